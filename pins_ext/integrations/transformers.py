"""The Hugging Face Trainer's way in: `PinsCallback` and, for pruning in the optimizer's own pass, `optimizer`."""

from pins_ext.extras import explained

with explained():
    from pins_ext.integrations.callback import PinsCallback
    from pins_ext.integrations.clipping import ClipInPass
    from pins_ext.integrations.optimizer import optimizer

__all__ = ["ClipInPass", "PinsCallback", "optimizer"]

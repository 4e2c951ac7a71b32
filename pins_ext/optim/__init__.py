"""AdamW and SGD whose one pass over memory can also take importance and a mask: drop-ins for torch.optim's.

On their own they are ordinary optimizers. A `Pruner` that finds one drives its step instead of following it by hooks.
"""

from pins_ext.optim.adamw import PinsAdamW
from pins_ext.optim.fused import FusedOptimizer
from pins_ext.optim.listener import PruningArguments, StepListener
from pins_ext.optim.sgd import PinsSGD
from pins_ext.optim.step import Scaling

__all__ = ["FusedOptimizer", "PinsAdamW", "PinsSGD", "PruningArguments", "Scaling", "StepListener"]

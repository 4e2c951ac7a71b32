"""What causal language models share: the head, batches, and the refusal of models that look ahead."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from pins_ext.tasks.arguments import TaskError
from pins_ext.tasks.labels import IGNORED
from pins_ext.tasks.task import Task

if TYPE_CHECKING:
    from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class CausalTask(Task):
    """A task of a causal language model. Its inputs have labels of their own: `IGNORED`, or the token itself."""

    auto_class = "AutoModelForCausalLM"
    loss_over_step = True
    embedded_model = False
    # Logits are as wide as the vocabulary.
    training_defaults = MappingProxyType({"per_device_eval_batch_size": 8})

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Lets the end-of-text token pad where there is no other: padding is never attended to, nor predicted."""
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        super().check_tokenizer(tokenizer)

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuses a model whose prediction of a token depends on that token, as an encoder's does."""
        import torch

        super().check_model(model)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[5, 1], [5, 2]], device=model.device)).logits[:, 0].float()
        model.train(was_training)
        if not torch.allclose(logits[0], logits[1], rtol=_TOLERANCE, atol=_TOLERANCE * float(logits.abs().max())):
            raise TaskError(
                f"{type(model).__name__} sees the token that it is to predict: text without labels and tasks that "
                "write text need a causal language model, for example --model gpt2"
            )

    @property
    def collator(self) -> DataCollatorForSeq2Seq:
        """Pads inputs and labels of each batch to its longest input."""
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(self.fitted_tokenizer(), label_pad_token_id=IGNORED)

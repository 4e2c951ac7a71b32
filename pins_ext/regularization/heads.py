"""What each kind of output compares: its rows of logits, its labels, its task loss and its distance from a teacher.

A head turns a model's outputs into rows, one per thing that has a loss of its own: a sentence, a token, a span's start,
a number. A head with several distributions (a span's start and end) has several lists of rows; the losses are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = ("classification", "regression", "token", "span", "lm")

LABELS = ("labels", "shift_labels", "start_positions", "end_positions", "num_items_in_batch")
"""Inputs that belong to the task's loss; a teacher runs without them."""

IGNORED = nn.CrossEntropyLoss().ignore_index
"""The label of a position that has none: what torch's and transformers' losses leave out."""

_CLASS_NAMES = {
    "ForSequenceClassification": "classification",
    "ForImageClassification": "classification",
    "ForMultipleChoice": "classification",
    "ForTokenClassification": "token",
    "ForMaskedLM": "token",
    "ForQuestionAnswering": "span",
    "ForCausalLM": "lm",
    "LMHeadModel": "lm",
}


class Rows(NamedTuple):
    """Student logits [R, C] (regression [R]), labels [R], and which rows count, bool [R]."""

    logits: Tensor
    labels: Tensor
    valid: Tensor


def head_of_model(model: nn.Module) -> str | None:
    """The head of a transformers model, from its class and configuration; None for any other module.

    Raises:
        ValueError: a multi-label model, or an encoder-decoder that generates: without labels its teacher has nothing to
            decode from.
    """
    config = getattr(model, "config", None)
    names = [base.__name__ for base in type(model).__mro__]
    head = next((head for part, head in _CLASS_NAMES.items() if any(part in name for name in names)), None)
    if getattr(config, "is_encoder_decoder", False) and head not in ("classification", "span"):
        raise ValueError(
            f"{names[0]} is an encoder-decoder that generates: no distance from a teacher here, train without a "
            "SelfRegularizer (--teacher none)"
        )
    if head != "classification" or "ForMultipleChoice" in "".join(names):
        return head
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        raise ValueError(_MULTI_LABEL)
    return "regression" if problem == "regression" or getattr(config, "num_labels", 2) == 1 else head


_MULTI_LABEL = (
    "multi-label classification has no distance from a teacher here: its labels are separate yes/no questions; "
    "train without a SelfRegularizer, or give integer labels of one class per example"
)


def head_of_outputs(outputs: Any, inputs: Mapping[str, Any]) -> str:
    """The head of a plain module, from the shapes of one batch.

    Raises:
        ValueError: the shapes fit several heads or none.
    """
    if field(outputs, "start_logits") is not None:
        return "span"
    logits = only_logits(outputs)
    if logits.dim() <= 1 or logits.shape[1:] == (1,):
        return "regression"
    if logits.dim() == 2 and not _required(inputs, "labels").is_floating_point():
        return "classification"
    if logits.dim() == 2:
        raise ValueError(f"float labels for logits {list(logits.shape)}: say head='regression'; {_MULTI_LABEL}")
    raise ValueError(
        f"logits {list(logits.shape)} fit head='token' (labels per position) and head='lm' (labels shifted): say which"
    )


def field(outputs: Any, name: str) -> Any:
    """A named output of a mapping or of an object with attributes, or None."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def only_logits(outputs: Any) -> Tensor:
    """`outputs.logits`, `outputs["logits"]`, or the outputs themselves when they are one tensor."""
    logits = outputs if isinstance(outputs, Tensor) else field(outputs, "logits")
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"outputs of type {type(outputs).__name__} have no .logits: return an object or a dict with logits "
            f"(transformers: return_dict=True; span heads: start_logits and end_logits)"
        )
    return logits


def raw_logits(head: str, outputs: Any) -> list[Tensor]:
    """The tensors of logits as the model returned them."""
    if head != "span":
        return [only_logits(outputs)]
    pair = [field(outputs, "start_logits"), field(outputs, "end_logits")]
    if not all(isinstance(logits, Tensor) for logits in pair):
        raise TypeError(f"head='span' needs start_logits and end_logits, got outputs of type {type(outputs).__name__}")
    return pair


def row_logits(head: str, outputs: Any) -> list[Tensor]:
    """Logits with one row per example: [R, C], for regression [R]."""
    if head == "regression":
        return [only_logits(outputs).reshape(-1)]
    return [logits.reshape(-1, logits.shape[-1]) for logits in raw_logits(head, outputs)]


def rows(head: str, outputs: Any, inputs: Mapping[str, Any]) -> list[Rows]:
    """The rows of a batch, labels aligned with logits, -100 and positions past the end not valid.

    Args:
        outputs: the student's outputs.
        inputs: the batch, with labels (span: start_positions, end_positions).

    Raises:
        ValueError: labels are missing, or don't fit the logits.
    """
    logits = row_logits(head, outputs)
    result = []
    for student, labels in zip(logits, _labels(head, inputs, logits[0].shape[-1]), strict=True):
        labels = labels.to(student.device)
        if labels.numel() != len(student):
            raise ValueError(
                f"{labels.numel()} labels for {len(student)} rows of logits; head={head!r} needs one for each"
            )
        if head == "regression":
            valid = torch.ones_like(labels, dtype=torch.bool)
        elif labels.is_floating_point():
            raise ValueError(_MULTI_LABEL)
        else:
            valid = labels != IGNORED
        result.append(Rows(student, labels, valid))
    return result


def _labels(head: str, inputs: Mapping[str, Any], classes: int) -> list[Tensor]:
    if head == "span":
        # As transformers: a position outside the input is a class that does not exist, and is ignored.
        positions = [_required(inputs, name).reshape(-1) for name in ("start_positions", "end_positions")]
        return [place.clamp(min=0).masked_fill(place >= classes, IGNORED) for place in positions]
    if head == "lm" and inputs.get("shift_labels") is not None:
        return [inputs["shift_labels"].reshape(-1)]
    labels = _required(inputs, "labels")
    if head == "lm":
        labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    return [labels.reshape(-1)]


def _required(inputs: Mapping[str, Any], name: str) -> Tensor:
    value = inputs.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"the batch has no {name!r}: self-regularization needs the labels beside the inputs. Under a Trainer, "
            f"label_smoothing_factor and compute_loss_func take them away: switch those off"
        )
    return value


def widened(x: Tensor) -> Tensor:
    """The tensor in float32, or float64 when it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def task_loss(head: str, row: Rows) -> Tensor:
    """Loss of each row against its label, float32 [R]: cross-entropy (0 where not valid), or the squared error."""
    if head == "regression":
        student = widened(row.logits)
        return (student - row.labels.to(student.dtype)).square()
    return F.cross_entropy(widened(row.logits), row.labels.long(), ignore_index=IGNORED, reduction="none")


def divergence(head: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Distance D of each row from the teacher, float32 [R].

    D = T^2 KL(softmax(teacher / T) || softmax(student / T)), Hinton et al. 2015; T^2 keeps the gradient's size;
    regression: (student - teacher)^2.

    Raises:
        ValueError: the teacher's logits have another shape.
    """
    if teacher.shape != student.shape:
        raise ValueError(
            f"the teacher's logits are {list(teacher.shape)} and the model's {list(student.shape)}: "
            f"the teacher must answer the same task with the same number of classes"
        )
    if head == "regression":
        return (widened(student) - widened(teacher)).square()
    distance: Tensor = _Divergence.apply(student, teacher, temperature)
    return distance


_AT_ONCE = {"cpu": 1 << 18, "gpu": 1 << 24}
"""Logits. On a CPU what is made of them stays in its caches: 512 rows of 50,257, distance and gradient, one thread of
an AMD EPYC: 264 ms; four times as many at once 284, sixteen times 394, all of them 693. A GPU wants larger pieces."""


class _Divergence(torch.autograd.Function):
    """The KL term of `divergence`; d D / d student = T (softmax(student / T) - softmax(teacher / T)).

    Between forward and backward it keeps its two inputs only, and beside them it needs a few rows at a time: a language
    model's logits are large.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.temperature = temperature
        distances = []
        for of_student, of_teacher in _some_rows(student, teacher):
            log_p = F.log_softmax(widened(of_teacher) / temperature, dim=-1)
            log_q = F.log_softmax(widened(of_student) / temperature, dim=-1)
            p = log_p.exp()
            # A class the teacher rules out (logit -inf) adds nothing, whatever the student says.
            terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
            distances.append(temperature**2 * terms.sum(-1))
        return torch.cat(distances)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        student, teacher = ctx.saved_tensors
        result = torch.empty_like(student)
        for of_student, of_teacher, weight, out in _some_rows(student, teacher, grad[:, None], result):
            q = F.softmax(widened(of_student) / ctx.temperature, dim=-1)
            p = F.softmax(widened(of_teacher) / ctx.temperature, dim=-1)
            out.copy_(q.sub_(p).mul_(weight * ctx.temperature))
        return result, None, None


@torch.no_grad()
def confidence(logits: Tensor) -> Tensor:
    """a = 1 - H(softmax(logits)) / log C of each row, float32 [R], detached (Ren & Zhu 2023, released code).

    1 for a certain student, 0 for a uniform one; the temperature is 1.

    Raises:
        ValueError: one class, where it would be 0/0.
    """
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError("weight='adaptive' needs at least two classes: log C is 0 for one; give a number as weight")
    entropies = [torch.special.entr(F.softmax(widened(row), dim=-1)).sum(-1) for (row,) in _some_rows(logits)]
    return 1 - torch.cat(entropies) / math.log(classes)


def _some_rows(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of as many rows, a few rows of each at a time; as many as make `_AT_ONCE` numbers of the first."""
    rows = max(1, _AT_ONCE["cpu" if first.is_cpu else "gpu"] // max(1, first.shape[-1]))
    return zip(*(tensor.split(rows) for tensor in (first, *others)), strict=True)

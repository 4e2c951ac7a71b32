"""Self-regularization of transformers models, one per head, tiny and built from their configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pins_ext.regularization import heads
from pins_ext.regularization.self_regularizer import SelfRegularizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}


def bert(kind: type[nn.Module], **settings: Any) -> Any:
    torch.manual_seed(0)
    return kind(BertConfig(**SIZES, max_position_embeddings=16, **settings))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16))


def bart() -> BartForSequenceClassification:
    torch.manual_seed(0)
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=40, d_model=16, max_position_embeddings=16, num_labels=3, **sizes, **heads)
    return BartForSequenceClassification(config)


def ids(*shape: int) -> Tensor:
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(1))


TOKENS = torch.where(ids(4, 8) % 3 == 0, -100, ids(4, 8) % 5)
CASES: dict[str, Any] = {
    "classification": (lambda: bert(BertForSequenceClassification, num_labels=3), {"labels": ids(4) % 3}),
    # Of each text the last token is its end.
    "encoder-decoder": (
        bart,
        {"input_ids": ids(4, 8).clamp(min=3).index_fill(1, torch.tensor([7]), 2), "labels": ids(4) % 3},
    ),
    "regression": (lambda: bert(BertForSequenceClassification, num_labels=1), {"labels": ids(4) / 8}),
    "choice": (lambda: bert(BertForMultipleChoice), {"input_ids": ids(4, 3, 8), "labels": ids(4) % 3}),
    "token": (lambda: bert(BertForTokenClassification, num_labels=5), {"labels": TOKENS}),
    "masked": (lambda: bert(BertForMaskedLM), {"labels": TOKENS}),
    "span": (
        lambda: bert(BertForQuestionAnswering),
        {"start_positions": torch.tensor([0, 3, 7, 9]), "end_positions": torch.tensor([2, 9, 7, 8])},
    ),
    "lm": (gpt2, {"labels": torch.where(ids(4, 8) % 5 == 0, -100, ids(4, 8))}),
}
HEADS = {"choice": "classification", "encoder-decoder": "classification", "masked": "token"}


def case(name: str) -> tuple[Any, dict[str, Tensor], str | float]:
    """A model, a batch and a weight that suits it."""
    build, labels = CASES[name]
    attention_mask = torch.ones_like(labels.get("input_ids", ids(4, 8)))
    return (
        build(),
        {"input_ids": ids(4, 8), "attention_mask": attention_mask} | labels,
        0.5 if name == "regression" else "adaptive",
    )


def train(model: Any, inputs: dict[str, Any], reg: SelfRegularizer, attached: bool, steps: int = 5) -> list[Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if attached:
        reg.attach(model, optimizer)
    losses = []
    for _ in range(steps):
        outputs = model(**inputs)
        loss = outputs.loss if attached else reg(outputs, inputs, inputs.get("num_items_in_batch"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not attached:
            reg.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("name", CASES)
def test_attached_equals_explicit_and_starts_as_the_models_own_loss(name: str) -> None:
    runs = []
    for attached in (False, True):
        model, inputs, weight = case(name)
        reg = SelfRegularizer(model, weight=weight, every=2)
        assert reg.head == HEADS.get(name, name)
        torch.manual_seed(1)
        own = model(**inputs).loss
        torch.manual_seed(1)
        runs.append(train(model, inputs, reg, attached))
        torch.testing.assert_close(runs[-1][0], own.detach())
        assert reg.stats()["divergence"] > 0
    assert torch.equal(torch.stack(runs[0]), torch.stack(runs[1]))


@pytest.mark.parametrize("name", ["lm", "token", "classification"])
def test_losses_are_sums_over_items_when_these_are_given(name: str) -> None:
    model, inputs, _ = case(name)
    model.eval()
    reg = SelfRegularizer(model, every=1, weight=1.0)
    reg.step()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    outputs = model(**inputs)
    valid = sum(int(row.valid.sum()) for row in heads.rows(reg.head or "", outputs, inputs))
    mean = reg(outputs, inputs)
    torch.testing.assert_close(reg(outputs, inputs, torch.tensor(2 * valid)), mean / 2)
    if name == "lm":
        own = model(**inputs, num_items_in_batch=torch.tensor(2 * valid)).loss
        reg.teacher.module = None
        torch.testing.assert_close(reg(outputs, inputs, 2 * valid), own)


def test_teacher_of_a_decoder_keeps_ties_and_no_cache() -> None:
    model = gpt2()
    reg = SelfRegularizer(model, every=1)
    reg.step()
    teacher: Any = reg.teacher.module
    assert teacher.lm_head.weight is teacher.transformer.wte.weight
    assert teacher.lm_head.weight is not model.lm_head.weight
    assert (teacher.config.use_cache, model.config.use_cache) == (False, True)
    assert "lm_head.weight" not in reg.state_dict()["tensors"]
    outputs = reg.teacher((), {"input_ids": ids(2, 8), "output_hidden_states": True})
    assert outputs.past_key_values is None
    assert len(outputs.hidden_states) == 3


def test_dropout_is_bitwise_the_same_with_and_without_teacher() -> None:
    losses = []
    for policy in ("none", "latest"):
        model, inputs, _ = case("classification")
        torch.manual_seed(3)
        losses.append(train(model, inputs, SelfRegularizer(model, policy, weight=0.0, every=1), attached=False))
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))


def test_a_fixed_teacher_from_a_folder(tmp_path: Path) -> None:
    model, inputs, _ = case("classification")
    fixed = bert(BertForSequenceClassification, num_labels=3)
    with torch.no_grad():
        fixed.classifier.weight.normal_()
    fixed.save_pretrained(tmp_path)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    reg = SelfRegularizer(model.bfloat16(), str(tmp_path), weight=1.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert reg.teacher.module is not None
    assert {p.dtype for p in reg.teacher.module.parameters()} == {torch.bfloat16}
    kept = {name: p.clone() for name, p in reg.teacher.module.named_parameters()}
    train(model, inputs, reg, attached=True, steps=3)
    reg.evaluated(1.0)
    assert all(torch.equal(p, kept[name]) for name, p in reg.teacher.module.named_parameters())
    state = reg.state_dict()
    assert state["tensors"] == {}
    assert state["meta"]["teacher"] == str(tmp_path)
    SelfRegularizer(model, tmp_path, weight=1.0).load_state_dict(state)
    start = SelfRegularizer(model, "ema", every=2, teacher_init=tmp_path)
    assert start.teacher.module is not None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": BertForMaskedLM}, r"lacks 4 weights, bert\.pooler\.dense\.bias first: .* fine-tuned for the task"),
        ({"id2label": {0: "b", 1: "a", 2: "c"}}, "orders its labels"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_teacher_that_does_not_fit_is_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    kind = settings.pop("kind", BertForSequenceClassification)
    bert(kind, **({"num_labels": 3} | settings)).save_pretrained(tmp_path)
    model = bert(BertForSequenceClassification, id2label={0: "a", 1: "b", 2: "c"})
    with pytest.raises(ValueError, match=words):
        SelfRegularizer(model, str(tmp_path))


def test_models_without_a_distance_are_refused() -> None:
    with pytest.raises(ValueError, match="multi-label"):
        SelfRegularizer(bert(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"))
    with pytest.raises(ValueError, match="encoder-decoder"):
        SelfRegularizer(
            T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9))
        )
    with pytest.raises(ValueError, match="weight='adaptive' needs class probabilities"):
        SelfRegularizer(bert(BertForSequenceClassification, num_labels=1))


@pytest.mark.filterwarnings("ignore")
def test_task_gradient_under_gradient_checkpointing() -> None:
    found = []
    for checkpointing in (False, True):
        model = gpt2()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = {"input_ids": ids(2, 8), "labels": ids(2, 8)}
        reg = SelfRegularizer(model, every=1, weight=1.0, score_gradient="task")
        reg.attach(model)
        reg.step()
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        torch.manual_seed(0)
        model(**inputs).loss.backward()
        gradients = reg.take_task_gradients()
        assert gradients is not None
        found.append((gradients, {name: p.grad for name, p in model.named_parameters()}))
    (plain, joint), (checkpointed, joint_checkpointed) = found
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])
        torch.testing.assert_close(joint_checkpointed[name], joint[name])
        assert not torch.equal(plain[name], joint[name])


class Stepping(TrainerCallback):
    """The least that a Trainer needs."""

    def __init__(self, reg: SelfRegularizer) -> None:
        self.reg = reg
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.reg.set_total_steps(state.max_steps)
        self.reg.attach(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.reg.step(state.global_step)


@pytest.mark.filterwarnings("ignore")
def test_gradients_in_a_trainer_do_not_depend_on_how_a_batch_is_cut(tmp_path: Path) -> None:
    """One batch of 4, or two of 2: each row weighs the same, although their numbers of labels differ."""
    found = []
    for size in (4, 2):
        model, inputs, _ = case("token")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        rows = [{name: tensor[i] for name, tensor in inputs.items()} for i in range(4)]
        args = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_steps=3,
            learning_rate=1e-2,
            max_grad_norm=0.0,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
        )
        callback = Stepping(SelfRegularizer(model, weight=1.0))
        Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()
        assert callback.reg.teacher.snapshot_step == 3
        found.append(callback.gradients)
    for whole, halves in zip(*found, strict=True):
        for name in whole:
            torch.testing.assert_close(halves[name], whole[name], rtol=1e-3, atol=1e-5)

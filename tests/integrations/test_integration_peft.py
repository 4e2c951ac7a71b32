"""LoRA on a pruned model: it trains with the zeros below it fixed, and a merge keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bert import CONFIG, arguments, model, stock
from torch import Tensor, nn

import pins_ext
from pins_ext import PruneConfig
from pins_ext.integrations.callback import PinsCallback

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model at 75 % sparsity, as any `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("pruned")
    run = stock(model(), arguments(folder / "training", save_strategy="no"), PinsCallback(CONFIG))
    run.train()
    run.save_model(str(folder / "model"))
    return folder / "model"


def adapted(pruned: Path, **settings: Any) -> Any:
    """The pruned model, frozen, under a LoRA whose update is not zero any more."""
    base = type(model()).from_pretrained(pruned)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, **({"target_modules": ["query", "value", "dense"]} | settings))
    torch.manual_seed(0)
    net = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_" in name:
                p.normal_()
    return net


def zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t == 0 for name, t in tensors.items() if t.dim() == 2}


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"target_modules": ["query", "word_embeddings"]}])
def test_a_merge_keeps_the_zeros(pruned: Path, settings: dict[str, Any]) -> None:
    before = type(model()).from_pretrained(pruned)
    net = adapted(pruned, **settings)
    plain = adapted(pruned, **settings).merge_and_unload().state_dict()
    merged = pins_ext.merge_lora(net)
    assert type(merged.model) is type(before)
    after, own = merged.model.state_dict(), before.state_dict()
    assert after.keys() == own.keys()
    filled = kept = 0
    for name, zero in zeros(own).items():
        assert not torch.count_nonzero(after[name][zero])
        filled += int(torch.count_nonzero(plain[name][zero]))
        # Beside the zeros it is the plain merge.
        assert torch.equal(after[name][~zero], plain[name][~zero])
        kept += int(zero.sum()) if not torch.equal(plain[name], own[name]) else 0
    assert merged.refilled == filled > 100
    assert merged.zeros == kept
    assert 0 < merged.sparsity < 1
    assert 0 < merged.dropped < 1


def test_what_is_dropped_is_the_update_on_the_zeros() -> None:
    net = nn.ModuleDict({"layer": nn.Linear(2, 2, bias=False)})
    with torch.no_grad():
        net["layer"].weight.copy_(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    net = peft.get_peft_model(net, peft.LoraConfig(target_modules=["layer"], r=1, lora_alpha=1))
    with torch.no_grad():
        net.base_model.model["layer"].lora_A["default"].weight.copy_(torch.tensor([[1.0, 2.0]]))
        net.base_model.model["layer"].lora_B["default"].weight.copy_(torch.tensor([[1.0], [3.0]]))
    merged = pins_ext.merge_lora(net)
    # The update is [[1, 2], [3, 6]].
    assert merged.model["layer"].weight.tolist() == [[0.0, 3.0], [5.0, 9.0]]
    assert (merged.weights, merged.zeros, merged.refilled) == (4, 1, 1)
    assert merged.dropped == pytest.approx(1 / 50)


def test_zeros_that_the_merge_makes_count() -> None:
    net = nn.ModuleDict({"layer": nn.Linear(2, 2, bias=False)})
    with torch.no_grad():
        net["layer"].weight.copy_(torch.tensor([[0.0, -1.0], [2.0, 3.0]]))
    net = peft.get_peft_model(net, peft.LoraConfig(target_modules=["layer"], r=1, lora_alpha=1))
    with torch.no_grad():
        net.base_model.model["layer"].lora_A["default"].weight.copy_(torch.tensor([[0.0, 1.0]]))
        net.base_model.model["layer"].lora_B["default"].weight.copy_(torch.tensor([[1.0], [0.0]]))
    merged = pins_ext.merge_lora(net)
    assert merged.model["layer"].weight.tolist() == [[0.0, 0.0], [2.0, 3.0]]
    assert merged.zeros == 2


def test_a_merge_in_16_bits_makes_no_zeros_by_rounding_twice() -> None:
    """The update is -(1 + 2^-10) of the weights: in bfloat16 it would be their negative."""
    net = nn.ModuleDict({"layer": nn.Linear(2, 2, bias=False)}).bfloat16()
    nn.init.constant_(net["layer"].weight, 1 / 32)
    net = peft.get_peft_model(net, peft.LoraConfig(target_modules=["layer"], r=1, lora_alpha=1 + 2**-10))
    for name, value in (("lora_A", 1.0), ("lora_B", -1 / 32)):
        nn.init.constant_(getattr(net.base_model.model["layer"], name)["default"].weight, value)
    merged = pins_ext.merge_lora(net)
    assert merged.zeros == 0
    weight = merged.model["layer"].weight
    assert weight.dtype == torch.bfloat16
    assert (weight == -(2**-15)).all()


def test_adapters_train_unpruned_while_the_base_keeps_its_zeros(pruned: Path, tmp_path: Path) -> None:
    net = adapted(pruned)
    base = {name: p.clone() for name, p in net.named_parameters() if "base_layer" in name}
    adapters = {name: p.clone() for name, p in net.named_parameters() if "lora_" in name}
    run = stock(net, arguments(tmp_path, save_strategy="no"))
    run.train()
    for name, p in net.named_parameters():
        if name in base:
            assert torch.equal(p, base[name])
        if name in adapters:
            assert not torch.equal(p, adapters[name])
            assert torch.count_nonzero(p) > 0.9 * p.numel()
    assert pins_ext.merge_lora(net).zeros > 0


def test_adapters_are_never_pruned_by_default(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is to be pruned but frozen"):
        stock(adapted(pruned), arguments(tmp_path), PinsCallback(CONFIG)).train()
    net = adapted(pruned)
    for p in net.parameters():
        p.requires_grad_(True)
    pruner = pins_ext.Pruner(net, torch.optim.SGD(net.parameters()), CONFIG, total_steps=14)
    assert pruner.names
    assert not [name for name in pruner.names if "lora_" in name]


def test_a_base_that_trains_along_keeps_its_zeros(pruned: Path) -> None:
    net = adapted(pruned)
    for p in net.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    pruner = pins_ext.Pruner.from_sparse(net, optimizer)
    before = {name: p.clone() for name, p in net.named_parameters()}
    wrapped = [
        name for name in before if name.replace("base_model.model.", "").replace("base_layer.", "") in pruner.names
    ]
    for _ in range(3):
        optimizer.zero_grad()
        net(input_ids=torch.arange(8)[None], labels=torch.tensor([1])).loss.backward()
        optimizer.step()
    for p, name in zip(pruner.parameters, wrapped, strict=True):
        assert p is net.get_parameter(name)
        assert torch.equal(p == 0, before[name] == 0)
        # A tensor may be pruned as a whole.
        assert not torch.count_nonzero(p) or not torch.equal(p, before[name])
    pruner.verify()


def test_what_can_not_be_merged_is_refused(pruned: Path) -> None:
    with pytest.raises(TypeError, match="takes a PeftModel, got Linear"):
        pins_ext.merge_lora(nn.Linear(2, 2))  # type: ignore[arg-type]
    net = adapted(pruned)
    net.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged already.*unmerge_adapter\(\) first"):
        pins_ext.merge_lora(net)
    net.unmerge_adapter()
    with torch.no_grad():
        next(p for name, p in net.named_parameters() if "lora_A" in name).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        pins_ext.merge_lora(net)


def test_what_peft_trains_a_copy_of_is_no_part_of_a_frozen_base() -> None:
    """No gradient ever comes to the original: it would be pruned first, and is gone after the merge."""
    net = nn.ModuleDict({"pruned": nn.Linear(8, 8), "saved": nn.Linear(8, 8)})
    net = peft.get_peft_model(net, peft.LoraConfig(target_modules=["pruned"], modules_to_save=["saved"]))
    learning = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    for options in ({"exclude": ("*modules_to_save*",)}, {"include": ("*pruned*", "*original_module*")}):
        config = PruneConfig(criterion="platon", **options)  # type: ignore[arg-type]
        pruner = pins_ext.Pruner(net, learning, config, total_steps=20, frozen_base=True)
        assert pruner.names == ["pruned.weight"] or pruner.names == ["pruned.weight", "pruned.bias"]
        pruner.detach()

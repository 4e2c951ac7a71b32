"""Weights that several layers share, and layers of several names: saved, loaded, and made sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_models import decoder_config
from helpers.sparse_models import assert_close, assert_same, pruned, sparse
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from pins_ext.sparse import format as sparse_format
from pins_ext.sparse.checkpoint import SparseCheckpoint
from pins_ext.sparse.format import load_sparse, save_sparse
from pins_ext.sparse.index import SparseFormatError
from pins_ext.sparse.linear import SparseLinear


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(decoder_config()).eval()


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    save_sparse(pruned(gpt2()), tmp_path / "sparse")
    index = SparseCheckpoint(tmp_path / "sparse").index
    assert dict(index.aliases) == {"lm_head.weight": "transformer.wte.weight"}
    again = load_sparse(tmp_path / "sparse")
    assert again.lm_head.weight is again.transformer.wte.weight


def test_weights_that_were_untied_come_back_as_two(tmp_path: Path) -> None:
    """The configuration ties them, the saved model did not."""
    model = pruned(gpt2())
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    save_sparse(model, tmp_path / "sparse")
    again = load_sparse(tmp_path / "sparse")
    assert again.lm_head.weight is not again.transformer.wte.weight
    assert_same(model.state_dict(), again.state_dict())
    tied = gpt2()
    before = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    with pytest.raises(SparseFormatError, match=r"different tensors for 'transformer.wte.weight' and 'lm_head.weight'"):
        load_sparse(tmp_path / "sparse", model=tied)
    assert_same(before, tied.state_dict())


class Pairs(nn.Module):
    """Four names; those of a group are one layer."""

    def __init__(self, *groups: str) -> None:
        super().__init__()
        for group in groups:
            layer = nn.Linear(40, 40)
            for name in group:
                self.add_module(name, layer)


def test_names_of_shared_layers_load_into_models_that_share_others(tmp_path: Path) -> None:
    saved = pruned(Pairs("ac", "bd"))
    save_sparse(saved, tmp_path / "sparse")
    for groups in (("ac", "bd"), ("a", "b", "c", "d"), ("a", "c", "bd")):
        other = Pairs(*groups)
        load_sparse(tmp_path / "sparse", model=other)
        assert_same({k: saved.state_dict()[k] for k in other.state_dict()}, other.state_dict())
    for groups in (("abcd",), ("ab", "cd"), ("abc", "d")):
        with pytest.raises(SparseFormatError, match="which are one in the model: give the model two"):
            load_sparse(tmp_path / "sparse", model=Pairs(*groups))


@pytest.mark.parametrize("groups", [("ab",), ("ab", "c")])
def test_a_module_of_two_names_holds_no_two_weights(
    groups: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built from the configuration, too: the second weight would take the first one's place under both names."""
    save_sparse(pruned(Pairs(*"".join(groups))), tmp_path / "sparse")
    monkeypatch.setattr(sparse_format, "_built", lambda checkpoint: Pairs(*groups))
    with pytest.raises(SparseFormatError, match=r"different tensors for 'a.weight' and 'b.weight', which are one"):
        load_sparse(tmp_path / "sparse")


class Buffers(nn.Module):
    """Two buffers, which may be one."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.register_buffer("a", torch.arange(6.0))
        self.register_buffer("b", self.a if tied else torch.ones(6))


def test_buffers_that_were_untied_come_back_as_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = Buffers(tied=False)
    save_sparse(saved, tmp_path / "sparse")
    monkeypatch.setattr(sparse_format, "_built", lambda checkpoint: Buffers(tied=True))
    again = load_sparse(tmp_path / "sparse")
    assert not list(again.parameters())
    assert dict(again.named_buffers()).keys() == {"a", "b"}
    assert_same(saved.state_dict(), again.state_dict())


class Shared(nn.Module):
    """One layer of two names, within one container of two names; and two layers over one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(40, 40)
        self.again = self.first
        self.own = nn.Sequential(nn.Linear(40, 40), nn.ReLU())
        self.container = self.own
        self.left, self.right = nn.Linear(40, 40), nn.Linear(40, 40)
        self.right.weight = self.left.weight
        self.bare = nn.Linear(40, 40, bias=False)
        self.bare.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.container(self.own(self.again(self.first(x))))
        return self.left(x) + 2 * self.right(x) + 3 * self.bare(x)


@pytest.mark.parametrize("values", ["float32", "int8"])
def test_layers_that_share_a_weight_share_its_packed_form(values: str) -> None:
    model = pruned(Shared())
    fast = sparse(model, values=values)
    assert [type(m) for m in fast.modules() if isinstance(m, (nn.Linear, SparseLinear))] == [SparseLinear] * 5
    assert fast.first is fast.again
    assert fast.own is fast.container
    assert isinstance(fast.own[0], SparseLinear)
    # Three layers with biases of their own over one packed matrix.
    layers = (fast.left, fast.right, fast.bare)
    assert len({layer.values.data_ptr() for layer in layers}) == 1
    assert [None if layer.bias is None else layer.bias.tolist() for layer in layers] == [
        model.left.bias.tolist(), model.right.bias.tolist(), None
    ]  # fmt: skip
    x = torch.randn(3, 40)
    if values == "int8":
        torch.testing.assert_close(fast(x), model(x), rtol=0.1, atol=0.05)
    else:
        assert_close(fast(x), model(x))
    # Twice sparse is as good as once: nothing is left to replace.
    with pytest.raises(ValueError, match="5 layers of the model are sparse already"):
        sparse(fast)


def test_shared_layers_from_the_model_to_the_file_and_to_sparse_layers(tmp_path: Path) -> None:
    model = pruned(Shared())
    save_sparse(model, tmp_path / "sparse")
    again = Shared()
    load_sparse(tmp_path / "sparse", model=again)
    assert again.left.weight is again.right.weight is again.bare.weight
    held = SparseCheckpoint(tmp_path / "sparse").index
    assert sorted(held.entries) == ["first.bias", "first.weight", "left.bias", "left.weight",
                                    "own.0.bias", "own.0.weight", "right.bias"]  # fmt: skip
    fast = sparse(again.eval())
    assert not any(isinstance(m, nn.Linear) for m in fast.modules())
    x = torch.randn(3, 40)
    assert_close(fast(x), model(x))


def test_a_language_model_whose_head_is_its_embedding() -> None:
    """The head becomes sparse, the embedding stays what it is, and generation goes on as before."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(decoder_config())
    model.transformer.wte.weight.data *= torch.rand(model.transformer.wte.weight.shape) < 0.2
    fast = sparse(pruned(model))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert isinstance(fast.lm_head, SparseLinear)
    assert isinstance(fast.transformer.wte, nn.Embedding)
    ids = torch.randint(1, 257, (2, 7))
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.generate(ids, **options), model.generate(ids, **options))


def test_a_hook_on_one_of_two_layers_over_one_weight_counts_its_calls_alone() -> None:
    fast = sparse(pruned(Shared()))
    called: list[nn.Module] = []
    fast.right.register_forward_hook(lambda module, *_: called.append(module))
    fast(torch.randn(3, 40))
    assert called == [fast.right]

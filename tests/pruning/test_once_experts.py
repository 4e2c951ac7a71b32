"""Wanda over experts: the inputs of each expert's matrices, against those that its library's plain code multiplies."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pins_ext import PruneConfig, prune_once
from pins_ext.pruning.inputs import InputNorms, output_dims
from pins_ext.pruning.plan import ConflictWarning

_SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}

MODELS: dict[str, Any] = {
    "gated": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_SIZES, num_local_experts=4)),
    # Transposed, with biases and a gate of its own.
    "transposed": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**_SIZES, num_local_experts=4, head_dim=8)),
    "ungated": lambda: hf.NemotronHForCausalLM(
        hf.NemotronHConfig(
            vocab_size=60,
            hidden_size=16,
            intermediate_size=24,
            layers_block_type=["moe", "attention", "moe"],
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts_per_tok=2,
            n_routed_experts=4,
            moe_intermediate_size=24,
            moe_shared_expert_intermediate_size=24,
            n_group=1,
            topk_group=1,
        )
    ),
}


def made(kind: str, implementation: str = "eager") -> nn.Module:
    torch.manual_seed(2)
    model: nn.Module = MODELS[kind]().eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.2
    for module in model.modules():
        if hasattr(module, "is_transposed"):
            module.config._experts_implementation = implementation  # type: ignore[union-attr]
    return model


def experts_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3}


class Multiplied(TorchFunctionMode):
    """Sums the squares of what is multiplied by a slice of the experts' tensors."""

    def __init__(self, experts: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.experts = experts
        self.squares = {name: [torch.zeros(0)] * len(p) for name, p in experts.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, torch.matmul, Tensor.__matmul__, Tensor.matmul):
            x, weight = args[:2]
            for name, p in self.experts.items():
                which, rest = divmod(weight.data_ptr() - p.data_ptr(), p[0].nbytes)
                if 0 <= which < len(p) and rest == 0 and weight.shape == p.shape[1:]:
                    new = x.double().square().sum(0)
                    before = self.squares[name][which]
                    self.squares[name][which] = before + new if len(before) else new
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", MODELS)
def test_norms_are_those_of_what_each_expert_multiplies(kind: str, implementation: str) -> None:
    ids = torch.randint(0, 60, (3, 7), generator=torch.Generator().manual_seed(5))
    plain = made(kind)
    experts = experts_of(plain)
    assert len(experts) == 4
    with torch.no_grad(), Multiplied(experts) as seen:
        plain(input_ids=ids)
    model = made(kind, implementation)
    norms = InputNorms(model, experts_of(model))
    with torch.no_grad():
        model(input_ids=ids)
    norms.detach()
    dims = output_dims(model, experts_of(model), "a test")
    for (name, p), dim in zip(experts.items(), dims, strict=True):
        features = p.shape[2 if dim == 1 else 1]
        reached = [len(squares) > 0 for squares in seen.squares[name]]
        assert any(reached)
        for expert, squares in enumerate(seen.squares[name]):
            found = norms.norm(name)[expert]
            assert found.shape == (features,)
            if reached[expert]:
                # Products of float32, added in another order.
                torch.testing.assert_close(found, squares.sqrt().float(), rtol=1e-4, atol=1e-6)
            else:
                assert (found == 1e-30).all()


def test_padding_reaches_no_expert() -> None:
    model = made("gated")
    experts = experts_of(model)
    ids = torch.randint(1, 60, (2, 6), generator=torch.Generator().manual_seed(5))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    padded = InputNorms(model, experts)
    padded.tokens = mask.bool()
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        padded.detach()
        alone = InputNorms(model, experts)
        model(input_ids=ids[:1])
        model(input_ids=ids[1:, :4])
        alone.detach()
    for name in experts:
        torch.testing.assert_close(padded.norm(name), alone.norm(name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["gated", "transposed"])
def test_each_output_of_each_expert_loses_as_many(kind: str) -> None:
    model = made(kind)
    before = {name: p.detach().clone() for name, p in experts_of(model).items()}
    ids = torch.randint(0, 60, (3, 7), generator=torch.Generator().manual_seed(5))
    norms = InputNorms(model, experts_of(model))
    with torch.no_grad():
        model(input_ids=ids)
    norms.detach()
    config = PruneConfig(sparsity=0.5, criterion="wanda", include=("*.experts.*_proj",))
    found = prune_once(model, [{"input_ids": ids}], config)
    assert found.zeros == found.weights // 2
    for name, p in experts_of(model).items():
        outputs = 2 if kind == "transposed" else 1
        score = (before[name].abs() * norms.norm(name).unsqueeze(outputs)).movedim(outputs, 1)
        kept = p.detach().movedim(outputs, 1) != 0
        assert (kept.sum(2) == kept.shape[2] // 2).all()
        assert (score.where(kept, torch.inf).amin(2) >= score.where(~kept, 0).amax(2)).all()


def test_experts_that_no_token_reached_are_told_and_compared_by_magnitude() -> None:
    model = made("gated")
    ids = torch.tensor([[3]])  # one token, two of four experts
    config = PruneConfig(sparsity=0.5, criterion="wanda", include=("*.experts.*_proj",), scope="global")
    before = {name: p.detach().clone() for name, p in experts_of(model).items()}
    with pytest.warns(ConflictWarning, match=r"no token reached some experts in 4 tensors, up to 2 of 4 in "):
        prune_once(model, [{"input_ids": ids}], config)
    # They lie below all others, so that of the half that is pruned they are the larger part by far.
    for name, p in experts_of(model).items():
        shares = (p == 0).float().mean((1, 2)).sort().values
        assert shares[2:].min() > 0.9
        assert shares[:2].max() < 0.1, (name, before[name].shape)
    again = made("gated")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConflictWarning)
        many = torch.randint(0, 60, (8, 16), generator=torch.Generator().manual_seed(5))
        prune_once(again, [{"input_ids": many}], config)


def test_other_stacks_of_matrices_are_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 4, 4))

    model = nn.Sequential(Experts())
    with pytest.raises(ValueError, match=r"no weight of nn\.Linear, transformers' Conv1D or its experts"):
        prune_once(model, [], PruneConfig(criterion="wanda", include=("*up",)))

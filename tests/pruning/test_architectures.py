"""One tiny model of each family of transformers: pruned for ten steps, saved, and loaded without pins_ext."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from pins_ext import PruneConfig, Pruner, merge_lora
from pins_ext.optim import PinsAdamW

STEPS = 10
CONFIG = PruneConfig(sparsity=0.6, delta_t=2, warmup=2, cooldown=3)

_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_ENCODER = {**_SIZES, "vocab_size": 64, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_ENCODER, "num_key_value_heads": 1, "pad_token_id": 0}
_EXPERTS = {"num_experts_per_tok": 1, "router_aux_loss_coef": 0.0}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 64}
_DBRX = {
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 2,
    "vocab_size": 64,
    "max_seq_len": 32,
    "pad_token_id": 0,
    "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0},
    "ffn_config": {"hidden_size": 16, "ffn_hidden_size": 8, "moe_num_experts": 4, "moe_top_k": 1},
}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64}

FAMILIES: dict[str, tuple[type[Any], Any, int]] = {
    "bert": (hf.BertForSequenceClassification, hf.BertConfig(**_ENCODER), 12),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig(**_ENCODER), 12),
    # One projection for query, key and value.
    "deberta": (hf.DebertaForSequenceClassification, hf.DebertaConfig(**_ENCODER, **_RELATIVE), 12),
    "deberta-v2": (hf.DebertaV2ForSequenceClassification, hf.DebertaV2Config(**_ENCODER, **_RELATIVE), 16),
    # Every layer is the same module.
    "albert": (hf.AlbertForSequenceClassification, hf.AlbertConfig(**_ENCODER, embedding_size=16), 6),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config(**_T5, decoder_start_token_id=0), 32),
    # Conv1D, whose weight is transposed; one projection for query, key and value; a tied head.
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(**_GPT2, bos_token_id=1, eos_token_id=2), 8),
    "gpt-neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**_ENCODER), 8),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**_DECODER), 14),
    "qwen": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**_DECODER, head_dim=8, tie_word_embeddings=True), 14),
    "phi": (hf.Phi3ForCausalLM, hf.Phi3Config(**_DECODER), 8),
    # Stacks of experts: 3-D parameters.
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig(**_DECODER, **_EXPERTS, num_local_experts=4), 12),
    # Their matrices lie on top of each other.
    "dbrx": (hf.DbrxForCausalLM, hf.DbrxConfig(**_DBRX), 10),
    # A shared expert beside them, whose gate is a linear module of one row.
    "qwen-moe": (
        hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig(**_DECODER, **_EXPERTS, num_experts=4, moe_intermediate_size=8),
        18,
    ),
    "vit": (hf.ViTForImageClassification, hf.ViTConfig(**_SIZES, image_size=8, patch_size=4), 12),
}


def inputs(kind: type[Any]) -> dict[str, Tensor]:
    """A batch of what the model takes."""
    if "Image" in kind.__name__:
        return {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.randint(2, (4,))}
    tokens = torch.randint(3, 64, (4, 8))
    classes = "Sequence" in kind.__name__
    return {"input_ids": tokens, "labels": torch.randint(2, (4,)) if classes else tokens}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    level = logging.getLogger("transformers").level
    hf.logging.set_verbosity_error()
    yield
    logging.getLogger("transformers").setLevel(level)


@pytest.mark.parametrize("optimizer_class", [PinsAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_then_an_ordinary_checkpoint(family: str, optimizer_class: Any, tmp_path: Path) -> None:
    kind, config, n_tensors = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config)
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, CONFIG, STEPS)
    assert len(pruner.names) == n_tensors
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**inputs(kind)).loss.backward()
        optimizer.step()
    final = pruner.finalize()
    assert final["zeros"] == pruner.n_weights - round(0.4 * pruner.n_weights)
    model.eval().save_pretrained(tmp_path)
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    loaded.eval()
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sum(int((dict(loaded.named_parameters())[name] == 0).sum()) for name in pruner.names) == final["zeros"]
    batch = inputs(kind)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in ("bert", "gpt2", "mixtral") else pytest.mark.slow)
        for family in FAMILIES
    ],
)
def test_a_frozen_base_under_adapters(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    kind, config, n_tensors = FAMILIES[family]
    torch.manual_seed(0)
    model = peft.get_peft_model(kind(config), peft.LoraConfig(r=2, target_modules="all-linear"))
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    rule = PruneConfig(sparsity=0.6, delta_t=2, warmup=2, cooldown=3, criterion="platon")
    pruner = Pruner(model, optimizer, rule, STEPS, frozen_base=True)
    assert len(pruner.names) == n_tensors
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**inputs(kind)).loss.backward()
        optimizer.step()
    final = pruner.finalize()
    assert final["zeros"] == pruner.n_weights - round(0.4 * pruner.n_weights)
    pruned = list(pruner.names)
    pruner.detach()
    merged = merge_lora(model)
    assert merged.refilled > 0
    merged.model.eval().save_pretrained(tmp_path)
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    weights = dict(loaded.named_parameters())
    assert sum(int((weights[name] == 0).sum()) for name in pruned) == final["zeros"]
    batch = inputs(kind)
    with torch.no_grad():
        assert torch.equal(merged.model(**batch).logits, loaded.eval()(**batch).logits)

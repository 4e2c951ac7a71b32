"""Which rows or columns of a checkpoint's matrices belong to one attention head."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INTO = {
    *("query", "key", "value", "q", "k", "v", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin"),
    *("query_proj", "key_proj", "value_proj", "query_key_value", "qkv", "qkv_proj", "c_attn", "in_proj_weight"),
}
_OUT_OF = {"o", "o_proj", "out_proj", "out_lin", "c_proj", "wo", "dense"}
"""Last part of the names of the projections into the heads and out of them, as transformers calls them."""

_TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""Models whose projections are [in, out] (transformers' Conv1D)."""

_WIDTH, _HEADS = ("hidden_size", "n_embd", "d_model", "dim"), ("num_attention_heads", "n_head", "num_heads", "n_heads")


@dataclass(frozen=True)
class HeadLayout:
    """How the heads of a model lie in its matrices.

    Attributes:
        size: rows of a projection that make one head.
        transposed: matrices are [in, out].
    """

    size: int
    transposed: bool = False

    def axis(self, name: str) -> str | None:
        """ "rows" or "columns", along which this tensor's heads lie; None if it belongs to no attention."""
        *path, last = name.removesuffix(".weight").split(".")
        where = ".".join(path).lower()
        if "att" not in where:
            return None
        # BERT calls the projection out of the heads attention.output.dense, and so its feed-forward's second layer.
        into, out_of = last in _INTO, last in _OUT_OF
        if not into and not out_of:
            return None
        return "columns" if out_of != self.transposed else "rows"


def head_layout(checkpoint: Path) -> HeadLayout | None:
    """Read it from the config.json beside a checkpoint; None without one, or where it tells no heads."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        size = _first(config, ("head_dim", "d_kv")) or _first(config, _WIDTH) // _first(config, _HEADS)
        return HeadLayout(size, config.get("model_type") in _TRANSPOSED) if size > 0 else None
    except (OSError, ValueError, TypeError, AttributeError, ZeroDivisionError, RecursionError):
        return None


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int:
    return int(next((config[name] for name in names if config.get(name)), 0))

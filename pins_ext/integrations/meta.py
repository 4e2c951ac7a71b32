"""A model without its weights, from its config.json alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig


def meta_model(source: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a model on the meta device, where tensors have shapes and no memory.

    Args:
        source: folder with a config.json, or a hub name; nothing else of it is read.
        dtype: of the parameters.

    Returns:
        The architecture that the configuration names, head included; without a name, the bare model.

    Raises:
        OSError: there is no configuration.
        ValueError: transformers doesn't know this kind of model, or it comes with code of its own.
    """
    config = AutoConfig.from_pretrained(source)
    kind = _architecture(config)
    with torch.device("meta"):
        return (kind._from_config if kind else AutoModel.from_config)(config, dtype=dtype)


def _architecture(config: PretrainedConfig) -> Any:
    """The class that made the checkpoint, if it is one of transformers' own."""
    for name in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    return None

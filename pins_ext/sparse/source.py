"""A checkpoint folder of either kind, dense or sparse, as a model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pins_ext.sparse.format import load_sparse, model_class
from pins_ext.sparse.index import FILE


class SourceError(ValueError):
    """A folder that holds no checkpoint, or a damaged one."""


def is_sparse(folder: Path) -> bool:
    """Whether the folder is a checkpoint that `save_sparse` wrote."""
    return (folder / FILE).is_file()


def load_checkpoint(path: str | Path) -> tuple[Any, Any]:
    """The model of a checkpoint with every weight in place, in evaluation mode, and its tokenizer.

    Args:
        path: a folder that `save_pretrained`, `pins-ext train` or `save_sparse` wrote.

    Returns:
        (transformers model, tokenizer or None).

    Raises:
        SourceError: no such folder, no checkpoint in it, or one that lacks weights or is damaged.
    """
    from transformers import AutoConfig

    folder = Path(path)
    if not folder.is_dir():
        raise SourceError(f"{folder} is no folder: name one that train, save_pretrained or export wrote")
    if is_sparse(folder):
        try:
            return load_sparse(folder), _tokenizer(folder)
        except ValueError as error:
            raise SourceError(str(error)) from error
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder} holds no checkpoint: it has neither config.json nor {FILE}")
    try:
        kind = model_class(AutoConfig.from_pretrained(folder, local_files_only=True), folder)
        # "auto": each checkpoint keeps the dtype that it was saved in.
        model, report = kind.from_pretrained(folder, dtype="auto", local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise SourceError(f"{folder} can't be loaded: {' '.join(str(error).split())}") from error
    lost = {kind: sorted(names)[0] for kind, names in report.items() if names and kind != "unexpected_keys"}
    if lost:
        kind, name = next(iter(lost.items()))
        raise SourceError(f"{folder} does not hold all weights of {type(model).__name__}: {kind} {name}")
    return model.eval(), _tokenizer(folder)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)

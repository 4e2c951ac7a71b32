"""`pins-ext export`: a checkpoint in sparse form, whose size follows its sparsity, or dense again for other tools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pins_ext.files.atomic import unsaved
from pins_ext.runs.errors import EXIT_OK, CommandError, UsageError
from pins_ext.runs.options import Parser

_ABOUT = """Writes the model of a checkpoint, and its tokenizer, into a new folder:

  --format sparse   zeros take one bit each; what pins_ext.load_sparse and pins-ext run read. docs/sparse_format.md
                    describes it, with a reader in NumPy
  --format dense    ordinary safetensors with exact zeros, which every other tool loads

The folder appears when it is complete. Weights come back to the last bit, unless a smaller dtype is asked for.

examples:
  pins-ext export runs/rte                                          -> runs/rte.sparse
  pins-ext export runs/rte --dtype bfloat16 --compression zstd --output-dir small
  pins-ext export small --format dense --output-dir runs/rte-again
"""

_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = Parser(prog="pins-ext export", description=_ABOUT)
    parser.add_argument("checkpoint", metavar="CKPT", help="a folder of train, save_pretrained or export")
    parser.add_argument("--format", choices=("sparse", "dense"), help="what to write (default: sparse)")
    parser.add_argument("--output-dir", metavar="DIR", help="the folder to make (default: CKPT.sparse or CKPT.dense)")
    parser.add_argument("--dtype", choices=_DTYPES, help="of all floating point tensors (default: as they are)")
    parser.add_argument(
        "--int8", action="store_true", help="sparse: pruned tensors as int8 codes with a scale per row; rounds weights"
    )
    parser.add_argument("--compression", choices=("none", "zstd"), help="sparse: of each array (default: none)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at the output folder")
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    parser.add_argument("-h", "--help", action="help", help="show this text")
    given = vars(parser.parse_args(argv))
    form = given.get("format", "sparse")
    refused = [flag for flag in ("int8", "compression") if flag in given and form == "dense"]
    if refused:
        raise UsageError(f"--{refused[0]} is for --format sparse: a dense checkpoint is what other tools read")
    source = Path(given["checkpoint"])
    target = Path(given.get("output_dir", f"{source}.{form}"))
    if target.resolve() == source.resolve():
        raise UsageError(f"{target} is the checkpoint itself: choose another --output-dir")
    if target.exists() and "overwrite" not in given:
        raise UsageError(f"{target} exists: choose another --output-dir, or replace it with --overwrite")
    model, tokenizer = load_or_refuse(source)
    dtype = _dtype(given.get("dtype"))
    try:
        if form == "dense":
            _write_dense(model, tokenizer, target, dtype)
        else:
            _write_sparse(model, tokenizer, target, dtype, "int8" in given, given.get("compression", "none"))
    except ValueError as error:
        # Weights that the asked form doesn't hold.
        raise UsageError(str(error)) from error
    except OSError as error:
        raise CommandError(unsaved(target, error)) from error
    return EXIT_OK


def load_or_refuse(source: Path) -> tuple[Any, Any]:
    """The model and tokenizer of a checkpoint folder of either kind; a UsageError says what is wrong with it."""
    from transformers.utils import logging

    from pins_ext.sparse.source import SourceError, load_checkpoint

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return load_checkpoint(source)
    except SourceError as error:
        raise UsageError(str(error)) from error


def _dtype(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


def _write_sparse(model: Any, tokenizer: Any, target: Path, dtype: Any, int8: bool, compression: str) -> None:
    from pins_ext.sparse.format import save_sparse

    sizes = save_sparse(
        model, target, dtype=dtype, int8=int8, compression=compression, tokenizer=tokenizer, overwrite=True
    )
    if sizes["weights"] == 0:
        print("note: no tensor has enough zeros to be smaller in sparse form; all are stored as they are")
    else:
        share = 1 - sizes["nonzero"] / sizes["weights"]
        print(f"pruned tensors: {sizes['weights']:,} weights, {share:.2%} zeros")
    print(f"dense   {_megabytes(sizes['dense'])}")
    times = sizes["dense"] / max(1, sizes["on_disk"])
    print(f"sparse  {_megabytes(sizes['on_disk'])}  {f'{times:.1f} times smaller' if times > 1 else 'no smaller'}")
    print(f"floor   {_megabytes(sizes['floor'])}  set by tensors that are not pruned, before compression")
    print(f"written {target}")


def _write_dense(model: Any, tokenizer: Any, target: Path, dtype: Any) -> None:
    from pins_ext.files.atomic import written_aside
    from pins_ext.sparse.encoding import refuse_overflow

    if dtype is not None:
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                refuse_overflow(name, tensor, dtype)
        model.to(dtype)
    with written_aside(target) as aside:
        model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    print(f"dense   {_megabytes(size)}")
    print(f"written {target}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:9,.1f} MB"

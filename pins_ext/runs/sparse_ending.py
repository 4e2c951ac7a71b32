"""The end of a comparison: the pruned model exported and run on its sparse weights, beside itself run densely."""

from __future__ import annotations

import copy
import shlex
from pathlib import Path

import torch
from rich.console import Console

from pins_ext.sparse.calibration import measure_calls
from pins_ext.sparse.format import save_sparse
from pins_ext.sparse.inference import NothingSparseError, sparsify_for_inference
from pins_ext.sparse.source import load_checkpoint

TOKENS = 48


def end_sparse(folder: Path, console: Console) -> None:
    """Export a pruned result beside itself, time one sequence dense and sparse, and print both in a table.

    Args:
        folder: the result of a pruned run; the export goes to `folder`.sparse, in place of an earlier one.
        console: where to print.
    """
    model, tokenizer = load_checkpoint(folder)
    target = folder.with_name(f"{folder.name}.sparse")
    sizes = save_sparse(model, target, tokenizer=tokenizer, overwrite=True)
    console.print(_zeros(model), soft_wrap=True)
    length = min(TOKENS, int(getattr(model.config, "max_position_embeddings", TOKENS)))
    try:
        sparse = sparsify_for_inference(copy.deepcopy(model), tokens=(length,), say=None)
    except NothingSparseError as error:
        console.print(f"sparse  {target}: {_megabytes(sizes['on_disk'])}; computed densely: {error}", soft_wrap=True)
        return
    ids = torch.arange(length)[None] % int(model.config.vocab_size)
    with torch.inference_mode():
        before, after = measure_calls([lambda: model(input_ids=ids), lambda: sparse(input_ids=ids)])
        difference = float((model(input_ids=ids)[0] - sparse(input_ids=ids)[0]).abs().max())
    threads = torch.get_num_threads()
    console.print(
        f"\n{folder.name} exported and run   on disk   1 x {length} tokens, {threads} thread{'s' * (threads > 1)}\n"
        f"  dense             {_megabytes(sizes['dense'])}   {before * 1e3:7.1f} ms\n"
        f"  sparse            {_megabytes(sizes['on_disk'])}   {after * 1e3:7.1f} ms   ({before / after:.1f} x)\n"
        f"outputs differ by at most {difference:.1e}; {_megabytes(sizes['floor']).strip()} on disk are not pruned",
        soft_wrap=True,
    )
    console.print(f"sparse  {target}", soft_wrap=True)
    console.print(f'next    pins-ext run {shlex.quote(str(target))} --text "your text"', soft_wrap=True)


def _zeros(model: torch.nn.Module) -> str:
    """How many of all the model's weights are zero, those that pruning leaves alone counted too."""
    pairs = [(int((weight == 0).sum()), weight.numel()) for weight in model.parameters()]
    zeros, weights = (sum(column) for column in zip(*pairs, strict=True))
    return f"zeros   {zeros:,} of the model's {weights:,} weights ({zeros / weights:.1%}), embeddings included"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:6.1f} MB"

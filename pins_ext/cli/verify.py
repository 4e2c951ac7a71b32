"""`pins-ext verify`: does a result hold what its record says, for a reader who has only transformers?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pins_ext.runs.errors import EXIT_FAILED, EXIT_OK, UsageError
from pins_ext.runs.folder import results_in
from pins_ext.runs.html import percent
from pins_ext.runs.options import Parser
from pins_ext.runs.record import RecordError, RunRecord, read_record

_ABOUT = """Loads the result of a run with plain transformers and checks it against its record (metrics.json): every
recorded zero is there, none has moved, no weight is NaN or infinite, the masks in the pruner's file prune just those.

examples:
  pins-ext verify runs/rte
  pins-ext verify runs/rte-80            every cell of an ablation
"""


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 when the result does not hold."""
    parser = Parser(prog="pins-ext verify", description=_ABOUT)
    parser.add_argument("run", metavar="RUN", help="a folder that train wrote")
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    parser.add_argument("-h", "--help", action="help", help="show this text")
    exit_code = EXIT_OK
    for folder in results_in(Path(parser.parse_args(argv).run)):
        try:
            record = read_record(folder)
        except RecordError as error:
            raise UsageError(str(error)) from error
        problems, final = check(folder, record), record.final
        share = "dense" if final.sparsity is None else percent(final.sparsity, 4)
        if problems:
            exit_code = EXIT_FAILED
            print("\n".join(f"WRONG  {folder}: {problem}" for problem in problems))
        else:
            print(f"holds  {folder}: {final.zeros:,} of {final.weights:,} prunable weights are zero ({share})")
    return exit_code


def check(folder: Path, record: RunRecord) -> list[str]:
    """Everything about a result that differs from its record."""
    import torch
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        dtype = getattr(torch, record.model.dtype)
        kind = getattr(transformers, record.model.auto_class)
        model, report = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    except Exception as error:
        return [f"transformers can't load it: {' '.join(str(error).split())}"]
    problems = [f"{kind.replace('_', ' ')}: {sorted(names)[0]}" for kind, names in report.items() if names]
    parameters = dict(model.named_parameters())
    problems += [f"{name} holds NaN or infinite weights" for name, p in parameters.items() if not p.isfinite().all()]
    for name, expected in record.final.tensors.items():
        p = parameters.get(name)
        if p is None or p.numel() != expected.weights:
            problems.append(f"{name} is missing or has another shape")
        elif (zeros := p.numel() - int(torch.count_nonzero(p))) != expected.zeros:
            problems.append(f"{name} has {zeros:,} zeros, recorded are {expected.zeros:,}")
    return problems + (_check_masks(folder, record, parameters) if record.final.tensors else [])


def _check_masks(folder: Path, record: RunRecord, parameters: Mapping[str, Any]) -> list[str]:
    """What the pruner's file says is pruned must be zero."""
    from safetensors.torch import load_file

    from pins_ext.integrations.callback import PRUNER_FILE
    from pins_ext.ops import unpack_bits

    try:
        state = load_file(folder / PRUNER_FILE)
    except Exception as error:
        return [f"{PRUNER_FILE} can't be read: {' '.join(str(error).split())}"]
    problems, kept = [], 0
    for name in record.final.tensors:
        bits = state.get(f"mask/{name}")
        if bits is None or name not in parameters:
            problems.append(f"{PRUNER_FILE} has no mask for {name}")
            continue
        mask = unpack_bits(bits, parameters[name].shape)
        kept += int(mask.sum())
        if alive := int(parameters[name].detach()[~mask].count_nonzero()):
            problems.append(f"{name}: {alive:,} weights that the mask prunes are not zero")
    if not problems and kept != record.final.kept:
        problems.append(f"the masks keep {kept:,} weights, recorded are {record.final.kept:,}")
    return problems

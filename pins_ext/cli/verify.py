"""`pins-ext verify`: does a result hold what its record says, for a reader who has only transformers?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pins_ext.patterns import NONE, pattern_text
from pins_ext.runs.errors import EXIT_FAILED, EXIT_OK, UsageError
from pins_ext.runs.folder import results_in
from pins_ext.runs.html import percent
from pins_ext.runs.options import Parser
from pins_ext.runs.record import RecordError, read_record

_ABOUT = """Loads the result of a run with plain transformers and checks it against its record (metrics.json): every
recorded zero is there, none has moved, no weight is NaN or infinite, the masks in the pruner's file prune just those.

examples:
  pins-ext verify runs/rte
  pins-ext verify runs/rte-80            every cell of an ablation
"""


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 when the result does not hold."""
    parser = Parser(prog="pins-ext verify", description=_ABOUT)
    parser.add_argument("run", metavar="RUN", help="a folder that train or save_result wrote")
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    parser.add_argument("-h", "--help", action="help", help="show this text")
    asked = Path(parser.parse_args(argv).run)

    from pins_ext.runs.checking import check

    exit_code = EXIT_OK
    for folder in results_in(asked):
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
            wanted = record.config.pruning.get("pattern", NONE)
            pattern = "" if wanted == NONE else f", pattern {pattern_text(wanted)}"
            print(f"holds  {folder}: {final.zeros:,} of {final.weights:,} prunable weights are zero ({share}){pattern}")
    return exit_code

"""The benchmarks: every operator and the whole step, beside PyTorch's own ways, on the machine at hand.

`python -m bench` in a checkout, `pins-ext bench` once installed (as `pins_ext.bench`); `python -m bench select` runs
one stem. How a case is timed is in protocol.py, what is counted in the bench_* modules.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    from .options import parsed

    options, flags = parsed(sys.argv[1:] if argv is None else list(argv))
    from .command import main as run

    return run(options, flags)

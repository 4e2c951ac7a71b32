"""The flags of the benchmarks, read without torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from pins_ext.cli.run import check_threads
from pins_ext.runs.errors import UsageError
from pins_ext.runs.options import Formatter, file_to_write

from .shapes import DTYPES, SCORES, SHAPES

STEMS = ("select", "step", "clip", "update", "importance", "pack", "norm", "scores", "shapes")

_ABOUT = """Times every operator and the whole training step, interleaved with copy and read bandwidth and with what
PyTorch itself and the released algorithm offer. Prints a table per group and the targets, writes JSON and a picture.

stems: select, step, clip (clipping and step together), update, importance, pack, norm on one model's shapes, with
peers; scores: select over score distributions and remaining ratios; shapes: our operators on one flat tensor, 5,000
small ones, misaligned views, and 5,000 small ones in turns with one. "of floor" is the share of a loop that moves the
same tensors without arithmetic.
"""
_EXAMPLES = """examples:
  pins-ext bench --quick                          under two minutes on two cores
  pins-ext bench select step                      two stems, BERT-base's 85 M weights
  pins-ext bench --params 1.1e9 --device cuda     BERT's layers, repeated up to 1.1 G weights
  pins-ext bench --shapes llama-7b --dtype bf16   6.5 G weights with bf16 states
  pins-ext bench --scaling --largest 2.2e9        cost as the work grows; a few minutes without --largest
  pins-ext bench --baseline                       beside the newest saved run of this machine

Peers that run out of memory, refuse the size or would take too long stay in the table with the reason.
"""


def parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """The flags that were given, and their parser for further errors."""
    flags = parser()
    options = flags.parse_args(argv)
    if unknown := [stem for stem in options.stems if stem not in STEMS]:
        flags.error(f"unknown stem {unknown[0]!r}; there are {', '.join(STEMS)}")
    if options.stems and options.scaling:
        flags.error("--scaling measures steps: leave the stems out")
    if options.largest and not options.scaling:
        flags.error("--largest belongs to --scaling")
    try:
        check_threads(options.threads or 1)
        if options.json:
            file_to_write("--json", str(options.json), ".json")
    except UsageError as error:
        flags.error(str(error))
    del options.debug  # whoever runs this reads it
    return options, flags


def parser() -> argparse.ArgumentParser:
    """The flags of `pins-ext bench`."""
    made = argparse.ArgumentParser(
        prog="pins-ext bench",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("stems", nargs="*", metavar="STEM", help=f"what to time: {', '.join(STEMS)}; all of them by default")
    add("--shapes", nargs="+", choices=SHAPES, default=["bert-base"], metavar="NAME", help=f"{', '.join(SHAPES)}")
    add("--params", type=count, metavar="N", help="number of weights, as 16e6 or 7e9; the model's own by default")
    add("--dtype", choices=DTYPES, default="fp32", metavar="NAME", help="fp32, bf16 or fp16; with 16 bits, bf16 states")
    add("--threads", type=count, metavar="N", help="CPU threads; torch's choice by default")
    add("--device", help="cpu or cuda; default cuda if there is one")
    add("--quick", action="store_true", help="8 M weights, few samples, little patience with slow peers")
    add(
        "--budget",
        type=seconds,
        metavar="SECONDS",
        help="stop before the group that would pass it, and say what is left out",
    )
    add(
        "--scores",
        nargs="+",
        choices=SCORES,
        metavar="NAME",
        help=f"score distributions of the stem `scores`, at every ratio: {', '.join(SCORES)}",
    )
    add("--ratios", nargs="+", type=ratio, metavar="R", help="remaining ratios of the stem `scores`, between 0 and 1")
    add(
        "--wait",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="wait up to this long in all until other processes rest",
    )
    add(
        "--scaling",
        action="store_true",
        help="instead of stems: a step over sizes, threads, numbers of tensors, windows and sparsities, with fitted "
        "slopes; --params is the size at which the others vary (8e6; --quick: 1e6)",
    )
    add("--largest", type=count, metavar="N", help="most weights of --scaling, up to 2.2e9 and more; default 64e6")
    add("--no-peers", action="store_true", help="our operators only")
    add("--rounds", type=count, metavar="N", help="samples per case; 11 on a CPU (--quick: 5), 50 on a GPU")
    add("--patience", type=seconds, metavar="SECONDS", help="time per case; a slow peer gets fewer samples, or none")
    add("--seed", type=int, default=0, help="of the random data")
    add("--baseline", nargs="?", const="", metavar="FILE", help="compare with a saved run; the newest of this machine")
    add(
        "--json",
        type=Path,
        metavar="PATH",
        help="where to write; default <machine>-<date>.json in bench/results of a checkout, else in bench-results here",
    )
    add("--debug", action="store_true", help="show a traceback when something fails")
    return made


def count(text: str) -> int:
    """A number of weights, threads or samples, also in scientific notation.

    Raises:
        argparse.ArgumentTypeError: not a positive whole number.
    """
    value = float(text)
    if not 1 <= value < math.inf or value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(value)


def seconds(text: str) -> float:
    """A time to spend.

    Raises:
        argparse.ArgumentTypeError: none above zero.
    """
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} leaves no time: seconds above 0 do")
    return value


def ratio(text: str) -> float:
    """A remaining ratio.

    Raises:
        argparse.ArgumentTypeError: none between 0 and 1.
    """
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of the weights between 0 and 1")
    return value

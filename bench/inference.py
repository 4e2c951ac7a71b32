"""`pins-ext bench-inference`: its flags, read without torch."""

from __future__ import annotations

from collections.abc import Sequence

from pins_ext.cli.run import check_threads
from pins_ext.runs.errors import UsageError
from pins_ext.runs.options import Parser, file_to_write

_ABOUT = """Times a model on the CPU: dense in torch, onnxruntime and OpenVINO (those that are installed), torch's CSR
matrices, and sparse in pins_ext with float32, bfloat16 and int8 values. All take turns in one process, so that they see
the same neighbours. Without a checkpoint: BERT-base with random weights, pruned at random to each --sparsity.

On a GPU (--device cuda): cuBLAS with float32 and bfloat16; for each layer that has zeros torch's 4-bit weights (groups
of up to 128 inputs), its 8-bit floats (a step for each output and token), its 2:4 kernels (the two larger of every four
weights) and CSR; and pins_ext with float32, bfloat16 and float16 values. What this GPU or torch has no kernels for is
named. Each runs as a CUDA graph; ratios are of the least wall time to cuBLAS bfloat16. Never run on a GPU so far.

Wall time is what a user waits; on a machine that others use, processor time of one thread compares better. Ratios are
of the least processor time with one thread, of the least wall time with more. MB: memory that stays with each model.
error: distance of its answer from the dense float32 one, relative; random weights forgive less than trained ones.

examples:
  pins-ext bench-inference --tokens 1 16 1x128 --sparsity 0.8 0.9 0.95
  pins-ext bench-inference runs/rte --threads 2 --tokens 8x128 --output rte.json
  pins-ext bench-inference --device cuda --tokens 1 4 128 --sparsity 0.5 0.8 0.9
  pins-ext bench-inference --curves --output curves.json
  pins-ext bench-inference --curves --threads 2 --at 8x128 --output curves-2-threads.json
"""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = Parser(prog="pins-ext bench-inference", description=_ABOUT)
    parser.add_argument("checkpoint", nargs="?", metavar="CKPT", help="a pruned checkpoint (default: see above)")
    parser.add_argument("--sparsity", nargs="+", type=float, metavar="S", help="without CKPT (default: .8 .9 .95)")
    parser.add_argument("--tokens", nargs="+", metavar="[B x]N", help="sequences x tokens (default: 1 16 128 8x128)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where all of them run (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="on the CPU: threads of every runtime (default: 1)")
    parser.add_argument("--rounds", type=int, metavar="N", help="measurements of each (default: 20, on a GPU 100)")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="stop measuring a case then, after 3 rounds (default: curves: 10)"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="layers of the random BERT (default: 12)")
    parser.add_argument(
        "--curves",
        action="store_true",
        help="the random BERT over sparsities from 0.5 to 0.98, at 1 and 128 tokens, and over tokens from 1 to 2048, "
        "at 0.9; and where our kernels become faster than each peer. --sparsity and --tokens give other places",
    )
    parser.add_argument("--at", nargs="+", metavar="[B x]N", help="with --curves: tokens while sparsity varies")
    parser.add_argument("--output", metavar="FILE", help="JSON to write; a plot goes beside it (.svg)")
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    parser.add_argument("-h", "--help", action="help", help="show this text")
    given = vars(parser.parse_args(argv))
    check_threads(given.get("threads", 1))
    if given.get("rounds", 1) < 1:
        raise UsageError("--rounds must be at least 1")
    if given.get("layers", 1) < 1:
        raise UsageError("--layers must be at least 1")
    if not given.get("seconds", 1.0) > 0:
        raise UsageError("--seconds must be above 0")
    if "output" in given:
        file_to_write("--output", given["output"], ".json")
    if "at" in given and "curves" not in given:
        raise UsageError("--at is for --curves: without them, --tokens says how many")
    if "checkpoint" in given and ("sparsity" in given or "layers" in given):
        raise UsageError("--sparsity and --layers are for the random BERT: leave them out with a checkpoint")
    from .bench_inference import run

    return run(given)

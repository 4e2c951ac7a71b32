"""`pins-ext run`: a pruned model on texts, computed over the weights that are left."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pins_ext.runs.errors import EXIT_OK, UsageError
from pins_ext.runs.options import Parser

_ABOUT = """Loads a checkpoint, makes its pruned layers sparse where that is faster on this machine (measured, for a
moment), and answers: classification and regression, entities, questions, generation, by the model's class.

examples:
  pins-ext run runs/mine --text "a film to remember" --text "a day to forget"
  pins-ext run runs/rte.sparse --text "It rains." --pair "The street is wet."
  pins-ext run runs/squad --text "Ada wrote the notes in 1843." --pair "When were the notes written?"
  pins-ext run runs/wikitext2 --text "The river" --max-new-tokens 60
  pins-ext run runs/mine --file texts.txt --json
"""

MOST_THREADS = 1024
"""With tens of thousands, which no machine has, torch ends in a segmentation fault."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = _parser()
    given = vars(parser.parse_args(argv))
    texts, pairs = _texts(given)
    if "threads" in given:
        check_threads(given["threads"])
    ignored = [flag for flag in ("values", "min_sparsity") if flag in given and "dense" in given]
    if ignored:
        raise UsageError(f"--{ignored[0].replace('_', '-')} is for sparse layers: leave it out with --dense")
    if given.get("max_new_tokens", 1) < 1:
        raise UsageError("--max-new-tokens must be at least 1")
    if "min_sparsity" in given and not 0 <= given["min_sparsity"] <= 1:
        raise UsageError(f"--min-sparsity must be between 0 and 1, got {given['min_sparsity']}")

    from pins_ext.cli.export import load_or_refuse
    from pins_ext.runs.answering import UnanswerableError, answers

    model, tokenizer = load_or_refuse(Path(given["checkpoint"]))
    if tokenizer is None:
        raise UsageError(f"{given['checkpoint']} has no tokenizer: save it beside the model")
    if "threads" in given:
        import torch

        torch.set_num_threads(given["threads"])
    if "dense" not in given:
        _sparsify(model, given)
    begin = time.perf_counter()
    try:
        found = answers(model, tokenizer, texts, pairs=pairs, max_new_tokens=given.get("max_new_tokens", 40))
        for text, answer in zip(texts, found, strict=True):
            print(json.dumps({"input": text} | answer, ensure_ascii=False) if "json" in given else _line(answer))
    except UnanswerableError as error:
        raise UsageError(str(error)) from error
    if "json" not in given:
        seconds = time.perf_counter() - begin
        print(f"{len(texts)} text{'s' if len(texts) > 1 else ''} in {seconds * 1e3:,.0f} ms")
    return EXIT_OK


def _parser() -> Parser:
    parser = Parser(prog="pins-ext run", description=_ABOUT)
    parser.add_argument("checkpoint", metavar="CKPT", help="a folder of train, save_pretrained or export")
    parser.add_argument("--text", action="append", metavar="TEXT", help="what to read; may be given several times")
    parser.add_argument(
        "--pair", action="append", metavar="TEXT", help="the second text, or the question, for each --text in order"
    )
    parser.add_argument("--file", metavar="FILE", help="texts, one a line (text and pair separated by a tab)")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="generation: how much to add, as far as the model's positions go (default: 40)",
    )
    parser.add_argument("--min-sparsity", type=float, metavar="S", help="layers with fewer zeros are not tried (.3)")
    parser.add_argument(
        "--values",
        choices=("float32", "bfloat16", "int8"),
        help="how pruned weights are kept (default: exactly); int8 rounds weights and activations",
    )
    parser.add_argument("--dense", action="store_true", help="compute densely, for comparison")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the kernels (default: torch's)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, and nothing else")
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    parser.add_argument("-h", "--help", action="help", help="show this text")
    return parser


def _texts(given: dict[str, Any]) -> tuple[list[str], list[str] | None]:
    if ("text" in given) == ("file" in given):
        raise UsageError("give texts with --text, or with --file")
    if "file" not in given:
        texts, pairs = given["text"], given.get("pair")
        if pairs is not None and len(pairs) != len(texts):
            raise UsageError(f"{len(texts)} --text and {len(pairs)} --pair: give one --pair for each --text, or none")
        return texts, pairs
    if "pair" in given:
        raise UsageError("--pair goes with --text; in a file the pair follows the text after a tab")
    try:
        lines = Path(given["file"]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--file {given['file']} can't be read: {error}") from error
    rows = [line.split("\t") for line in lines if line.strip()]
    if not rows:
        raise UsageError(f"--file {given['file']} holds no text")
    if len({len(row) for row in rows}) > 1 or len(rows[0]) > 2:
        raise UsageError(f"--file {given['file']}: all lines must hold a text, or all a text, a tab and a pair")
    return [row[0] for row in rows], [row[1] for row in rows] if len(rows[0]) == 2 else None


def check_threads(threads: int) -> None:
    """Refuse numbers of threads with which torch would crash."""
    if not 1 <= threads <= MOST_THREADS:
        raise UsageError(f"--threads must be between 1 and {MOST_THREADS}, got {threads}")


def _sparsify(model: Any, given: dict[str, Any]) -> None:
    from pins_ext.sparse.inference import NothingSparseError, sparsify_for_inference

    say = None if "json" in given else print
    try:
        sparsify_for_inference(model, given.get("min_sparsity"), values=given.get("values"), say=say)
    except NothingSparseError as error:
        if say is not None:
            say(f"computed densely: {error}")


def _line(answer: dict[str, Any]) -> str:
    """One line for people."""
    cut = f"  (the text was cut to {answer['cut_to']} tokens)" if "cut_to" in answer else ""
    return _answer(answer) + cut


def _answer(answer: dict[str, Any]) -> str:
    if "entities" in answer:
        return "; ".join(f"{e['label']}: {e['text']} ({e['score']:.2f})" for e in answer["entities"]) or "(no entity)"
    if "labels" in answer:
        return ", ".join(f"{label} {score:.2f}" for label, score in answer["labels"].items())
    if "label" in answer:
        return f"{answer['label']} ({answer['score']:.3f})"
    if "value" in answer:
        return f"{answer['value']:.4f}"
    return str(answer.get("answer", answer.get("text"))) or "(no answer)"

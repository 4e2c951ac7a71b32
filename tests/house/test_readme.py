"""README: short, its links hold on an index page too, its code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import pins_ext
from pins_ext.examples.passages import load
from pins_ext.runs import charts
from pins_ext.runs.record import read_record

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
BASE = "https://github.com/pins-ext/pins_ext"


def test_it_is_short_and_begins_with_two_commands() -> None:
    lines = TEXT.splitlines()
    assert len(lines) <= 120
    for command in ("    make demo ", "    make test "):
        assert any(line.startswith(command) for line in lines[:30])


def test_its_links_are_absolute_and_lead_to_files_of_this_repository() -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXT) + re.findall(r"^\[\w+\]: (\S+)$", TEXT, re.M)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []
    own = [link.removeprefix(BASE) for link in links if link.startswith(BASE)]
    paths = [re.fullmatch(r"/(?:blob|raw|tree)/main/(.+)", link) for link in own]
    assert all(paths)
    assert [path[1] for path in paths if path and not (ROOT / path[1]).exists()] == []
    used = set(re.findall(r"\[[^\]]+\]\[(\w+)\]", TEXT))
    assert used == set(re.findall(r"^\[(\w+)\]: ", TEXT, re.M))


def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train, _, collate, model, _ = load()
    args = TrainingArguments(
        "training", max_steps=12, per_device_train_batch_size=4, report_to="none", disable_tqdm=True
    )
    batches = DataLoader(train[:80], batch_size=4, collate_fn=collate)
    names: dict[str, Any] = {"Trainer": Trainer, "args": args, "train": train, "collate": collate, "model": model}
    names |= {"batches": batches, "steps": len(batches)}
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert names["pruner"].step == len(batches)
    loaded = type(model).from_pretrained("pruned")
    for name in names["pruner"].names:
        for result in (loaded, pins_ext.load_sparse("packed")):
            assert (result.get_parameter(name) == model.get_parameter(name)).all()


def test_its_picture_shows_the_recorded_scores_and_so_does_its_table() -> None:
    records = {f.parent.name: read_record(f) for f in ROOT.glob("bench/results/demo-*/*/metrics.json")}
    assert set(records) == {"dense", "pins", "magnitude"}
    drawn = charts.scores_alone([records[name] for name in ("dense", "pins", "magnitude")])
    texts = [
        re.findall(r">([^<>\n]+)</text>", svg or "") for svg in ((ROOT / "docs/_static/demo.svg").read_text(), drawn)
    ]
    assert texts[0] == texts[1]
    for record in records.values():
        assert re.search(rf"^    {re.escape(record.label)} +{record.final.score:.4f} ", TEXT, re.M)


def test_the_citation_and_the_package_agree() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == pins_ext.__version__
    assert cited["repository-code"] == BASE

"""GLUE from files in the distribution's layouts, and from the hub, whose answers are simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.arrow_writer import ArrowWriter

from pins_ext.tasks import TaskArguments, TaskError, load_task, task_names
from pins_ext.tasks.sources.glue import GLUE, HUB_NAME, HUB_REVISION, read_glue_folder, read_glue_hub

# Two rows per file, as in the distribution: header (None: the file has none), rows.
LAYOUTS: dict[str, tuple[str | None, list[str]]] = {
    "cola": (None, ["gj04\t1\t\tThey drank the pub dry.", "gj04\t0\t*\tThey drank the pub."]),
    "sst2": ("sentence\tlabel", ["a fine film \t1", "a dull one \t0"]),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ['1\t70\t71\tHe said "yes.\tHe agreed.', "0\t72\t73\tOne.\tTwo."],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        [
            "0\tmain\tMSRvid\t2012\t1\tnone\tnone\tA plane.\tA jet.\t5.000",
            "1\tmain\tMSRvid\t2012\t4\tnone\tnone\tA man.\tA cat.\t0.250",
        ],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["1\t2\t3\tWhy?\tWhat for?\t1", "4\t5\t6\tHow?\tWhen?\t0", "7\t8\tbroken"],
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
        [
            "0\t1\t1n\tfiction\tIt rains.\tIt is wet.\tentailment\tentailment",
            "1\t2\t2c\tfiction\tIt rains.\tIt is dry.\tcontradiction\tcontradiction",
        ],
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", ["0\tWho?\tHe did.\tentailment", "1\tWhy?\tHe did.\tnot_entailment"]),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        ["0\tRain.\tWet.\tentailment", "1\tRain.\tDry.\tnot_entailment"],
    ),
    "wnli": ("index\tsentence1\tsentence2\tlabel", ["0\tIt rains.\tDry.\t0", "1\tIt rains.\tWet.\t1"]),
}
IDS = {"cola": [1, 0], "sst2": [1, 0], "mrpc": [1, 0], "stsb": [5.0, 0.25], "qqp": [1, 0], "mnli": [0, 2]}


def write_layout(folder: Path, name: str) -> Path:
    header, rows = LAYOUTS[name]
    content = "\n".join([*([header] if header else []), *rows]) + "\n"
    for stems in GLUE[name].files:
        (folder / f"{stems[0]}.tsv").write_text(content)
    return folder


@pytest.mark.parametrize("name", GLUE)
def test_every_task_loads_from_a_folder(tmp_path: Path, name: str) -> None:
    task = load_task(TaskArguments(task=f"glue/{name}", data_dir=str(write_layout(tmp_path, name))))
    assert task.train["labels"][:] == IDS.get(name, [0, 1])
    assert len(task.validation) == 2
    assert (task.test is not None) == (name in ("mrpc", "mnli"))
    assert task.is_regression == (name == "stsb")
    assert task.main_metric in task.baseline()
    assert ("text_pair" in task.train.column_names) == (len(GLUE[name].texts) == 2)
    assert f"glue/{name}" in task.describe()


def test_texts_are_those_of_the_file(tmp_path: Path) -> None:
    (train, _, _) = read_glue_folder("mrpc", write_layout(tmp_path, "mrpc"))
    assert (train.text[0], train.pair and train.pair[0]) == ('He said "yes.', "He agreed.")
    (train, _) = read_glue_folder("cola", write_layout(tmp_path, "cola"))
    assert train.text == ["They drank the pub dry.", "They drank the pub."]


def test_broken_rows_of_qqp_are_counted(tmp_path: Path) -> None:
    task = load_task(TaskArguments(task="qqp", data_dir=str(write_layout(tmp_path, "qqp"))))
    assert any("1 incomplete rows left out" in note for note in task.notes)


def test_files_exported_from_the_hub_load_too(tmp_path: Path) -> None:
    for stem in ("train", "validation"):
        (tmp_path / f"{stem}.csv").write_text('sentence1,sentence2,label,idx\n"a, b",c,1,0\nd,e,0,1\n')
    task = load_task(TaskArguments(task="mrpc", data_dir=str(tmp_path)))
    assert task.train["labels"][:] == [1, 0]


@pytest.mark.parametrize("spelling", ["rte", "RTE", "glue/rte", "GLUE/RTE"])
def test_spellings(tmp_path: Path, spelling: str) -> None:
    assert load_task(TaskArguments(task=spelling, data_dir=str(write_layout(tmp_path, "rte")))).name == "glue/rte"


def test_hyphens_are_optional(tmp_path: Path) -> None:
    assert load_task(TaskArguments(task="SST-2", data_dir=str(write_layout(tmp_path, "sst2")))).name == "glue/sst2"


def test_an_unknown_task_lists_the_known() -> None:
    with pytest.raises(TaskError, match=r"unknown task glue/boolq; known are stdlib, glue/cola, .*glue/wnli, wnut17"):
        load_task(TaskArguments(task="glue/boolq"))
    assert len(task_names()) == 16


def test_a_folder_without_the_files_says_what_it_has(tmp_path: Path) -> None:
    write_layout(tmp_path, "rte")
    (tmp_path / "dev.tsv").rename(tmp_path / "notes.txt")
    with pytest.raises(TaskError, match=r"has no dev\.tsv .* for glue/rte; it has notes\.txt, train\.tsv"):
        read_glue_folder("rte", tmp_path)
    with pytest.raises(TaskError, match="is not a folder"):
        read_glue_folder("rte", tmp_path / "none")


def test_an_unknown_label_names_its_line(tmp_path: Path) -> None:
    write_layout(tmp_path, "rte")
    (tmp_path / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\tb\tmaybe\n")
    with pytest.raises(TaskError, match=r"dev\.tsv:3: unknown label maybe; training has entailment, not_entailment"):
        load_task(TaskArguments(task="rte", data_dir=str(tmp_path)))


def hub_splits(name: str) -> dict[str, datasets.Dataset]:
    task = GLUE[name]
    features = datasets.Features(
        {
            **{column: datasets.Value("string") for column in task.texts},
            "label": datasets.ClassLabel(names=list(task.names)) if task.names else datasets.Value("float32"),
            "idx": datasets.Value("int32"),
        }
    )
    rows = {**{column: ["a", "b"] for column in task.texts}, "label": [1, 0], "idx": [0, 1]}
    split = datasets.Dataset.from_dict(rows, features=features)
    hidden = datasets.Dataset.from_dict(rows | {"label": [-1, -1]}, features=features)
    return dict.fromkeys(task.hub_splits, split) | {"test": hidden}


@pytest.mark.parametrize("name", GLUE)
def test_every_task_loads_from_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> dict[str, datasets.Dataset]:
        calls.append((args, kwargs))
        return hub_splits(name)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(TaskArguments(task=f"glue/{name}"))
    assert calls == [((HUB_NAME, name), {"revision": HUB_REVISION})]
    assert task.train["labels"][:] == [1, 0]
    assert (task.test is not None) == (name == "mnli")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach the hub"),
        datasets.exceptions.DatasetNotFoundError("not found"),
        ValueError("Couldn't find cache for config 'rte'"),
    ],
)
def test_without_network_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TaskError, match=r"--data-dir FOLDER, which holds train\.tsv and dev\.tsv"):
        read_glue_hub("rte")


def test_a_read_only_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("the lock file cannot be written")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(TaskError, match="the datasets cache cannot be used"):
        read_glue_hub("rte")
    folder = tmp_path / "nyu-mll___glue" / "rte" / "0.0.0" / HUB_REVISION
    folder.mkdir(parents=True)
    for name, split in hub_splits("rte").items():
        with ArrowWriter(path=str(folder / f"glue-{name}.arrow"), features=split.features) as writer:
            writer.write_table(split.data.table)
            writer.finalize()
    train, validation = read_glue_hub("rte")
    assert (train.text, train.labels, len(validation)) == (["a", "b"], [1, 0], 2)

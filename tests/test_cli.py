"""The command line, on a tiny model and files made here: results, refusals, exit codes, kills and resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, PreTrainedTokenizerFast

from pins_ext.cli import COMMANDS, main
from pins_ext.commands import options
from pins_ext.commands import request as requests
from pins_ext.commands.errors import UsageError
from pins_ext.config import PruneConfig
from pins_ext.integrations.saving import newest_complete

WORDS = ["good", "bad", "odd", "film", "book", "day", "very", "a", "the", "was"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pretrained tiny BERT (no classifier yet) and three labelled files."""
    root = tmp_path_factory.mktemp("tiny")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        root / "model"
    )
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(root / "model")
    for name, n in (("train", 60), ("dev", 18), ("test", 12)):
        rows = [f"{WORDS[i % 3]} {WORDS[3 + i % 7]} {WORDS[5 + i % 5]},{'yes' if i % 3 else 'no'}" for i in range(n)]
        (root / f"{name}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    return root


def flags(tiny: Path, output: Path, *more: str) -> list[str]:
    """A run of twelve steps, checkpoints every third, that prunes from the third step on."""
    files = ["--train-file", f"{tiny}/train.csv", "--validation-file", f"{tiny}/dev.csv"]
    length = ["--max-steps", "12", "--save-steps", "3", "--eval-steps", "6", "--logging-steps", "2", "--use-cpu"]
    pruning = ["--sparsity", "0.75", "--delta-t", "2", "--learning-rate", "1e-3", "--per-device-train-batch-size", "8"]
    return ["--model", f"{tiny}/model", *files, *length, *pruning, "--output-dir", str(output), *more]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="session")
def unbroken(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("unbroken") / "run"
    assert main(["train", *flags(tiny, output), "--test-file", f"{tiny}/test.csv"]) == 0
    return output


# ---- results ---------------------------------------------------------------------------------------------------------


def test_the_result_is_an_ordinary_checkpoint_with_its_zeros(unbroken: Path) -> None:
    names = {file.name for file in unbroken.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "metrics.json", "report.html"} <= names
    assert not unbroken.with_name("run.unfinished").exists()
    model = AutoModelForSequenceClassification.from_pretrained(unbroken)
    assert model.config.id2label == {0: "no", 1: "yes"}
    record = json.loads((unbroken / "metrics.json").read_text())
    tensors = record["final"]["tensors"]
    parameters = dict(model.named_parameters())
    assert all((parameters[name] == 0).sum() == t["zeros"] for name, t in tensors.items())
    assert (
        record["final"]["zeros"]
        == round(0.75 * record["final"]["weights"])
        == sum(t["zeros"] for t in tensors.values())
    )
    assert {"eval_accuracy", "test_accuracy"} <= record["final"]["metrics"].keys()
    assert [entry["step"] for entry in record["history"]] == [2, 4, 6, 8, 10, 12]
    assert record["masks"]
    assert 0 < record["timings"]["pruning_share"] < 1


def test_verify_confirms_and_notices(unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(unbroken)]) == 0
    assert "holds  " in capsys.readouterr().out
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in unbroken.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = weights(broken)
    name = "bert.encoder.layer.1.output.dense.weight"
    tensors[name][tensors[name] == 0] = 1e-9
    tensors["bert.embeddings.word_embeddings.weight"][3, 3] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert main(["verify", str(broken)]) == 1
    said = capsys.readouterr().out
    assert f"{name} has 0 zeros" in said
    assert "word_embeddings.weight holds NaN" in said
    assert "weights that the mask prunes are not zero" in said
    (broken / "model.safetensors").write_bytes(b"nothing")
    assert main(["verify", str(broken)]) == 1
    assert "transformers can't load it" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "absent")]) == 2


def test_report_is_written_again_and_compares(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (unbroken / "report.html").unlink()
    assert main(["report", str(unbroken)]) == 0
    assert "Sparsity per tensor" in (unbroken / "report.html").read_text()
    assert main(["report", str(unbroken), str(unbroken), "-o", str(tmp_path / "both.html"), "--title", "Two"]) == 0
    assert "<h1>Two</h1>" in (tmp_path / "both.html").read_text()
    assert main(["report", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def test_plan_trains_and_writes_nothing(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags(tiny, tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "4,096 prunable weights in 12 tensors" in said
    assert "12 steps of 8" in said
    assert "schedule cubic" in said
    assert not list(tmp_path.iterdir())


def test_compare_trains_three_and_says_who_won(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", *flags(tiny, tmp_path / "all", "--compare", "--save-strategy", "no")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "majority class" in said
    assert "magnitude 75 %" in said
    assert "beat" in said
    html = (tmp_path / "all" / "report.html").read_text()
    assert html.count("<b>Sparsity per tensor") == 2
    records = {
        kind: json.loads((tmp_path / "all" / kind / "metrics.json").read_text())
        for kind in ("dense", "pins", "magnitude")
    }
    assert records["dense"]["final"]["weights"] == 0
    assert records["magnitude"]["config"]["self_regularization"] == {}
    assert records["pins"]["config"]["self_regularization"]["teacher"] == "latest"
    # All three are there: resuming has nothing to do, and says so by being quick.
    assert main([*command, "--resume"]) == 0
    assert main(["report", str(tmp_path / "all")]) == 0
    assert main(["verify", str(tmp_path / "all")]) == 0
    assert capsys.readouterr().out.count("holds") == 3
    (tmp_path / "all" / "mine.txt").write_text("keep")
    assert main(command) == 2


@pytest.mark.parametrize(
    "more",
    [
        ("--optimizer", "adafactor"),
        ("--optim", "sgd"),
        ("--sparsity", "0"),
        ("--dtype", "bfloat16", "--state-dtype", "bfloat16"),
        ("--score-gradient", "task", "--teacher", "ema"),
        ("--early-stopping", "2", "--save-steps", "6"),
        ("--label-type", "number", "--label-column", "score"),
    ],
)
def test_other_ways_of_training(tiny: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    rows = [f"{WORDS[i % 3]} {WORDS[3 + i % 7]},{i % 3},{i % 3 / 2}" for i in range(24)]
    (tmp_path / "numbers.csv").write_text("text,label,score\n" + "\n".join(rows) + "\n")
    files = ["--train-file", f"{tmp_path}/numbers.csv", "--validation-file", f"{tmp_path}/numbers.csv"]
    assert main(["train", *flags(tiny, tmp_path / "run", *files, *more)]) == 0
    assert main(["verify", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["final"]["zeros"] == (0 if "0" in more else 3072)


# ---- flags -----------------------------------------------------------------------------------------------------------


def parsed(*argv: str) -> requests.Request:
    return requests.parse(requests.parser("pins-ext train", "", ""), argv)


def test_every_pruning_option_is_a_flag() -> None:
    text = requests.help_text(requests.parser("pins-ext train", "", ""), everything=False)
    for name in PruneConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in text
    assert "--deepspeed" not in text


def test_help_all_lists_the_trainer_s_flags() -> None:
    text = requests.help_text(requests.parser("pins-ext train", "", ""), everything=True)
    for flag in ("--adam-beta1", "--torch-empty-cache-steps", "--ddp-timeout"):
        assert flag in text


def test_values_are_read_as_they_are_meant() -> None:
    asked = parsed(
        "--train_file", "x.csv", "--warmup", "7", "--cooldown", "0.25", "--scope", "a=*attention*,b=*inter*;*output*",
        "--min-density", "*.query.*=0.2,*.key.*=0.1", "--max-density", "0.9", "--exclude", "*.0.*", "*.1.*",
        "--seed=5", "--teacher-weight", "0.5", "--mask-optimizer-state", "--bf16", "no", "--optimizer", "sgd",
    )  # fmt: skip
    config = asked.pruning
    assert config is not None
    assert (config.warmup, config.cooldown, config.seed) == (7, 0.25, 5)
    assert config.scope == {"a": ("*attention*",), "b": ("*inter*", "*output*")}
    assert config.min_density == {"*.query.*": 0.2, "*.key.*": 0.1}
    assert config.max_density == {"*": 0.9}
    assert config.exclude == ("*.0.*", "*.1.*")
    assert config.mask_optimizer_state
    assert asked.regularizer.teacher_weight == 0.5
    assert asked.training["bf16"] is False
    assert asked.training_arguments(Path("runs")).optim == "sgd"
    assert parsed("--train-file", "x.csv", "--scope", '{"a": ["*"]}').pruning.scope == {"a": ("*",)}  # type: ignore[union-attr]


def test_flags_come_from_files_too(tmp_path: Path) -> None:
    yaml = tmp_path / "a.yaml"
    yaml.write_text(
        "sparsity: 0.6\nlearning_rate: 1e-4\ntrain_file: x.csv\nexclude: ['*.0.*']\nmask_optimizer_state: true\n"
    )
    asked = parsed("--config", str(yaml), "--sparsity", "0.7")
    assert asked.pruning is not None
    assert asked.pruning.sparsity == 0.7
    assert asked.pruning.mask_optimizer_state
    assert asked.pruning.exclude == ("*.0.*",)
    assert asked.training["learning_rate"] == 1e-4
    (tmp_path / "b.json").write_text(json.dumps({"scope": {"a": ["*"]}, "train_file": "x.csv", "label": None}))
    assert parsed("--config", str(tmp_path / "b.json")).pruning.scope == {"a": ("*",)}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "reason"),
    [("- a", "must map flags"), ("a: [", "is not YAML"), ("nonsense: 1", "unknown flag --nonsense")],
)
def test_a_bad_file_of_flags_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UsageError, match=reason):
        parsed("--config", str(tmp_path / "a.yaml"))
    with pytest.raises(UsageError, match="No such file"):
        parsed("--config", str(tmp_path / "absent.yaml"))


def test_recipes_give_way_to_flags() -> None:
    demo = parsed()
    assert demo.compares
    assert demo.run.output_dir == str(Path("runs", "demo"))
    assert demo.training["max_steps"] == 200
    short = parsed("--max-steps", "30")
    assert short.compares
    assert short.pruning is not None
    assert short.pruning.warmup == 0.1
    rte = parsed("--task", "rte", "--recipe")
    assert rte.pruning is not None
    assert (rte.pruning.beta2, rte.pruning.warmup, rte.training["num_train_epochs"]) == (0.99, 200, 20)
    assert not rte.compares
    assert parsed("--task", "glue/rte").training.get("num_train_epochs") is None
    with pytest.raises(UsageError, match="there is none for this task"):
        parsed("--train-file", "x.csv", "--recipe")


def test_options_are_quick_to_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)
    assert main(["--version"]) == 0
    code = "import sys, pins_ext.cli as c; c.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--sparsity", "1.0"), r"sparsity must be in \[0, 1\)"),
        (("--sparsity", "much"), "argument --sparsity: invalid float value"),
        (("--sparcity", "0.5"), "unknown flag --sparcity; did you mean --sparsity?"),
        (("--learning-rat", "0.5"), "did you mean --learning-rate?"),
        (("extra",), "unexpected argument 'extra'"),
        (("--exclude", "*nothing*"), "the pattern '*nothing*' matches no parameter"),
        (("--warmup", "10", "--cooldown", "10"), "the schedule is longer than training"),
        (("--model", "no/such/model"), "--model no/such/model"),
        (("--train-file", "absent.csv"), "absent.csv"),
        (("--eval-strategy", "sometimes"), "sometimes"),
        (("--deepspeed", "x.json"), "DeepSpeed"),
        (("--teacher-weight", "-1"), "weight must be 'adaptive' or a number"),
        (("--resume", "nowhere"), "nowhere holds no readable checkpoint.json"),
        (("--optimizer", "best"), "best"),
        (("--min-density", "0.9"), "min_density"),
    ],
)
def test_bad_input_is_one_clear_line(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], more: tuple[str, ...], reason: str
) -> None:
    assert main(["train", *flags(tiny, tmp_path / "run", *more)]) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("pins-ext train: ")
    assert reason.replace("\\", "") in said[0]
    assert not list(tmp_path.iterdir())


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


def test_other_people_s_files_are_not_touched(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    assert main(["train", *flags(tiny, output)]) == 2
    assert "not the result of a run" in capsys.readouterr().err
    assert (output / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    assert main(["train", *flags(tiny, tmp_path / "file")]) == 2


def test_an_earlier_result_is_kept_or_replaced(tiny: Path, tmp_path: Path, unbroken: Path) -> None:
    output = tmp_path / "run"
    short = ["--max-steps", "4", "--save-strategy", "no", "--eval-strategy", "no"]
    assert main(["train", *flags(tiny, output, *short)]) == 0
    assert main(["train", *flags(tiny, output, *short, "--sparsity", "0.5")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.1"]
    assert json.loads((tmp_path / "run.1" / "metrics.json").read_text())["config"]["pruning"]["sparsity"] == 0.75
    assert main(["train", *flags(tiny, output, *short, "--overwrite", "--sparsity", "0.25")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.1"]
    assert json.loads((output / "metrics.json").read_text())["config"]["pruning"]["sparsity"] == 0.25


# ---- kills, interrupts, full disks -----------------------------------------------------------------------------------

_DYING = """
import os, signal, sys
from pins_ext.cli import main
{setup}
sys.exit(main(sys.argv[1:]))
"""


def train_apart(setup: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, after some lines that decide how it will end."""
    command = [sys.executable, "-c", _DYING.format(setup=setup), "train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


_KILL_IN_STEP = """
from pins_ext.pruner import Pruner
end = Pruner.end
def dying(self, slot):
    end(self, slot)
    if self.step == 8: os.kill(os.getpid(), signal.SIGKILL)
Pruner.end = dying
"""

_KILL_WHILE_SAVING = """
import torch
save = torch.save
def dying(value, file, *rest, **more):
    if 'checkpoint-6' in str(file) and 'scheduler' in str(file): os.kill(os.getpid(), signal.SIGKILL)
    save(value, file, *rest, **more)
torch.save = dying
"""

_KILL_WHILE_PUBLISHING = """
rename = os.rename
def dying(source, target):
    rename(source, target)
    if str(target).endswith('unfinished/result'): os.kill(os.getpid(), signal.SIGKILL)
os.rename = dying
"""


@pytest.mark.parametrize(
    ("setup", "newest"), [(_KILL_IN_STEP, 6), (_KILL_WHILE_SAVING, 3), (_KILL_WHILE_PUBLISHING, 12)]
)
def test_a_killed_run_resumes_to_the_same_weights(
    tiny: Path, tmp_path: Path, unbroken: Path, setup: str, newest: int
) -> None:
    output = tmp_path / "run"
    dead = train_apart(setup, flags(tiny, output, "--test-file", f"{tiny}/test.csv"))
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert not output.exists()
    work = tmp_path / "run.unfinished"
    assert newest_complete(work)[0] == work / f"checkpoint-{newest}"
    # Without --resume an unfinished run is not thrown away; with other settings it is not resumed.
    assert main(["train", *flags(tiny, output)]) == 2
    assert main(["train", "--output-dir", str(output), "--resume", "--sparsity", "0.5"]) == 2
    assert main(["train", "--output-dir", str(output), "--resume"]) == 0
    assert_same(output, unbroken)
    assert not work.exists()
    assert main(["verify", str(output)]) == 0
    assert main(["train", "--output-dir", str(output), "--resume", *flags(tiny, output)]) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_stops_with_a_checkpoint(
    tiny: Path, tmp_path: Path, unbroken: Path, capsys: pytest.CaptureFixture[str], number: int, code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from pins_ext.pruner import Pruner

    end: Callable[..., Any] = Pruner.end

    def interrupted(self: Pruner, slot: Any) -> None:
        end(self, slot)
        if self.step == 5:
            os.kill(os.getpid(), number)

    output = tmp_path / "run"
    monkeypatch.setattr(Pruner, "end", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert main(["train", *flags(tiny, output), "--test-file", f"{tiny}/test.csv"]) == code
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped at step 5" in (said := capsys.readouterr().err)
    assert "checkpoint-5: go on from there with --resume" in said
    monkeypatch.undo()
    assert main(["train", "--output-dir", str(output), "--resume"]) == 0
    assert_same(output, unbroken)


def test_ctrl_c_before_training_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    monkeypatch.setattr("pins_ext.commands.prepare.load_task", interrupted)
    assert main(["train", *flags(tiny, tmp_path / "run")]) == 130
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_at_the_end_loses_nothing(tiny: Path, tmp_path: Path, unbroken: Path) -> None:
    output = tmp_path / "run"
    # No file may grow past 30 kB once training is over: the model does not fit any more.
    full = """
import resource
from pins_ext.integrations.trainer import PinsTrainer
evaluate = PinsTrainer.evaluate
def fill(self, *args, **kwargs):
    if not self.is_in_train: resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
    return evaluate(self, *args, **kwargs)
PinsTrainer.evaluate = fill
"""
    failed = train_apart(full, flags(tiny, output, "--test-file", f"{tiny}/test.csv"))
    assert failed.returncode == 1, failed.stderr
    assert failed.stderr.startswith("pins-ext train: could not save")
    assert "checkpoint-12: go on from there with --resume" in failed.stderr
    assert not output.exists()
    assert main(["train", "--output-dir", str(output), "--resume"]) == 0
    assert_same(output, unbroken)


def test_two_processes_do_not_share_an_output_folder(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    work = tmp_path / "run.unfinished"
    work.mkdir()
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["train", *flags(tiny, tmp_path / "run")]) == 2
    assert "another process runs in" in capsys.readouterr().err
    assert work.exists()


def test_a_failure_is_one_line_and_with_debug_a_traceback(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the kernel\nis unhappy")

    monkeypatch.setattr("pins_ext.pruner.Pruner.end", fails)
    assert main(["train", *flags(tiny, tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "pins-ext train: RuntimeError: the kernel  (--debug shows where)\n"
    with pytest.raises(RuntimeError, match="unhappy"):
        main(["train", *flags(tiny, tmp_path / "run", "--debug")])


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_finds_a_sound_installation(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", f"{tiny}/model"]) == 0
    said = capsys.readouterr().out
    assert "agree with the reference, bit for bit" in said
    assert "model: float32" in said.replace(f"{tiny}/", "")
    assert said.endswith("ready\n")


def test_doctor_finds_a_broken_extension(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pins_ext.reference.instant_score", lambda *args: torch.zeros(4099))
    assert main(["doctor"]) == 1
    assert "BROKEN operators" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "pins_ext._C", None)
    assert main(["doctor"]) == 1
    assert "does not load" in capsys.readouterr().out


def test_options_refuse_what_they_cannot_read() -> None:
    with pytest.raises(UsageError, match="true or false expected"):
        parsed("--mask-optimizer-state", "perhaps")
    with pytest.raises(UsageError, match="a number expected"):
        parsed("--cooldown", "long")
    with pytest.raises(UsageError, match="JSON object expected"):
        parsed("--scope", "{broken")
    assert options.normalised(["--a_b=c_d", "e_f"]) == ["--a-b=c_d", "e_f"]

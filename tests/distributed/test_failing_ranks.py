"""A rank that fails: the others stop with a message, none waits for ever."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run
from sharded import CONFIG, OPTIMIZERS, STEPS, inject, sharded

from pins_ext import PruneConfig, Pruner, SelfRegularizer
from pins_ext.distributed.first import on_first


def left_alone() -> str | None:
    """The last rank leaves after some steps. Returns what the others then run into."""
    model = sharded("rows")
    optimizer = OPTIMIZERS["PinsAdamW"](model.parameters())
    Pruner(model, optimizer, PruneConfig(**CONFIG), STEPS)
    for step in range(STEPS):
        inject(model, step)
        if step == 8 and dist.get_rank() == dist.get_world_size() - 1:
            return None
        try:
            optimizer.step()
        except RuntimeError as error:
            return f"step {step}: {error}"
    return "nothing"


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_others_stop_when_one_is_gone(size: int) -> None:
    """Injected gradients: no collective but the pruner's, which comes at the next mask."""
    begin = time.monotonic()
    *others, gone = run(size, left_alone)
    assert gone is None
    assert all(said is not None and said.startswith("step 9: ") and len(said) > 20 for said in others), others
    assert time.monotonic() - begin < 120


def unwritable(folder: Path) -> list[str]:
    model = sharded("rows", 16)
    optimizer = OPTIMIZERS["PinsAdamW"](model.parameters())
    pruner = Pruner(model, optimizer, PruneConfig(**CONFIG), STEPS)
    inject(model, 0)
    optimizer.step()
    regularizer = SelfRegularizer(model, teacher="latest", every=1, head="classification")
    regularizer.step()
    said = []
    for save in (pruner.save, regularizer.save):
        with pytest.raises((OSError, RuntimeError)) as caught:
            save(folder / "file" / "state.safetensors")
        said.append(f"{caught.typename}: {caught.value}")
    # They go on together.
    inject(model, 1)
    optimizer.step()
    pruner.save(folder / f"rank{dist.get_rank()}.safetensors")
    return said


def test_a_file_that_one_rank_can_not_write_is_an_error_on_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    first, second = run(2, unwritable, tmp_path)
    assert len(first) == len(second) == 2
    assert all("file" in said and not said.startswith("RuntimeError") for said in first), first
    assert all("the rank that writes says why" in said for said in second)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["rank0.safetensors"]


class OddError(Exception):
    """One that can't be made again from its arguments, as those of libraries for downloads."""

    def __init__(self, name: str, *, answer: int) -> None:
        super().__init__(f"{name} answers {answer}")


def fails_on_the_first(kind: str) -> str:
    def action() -> None:
        raise OddError("the hub", answer=404) if kind == "odd" else ValueError("no such folder")

    with pytest.raises((OddError, ValueError, RuntimeError)) as caught:
        on_first(action)
    # They go on together.
    return f"{caught.typename}: {caught.value} {on_first(lambda: 7)}"


def test_what_fails_on_the_first_rank_is_said_on_all() -> None:
    assert run(2, fails_on_the_first, "plain") == ["ValueError: no such folder 7"] * 2
    first, second = run(2, fails_on_the_first, "odd")
    assert first == "OddError: the hub answers 404 7"
    assert second == "RuntimeError: OddError: the hub answers 404 7"

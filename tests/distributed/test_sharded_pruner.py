"""The same full gradients on any number of ranks, however the model is cut: the same masks and weights, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
from models import Network
from ranks import run
from sharded import CONFIG, OPTIMIZERS, STEPS, inject, masks, pruned
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pins_ext import PruneConfig, Pruner

CASES: list[tuple[int, str, str, dict[str, Any]]] = [
    (2, "rows", "PinsAdamW", {}),
    (2, "rows", "SGD", {"mask_policy": "strict", "criterion": "platon"}),
    (2, "columns", "PinsSGD", {"state_dtype": "bfloat16"}),
    (2, "parallel", "PinsAdamW", {"mask_optimizer_state": True}),
    (4, "both", "PinsAdamW", {}),
    (4, "hybrid", "AdamW", {"scope": "layer"}),
    (2, "rows", "PinsAdamW", {"criterion": "fisher"}),
    (4, "both", "AdamW", {"criterion": "moments"}),
    (4, "hybrid", "PinsAdamW", {"criterion": "moments"}),  # replicas that own nothing
]
WIDE: list[tuple[int, str, str, dict[str, Any]]] = [
    (size, how, optimizer, options)
    for size, how in ((3, "rows"), (6, "rows"), (8, "rows"), (6, "both"), (8, "both"), (8, "hybrid"), (4, "parallel"))
    for optimizer, options in (
        ("PinsAdamW", {"state_dtype": "bfloat16"}),
        ("SGD", {"beta2": 0.0, "min_density": {"*output*": 0.4}}),
        ("PinsSGD", {"criterion": "magnitude", "mask_policy": "strict"}),
        ("PinsAdamW", {"criterion": "movement", "ties": "reference"}),
        ("AdamW", {"criterion": "pins-update", "scope": "layer"}),
        ("PinsAdamW", {"criterion": "moments", "scope": "layer"}),
        ("AdamW", {"criterion": "fisher"}),
    )
]


def several(cases: list[tuple[str, str, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [pruned(*case) for case in cases]


def agree(cases: list[tuple[int, str, str, dict[str, Any]]], size: int) -> None:
    here = [case[1:] for case in cases if case[0] == size]
    told = run(size, several, here)
    for i, (how, optimizer, options) in enumerate(here):
        alone = pruned("whole", optimizer, options)
        assert len(set(alone["masks"])) >= 4
        for rank in told:
            assert rank[i]["placements"] != ["None"]
            for part in ("masks", "view", "stats", "final", "weights"):
                assert rank[i][part] == alone[part], (how, optimizer, options, part)
        assert len(alone["masks"]) == STEPS + 1


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_masks_and_weights_are_those_of_one_process(size: int) -> None:
    agree(CASES, size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4, 6, 8])
def test_masks_and_weights_are_those_of_one_process_on_more_ranks(size: int) -> None:
    agree(WIDE, size)


@pytest.mark.slow
def test_rows_that_the_ranks_do_not_divide() -> None:
    """3 x 2 ranks: 7 and 14 rows, where torch's own offsets are wrong; 2 and 4, of which some ranks have none."""
    widths = (7, 2)
    told = run(6, of_widths, widths)
    for i, width in enumerate(widths):
        alone = pruned("whole", "PinsAdamW", {}, width)
        assert len(set(alone["masks"])) >= 3
        for rank in told:
            for part in ("masks", "view", "stats", "final", "weights"):
                assert rank[i][part] == alone[part], (width, part)


def of_widths(widths: tuple[int, ...]) -> list[dict[str, Any]]:
    return [pruned("both", "PinsAdamW", {}, width) for width in widths]


def a_stage(stage: int | None) -> dict[str, Any]:
    """One of the models of two pairs of ranks, each cut over its pair; with a number, whole."""
    alone = stage is not None
    mesh = None if alone else init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    number = mesh["pp"].get_local_rank() if mesh is not None else stage
    model: Any = Network(13, seed=number)
    if mesh is not None:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    optimizer = OPTIMIZERS["PinsAdamW"](model.parameters())
    pruner = Pruner(model, optimizer, PruneConfig(**CONFIG), STEPS)
    told: dict[str, Any] = {"stage": number, "masks": []}
    for step in range(STEPS):
        inject(model, step)
        optimizer.step()
        told["masks"].append(masks(pruner))
    return told | {"final": pruner.finalize(), "threshold": pruner.stats()["threshold"]}


@pytest.mark.slow
def test_each_stage_of_a_pipeline_has_a_threshold_of_its_own() -> None:
    told = run(4, a_stage, None)
    assert [rank["stage"] for rank in told] == [0, 0, 1, 1]
    for rank in told:
        assert rank == a_stage(rank["stage"])
    assert told[0]["threshold"] != told[2]["threshold"]


def a_llama(how: str) -> dict[str, Any]:
    return pruned(how, "PinsAdamW", {}, width=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "how"),
    [*((n, "rows") for n in (1, 2, 3, 4, 6, 8)), (2, "parallel"), *((n, "both") for n in (4, 6, 8))],
)
def test_a_llama_has_the_masks_of_one_process(size: int, how: str) -> None:
    alone = a_llama("whole")
    assert len(set(alone["masks"])) >= 4
    for told in run(size, a_llama, how):
        for part in ("masks", "view", "stats", "final", "weights"):
            assert told[part] == alone[part], part
        collectives = told["collectives"]
        if size == 1:
            assert not any(collectives)
            continue
        # Until a gradient was seen on some rank they ask each other; from then on for a new mask alone.
        later = [sum(counts.values()) for counts in collectives[CONFIG["warmup"] + 1 :]]
        due = [step % CONFIG["delta_t"] == 0 for step in range(CONFIG["warmup"] + 1, STEPS)]
        assert all(not n for n, is_due in zip(later, due, strict=True) if not is_due)
        misses = [c["all_reduce"] - 1 for c in collectives if "all_gather" in c]
        assert all(c["all_gather"] == 1 for c in collectives if "all_gather" in c)
        assert len(misses) >= 5
        # There is no bracket yet for the first one; later a threshold may have left it.
        assert misses[0] <= 2
        assert max(misses[1:]) <= 1

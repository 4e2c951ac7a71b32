"""A stock Trainer under FSDP 2 through accelerate, on two CPU ranks: PinsCallback prunes as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsdp_job
import pytest
import torch
from bert import STEPS
from ranks import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pins_ext import PruneConfig, Pruner


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(2, fsdp_job.everything, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fused", "hooked"])
def test_masks_and_weights_are_those_of_one_process(ranks: list[dict[str, Any]], kind: str, tmp_path: Path) -> None:
    alone = fsdp_job.train(tmp_path, kind == "fused")
    assert len(set(alone["masks"])) > 4
    for told in ranks:
        assert told[kind]["type"] == "DistributedType.FSDP"
        for part in ("masks", "weights", "final", "at end"):
            assert told[kind][part] == alone[part], part
        assert told[kind]["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-5)


@pytest.mark.slow
def test_checkpointed_blocks_and_sharded_files_change_nothing(ranks: list[dict[str, Any]]) -> None:
    for told in ranks:
        for part in ("masks", "weights", "final", "evaluated"):
            assert told["options"][part] == told["fused"][part], part


@pytest.mark.slow
def test_mixed_precision_and_accumulation_have_one_mask_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    first, second = (told["bfloat16"] for told in ranks)
    assert first["masks"] == second["masks"]
    assert first["weights"] == second["weights"]
    assert first["final"]["zeros"] == ranks[0]["fused"]["final"]["zeros"]
    assert first["weights"][-1] != ranks[0]["fused"]["weights"][-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clipped", "clipped hooked", "clipped in pass"])
def test_gradients_are_clipped_by_the_norm_of_all_ranks(ranks: list[dict[str, Any]], name: str, tmp_path: Path) -> None:
    kind = fsdp_job.Clipped if "pass" in name else fsdp_job.Doubled
    fused = "hooked" not in name
    alone = fsdp_job.train(tmp_path, fused, kind=kind, max_norm=fsdp_job.MAX_NORM)
    assert len(alone["norms"]) == STEPS
    assert min(alone["norms"]) > 2 * fsdp_job.MAX_NORM
    for told in ranks:
        assert told[name]["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert told[name]["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-4)
        assert told[name]["final"]["zeros"] == alone["final"]["zeros"]
        assert told[name]["masks"] != told["fused" if fused else "hooked"]["masks"]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    for told in ranks:
        assert len(told["killed"]["masks"]) == 10
        assert told["resumed"]["masks"] == told["fused"]["masks"][8:]
        assert told["resumed"]["weights"] == told["fused"]["weights"][8:]
        assert len(told["fused"]["weights"]) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["latest", "best", "ema"])
def test_a_teacher_of_parts_is_that_of_one_process(ranks: list[dict[str, Any]], teacher: str, tmp_path: Path) -> None:
    alone = fsdp_job.train(tmp_path, True, teacher=teacher)
    for told in ranks:
        assert told[teacher]["weights"] != told["fused"]["weights"]
        for part in ("masks", "weights", "final", "at end"):
            assert told[teacher][part] == alone[part], part


@pytest.mark.slow
def test_a_teacher_of_parts_goes_on_from_a_checkpoint(ranks: list[dict[str, Any]]) -> None:
    for told in ranks:
        assert len(told["latest killed"]["masks"]) == 10
        assert told["latest resumed"]["masks"] == told["latest"]["masks"][8:]
        assert told["latest resumed"]["weights"] == told["latest"]["weights"][8:]


def outputs(sharded: bool) -> list[list[list[float]]]:
    """What a model says: in a view of it, in training after the view, and when it is finalized."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    if sharded:
        # All in one group, the outermost, which stays gathered after a forward pass.
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, said = torch.randn(5, 8), list[list[list[float]]]()
    with torch.no_grad():
        model(x)
    pruner = Pruner(model, optimizer, PruneConfig(sparsity=0.5, delta_t=4, warmup=0, cooldown=4), 12)
    with torch.no_grad():
        model(x)
    pruner.state_dict()
    for _ in range(6):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        said.append(model(x).tolist())
        with pruner.masked_view():
            said.append(model(x).tolist())
        said.append(model(x).tolist())
        pruner.finalize()
        said.append(model(x).tolist())
    return said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:finalize pruned in one go")
def test_weights_that_are_gathered_already_are_gathered_anew() -> None:
    alone = outputs(False)
    assert alone[0] == alone[2]
    assert alone[1] not in (alone[0], alone[3])
    for told in run(2, outputs, True):
        for here, there in zip(told, alone, strict=True):
            torch.testing.assert_close(torch.tensor(here), torch.tensor(there))

"""`pins-ext plan --model DIR`: from a config.json alone, of any size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from small_models import decoder_config

from pins_ext.cli.main import main

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def large(tmp_path: Path) -> str:
    """A folder with the configuration of Llama-3-70B and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    return str(tmp_path)


def test_seventy_billion_weights_need_no_memory(large: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--dtype", "bfloat16", "--state-dtype", "bfloat16", "--moment-dtype", "bfloat16", "--teacher", "none"]
    assert main(["plan", "--model", large, *small, "--ranks", "64"]) == 0
    said = capsys.readouterr().out
    assert "LlamaForCausalLM, 70,553,706,496 weights, bfloat16" in said
    assert "68,451,041,280 weights in 560 tensors (97.0% of the model)" in said
    assert "model.layers.{0..79}.self_attn.k_proj.weight  (1024, 8192)  x 80" in said
    assert "on each of 64 ranks, one copy of the model (FSDP):" in said
    # Arithmetic: 2 B weights, 2 B gradients, 4 B moments, 6 B statistics, all over 64 ranks.
    rows = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    for kind, each in (("weights", 2), ("gradients", 2), ("moments", 4)):
        assert f"{each * 70_553_706_496 / 64e9:.2f} GB" in rows[kind]
    assert f"{6 * 68_451_041_280 / 64e9:.2f} GB" in rows["statistics"]
    assert "24 GB  yes, 8.6 GB left" in said
    assert "80 GB  yes, 64.6 GB left; one copy of the model over 16 ranks does" in said
    assert "the largest is 4.20 GB" in said
    assert main(["plan", "--model", large, *small]) == 0
    assert "141 GB  no; one copy of the model over 8 ranks does" in capsys.readouterr().out


def test_flags_change_what_they_say(large: str, capsys: pytest.CaptureFixture[str]) -> None:
    def page(*more: str) -> str:
        assert main(["plan", "--model", large, *more]) == 0
        return " ".join(capsys.readouterr().out.split())

    plain = page("--teacher", "none")
    assert "teacher" not in plain
    assert "teacher 282.21 GB" in page()
    assert "moments" not in page("--optimizer", "sgd").split("fits")[0]
    for small in ("--state-dtype", "--moment-dtype"):
        assert "never on a GPU" in page(small, "8bit", "--dtype", "bfloat16")
    moved = page("--state-device", "cpu", "--teacher", "none").split("fits")[0]
    assert "statistics" in plain.split("fits")[0].split("together")[0]
    assert "statistics" not in moved.split("together")[0]
    # 12 B a weight of float32 states, a bit of the mask, twice the weights and gradients of the largest tensor.
    held = (12 + 1 / 8) * 68_451_041_280 + 2 * 8 * 8192 * 28672
    assert f"on the host {int(held / 1e9)}." in re.sub(r"(\d),(\d)", r"\1\2", moved)
    assert "8 copies of the model, 2 ranks each (HSDP)" in page("--ranks", "16", "--replicas", "8")
    assert "buckets 282.21 GB" in page("--ranks", "2", "--replicas", "2")
    assert "in 240 tensors" in page("--exclude", "*.self_attn.*")
    assert "plan with --dtype float32" in page("--ranks", "2", "--dtype", "bfloat16", "--bf16")


def test_small_set_ups_of_eight_billion_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Arithmetic beside the page: bytes of every weight, and of the pruned ones."""
    small = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B | small))
    n, pruned, head = 8_030_261_248, 6_979_321_856, 128_256 * 4096

    def page(*more: str) -> str:
        assert main(["plan", "--model", str(tmp_path), "--teacher", "none", "--dtype", "bfloat16", *more]) == 0
        return " ".join(capsys.readouterr().out.split())

    codes, mask = 34 / 32, 1 / 8
    every, released = (2 + 2 * codes) * n + 2 * n, (2 + 2 * codes) * n + 2 * head
    eight = ("--state-dtype", "8bit", "--moment-dtype", "8bit")
    said = page(*eight)
    both = (3 * codes + mask) * pruned
    frozen = 2 * n + 2 * 4096 * 14336 + both
    at_once = 2 * n + (2 + codes) * 4096 * 14336 + (2 * codes + mask) * pruned
    fisher = mask * pruned
    for name, size, fits in (
        ("8-bit moments and statistics", every + both, 80),
        ("8-bit moments and statistics .*? and --release-gradients", released + both, 80),
        ("fisher, 8-bit moments", every + fisher, 80),
        ("fisher, 8-bit moments .*? and --release-gradients", released + fisher, 48),
        ("below LoRA, 8 bits", frozen, 48),
        ("below LoRA, 8 bits .*? and --delta-t 1", at_once, 48),
    ):
        found = re.search(rf"{name} ([\d.]+) GB ([\d.]+) B a weight fits (\d+) GB", said)
        assert found is not None, name
        # The room of the selection comes on top.
        assert float(found[1]) == pytest.approx(size / 1e9, abs=0.02)
        assert float(found[2]) == pytest.approx(size / n, abs=0.01)
        assert int(found[3]) == fits
    flags = ("--release-gradients", "--max-grad-norm", "0")
    assert f"gradients {2 * head / 1e9:.2f} GB" in page(*eight, *flags)
    said = page("--state-dtype", "8bit", "--frozen-base")
    assert "moments" not in said.split("fits")[0]
    wide = 2 * (pruned + head) / 1e9
    copies = f"in the forward to that in backward: up to {wide:.2f} GB"
    assert copies in page("--bf16", "--dtype", "float32")
    assert "autocast" not in page("--bf16")


def test_autocast_keeps_a_copy_of_every_linear_weight() -> None:
    """What the page says of mixed precision, seen: copies that backward holds on to."""
    net = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
    held: list[int] = []

    def look(t: torch.Tensor) -> torch.Tensor:
        held.append(t.nbytes if t.dtype == torch.bfloat16 and t.numel() == 64 * 64 else 0)
        return t

    with torch.autograd.graph.saved_tensors_hooks(look, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(2, 64, requires_grad=True))
    assert sum(held) == 3 * 2 * 64 * 64


def test_a_tied_head_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = decoder_config()
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    embeddings, block = (257 + 64) * 16, 16 * 48 + 48 + 16 * 16 + 16 + 2 * 16 * 64 + 64 + 16 + 4 * 16
    assert f"GPT2LMHeadModel, {embeddings + block + 2 * 16:,} weights" in said
    assert "transformer.h.0.attn.c_attn.weight  (16, 48)" in said


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--ranks", "8", "--replicas", "3"], "8 ranks cannot hold 3 copies of the model"),
        (["--ranks", "0"], "0 ranks cannot hold 1 copies"),
        (["--ranks", "two"], "argument --ranks"),
        (["--exclude", "*nothing*"], "the pattern '*nothing*' matches no parameter"),
        (["--frozen-base", "--ranks", "2"], "are of one process, not of 2 ranks"),
        (["--state-device", "cpu", "--ranks", "2"], "weights that one process holds whole"),
        (["--state-device", "cpu", "--release-gradients", "--max-grad-norm", "0"], "leave one of them out"),
        (["--frozen-base", "--criterion", "fisher"], "a frozen base has none"),
        (["--frozen-base", "--state-dtype", "8bit", "--min-density", "0.1"], "leave min_density and max_density out"),
        (["--task", "rte", "--frozen-base"], "--frozen-base is about a model without data"),
        (["--optimizer", "muon"], "there is no 'muon'"),
        (["--optimizer", "ademamix"], "the size of ademamix's state is not known"),
        (["--task", "rte", "--ranks", "2"], "--ranks is about a model without data"),
        (["--model", "no/such/model"], "--model no/such/model"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    large: str, capsys: pytest.CaptureFixture[str], more: list[str], reason: str
) -> None:
    assert main(["plan", "--model", large, *more]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert reason in said

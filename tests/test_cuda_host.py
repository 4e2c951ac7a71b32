"""The CUDA kernels' source, compiled for the host and run thread by thread, against the reference formulas, bit for bit.

Index arithmetic (chunk table, scalar head, 16-byte body, scalar tail, mask bits, global index of shards) is the same
source on a GPU. AddressSanitizer and UBSan watch every access.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pins_ext import reference
from pins_ext.ops import CRITERIA, Layout, Shard, mask_bytes

SOURCE = Path(__file__).parent / "cuda_host.cpp"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATES = (torch.float32, torch.bfloat16)
STEPS = {
    "adamw": ("params", "exp_avg", "exp_avg_sq", "ipt", "shadow", "grads", "masks"),
    "sgd": ("params", "momentum_buffer", "ipt", "shadow", "grads", "masks"),
    "mask": ("params", "masks"),
}
THREADS = 128  # csrc/cuda/update.cu kThreads
SIZES = (0, 1, 3, 7, 8, 9, 31, 1030, 16383, 16384, 16385, 2 * 16384 + 5)


@dataclass
class Job:
    """One operator call: which lists, how they lie in memory, and the scalars."""

    step: str = "adamw"
    dtype: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    criterion: str = "pins"
    absent: tuple[str, ...] = ()
    sizes: Sequence[int] = (1030,)
    shards: Sequence[Shard | None] | None = None
    local: Sequence[tuple[int, ...]] | None = None  # shapes of the shards, instead of sizes
    base: int = 0
    misaligned: Callable[[str, int], int] = lambda name, tensor: 0  # in weights, per list and tensor
    clear_state: bool = False
    accepted: float = 2.0
    grad_scale: float | None = None
    clip: float | None = None
    found_inf: float | None = None
    rng: tuple[int, int] = (0x9ABCDEF0, 0x12345678)
    lists: dict[str, list[Tensor]] = field(init=False, repr=False)
    layout: Layout = field(init=False, repr=False)
    hyper: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(len(self.sizes) + 17 * len(self.criterion))
        shapes = self.local or [(n,) for n in self.sizes]
        self.layout = Layout.of([torch.empty(shape) for shape in shapes], self.shards, self.base)
        numel = [torch.Size(shape).numel() for shape in shapes]

        def values(name: str, n: int) -> Tensor:
            x = torch.randn(n, generator=generator) * 10 ** (4 * torch.rand(n, generator=generator) - 3)
            x[torch.rand(n, generator=generator) < 0.1] = 0.0
            x[torch.rand(n, generator=generator) < 0.02] *= 1e-39
            return x.abs() if name in ("exp_avg_sq", "ipt") else x

        self.lists = {}
        for name in STEPS[self.step]:
            if name in self.absent:
                self.lists[name] = []
            elif name == "masks":
                keep = [torch.rand(n, generator=generator) < 0.6 for n in numel]
                self.lists[name] = [reference.pack_bits(k) if k.numel() else torch.empty(0, dtype=torch.uint8) for k in keep]
                assert [m.numel() for m in self.lists[name]] == [mask_bytes(n) for n in numel]
            else:
                self.lists[name] = [values(name, n).to(self.state if name == "ipt" else self.dtype) for n in numel]
        self.hyper = self._hyper(len(numel), generator)

    def _hyper(self, n: int, generator: torch.Generator) -> Tensor:
        rows = 0.1 + 0.8 * torch.rand(n, 8, generator=generator)
        rows[:, 0] = torch.tensor([3e-5 * (i + 1) for i in range(n)])
        if self.step == "sgd":
            rows[:, 1] = torch.arange(n) % 2 * 0.01
            rows[:, 2] = 0.0 if "momentum_buffer" in self.absent else torch.arange(n) % 3 * 0.4
            rows[:, 4] = (torch.arange(n) % 5 == 1).float()
            rows[:, 5] = (torch.arange(n) % 4 > 1).float()
            rows[:, 6] = -rows[:, 0]
        elif self.step == "adamw":
            rows[:, 2] = torch.tensor([0.1, 0.6])[torch.arange(n) % 2]  # both branches of lerp
            rows[:, 5] = -rows[:, 0]
            rows[:, 7] = 1e-8
        return rows

    def pack(self) -> bytes:
        """The job in the format of cuda_host.cpp."""
        names = STEPS[self.step]
        given = sum(1 << k for k, name in enumerate(names) if self.lists[name])
        options = (self.grad_scale, self.clip, self.found_inf)
        flags = sum(1 << k for k, option in enumerate(options) if option is not None)
        n, m = len(self.layout.rows), len(self.layout.chunks)
        header = (
            list(STEPS).index(self.step), DTYPES.index(self.dtype), STATES.index(self.state),
            CRITERIA.index(self.criterion), self.clear_state, len(names), given, n, m, THREADS, flags,
        )  # fmt: skip
        scalars = (self.accepted, *(option or 0.0 for option in options))
        parts = [struct.pack("<11q", *header), _bytes(self.layout.rows), _bytes(self.layout.chunks), _bytes(self.hyper)]
        parts += [struct.pack("<2q", *self.rng), struct.pack("<4f", *scalars)]
        for name in names:
            for i in range(n):
                data = _bytes(self.lists[name][i]) if self.lists[name] else b""
                size = self.lists[name][i].element_size() if self.lists[name] else 0
                parts += [struct.pack("<2q", size * self.misaligned(name, i), len(data)), data]
        return b"".join(parts)

    def unpack(self, data: bytes) -> tuple[int, dict[str, list[Tensor]], bytes]:
        """Number of accesses, the lists after the update, and the data of the jobs behind this one."""
        (accesses,) = struct.unpack_from("<q", data)
        at, after = 8, {}
        for name, tensors in self.lists.items():
            after[name] = []
            for tensor in tensors:
                end = at + tensor.numel() * tensor.element_size()
                after[name].append(torch.frombuffer(bytearray(data[at:end]) or bytearray(8), dtype=tensor.dtype)[: tensor.numel()])
                at = end
        return accesses, after, data[at:]

    def expected(self) -> dict[str, list[Tensor]]:
        """The lists after the update by the reference's formulas."""
        after = {name: [tensor.clone() for tensor in tensors] for name, tensors in self.lists.items()}
        if self.found_inf:
            return after
        for i in range(len(self.layout.rows)):
            self._expect(i, after)
        return after

    def _expect(self, i: int, after: dict[str, list[Tensor]]) -> None:
        old = {name: tensors[i] for name, tensors in self.lists.items() if tensors}
        p = old["params"].float()
        keep = reference.unpack_bits(old["masks"], p.shape) if "masks" in old else torch.ones_like(p, dtype=torch.bool)
        if self.step == "mask":
            after["params"][i] = torch.where(keep, old["params"], 0)
            return
        g = old["grads"].float()
        if self.grad_scale is not None:
            g = g / torch.tensor(self.grad_scale)
        if self.clip is not None:
            g = g * torch.tensor(self.clip)
        row = self.hyper[i]
        if self.step == "adamw":
            p_next, moments = adamw(p, g, old["exp_avg"].float(), old["exp_avg_sq"].float(), row)
        else:
            p_next, moments = sgd(p, g, old.get("momentum_buffer", torch.zeros_like(p)).float(), row)
        for name, moment in moments.items():
            if name in old:
                after[name][i] = torch.where(keep | (not self.clear_state), moment, 0.0).to(self.dtype)
        if "ipt" in old:
            c = reference.instant_score(self.criterion, old.get("shadow", p), p_next, g, row[0].item())
            ipt = reference.next_ipt(self.criterion, old["ipt"], c, int(self.accepted))
            bits = reference.random_bits(reference.global_index(self.layout.rows[i]), *self.rng)
            after["ipt"][i] = reference.store(ipt, self.state, bits)
        if "shadow" in old:
            after["shadow"][i] = p_next.to(self.dtype)
        after["params"][i] = torch.where(keep, p_next, 0.0).to(self.dtype)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c with one rounding to float32: the exact product, a sum in float64 rounded to odd, then float32."""
    product, c = a.double() * b.double(), c.double()
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    even = total.view(torch.int64) & 1 == 0
    toward = torch.where(error > 0, torch.inf, -torch.inf).double()
    return torch.where((error != 0) & even, torch.nextafter(total, toward), total).float()


def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, row: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """torch.optim.AdamW's arithmetic; `row` as AdamWRow."""
    _, decay, weight, beta2, one_minus_beta2, minus_step_size, bias_sqrt, eps = row
    p = p * decay
    m = fma(weight, g - m, m) if weight < 0.5 else fma(weight - 1, g - m, g)
    v = fma(one_minus_beta2 * g, g, v * beta2)
    root = v.double().sqrt().float()  # torch's float32 sqrt on a CPU may be MKL's, a last bit off
    return p + (minus_step_size * m) / (root / bias_sqrt + eps), {"exp_avg": m, "exp_avg_sq": v}


def sgd(p: Tensor, g: Tensor, buffer: Tensor, row: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """torch.optim.SGD's arithmetic; `row` as SgdRow."""
    _, weight_decay, momentum, one_minus_dampening, first, nesterov, minus_lr, _ = row
    if weight_decay != 0:
        g = fma(weight_decay, p, g)
    if momentum != 0:
        buffer = g if first else fma(one_minus_dampening, g, buffer * momentum)
        g = fma(momentum, buffer, g) if nesterov else buffer
    return fma(minus_lr, g, p), {"momentum_buffer": buffer}


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is missing: the CUDA kernels' source cannot be run on the host")
    program = tmp_path_factory.mktemp("cuda_host") / "cuda_host"
    flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Werror", "-fsanitize=address"]
    flags += ["-fsanitize=alignment,bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(program)], check=True)
    return program


def run(host: Path, *jobs: Job) -> list[int]:
    """Runs the jobs, holds every list against the reference, and returns the number of accesses of each job."""
    done = subprocess.run([host], input=b"".join(job.pack() for job in jobs), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    data, counts = done.stdout, []
    for job in jobs:
        accesses, after, data = job.unpack(data)
        counts.append(accesses)
        for name, tensors in job.expected().items():
            for i, (got, want) in enumerate(zip(after[name], tensors, strict=True)):
                torch.testing.assert_close(
                    got, want, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{job.step} {name}[{i}] of {job}: {text}"  # noqa: B023
                )
    assert not data
    return counts


def edges(head: int, n: int, width: int) -> tuple[int, int]:
    """Wide and scalar accesses that each stream of a chunk of n weights needs."""
    head = min(head, n)
    return (n - head) // width, n - (n - head) // width * width


@pytest.mark.parametrize("step", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_every_size(host: Path, step: str, dtype: torch.dtype, state: torch.dtype) -> None:
    run(host, Job(step, dtype, state, sizes=SIZES, grad_scale=1024.0, clip=0.7, clear_state=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_shared_misalignment_has_a_scalar_head_and_a_wide_body(host: Path, dtype: torch.dtype, state: torch.dtype) -> None:
    width = 16 // dtype.itemsize
    sizes = (1, width, 777, 16384 + 333)
    jobs = [
        Job("adamw", dtype, state, sizes=sizes, absent=absent, misaligned=lambda name, i, k=k: k if name != "masks" else i)
        for k in range(width)
        for absent in (("masks", "shadow"), ())
    ]
    counts = run(host, *jobs)
    for k, count in zip(range(width), counts[::2], strict=True):
        # A chunk starts 16384 weights after the tensor, so with the tensor's own alignment.
        parts = [edges(-k % width, min(16384, n - at), width) for n in sizes for at in range(0, n, 16384)]
        streams = 5 + 4  # read p g m v ipt, write p m v ipt
        assert count == streams * sum(map(sum, parts))


@pytest.mark.parametrize("stream", ["params", "exp_avg", "exp_avg_sq", "ipt", "shadow", "grads"])
def test_one_stream_apart_is_walked_weight_by_weight(host: Path, stream: str) -> None:
    jobs = [
        Job("adamw", dtype, state, sizes=(1, 9, 1030), absent=("masks",), misaligned=lambda name, i: int(name == stream))
        for dtype in DTYPES
        for state in STATES
    ]
    assert run(host, *jobs) == [(6 + 5) * (1 + 9 + 1030)] * len(jobs)


def test_a_window_s_first_score_does_not_read_ipt(host: Path) -> None:
    first, later, movement = run(
        host,
        Job(accepted=0, absent=("masks", "shadow"), sizes=(64,)),
        Job(accepted=1, absent=("masks", "shadow"), sizes=(64,)),
        Job(accepted=0, absent=("masks", "shadow"), sizes=(64,), criterion="movement"),
    )
    assert (first, later, movement) == (8 * 16, 9 * 16, 9 * 16)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_and_option(host: Path, criterion: str) -> None:
    run(
        host,
        *(
            Job(step, dtype, state, criterion, absent, (5, 301), accepted=accepted, clear_state=clear, clip=clip)
            for step in ("adamw", "sgd")
            for dtype, state in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16))
            for absent in ((), ("shadow",), ("masks",))
            for accepted, clear, clip in ((0, False, None), (3, True, 0.3))
        ),
    )


@pytest.mark.parametrize("absent", ["ipt", "momentum_buffer"])
def test_lists_that_are_not_wanted(host: Path, absent: str) -> None:
    steps = ("adamw", "sgd") if absent == "ipt" else ("sgd",)
    run(host, *(Job(step, dtype, absent=(absent, "shadow"), misaligned=lambda name, i: 1) for step in steps for dtype in DTYPES))


def test_found_inf_touches_nothing(host: Path) -> None:
    skipped, taken = run(host, Job(found_inf=1.0, sizes=SIZES), Job(found_inf=0.0, sizes=(300,)))
    assert skipped == 0
    assert taken > 0


@pytest.mark.parametrize(
    ("full", "local", "start"),
    [
        ((64, 700), (64, 300), (0, 200)),  # columns
        ((300, 100), (77, 100), (200, 0)),  # rows: one run
        ((9, 40, 50), (7, 30, 21), (1, 5, 20)),  # three dimensions
        ((5, 6, 7, 8), (3, 4, 5, 6), (1, 1, 1, 1)),
        ((4, 3, 1000), (4, 2, 3), (0, 1, 500)),  # runs shorter than an access
        ((3, 20000), (3, 17000), (0, 3000)),  # runs longer than a chunk
    ],
)
@pytest.mark.parametrize("base", [0, (1 << 32) - 1003, (1 << 41) + 12345])
def test_stochastic_rounding_follows_the_global_index_of_a_shard(
    host: Path, full: tuple[int, ...], local: tuple[int, ...], start: tuple[int, ...], base: int
) -> None:
    run(
        host,
        *(
            Job("sgd", dtype, torch.bfloat16, local=[local], shards=[Shard(full, start)], base=base, misaligned=lambda *_: k)
            for dtype in (torch.float32, torch.bfloat16)
            for k in (0, 3)
        ),
    )


def test_global_index_carries_inside_an_access(host: Path) -> None:
    # Every offset of the carry from the low to the high 32 bits within an access.
    run(host, *(Job(state=torch.bfloat16, sizes=(64,), base=(1 << 32) - k) for k in range(1, 65, 3)))
    run(host, *(Job(dtype=torch.bfloat16, state=torch.bfloat16, sizes=(64,), base=(1 << 32) - k) for k in range(1, 65)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_alone(host: Path, dtype: torch.dtype) -> None:
    jobs = [Job("mask", dtype, sizes=SIZES, misaligned=lambda name, i, k=k: k if name == "params" else i) for k in range(9)]
    for job in jobs:
        for tensor in job.lists["params"]:
            tensor[::5] = float("nan")
    run(host, *jobs)


def test_mask_alone_leaves_full_accesses_unwritten(host: Path) -> None:
    job = Job("mask", sizes=(64,))
    job.lists["masks"] = [torch.full((8,), 255, dtype=torch.uint8)]
    (kept,) = run(host, job)
    job.lists["masks"][0][2] = 0xF0
    (written,) = run(host, job)
    assert written == kept + 1

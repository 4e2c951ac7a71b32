"""Calls of the update operators with random operands, and what they should leave: shared by the tests of csrc/cuda."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pins_ext import reference
from pins_ext.ops import CRITERIA, Layout, Shard, mask_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATES = (torch.float32, torch.bfloat16)
STEPS = {
    "adamw": ("params", "exp_avg", "exp_avg_sq", "ipt", "shadow", "grads", "masks"),
    "sgd": ("params", "momentum_buffer", "ipt", "shadow", "grads", "masks"),
    "mask": ("params", "masks"),
}
THREADS = 128  # csrc/cuda/update.cu kThreads
SIZES = (0, 1, 3, 7, 8, 9, 31, 1030, 16383, 16384, 16385, 2 * 16384 + 5)
"""Empty, one, odd, around an access and around a chunk."""


Lists = dict[str, list[Tensor]]
"""The list arguments of an operator, by name and in order."""


@dataclass
class Job:
    """One operator call: which lists, how they lie in memory, and the scalars."""

    step: str = "adamw"
    dtype: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    moments: torch.dtype | None = None  # of AdamW; None: float32
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
    lists: Lists = field(init=False, repr=False)
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
                self.lists[name] = [reference.pack_bits(k) for k in keep]
                assert [m.numel() for m in self.lists[name]] == [mask_bytes(n) for n in numel]
            else:
                self.lists[name] = [values(name, n).to(self.storage(name)) for n in numel]
        self.hyper = self._hyper(len(numel), generator)

    def storage(self, name: str) -> torch.dtype:
        """The dtype of a list."""
        if name.startswith("exp_avg"):
            return self.moments or torch.float32
        return self.state if name == "ipt" else self.dtype

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
        names = tuple(self.lists)
        given = sum(1 << k for k, name in enumerate(names) if self.lists[name])
        options = (self.grad_scale, self.clip, self.found_inf)
        flags = sum(1 << k for k, option in enumerate(options) if option is not None)
        n, m = len(self.layout.places), len(self.layout.chunks)
        header = (
            list(STEPS).index(self.step), DTYPES.index(self.dtype), STATES.index(self.state),
            DTYPES.index(self.storage("exp_avg")), CRITERIA.index(self.criterion), self.clear_state, len(names), given,
            n, m, THREADS, flags,
        )  # fmt: skip
        scalars = (self.accepted, *(option or 0.0 for option in options))
        parts = [
            struct.pack("<12q", *header),
            _bytes(self.layout.places),
            _bytes(self.layout.chunks),
            _bytes(self.hyper),
        ]
        parts += [struct.pack("<2q", *self.rng), struct.pack("<4f", *scalars)]
        for name in names:
            for i in range(n):
                data = _bytes(self.lists[name][i]) if self.lists[name] else b""
                size = self.lists[name][i].element_size() if self.lists[name] else 0
                parts += [struct.pack("<2q", size * self.misaligned(name, i), len(data)), data]
        return b"".join(parts)

    def unpack(self, data: bytes) -> tuple[int, Lists, bytes]:
        """Number of accesses, the lists after the update, and the data of the jobs behind this one."""
        (accesses,) = struct.unpack_from("<q", data)
        at, after = 8, {}
        for name, tensors in self.lists.items():
            after[name] = []
            for tensor in tensors:
                size = tensor.numel() * tensor.element_size()
                after[name].append(torch.frombuffer(bytearray(data[at : at + size] + b"\0"), dtype=torch.uint8)[:size])
                after[name][-1] = after[name][-1].view(tensor.dtype)
                at += size
        return accesses, after, data[at:]

    def place(self, device: str) -> Lists:
        """Copies of the lists on a device, misaligned as the job says."""
        placed: Lists = {}
        for name, tensors in self.lists.items():
            placed[name] = []
            for i, tensor in enumerate(tensors):
                k = self.misaligned(name, i)
                storage = torch.empty(tensor.numel() + k, dtype=tensor.dtype, device=device)
                placed[name].append(storage[k:].copy_(tensor))
        return placed

    def arguments(self, lists: Lists) -> tuple[tuple[object, ...], dict[str, Tensor]]:
        """Arguments of `self.op` on placed lists: those by position, and the scalars that are given."""
        device = lists["params"][0].device
        tables = (self.layout.places.to(device), self.layout.chunks.to(device))
        if self.step == "mask":
            return (*lists.values(), *tables), {}
        accepted = torch.tensor([self.accepted], dtype=torch.float32, device=device)
        rng = torch.tensor(self.rng, dtype=torch.int64, device=device)
        scalars = {"grad_scale": self.grad_scale, "clip": self.clip, "found_inf": self.found_inf}
        given = {name: torch.tensor([x], device=device) for name, x in scalars.items() if x is not None}
        arguments = (*lists.values(), *tables, self.hyper.to(device), accepted, rng, self.criterion, self.clear_state)
        return arguments, given

    @property
    def op(self) -> Callable[..., None]:
        names = {"adamw": "masked_adamw_", "sgd": "masked_sgd_", "mask": "apply_mask_"}
        return getattr(torch.ops.pins_ext, names[self.step])

    def check(self, after: Lists, expected: Lists | None = None) -> None:
        """The same bits in every place, but that a NaN may be any NaN."""
        for name, tensors in (expected or self.expected()).items():
            for i, (got, want) in enumerate(zip(after[name], tensors, strict=True)):
                same = (_number_bits(got.cpu()) == _number_bits(want)) & (got.cpu().isnan() == want.isnan())
                assert same.all(), f"{int((~same).sum())} weights of {name}[{i}] differ: {self}"

    def expected(self) -> Lists:
        """The lists after the update by the reference's formulas."""
        after = {name: [tensor.clone() for tensor in tensors] for name, tensors in self.lists.items()}
        if self.found_inf:
            return after
        for i in range(len(self.layout.places)):
            self._expect(i, after)
        return after

    def _expect(self, i: int, after: Lists) -> None:
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
        bits = reference.update_bits(reference.global_index(self.layout.places[i]), *self.rng)
        for kind, (name, moment) in zip(("first", "second"), moments.items(), strict=False):
            if name in old:
                kept = torch.where(keep | (not self.clear_state), moment, 0.0)
                after[name][i] = reference.store(kept, self.storage(name), bits[kind])
        if "ipt" in old:
            c = reference.instant_score(self.criterion, old.get("shadow", p), p_next, g, row[0].item())
            ipt = reference.next_ipt(self.criterion, old["ipt"], c, int(self.accepted))
            after["ipt"][i] = reference.store(ipt, self.state, bits["ipt"])
        if "shadow" in old:
            after["shadow"][i] = reference.store(p_next, self.dtype, bits["params"])
        after["params"][i] = reference.store(torch.where(keep, p_next, 0.0), self.dtype, bits["params"])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _number_bits(x: Tensor) -> Tensor:
    bits = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()]
    return x.masked_fill(x.isnan(), 0).view(bits)


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

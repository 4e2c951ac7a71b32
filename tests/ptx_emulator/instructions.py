"""One PTX instruction as a row of the interpreter's table. Anything not understood raises."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .names import ATOMS, COMPARISONS, FLOATING, JOINS, OPS, ROUNDINGS, SHUFFLES, SPACES, TYPES, VOTES, words

ROW = np.dtype(
    [(name, "i4") for name in ("op", "ty", "ty2", "pred", "pneg", "mod", "mod2", "space", "nd", "ns")]
    + [("dst", "i4", 8), ("src", "i4", 8), ("target", "i4"), ("line", "i4"), ("imm", "i8")]
)
"""machine/launch.h Ins: operation, types, guard, modifiers, operands, branch target, line of the text, immediate."""

CONSTANT = 1 << 30
"""An operand from here on is a constant."""

NOTHING = -1

SPECIAL = words("""%tid.x %tid.y %tid.z %ntid.x %ntid.y %ntid.z %ctaid.x %ctaid.y %ctaid.z %nctaid.x %nctaid.y %nctaid.z
%laneid %warpid %nwarpid %lanemask_lt %lanemask_le %lanemask_gt %lanemask_ge %lanemask_eq %clock %clock64 %globaltimer
%smid %nsmid %cluster_ctaid.x %cluster_ctarank %is_explicit_cluster""")


class PTXError(Exception):
    """PTX that the emulator does not understand."""


class Scope:
    """Registers, constants and symbols of an entry's body.

    Args:
        symbols: offsets of parameters, addresses of shared variables.
    """

    def __init__(self, symbols: dict[str, int]) -> None:
        self.symbols = symbols
        self.registers = {name: i for i, name in enumerate(SPECIAL)}
        self.constants: dict[int, int] = {}
        self._blocks: list[dict[str, str]] = [{}]

    def open(self) -> None:
        self._blocks.append({})

    def close(self) -> None:
        self._blocks.pop()

    def declare(self, names: str) -> None:
        """The names of a `.reg` directive: "%p<3>" or "a, b"."""
        for name in map(str.strip, names.split(",")):
            if m := re.match(r"([%\w$]+)<(\d+)>$", name):
                for i in range(int(m[2])):
                    self._new(f"{m[1]}{i}")
            else:
                self._new(name)

    def _new(self, name: str) -> None:
        unique = name if len(self._blocks) == 1 else f"{name}@{len(self.registers)}"
        self._blocks[-1][name] = unique
        self.registers[unique] = len(self.registers)

    def register(self, name: str) -> int | None:
        for block in reversed(self._blocks):
            if name in block:
                return self.registers[block[name]]
        return self.registers.get(name)

    def constant(self, value: int) -> int:
        return CONSTANT + self.constants.setdefault(value & ((1 << 64) - 1), len(self.constants))

    def operand(self, text: str, ty: str = "b64") -> int:
        """Register, symbol or number; `ty` says how a floating-point number is read."""
        text = text.strip()
        if text == "_":
            return NOTHING
        if (register := self.register(text)) is not None:
            return register
        if (m := re.fullmatch(r"([\w$]+)(?:\+(\d+))?", text)) and m[1] in self.symbols:
            return self.constant(self.symbols[m[1]] + int(m[2] or 0))
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            bits = bytes.fromhex(m[1])
            wide = ty == "f64"
            return self.constant(int.from_bytes(struct.pack(">d", *struct.unpack(">f", bits)) if wide else bits))
        if m := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
            bits = bytes.fromhex(m[1])
            narrow = ty == "f32"
            return self.constant(int.from_bytes(struct.pack(">f", *struct.unpack(">d", bits)) if narrow else bits))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return self.constant(int(text.rstrip("U"), 0))
        if text == "WARP_SZ":
            return self.constant(32)
        raise PTXError(f"operand not understood: {text!r}")

    def address(self, text: str) -> tuple[int, int]:
        """Base operand and offset of "[base + offset]"."""
        m = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", text.strip())
        if not m:
            raise PTXError(f"address not understood: {text!r}")
        return self.operand(m[1]), int(m[3], 0) * (-1 if m[2] == "-" else 1) if m[3] else 0


def split_operands(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def vector(text: str) -> list[str]:
    return [x.strip() for x in text.strip().removeprefix("{").removesuffix("}").split(",")]


# Instructions of one result: operation, and the modifiers it may have. Rounding to nearest is what `rn` and none mean.
PLAIN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("add", "sub"), ("rn", "ftz")),
    **dict.fromkeys(("neg", "abs", "not", "cnot", "clz", "popc", "brev"), ("ftz",)),
    **dict.fromkeys(("sqrt", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh"), ("rn", "approx", "ftz")),
    **dict.fromkeys(("and", "or", "xor", "shl", "shr", "bfe", "bfi", "prmt", "copysign", "lop3", "selp"), ()),
    "fma": ("rn", "ftz"),
    "div": ("rn", "full", "approx", "ftz"),
    "rem": (),
}
CACHING = re.compile(r"(L1::\w+|L2::\w+|ca|cg|cs|cv|wb|wt|evict_\w+|no_allocate|nc)$")
ORDERING = ("relaxed", "acquire", "release", "acq_rel", "volatile", "weak", "gpu", "cta", "sys", "cluster")


class Decoder:
    """One instruction: `row` is its row of the table, `label` where it branches to, if it does."""

    def __init__(self, scope: Scope, text: str) -> None:
        self.scope, self.row, self.label = scope, dict[str, Any](), None
        if m := re.match(r"@(!?)(%?[\w$]+)\s+(.*)$", text, re.DOTALL):
            guard = scope.register(m[2])
            if guard is None:
                raise PTXError("guard not declared")
            self.row["pred"], self.row["pneg"], text = guard, int(m[1] == "!"), m[3]
        m = re.match(r"([a-z]\w*(?:\.[\w:]+)*)\s*(.*)$", text, re.DOTALL)
        if not m:
            raise PTXError("not an instruction")
        self.base, *self.modifiers = m[1].split(".")
        self.operands = split_operands(m[2])
        self.types = [x for x in self.modifiers if x in TYPES]
        self.ty = self.types[0] if self.types else "b32"
        self.ty2 = self.types[1] if len(self.types) > 1 else self.ty
        self.row["ty"], self.row["ty2"] = TYPES.index(self.ty), TYPES.index(self.ty2)
        self._decode()

    def _decode(self) -> None:
        if self.base in ("mul", "mad"):
            return self._multiply()
        if self.base in PLAIN:
            return self._plain(self.base, *PLAIN[self.base])
        method: Callable[[], None] | None = getattr(self, f"_{self.base}", None)
        if method is None:
            raise PTXError("instruction not implemented")
        return method()

    # ---- what decoding consists of ----

    def _op(self, name: str, results: list[str], sources: list[str], ty: str | None = None) -> None:
        self.row["op"] = OPS.index(name)
        self.row["dst"] = [self.scope.operand(x) for x in results]
        self.row["src"] = [self.scope.operand(x, ty or self.ty) for x in sources]

    def _known(self, *allowed: str) -> None:
        for x in self.modifiers:
            if x not in allowed and x not in self.types:
                raise PTXError(f"modifier .{x} not understood")

    def _one_of(self, names: list[str], default: str | None = None) -> str:
        found = next((x for x in self.modifiers if x in names), default)
        if found is None:
            raise PTXError(f"none of {', '.join(names)}")
        return found

    def _space(self) -> str:
        return next((x.split("::")[0] for x in self.modifiers if x.split("::")[0] in SPACES), "generic")

    # ---- arithmetic ----

    def _plain(self, name: str, *allowed: str) -> None:
        self._known(*allowed)
        self._op(name, self.operands[:1], self.operands[1:])
        self.row["mod2"] = int("ftz" in self.modifiers)

    def _multiply(self) -> None:
        if self.ty in FLOATING:
            return self._plain("mul_lo" if self.base == "mul" else "fma", "rn", "ftz")
        kind = self._one_of(["lo", "hi", "wide"])
        return self._plain(f"{self.base}_{kind}", kind)

    def _min(self) -> None:
        self._plain(self.base, "ftz", "NaN")
        self.row["mod"] = int("NaN" in self.modifiers)

    _max = _min

    def _shf(self) -> None:
        self._plain("shf", "l", "r", "wrap", "clamp")
        self.row["mod"], self.row["mod2"] = int("r" in self.modifiers), int("wrap" in self.modifiers)

    def _dp4a(self) -> None:
        if self.types != ["u32", "u32"]:
            raise PTXError("dp4a of signed bytes is not implemented")
        self._plain("dp4a")

    def _setp(self) -> None:
        comparison, join = self._one_of(COMPARISONS), self._one_of(JOINS, "none")
        self._known(comparison, join, "ftz")
        joined = self.operands[3:]
        self._op("setp", self.operands[0].split("|"), [*self.operands[1:3], *(x.lstrip("!") for x in joined)])
        self.row["mod"], self.row["mod2"] = COMPARISONS.index(comparison), JOINS.index(join)
        self.row["imm"] = int(bool(joined) and joined[0].startswith("!"))

    def _set(self) -> None:
        comparison = self._one_of(COMPARISONS)
        self._known(comparison, "ftz")
        self._op("set", self.operands[:1], self.operands[1:], self.ty2)
        self.row["mod"] = COMPARISONS.index(comparison)

    def _mov(self) -> None:
        self._known()
        result, source = self.operands
        if result.startswith("{"):
            self._op("movunpack", vector(result), [source])
        elif source.startswith("{"):
            self._op("movpack", [result], vector(source))
        else:
            self._op("mov", [result], [source])

    def _cvta(self) -> None:
        # Generic and global addresses are the same numbers here.
        self._known("to", "global")
        if "global" not in self.modifiers:
            raise PTXError("cvta of this space is not implemented")
        self._op("mov", self.operands[:1], self.operands[1:])

    def _cvt(self) -> None:
        self._known(*ROUNDINGS, "ftz", "sat")
        self._op("cvt2" if len(self.operands) == 3 else "cvt", self.operands[:1], self.operands[1:], self.ty2)
        self.row["mod"] = ROUNDINGS.index(self._one_of(ROUNDINGS, "none"))
        self.row["mod2"] = int("ftz" in self.modifiers) | 2 * int("sat" in self.modifiers)

    # ---- memory ----

    def _memory(self) -> int:
        """Checks the modifiers of a load or store; the number of elements."""
        vectors = ("v2", "v4", "v8")
        for x in self.modifiers:
            if x not in (*self.types, *vectors, *ORDERING) and x.split("::")[0] not in SPACES and not CACHING.match(x):
                raise PTXError(f"modifier .{x} not understood")
        if len(self.operands) > 2:
            raise PTXError("cache policies are not implemented")
        self.row["space"] = SPACES.index(self._space())
        return next((int(x[1]) for x in self.modifiers if x in vectors), 1)

    def _ld(self) -> None:
        elements = self._memory()
        base, self.row["imm"] = self.scope.address(self.operands[1])
        self._op("ld", vector(self.operands[0]), [])
        self.row["src"] = [base]
        if len(self.row["dst"]) != elements:
            raise PTXError("vector width and operands differ")

    def _st(self) -> None:
        elements = self._memory()
        base, self.row["imm"] = self.scope.address(self.operands[0])
        self._op("st", [], vector(self.operands[1]))
        if len(self.row["src"]) != elements:
            raise PTXError("vector width and operands differ")
        self.row["src"] = [base, *self.row["src"]]

    def _atom(self) -> None:
        kind, space = self._one_of(ATOMS), self._space()
        self._known(kind, space, "shared::cta", "noftz", *ORDERING)
        results = self.operands[:1] if self.base == "atom" else ["_"]
        address, *values = self.operands[len(self.operands[:1]) if self.base == "atom" else 0 :]
        base, self.row["imm"] = self.scope.address(address)
        self._op("atom", results, values)
        self.row["src"] = [base, *self.row["src"]]
        self.row["space"], self.row["mod"] = SPACES.index(space), ATOMS.index(kind)

    _red = _atom

    def _cp(self) -> None:
        if "async" not in self.modifiers:
            raise PTXError("cp of this kind is not implemented")
        if any(x in self.modifiers for x in ("commit_group", "wait_group", "wait_all")):
            return self._op("nop", [], [])
        if self._space() != "shared":
            raise PTXError("cp.async of this kind is not implemented")
        to, self.row["imm"] = self.scope.address(self.operands[0])
        source, self.row["target"] = self.scope.address(self.operands[1])
        self._op("cpasync", [], self.operands[2:])
        self.row["src"] = [to, source, *self.row["src"]]
        return None

    # ---- control, barriers, whole warps ----

    def _bra(self) -> None:
        self._known("uni")
        self._op("bra", [], [])
        self.label = self.operands[0]

    def _bar(self) -> None:
        if "warp" in self.modifiers:
            return self._op("warpsync", [], self.operands[:1])
        if "sync" not in self.modifiers:
            raise PTXError("barrier not implemented")
        return self._op("bar", [], self.operands)

    _barrier = _bar

    def _shfl(self) -> None:
        kind = self._one_of(SHUFFLES)
        self._known(kind, "sync")
        self._op("shfl", self.operands[0].split("|"), self.operands[1:])
        self.row["mod"] = SHUFFLES.index(kind)

    def _vote(self) -> None:
        kind = self._one_of(VOTES)
        self._known(kind, "sync")
        self._op("vote", self.operands[:1], [self.operands[1].lstrip("!"), self.operands[2]])
        self.row["mod"], self.row["imm"] = VOTES.index(kind), int(self.operands[1].startswith("!"))

    def _redux(self) -> None:
        kind = self._one_of(ATOMS)
        self._known(kind, "sync")
        self._op("redux", self.operands[:1], self.operands[1:])
        self.row["mod"] = ATOMS.index(kind)

    def _match(self) -> None:
        kind = self._one_of(["any", "all"])
        self._known(kind, "sync")
        self._op(f"match_{kind}", self.operands[0].split("|"), self.operands[1:])

    def _activemask(self) -> None:
        self._op("activemask", self.operands[:1], [])

    def _ret(self) -> None:
        self._op("ret", [], [])

    _exit = _ret

    def _trap(self) -> None:
        self._op("trap", [], [])

    def _membar(self) -> None:
        # Memory is sequentially consistent here.
        self._op("nop", [], [])

    _fence = _griddepcontrol = _nanosleep = _prefetch = _discard = _membar

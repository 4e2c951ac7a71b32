"""PTX text to entries: parameters, shared memory, and a table of instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .instructions import NOTHING, ROW, Decoder, PTXError, Scope
from .names import BITS, OPS

SHARED_BASE = 4096
"""Address of the first byte of shared memory; machine/launch.h kSharedBase."""

SHARED = re.compile(r"(?:\.visible\s+|\.weak\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?")
EXTERN_SHARED = re.compile(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]")
ENTRY = re.compile(r"(?:\.visible\s+|\.weak\s+)?\.entry\b")
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+)?(?:\.(?:global|shared|const)\s+)?"
    r"(?:\.align\s+\d+\s+)?([\w$]+)(?:\[(\d+)\])?$"
)


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter and its place among the bytes of a launch."""

    name: str
    size: int
    offset: int


@dataclass
class Entry:
    """A kernel.

    Attributes:
        target: of the module, such as "sm_90a".
        threads: most that a block may have, 0 if it is not said.
        code: table of instructions.ROW.
        registers: how many.
        constants: uint64 values.
        lines: per instruction, its line and text.
        where: per instruction, the source line before it.
        static_shared: bytes.
        extern_shared: offset of the memory that a launch asks for, None if there is none.
    """

    name: str
    parameters: list[Parameter]
    target: str
    threads: int
    code: np.ndarray = field(default_factory=lambda: np.zeros(0, ROW))
    registers: int = 0
    constants: list[int] = field(default_factory=list)
    lines: list[tuple[int, str]] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    static_shared: int = 0
    extern_shared: int | None = None

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)


class SharedMemory:
    """Places of the shared variables declared so far."""

    def __init__(self, of: SharedMemory | None = None) -> None:
        self.offsets: dict[str, int] = dict(of.offsets) if of else {}
        self.size: int = of.size if of else 0
        self.extern: str | None = of.extern if of else None

    def declare(self, m: re.Match[str]) -> None:
        align, bytes_ = int(m[1] or 1), BITS[m[2]] // 8 * int(m[4] or 1)
        self.offsets[m[3]] = -(-self.size // align) * align
        self.size = self.offsets[m[3]] + bytes_


def entries(text: str) -> dict[str, Entry]:
    """The kernels of a module, by name."""
    lines = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL).split("\n")
    found: dict[str, Entry] = {}
    target, shared, i = "", SharedMemory(), 0
    while i < len(lines):
        code = _code(lines[i])
        if code.startswith(".target"):
            target = code.split()[1].rstrip(",")
        elif m := EXTERN_SHARED.match(code):
            shared.extern = m[1]
        elif m := SHARED.match(code):
            shared.declare(m)
        elif ENTRY.match(code):
            head, begin = "", i
            while "{" not in head.rpartition(")")[2] or ")" not in head:
                head += _code(lines[begin]) + "\n"
                begin += 1
            end = _end_of_body(lines, begin)
            entry = _entry(head, target)
            _fill(entry, lines, begin, end, SharedMemory(shared))
            found[entry.name] = entry
            i = end
        i += 1
    return found


def _code(line: str) -> str:
    return line.split("//")[0].strip()


def _end_of_body(lines: list[str], begin: int) -> int:
    """The line of the brace that closes a body whose opening brace is before `begin`."""
    depth, i = 1, begin - 1
    while depth:
        i += 1
        depth += _code(lines[i]).count("{") - _code(lines[i]).count("}")
    return i


def _entry(head: str, target: str) -> Entry:
    name = re.search(r"\.entry\s+([\w$]+)", head)
    assert name
    parameters, offset = [], 0
    body = head[head.index("(") + 1 : head.rindex(")")]
    for part in filter(None, map(str.strip, body.split(","))):
        m = PARAMETER.match(part)
        if not m:
            raise PTXError(f"parameter not understood: {part}")
        size = BITS[m[2]] // 8 * int(m[4] or 1)
        align = int(m[1] or BITS[m[2]] // 8)
        offset = -(-offset // align) * align
        parameters.append(Parameter(m[3], size, offset))
        offset += size
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head)
    return Entry(name[1], parameters, target, int(threads[1]) if threads else 0)


def _statements(lines: list[str], begin: int, end: int) -> Iterator[tuple[int, str, str]]:
    """(line from 1, statement, source line) of a body; a statement is a label "x:", a brace, or text before ";"."""
    where, part, first = "", "", 0
    for i in range(begin, end):
        line = lines[i].strip()
        if line.startswith(".loc"):
            where = line.partition("//")[2].strip() or line
            continue
        if line.startswith((".pragma", ".file")):
            continue
        for c in _code(lines[i]) + " ":
            if not part.strip():
                part, first = "", i + 1
                if c in "{}":
                    yield first, c, where
                    continue
            if c == ";":
                yield first, part.strip(), where
                part = ""
            elif c == ":" and re.fullmatch(r"[\w$]+", part.strip()):
                yield first, part.strip() + ":", where
                part = ""
            else:
                part += c
    if part.strip():
        raise PTXError(f"unfinished statement {part!r}")


def _fill(entry: Entry, lines: list[str], begin: int, end: int, shared: SharedMemory) -> None:
    body = list(_statements(lines, begin, end))
    for _, text, _ in body:
        if m := SHARED.match(text):
            shared.declare(m)
    symbols = {p.name: p.offset for p in entry.parameters}
    symbols |= {name: SHARED_BASE + offset for name, offset in shared.offsets.items()}
    if shared.extern:
        entry.extern_shared = -(-shared.size // 16) * 16
        symbols[shared.extern] = SHARED_BASE + entry.extern_shared
    entry.static_shared = shared.size
    scope, labels, decoded = Scope(symbols), dict[str, int](), list[Decoder]()
    for number, text, where in body:
        try:
            if text == "{":
                scope.open()
            elif text == "}":
                scope.close()
            elif text.endswith(":"):
                labels[text[:-1]] = len(decoded)
            elif m := re.match(r"\.reg\s+\.\w+\s+(.*)$", text, re.DOTALL):
                scope.declare(m[1])
            elif text.startswith(".") and not text.startswith(".shared"):
                raise PTXError("directive not understood")
            elif not text.startswith("."):
                decoded.append(Decoder(scope, text))
                entry.lines.append((number, text))
                entry.where.append(where)
        except PTXError as error:  # noqa: PERF203  (the statement belongs to the message)
            raise PTXError(f"{entry.name} line {number}: {text}: {error}") from None
    entry.lines.append((end, "(end)"))
    entry.where.append("")
    entry.code = _table(entry, decoded, labels)
    entry.registers, entry.constants = len(scope.registers), list(scope.constants)


def _table(entry: Entry, decoded: list[Decoder], labels: dict[str, int]) -> np.ndarray:
    code = np.zeros(len(decoded) + 1, ROW)
    code["pred"] = code["dst"] = code["src"] = NOTHING
    code["line"] = [number for number, _ in entry.lines]
    code[-1]["op"] = OPS.index("ret")
    for row, instruction in zip(code, decoded, strict=False):
        for name, value in instruction.row.items():
            if name in ("dst", "src"):
                row[name][: len(value)] = value
                row[f"n{name[0]}"] = len(value)
            else:
                row[name] = value
        if instruction.label:
            if instruction.label not in labels:
                raise PTXError(f"{entry.name}: no label {instruction.label}")
            row["target"] = labels[instruction.label]
    return code

"""Imports point down: each module belongs to a floor and imports none above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Floor -> modules. A file's own name decides before its folder's.
FLOORS: list[tuple[int, tuple[str, ...]]] = [
    (
        0,
        (
            "pins_ext.chance",
            "pins_ext.criteria",
            "pins_ext.patterns",
            "pins_ext.reference",
            "pins_ext.storage",
            "pins_ext.triton_kernels.criterion",
        ),
    ),
    (1, ("pins_ext.triton_kernels", "pins_ext.triton_kernels.*", "pins_ext._C")),
    (
        2,
        (
            "pins_ext.contention",
            "pins_ext.extras",
            "pins_ext.files",
            "pins_ext.files.*",
            "pins_ext.hooks",
            "pins_ext.ops",
            "pins_ext.ops.*",
            "pins_ext.wrappers",
        ),
    ),
    (
        3,
        (
            "pins_ext.distributed",
            "pins_ext.distributed.*",
            "pins_ext.optim",
            "pins_ext.optim.*",
            "pins_ext.pruning",
            "pins_ext.pruning.*",
            "pins_ext.regularization",
            "pins_ext.regularization.*",
        ),
    ),
    (
        4,
        (
            "pins_ext.integrations",
            "pins_ext.integrations.*",
            "pins_ext.sparse",
            "pins_ext.sparse.*",
            "pins_ext.tasks",
            "pins_ext.tasks.*",
        ),
    ),
    (5, ("pins_ext.runs", "pins_ext.runs.*", "pins_ext.studies", "pins_ext.studies.*")),
    (
        6,
        (
            "pins_ext.bench",
            "pins_ext.bench.*",
            "pins_ext.cli",
            "pins_ext.cli.*",
            "pins_ext.examples",
            "pins_ext.examples.*",
            "pins_ext.__main__",
        ),
    ),
]
# The front door names what users need from every floor and is imported by none.
FRONT_DOOR = "pins_ext"


def modules() -> dict[str, Path]:
    """Installed name -> source file."""
    found = {}
    for folder, package in (
        ("pins_ext", "pins_ext"),
        ("triton_kernels", "pins_ext.triton_kernels"),
        ("bench", "pins_ext.bench"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


MODULES = modules()


def floor_of(module: str) -> int | None:
    fits = [(p != module, floor) for floor, patterns in FLOORS for p in patterns if fnmatch(module, p)]
    return min(fits)[1] if fits else None


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker reads. An import inside a function counts: it is a dependency."""
    for child in ast.iter_child_nodes(tree):
        if not is_type_checking(child):
            yield child
            yield from nodes(child)


def imports(module: str, for_types: bool = False) -> Iterator[str]:
    """Modules of ours that this one imports, by installed name; `for_types`: for a type checker only, too."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if for_types else nodes(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in MODULES and name != "pins_ext._C":
                name = name.rpartition(".")[0]
            if name:
                yield name


@pytest.mark.parametrize("module", [m for m in MODULES if m != FRONT_DOOR])
def test_imports_point_down(module: str) -> None:
    floor = floor_of(module)
    assert floor is not None, f"{module} has no floor: give it one in {Path(__file__).name}"
    named = imports(module, for_types=True)
    above = {name: floor_of(name) for name in named if name != FRONT_DOOR and (floor_of(name) or 0) > floor}
    assert above == {}


def room_of(module: str) -> str:
    """The folder that a file belongs to; a file on its own belongs to none."""
    room = ".".join(module.split(".")[:2])
    return room if MODULES.get(room, ROOT / room).name == "__init__.py" else ""


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A way from a node back to itself, or nothing."""
    done: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := search(other, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := search(node, []))), [])


# In the core a type checker's imports count too. A package that gathers its files' names is no dependency of theirs.
FILES = {
    m: {n for n in imports(m, for_types=(floor_of(m) or 0) <= 3) if n != m and n not in m}
    for m in MODULES
    if m != FRONT_DOOR
}
ROOMS: dict[str, set[str]] = {}
for _file, _others in FILES.items():
    ROOMS.setdefault(room_of(_file), set()).update({room_of(o) for o in _others} - {room_of(_file), ""})
ROOMS.pop("")


def test_no_circle_between_files() -> None:
    assert circle(FILES) == []


def test_few_arrows_and_no_circle_between_rooms() -> None:
    assert circle(ROOMS) == []
    assert sum(map(len, ROOMS.values())) < 50


def test_what_uses_the_core_does_not_know_the_specification() -> None:
    """Only what checks the operators reads it."""
    checks = {"pins_ext.cli.doctor"}
    readers = {m for m, others in FILES.items() if "pins_ext.reference" in others and "bench" not in m}
    assert readers <= checks


def test_nothing_reaches_in_by_the_front_door() -> None:
    """`from pins_ext import Pruner` inside the package would tie every floor to every other; constants are fine."""
    allowed = {"__version__"}
    for module in MODULES:
        if module == FRONT_DOOR:
            continue
        for node in nodes(ast.parse(MODULES[module].read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "pins_ext" and node.level == 0:
                taken = {alias.name for alias in node.names}
                assert {n for n in taken if f"pins_ext.{n}" not in MODULES and n != "_C"} <= allowed, module


def test_triton_kernels_are_imported_by_their_installed_name() -> None:
    """`triton_kernels` is also a package of Triton's own."""
    for module, path in MODULES.items():
        for node in nodes(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [n for n in names if n.split(".")[0] in ("triton_kernels", "bench")], module


def test_csrc_includes_point_down() -> None:
    """The maths include nothing; instruction set units know no torch header."""
    for name in ("criterion.inl", "optimizer.inl", "layout.inl"):
        assert "#include" not in (ROOT / "csrc" / name).read_text()
    for path in [
        *(ROOT / "csrc/cpu").glob("isa_*.cpp"),
        *(ROOT / "csrc/cpu").glob("*.inl"),
        ROOT / "csrc/cpu/kernels.h",
    ]:
        assert "torch" not in "".join(line for line in path.read_text().splitlines() if line.startswith("#include"))

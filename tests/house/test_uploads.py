"""In the code of a step, host data reaches a device through ops.to_device alone: pinned, without waiting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEP = ("pins_ext/ops", "pins_ext/optim", "pins_ext/pruning", "triton_kernels")

MOVES = ("to", "cuda", "pin_memory")
MAKES = ("tensor", "as_tensor", "from_numpy", "scalar_tensor")

# Function -> why it may.
ALLOWED = {
    "to_device": "it is the one",
    "pointer_table": "pinned when it is made; refused while a graph is captured",
    "of": "Scaling: a scalar that a gradient scaler left on another device",
    "squared": "GradientNorm: sums of other devices",
    "scalars_on": "a learning rate that lives on another device",
    "_moved": "calibration batches of one-shot pruning, in no optimizer's step",
    "_on": "released gradients: sums of other devices, and a checkpoint's norm, once",
    "_down": "state_device='cpu': a few numbers for the host's operators, and a checkpoint's masks, once",
    "write_bars": "marks of what stays pruned, from the masks to states on the host: at a new mask",
    "load_state": "a checkpoint, once",
    "converted_moment": "a checkpoint, once",
    "read": "a checkpoint, once",
}


def uploads(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(function, line) of each tensor that is made on a device or moved to one."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for call in ast.walk(function):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            to_dtype = call.args and ast.unparse(call.args[0]).startswith(("torch.", "tl."))
            places = any(k.arg == "device" and ast.unparse(k.value) != "'cpu'" for k in call.keywords)
            if (call.func.attr in MOVES and not to_dtype) or (call.func.attr in MAKES and places):
                yield function.name, call.lineno


def is_kernel(function: ast.FunctionDef) -> bool:
    """A Triton kernel, where `to` converts."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_host_data_reaches_a_device_through_one_function() -> None:
    found = []
    for path in (p for room in STEP for p in sorted((ROOT / room).rglob("*.py"))):
        tree = ast.parse(path.read_text())
        kernels = {f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and is_kernel(f)}
        found += [
            f"{path.relative_to(ROOT)}:{n} in {name}" for name, n in uploads(tree) if name not in {*ALLOWED, *kernels}
        ]
    assert found == []


def test_an_upload_is_found() -> None:
    source = (
        "def f(x, d):\n    a = torch.tensor([1]).to(d)\n    b = torch.tensor(1, device=d)\n    c = x.to(torch.int64)\n"
    )
    assert [line for _, line in uploads(ast.parse(source))] == [2, 3]


def test_the_hosts_tensors_say_so() -> None:
    """Whatever torch.set_default_device says: on a GPU they would be uploads that wait."""
    made = {f"torch.{name}" for name in ("tensor", "zeros", "ones", "empty", "full", "arange")}
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in (p for room in (*STEP, "pins_ext/distributed") for p in sorted((ROOT / room).rglob("*.py")))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in made
        if not any(keyword.arg == "device" for keyword in call.keywords)
    ]
    assert found == []

"""How far one training step walks through the package: few files, and the pruner only at its two ends."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from models import CONFIG, start

import pins_ext

PACKAGE = Path(pins_ext.__file__).parent


def walk(optimizer: torch.optim.Optimizer) -> list[tuple[str, str]]:
    """Caller's and callee's file of every call during a step that ends in the package."""
    calls = []

    def notice(frame: FrameType, event: str, _: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(PACKAGE) and frame.f_back is not None:
            calls.append((Path(frame.f_back.f_code.co_filename).name, str(file.relative_to(PACKAGE))))

    sys.setprofile(notice)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return calls


def test_a_step_touches_few_files_and_the_pruner_twice() -> None:
    model, optimizer, pruner = start()
    seen = []
    for _ in range(CONFIG.delta_t * 4):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        calls = walk(optimizer)
        entered = [caller for caller, file in calls if file == "pruning/pruner.py" and caller != "pruner.py"]
        seen.append((len({file for _, file in calls}), len(entered)))
    assert pruner.masks.chosen
    assert max(files for files, _ in seen) <= 16
    assert max(entered for _, entered in seen) <= 4


def test_the_pruner_is_easily_held_in_the_head() -> None:
    """Properties and dunder methods count; so do attributes that any method sets."""
    (cls,) = ast.parse(textwrap.dedent(inspect.getsource(pins_ext.Pruner))).body
    assert isinstance(cls, ast.ClassDef)
    assert not cls.bases
    methods = [node.name for node in cls.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    stored = [node for node in ast.walk(cls) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    attributes = {node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id == "self"}
    attributes |= {
        node.target.id for node in cls.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert len(methods) <= 20, methods
    assert len(attributes) <= 14, attributes

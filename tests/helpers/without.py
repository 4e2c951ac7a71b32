"""Python code run in a process of its own where some modules can't be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

_HIDE = """
import sys

class Hidden:
    def __init__(self, finder, names):
        self.finder, self.names = finder, names

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.names else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path = [Hidden(finder, {names!r}) for finder in sys.meta_path]
"""


def run_without(
    modules: Collection[str], code: str, *arguments: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code where the modules are not to be found, as if they were not installed.

    Args:
        modules: top-level names.
        code: Python source.
        arguments: `sys.argv[1:]`.
        cwd: working directory of the process.
    """
    script = _HIDE.format(names=frozenset(modules)) + code
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment, timeout=300)

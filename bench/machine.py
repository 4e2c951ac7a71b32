"""The machine a figure belongs to: models and versions, no names of hosts or users."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import pins_ext


def describe(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "name": gpu.name if gpu else cpu_model(),
        "device": device.type,
        "cpu": cpu_model(),
        "cpu_family": cpu_family(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.ops.pins_ext.cpu_capability(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu_memory_gb": round(gpu.total_memory / 1e9, 1) if gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "pins_ext": pins_ext.__version__,
        "python": platform.python_version(),
    }


def cpu_model() -> str:
    """As the processor calls itself."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def cpu_family() -> str | None:
    """Family and model, by number: what tells generations apart where a virtual machine has no better name."""
    family, model = _cpu_info("cpu family"), _cpu_info("model")
    return f"{family}, model {model}" if family and model else None


def _cpu_info(key: str) -> str | None:
    info = Path("/proc/cpuinfo")
    found = re.search(rf"^{key}\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else None


def file_stem(name: str) -> str:
    """A model's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")

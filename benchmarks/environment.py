"""The stamp that every result carries: what it was measured on, and with which versions."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastkd

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "nvidia-cutlass-dsl",
    "trl",
    "unsloth_zoo",
    "orda-kernel",
    "quack-kernels",
)


def stamp(device: torch.device) -> dict[str, Any]:
    """Device, versions, threads, commit and time (UTC)."""
    return {
        "device": device_name(device),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "versions": {"fastkd": fastkd.__version__} | {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    described = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.+)$", described.read_text(), re.MULTILINE) if described.is_file() else []
    return f"{models[0] if models else 'CPU'} {torch.backends.cpu.get_cpu_capability()}"


def device_slug(device: torch.device) -> str:
    """The device's part of a file name: cpu, or the GPU's name as in nvidia_h200."""
    return "cpu" if device.type == "cpu" else re.sub(r"\W+", "_", device_name(device)).strip("_").lower()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """Name the commit of the checkout that this file is part of; an installed package and a copy without its history have none."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"

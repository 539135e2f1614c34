"""The stamp that every result carries: what it was measured on, and with which versions."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "triton", "fastkd", "liger-kernel", "trl")


def stamp() -> dict[str, Any]:
    """Device, versions, threads, commit and time (UTC)."""
    root = Path(__file__).parent.parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": device,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES if find_spec(name.replace("-", "_"))},
        "commit": commit.stdout.strip() or "unknown",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }

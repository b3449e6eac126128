"""What a record says about where its numbers come from: versions, commit, memory."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import avalanche_ext

__all__ = ["commit", "peak_memory", "versions"]

_PACKAGES = ("torch", "torchvision", "timm", "avalanche-lib", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "avalanche_ext": avalanche_ext.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
    }


def commit() -> dict[str, Any] | None:
    """The commit of the checkout that the package runs from, ``None`` for an installed one.

    Returns:
        ``hash``, and ``modified``: whether files of the package differ from that commit.
    """
    package = Path(avalanche_ext.__file__).parent
    if not (package.parent / ".git").exists():
        return None
    try:
        found = _git(package, "rev-parse", "HEAD")
        changed = _git(package, "status", "--porcelain", "--", ".")
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or not its checkout
        return None
    return {"hash": found, "modified": bool(changed)}


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """The process's largest resident memory so far, and the device's largest allocation."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        # Linux counts in kilobytes, macOS in bytes.
        "peak_rss_bytes": resident if sys.platform == "darwin" else 1024 * resident,
        "peak_device_bytes": on_device,
    }


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()

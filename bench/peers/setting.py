"""What a run was done with: how long it may take, on which device, with which versions, on what machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "torch-pruning", "curvlinops-for-pytorch", "backpack-for-pytorch")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Setting:
    """How to run.

    Attributes:
        quick: a few minutes for everything, to see that it works; less of everything.
        data: what `pl.data.cifar10` takes, for the table of quality.
        known: rows of a run that was cut short, which resumes.
    """

    quick: bool = False
    data: str = "mini"
    known: tuple[dict[str, Any], ...] = ()

    def find(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Return the known row with these values, if there is one."""
        return next((dict(known) for known in self.known if row.items() <= known.items()), None)

    @property
    def repeats(self) -> int:
        """How often everything is timed, after a first time that warms up."""
        return 3 if self.quick else 7


def devices() -> list[str]:
    """Return where timings run: the CPU, and a GPU where there is one."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def versions() -> dict[str, str]:
    """Return the versions of PyTorch and of the peers that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Return what this runs on, as far as it can be told."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "processor": name[1] if name and name[1] != "unknown" else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def commit() -> str:
    """Return the commit that is checked out, with a plus where the package or the bench was changed since."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "prunelab", "bench"], cwd=ROOT)
    except FileNotFoundError:
        return "unknown"
    return (done.stdout.strip() or "unknown") + ("+" if changed.returncode else "")

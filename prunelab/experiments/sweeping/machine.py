"""Where numbers come from: command, commit, versions, hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from prunelab.runtime.devices import cores


def provenance(command: str) -> dict[str, Any]:
    """Return where a sweep runs, as plain data: nothing of it names the machine or its user.

    Args:
        command: what was called.
    """
    import prunelab

    found: dict[str, Any] = {"command": command, "prunelab": prunelab.__version__, "commit": commit()}
    for name in ("torch", "torchvision", "papermill", "dask"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"python": platform.python_version(), "system": platform.system(), "hardware": hardware()}


def commit() -> str:
    """Return the commit of the clone that prunelab is imported from, with a star if its files differ; else nothing."""
    import prunelab

    home = Path(prunelab.__file__).resolve().parents[1]
    if not (home / ".git").exists() or shutil.which("git") is None:
        return ""

    def git(*words: str) -> str:
        line = ["git", "-C", str(home), *words]
        return subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("*" if git("status", "--porcelain", "--", "prunelab") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def hardware() -> str:
    """Return the processor, its cores, memory and GPUs, in words."""
    parts = [f"{_processor()}, {cores()} cores"]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        parts.append(f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB")
    if shutil.which("nvidia-smi"):
        line = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        try:
            said = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout
            parts += [name.strip() for name in said.splitlines() if name.strip()]
        except (OSError, subprocess.SubprocessError):
            pass
    return ", ".join(parts)


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def typed() -> str:
    """Return the command line of this process as it can be typed again."""
    import shlex

    name = getattr(sys.modules.get("__main__"), "__spec__", None)
    module = name.name.removesuffix(".__main__") if name is not None else ""
    words = ["python", "-m", module] if module else ["python", Path(sys.argv[0]).name]
    return shlex.join([*words, *sys.argv[1:]])

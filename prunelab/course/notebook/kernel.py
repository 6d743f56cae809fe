"""What running and saving share: the environment of a kernel, and errors in one line."""

from __future__ import annotations

import os
from pathlib import Path

from prunelab.errors import PruneLabError

START_TIMEOUT = 180
"""Seconds that a kernel may take to start."""
QUIET = ["--IPKernelApp.log_level=50"]
"""What is passed to the kernel, so that it does not write remarks about itself between the lines of progress."""


def existing(notebook: str | Path) -> Path:
    """Return the path of a notebook, or raise that there is none."""
    if not Path(notebook).is_file():
        raise PruneLabError(f"There is no notebook {notebook}.")
    return Path(notebook)


def prepare_kernel() -> None:
    """Let notebooks run in this environment, whatever else is installed for this user, and without debugger's notes."""
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")


def gist(error: object) -> str:
    """Return the first line that an error says."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

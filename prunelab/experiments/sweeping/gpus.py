"""GPUs handed out to jobs, each to one at a time, whichever process on the machine asks.

Flows in: how many.  Flows out: their identifiers, held by locks that end with the process that has them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

PATIENCE = 0.5
"""Seconds between two looks for a device that is free."""


def visible() -> list[str]:
    """Return the identifiers of this machine's NVIDIA GPUs that ``CUDA_VISIBLE_DEVICES`` does not hide."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^GPU (\d+):", said, re.MULTILINE)


@contextlib.contextmanager
def borrowed(number: int | None, devices: list[str]) -> Iterator[list[str]]:
    """Yield the identifiers of devices that nobody else has while the block runs; wait until there are enough.

    Args:
        number: how many; ``None`` for one where there are any.
        devices: to choose from.

    Raises:
        ValueError: more are asked for than there are.
    """
    wanted = min(1, len(devices)) if number is None else number
    if wanted > len(devices):
        raise ValueError(f"it wants {wanted} GPUs (limits.gpus), and its machine has {len(devices)}")
    while True:
        with contextlib.ExitStack() as held:
            mine: list[str] = []
            for device in devices:
                with contextlib.suppress(Timeout):
                    if len(mine) < wanted:
                        held.enter_context(FileLock(_file(device)).acquire(blocking=False))
                        mine.append(device)
            if len(mine) == wanted:
                yield mine
                return
        time.sleep(PATIENCE)  # with none held, so that two that want two do not wait for each other


def _file(device: str) -> Path:
    owner = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"prunelab-{owner}-gpu-{re.sub('[^A-Za-z0-9-]', '-', device)}.lock"

"""How much memory is free, so that a matrix that cannot fit is refused before hours of work, not after.

Flows in: a device and a number of bytes.  Flows out: nothing, or an error that says what to do.
"""

from __future__ import annotations

from pathlib import Path

import torch

from prunelab.errors import OptionError


def free_bytes(device: torch.device) -> int | None:
    """Return how many bytes are free on a device, ``None`` where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # Windows and macOS have no such file
        return None
    known = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(known["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in known else None


def check_fits(what: str, needed: int, device: torch.device, advice: str) -> None:
    """Refuse what needs more memory than is free.

    Args:
        what: what is to be kept, for the message.
        needed: bytes.
        device: where.
        advice: what to do instead.

    Raises:
        OptionError: it does not fit.
    """
    free = free_bytes(device)
    if free is not None and needed > free:
        raise OptionError(f"{what} needs {needed / 1e9:.3g} GB, and {device} has {free / 1e9:.3g} GB free: {advice}.")

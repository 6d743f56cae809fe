"""Devices: what differs between a CPU, an NVIDIA GPU and an Apple GPU, in one place.

Flows in: tensors, devices and errors.  Flows out: the same code on all of them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from prunelab.errors import OptionError

WITHOUT_FLOAT64 = ("mps",)
"""Types of devices that have no numbers in double precision."""


def accelerator() -> torch.device:
    """Return the accelerator of this machine, or the CPU where there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else torch.device(found.type)


def named_device(name: str) -> torch.device:
    """Return the device of a name, or the accelerator (else the CPU) for ``"auto"``.

    Raises:
        OptionError: there is no such device here.
    """
    if name == "auto":
        return accelerator()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise OptionError(
            f"`device` is {name!r}, which is not available here; 'auto' takes the best: {said}"
        ) from error
    return device


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def synchronize() -> None:
    """Wait until the accelerator, if there is one, has done what it was asked for."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def exact_on(device: torch.device) -> torch.device:
    """Return where float64 tensors of a device are kept: there, or on the CPU where it has none."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def exact(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on its own device, or on the CPU where that one has no float64."""
    return tensor.to(exact_on(tensor.device)).double()  # in this order: the device is not asked for float64


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """Restore the generators of the CPU and of a device, in the end, to their current state.

    They are those of the whole process: another thread that wants to seed them waits.
    """
    with _GENERATORS:
        yield from _forked(device)


_GENERATORS = threading.RLock()


def _forked(device: torch.device) -> Iterator[None]:
    cpu = torch.get_rng_state()
    module = None if device.type in ("cpu", "meta") else torch.get_device_module(device.type)
    place = () if device.type == "mps" else (device,)  # which has one device, and takes no number
    own = None if module is None else module.get_rng_state(*place)
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if module is not None:
            module.set_rng_state(own, *place)


def raise_out_of_memory(error: BaseException, advice: str = "") -> None:
    """Raise an error again if it says that memory has run out, with a note on what to do; else do nothing.

    CUDA has a class for it; other devices raise a ``RuntimeError`` and say so.
    """
    says = str(error).lower()
    told = "out of memory" in says or "can't allocate memory" in says or "not enough memory" in says
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not (isinstance(error, RuntimeError) and told):
        return
    note = f"prunelab ran out of memory: {advice or 'give smaller batches'}."
    if hasattr(error, "add_note") and note not in getattr(error, "__notes__", ()):  # Python 3.11
        error.add_note(note)
    raise error

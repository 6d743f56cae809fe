"""What a notebook runs on: the device of its tensors, and the scale of its measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from prunelab.data import Images, loader
from prunelab.options import one_of
from prunelab.runtime.devices import cores, named_device

Scale = Literal["small", "full"]
SCALES: tuple[Scale, ...] = get_args(Scale)
TIMES: dict[Scale, int] = {"small": 1, "full": 10}
"""How many times the images of ``"small"`` are used."""


@dataclass(frozen=True)
class Machine:
    """Where a notebook computes, and at which scale; see ``machine``.

    Attributes:
        device: of model, batches and statistics.
        scale: ``"small"`` for two cores, ``"full"`` for ten times the images.
    """

    device: torch.device
    scale: Scale

    def __str__(self) -> str:
        if self.device.type == "cuda":
            where = f"on {torch.cuda.get_device_name(self.device)}"
        else:
            where = f"on {cores()} CPU cores" if self.device.type == "cpu" else f"on {self.device}"
        return f"Runs {where}, at {self.scale} scale."

    def images(self, number: int, most: int | None = None) -> int:
        """Return ``number`` at small scale, ten times as many at full scale, at most ``most``."""
        many = number * TIMES[self.scale]
        return many if most is None else min(many, most)

    def batches(self, images: Images, batch_size: int = 125) -> list[tuple[Tensor, Tensor]]:
        """Return ``(inputs, targets)`` on the device."""
        return [(x.to(self.device), y.to(self.device)) for x, y in loader(images, batch_size)]


def machine(device: str = "auto", scale: Any = "small") -> Machine:
    """Return what a notebook runs on, from its parameters ``device`` and ``scale``.

    Args:
        device: ``"auto"`` for the accelerator where there is one, else the CPU; or a device's name, as ``"cuda:1"``.
        scale: ``"small"`` or ``"full"``.

    Raises:
        OptionError: there is no such device here, or no such scale.

    >>> machine("cpu").images(100)
    100
    >>> machine("cpu", "full").images(100, most=500)
    500
    """
    return Machine(named_device(device), one_of("scale", scale, SCALES))

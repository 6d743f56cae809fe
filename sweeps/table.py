"""Print the table of grids for sweeps/README.md: ``python -m sweeps.table``.

How much a grid computes follows from the grid alone: networks, images, epochs.  How long that takes depends on the
machine, so it is given in operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

import prunelab as pl
from prunelab.experiments.sweeping.grid import read_grid

HERE = Path(__file__).parent
IMAGES = {
    "cifar10-mini": (5_000, 10, 32),
    "cifar10": (50_000, 10, 32),
    "cifar100": (50_000, 100, 32),
    "tiny-imagenet": (100_000, 200, 64),
    "imagenet": (1_281_167, 1_000, 224),
}
"""Data set -> training images, classes, size."""


@cache
def flops(model: str, classes: int, size: int) -> int:
    """Return the FLOPs of one forward pass on one image."""
    with torch.device("meta"):
        return pl.count(pl.zoo.build(model, num_classes=classes), torch.empty(1, 3, size, size)).flops


def work(job: dict[str, Any]) -> float:
    """Return the operations of a job's fine-tuning if nothing were cut: three forward passes for each image."""
    number, classes, size = IMAGES[job["dataset"]]
    return 3 * flops(job["model"], classes, size) * (job.get("images") or number) * job["epochs"]


def lines() -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| grid | jobs | networks | data | epochs of a job | fine-tuning of all jobs, at most |"
    yield "|---|---:|---|---|---:|---:|"
    for path in sorted(HERE.glob("*.yaml")):
        jobs = read_grid(path).jobs()
        models, sets = (", ".join(dict.fromkeys(f"`{job[name]}`" for job in jobs)) for name in ("model", "dataset"))
        epochs = ", ".join(dict.fromkeys(f"{job['epochs']:g}" for job in jobs))
        total = sum(map(work, jobs))
        much = f"{total / 1e15:,.2g} · 10¹⁵ FLOPs" if total < 1e17 else f"{total / 1e15:,.0f} · 10¹⁵ FLOPs"
        yield f"| [{path.stem}]({path.name}) | {len(jobs)} | {models} | {sets} | {epochs} | {much if total else '–'} |"


if __name__ == "__main__":
    print("\n".join(lines()))

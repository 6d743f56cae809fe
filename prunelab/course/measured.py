"""Measured: what silencing single units does to the loss on test images, kept in a file, since it takes minutes.

Flows in: the zoo's networks and the first test images of the repository.  Flows out: the loss change of each unit on
each hundred of these images.  ``python -m prunelab.course.measured`` measures it again and writes the file; 10_oracle
measures a few of its numbers itself and compares.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import prunelab as pl
from prunelab.criteria.oracle import loss_changes
from prunelab.data import cifar10, loader, root
from prunelab.tracing.trace import DependencyGraph

CHUNK = 100
"""Images for which there is one number."""
SMALLEST, MOST = 16, 16
"""Units that a group must have, and how many of them are measured."""


@dataclass(frozen=True)
class Measured:
    """The loss changes of some units of one network, on test images.

    Attributes:
        units: group name -> the units that were measured.
        changes: group name -> float64 ``[units, chunks]``, in nats, one column for each hundred test images.
    """

    units: dict[str, list[int]]
    changes: dict[str, Tensor]

    def mean(self, chunks: slice = slice(None)) -> dict[str, Tensor]:
        """Return the loss change of every unit, ``[units]`` by group, over some chunks of images."""
        return {name: values[:, chunks].mean(1) for name, values in self.changes.items()}


def oracle_on_test_images(network: str) -> Measured:
    """Return what was measured for ``"resnet20"`` or ``"vit_small"``.

    >>> found = oracle_on_test_images("resnet20")
    >>> len(found.units), sum(map(len, found.units.values()))
    (12, 192)
    """
    stored = json.loads((root() / "oracle.json").read_text("utf-8"))[network]
    changes = {name: torch.tensor(one["changes"], dtype=torch.float64) for name, one in stored.items()}
    return Measured({name: one["units"] for name, one in stored.items()}, changes)


def measure(graph: DependencyGraph, chunks: int, seed: int = 0) -> dict[str, dict[str, list]]:  # type: ignore[type-arg]
    """Return units and loss changes by group, over the first ``chunks`` hundred test images."""
    generator = torch.Generator().manual_seed(seed)
    units = {}
    for group in graph.groups:
        if group.size >= SMALLEST:
            units[group.name] = torch.randperm(group.size, generator=generator)[:MOST].sort().values.tolist()
    columns = []
    for x, y in list(loader(cifar10("mini").test, CHUNK))[:chunks]:
        columns.append(loss_changes(graph, [(x, y)], units, progress=False))
        print(graph.model.__class__.__name__, len(columns), flush=True)
    return {
        name: {
            "units": chosen,
            "changes": [
                [float(f"{float(column[name][place]):.6g}") for column in columns] for place in range(len(chosen))
            ],
        }
        for name, chosen in units.items()
    }


def main() -> None:
    """Measure both networks and write the file."""
    parser = argparse.ArgumentParser(description="Silence units one by one, on test images.")
    parser.add_argument("--chunks", type=int, default=6, help="hundreds of test images")
    parser.add_argument("--out", type=Path, default=root() / "oracle.json")
    given = parser.parse_args()
    found = {}
    for network in ("resnet20", "vit_small"):
        found[network] = measure(pl.trace(pl.zoo.load(network), torch.zeros(1, 3, 32, 32)), given.chunks)
        given.out.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

__all__ = ["Measured", "measure", "oracle_on_test_images"]

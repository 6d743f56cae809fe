"""Moments: ``E[g_n²]`` for every weight, g_n the gradient of one sample's loss: the diagonal of a Fisher.

One backward pass gives the gradients of all layer outputs, for all samples at once. For most layers
``squared_products`` finishes from there; where a parameter is used several times, the gradients of a few samples at a
time are made, squared and added up. Nothing loops over samples, and no more than a chunk of per-sample gradients
exists at any time.

Flows in: calls with their layouts and output gradients.  Flows out: sums of squares by parameter name.  Notebook 04_obd
derives them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from prunelab.curvature.statistics.per_sample import Part
from prunelab.curvature.statistics.squared_products import ranges


def squared_sums(parts: Iterable[Part]) -> Iterator[tuple[str, slice, Tensor]]:
    """Yield ``Σ_n (Σ_calls g_n)²`` as (name, rows, ``[*rows of the parameter]``).

    Gradients of several calls of one parameter add up before they are squared.
    """
    by_name: dict[str, list[Part]] = {}
    for part in parts:
        by_name.setdefault(part.name, []).append(part)
    while by_name:  # what is done is forgotten, with all that it holds
        name, found = by_name.popitem()
        for together in _overlapping(found):
            rows = slice(together[0].rows.start, max(part.rows.stop for part in together))
            if len(together) == 1 and together[0].squares is not None:
                yield name, rows, together[0].squares()
            else:
                yield name, rows, _chunked(rows, together)


def _overlapping(parts: list[Part]) -> Iterator[list[Part]]:
    """Yield the parts in sets that share rows."""
    together: list[Part] = []
    for part in sorted(parts, key=lambda part: part.rows.start):
        if together and part.rows.start >= max(other.rows.stop for other in together):
            yield together
            together = []
        together.append(part)
    yield together


def _chunked(rows: slice, parts: list[Part]) -> Tensor:
    total = torch.zeros(())
    for n in ranges(parts[0].samples, sum(part.size for part in parts), parts[0].device):
        gradients = parts[0].gradients(n)
        if len(parts) > 1:
            whole = gradients.new_zeros(len(gradients), rows.stop - rows.start, *gradients.shape[2:])
            for place, part in enumerate(parts):
                found = gradients if place == 0 else part.gradients(n)
                whole[:, part.rows.start - rows.start : part.rows.stop - rows.start] += found
            gradients = whole
        squares = gradients.square_().sum(0)
        total = squares if n.start == 0 else total.add_(squares)
    return total

"""Rehearsal: compare the operators of a cut model with those of the whole one, on tensors without data.

Flows in: the trace before a cut, what stays, and the trace after it.  Flows out: the operators in pairs, or an error
where one does not give the shape that it should, so that no cut goes wrong in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from prunelab.errors import PlanError
from prunelab.tracing.axes import Axis
from prunelab.tracing.recorder import Op
from prunelab.tracing.trace import DependencyGraph

COPIES = ("clone", "contiguous", "alias", "detach", "as_strided", "as_strided_")
"""Whether one of these is needed depends on how tensors lie in memory, not on what is computed.

A view by strides that moves entries freezes all that it touches.
"""

RESHAPES = ("unsqueeze", "squeeze", "view", "_unsafe_view", "expand", "slice")
"""Entries stay in their order; a row of these that ends with the shape it began with does nothing."""

Shapes = list[tuple[int, ...]]


def compare(graph: DependencyGraph, cut: DependencyGraph, kept_size: Callable[[Axis], int]) -> list[tuple[Op, Op]]:
    """Return every operator of the whole model with the same one of the cut model.

    Raises:
        PlanError: an operator gives another shape than the kept sizes of its axes, or is another one.
    """
    before, after = ([op for op in g.tape if op.name not in COPIES] for g in (graph, cut))
    wanted = [_signature(op, graph, kept_size) for op in before]
    found = [_signature(op, cut, lambda axis: axis.size) for op in after]
    pairs, place, idle = [], 0, 0
    for number, op in enumerate(before):
        if number < idle:
            continue
        if place < len(found) and found[place] == wanted[number]:
            pairs.append((op, after[place]))
            place += 1
            continue
        idle = _after_nothing(before, number, graph, kept_size)
        if idle > number:
            continue
        skipped = _after_attention(found, place, wanted, number)
        if skipped is None:
            gives = "`{}` gives {}".format(*found[place]) if place < len(found) else "the model ends"
            raise PlanError(
                f"Cutting {type(graph.model).__name__} would go wrong in {op.place}, so nothing was cut: "
                f"`{op.name}` should give {wanted[number][1]}, but {gives}. "
                "Its code holds a size that could not be changed: ignore that module."
            )
        place = skipped
    if place < len(found):
        raise PlanError(f"The cut {type(graph.model).__name__} runs other operators than before, so nothing was cut.")
    return pairs


def _signature(op: Op, graph: DependencyGraph, size: Callable[[Axis], int]) -> tuple[str, Shapes]:
    shapes = [tuple(size(axis) for axis in graph.axes_of(tensor)) for tensor in op.outputs]
    return op.name.replace("_unsafe_view", "view"), shapes


def _after_nothing(before: list[Op], start: int, graph: DependencyGraph, size: Callable[[Axis], int]) -> int:
    """Return where a row of operators ends that does nothing once the model is cut, ``start`` if there is none.

    Code leaves those out: ``if repeats == 1: return x``.
    """

    def shape(tensor: Tensor) -> tuple[int, ...]:
        return tuple(size(axis) for axis in graph.axes_of(tensor))

    if before[start].name not in RESHAPES:
        return start
    copied = {id(op.outputs[0]): op.args[0] for op in graph.tape if op.name in COPIES}
    tensor = before[start].args[0]
    first, number = shape(tensor), start
    while number < len(before) and before[number].name in RESHAPES:
        source = before[number].args[0]
        if source is not tensor and copied.get(id(source)) is not tensor:
            break
        tensor = before[number].outputs[0]
        number += 1
        if math.prod(shape(tensor)) != math.prod(first):
            break
        if shape(tensor) == first:
            return number
    return start


def _after_attention(
    found: list[tuple[str, Shapes]], start: int, wanted: list[tuple[str, Shapes]], number: int
) -> int | None:
    """Return where the cut model goes on after attention for which PyTorch picked another kernel.

    Fused kernels want values as wide as queries; without them the same product is several operators.
    """
    name, shapes = wanted[number]
    if "scaled_dot_product" not in name or number + 1 == len(wanted):
        return None
    for place in range(start + 1, min(start + 30, len(found))):
        if found[place] == wanted[number + 1] and found[place - 1][1][:1] == shapes[:1]:
            return place
    return None

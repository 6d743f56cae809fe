"""Integers that say which entries an operator takes together, and that no shape gives away.

A channel shuffle with the wrong number of groups, a group norm with too few of them, or a slice that starts at the
wrong place still gives the right shape.  Here each such integer is worked out from what is kept.

Flows in: an operator of the whole model, its axes and what stays of them.  Flows out: what its integers must be.
"""

from __future__ import annotations

from typing import Any

from prunelab.errors import PlanError
from prunelab.kept import Kept
from prunelab.tracing.axes import regroup
from prunelab.tracing.recorder import Op, signature
from prunelab.tracing.trace import DependencyGraph


def compare_integers(graph: DependencyGraph, cut: DependencyGraph, kept: Kept, pairs: list[tuple[Op, Op]]) -> None:
    """Hold the integers of every operator of the cut model against what they must be.

    Raises:
        PlanError: one is as it was, although the axis that it describes was cut.
    """
    for before, after in pairs:
        right = wanted(before, graph, kept)
        for name, value in found(after, cut, right).items():
            if value != right[name]:
                raise PlanError(
                    f"Cutting {type(graph.model).__name__} would go wrong in {before.place}, so nothing was cut: "
                    f"`{before.name}` needs {name}={right[name]} after the cut, and its code says {value}. "
                    "Ignore that module, or use backend='graph'."
                )


def arguments(op: Op) -> dict[str, Any]:
    """Return what an operator was called with, by name, defaults included."""
    defaults = signature(op.func)[1]
    return {**defaults, **dict(zip(defaults, op.args, strict=False)), **op.kwargs}


def wanted(op: Op, graph: DependencyGraph, kept: Kept) -> dict[str, int]:
    """Return the integers that an operator of the whole model must be called with after the cut, by name."""
    given = arguments(op)
    if op.name in ("channel_shuffle", "native_channel_shuffle"):
        axis = graph.axes_of(given["self"])[1]
        outer, _ = regroup([axis], [given["groups"], axis.size // given["groups"]], op.place)
        return {"groups": kept.size(outer)}
    if op.name == "native_group_norm":
        return {"group": kept.size(graph.axes_of(op.outputs[1])[1])}
    if op.name in ("slice", "slice_scatter"):
        axes = graph.axes_of(given["self"])
        axis = axes[given["dim"] % len(axes)]
        if kept.size(axis) == axis.size:
            return {}
        mask = kept.mask(axis)
        start, _, _ = slice(given["start"], given["end"], given["step"]).indices(axis.size)
        return {"start": int(mask[:start].sum())}
    return {}


def found(op: Op, graph: DependencyGraph, names: dict[str, int]) -> dict[str, int]:
    """Return what the same operator of the cut model was called with, in the same terms."""
    given = arguments(op)
    if "start" not in names:
        return {name: given[name] for name in names}
    axes = graph.axes_of(given["self"])
    size = axes[given["dim"] % len(axes)].size
    return {"start": slice(given["start"], given["end"], given["step"]).indices(size)[0]}

"""Constants that follow a width: when a cut changes them, the rows that they multiply make up for it.

Attention divides by √(head width), by default in PyTorch's own attention or in the model's code.  A cut from d to d'
would change the function, so the rows that produce the queries are multiplied by √(d'/d).

Flows in: the operators of the model before and after a cut.  Flows out: which rows of which parameters to scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from prunelab.errors import PlanError
from prunelab.tracing.axes import Axis
from prunelab.tracing.recorder import Op
from prunelab.tracing.trace import DependencyGraph

_VIEWS = {"view", "_unsafe_view", "reshape"}
_SHAPES = _VIEWS | {"permute", "transpose", "t", "select", "unbind", "slice", "split", "split_with_sizes", "unsqueeze"}
_SHAPES |= {"squeeze", "expand"}
_NORMS = {"native_layer_norm", "_fused_rms_norm"}


@dataclass(frozen=True)
class ScaleFix:
    """Multiply ``rows`` of the parameter ``name`` by ``factor``."""

    name: str
    rows: Tensor
    factor: float


def scale_fixes(
    graph: DependencyGraph, kept_size: Callable[[Axis], int], pairs: list[tuple[Op, Op]]
) -> tuple[ScaleFix, ...]:
    """Return what to scale so that the cut network computes with the constants of the whole one.

    Args:
        graph: of the whole model.
        kept_size: how many entries of an axis stay.
        pairs: every operator before the cut, and the same one after.

    Raises:
        PlanError: a constant changes, and what it multiplies is not made by rows that can be scaled.
    """
    made_by = {id(tensor): op for op in graph.tape for tensor in op.outputs}
    found: dict[tuple[str, float], list[Tensor]] = {}  # queries and keys may be rows of one parameter
    for tensor, factor, what in [*_default_scales(graph, kept_size), *_changed_constants(pairs)]:
        makers = _makers(tensor, made_by, graph)
        if not makers:
            raise PlanError(
                f"{what}, and what it scales is made in a way that cannot make up for it, so nothing was cut: "
                "write the constant into the model's code, or ignore that width."
            )
        for name, rows in makers.items():
            found.setdefault((name, factor), []).append(rows.flatten())
    return tuple(ScaleFix(name, torch.cat(rows).unique(), factor) for (name, factor), rows in found.items())


def _default_scales(graph: DependencyGraph, kept_size: Callable[[Axis], int]) -> list[tuple[Tensor, float, str]]:
    """Return queries whose attention takes its scale from their width, and the factor that they need."""
    found = []
    for op in graph.tape:
        if "scaled_dot_product" in op.name and op.kwargs.get("scale") is None:
            width = graph.axes_of(op.args[0])[-1]
            if kept_size(width) != width.size:
                factor = math.sqrt(kept_size(width) / width.size)
                found.append((op.args[0], factor, f"{op.place} attends with a scale that follows the head width"))
    return found


def _changed_constants(pairs: list[tuple[Op, Op]]) -> list[tuple[Tensor, float, str]]:
    """Return tensors that are multiplied or divided by a number that the cut changes, and the factor that they need.

    Raises:
        PlanError: an operator other than these computes with such a number.
    """
    found = []
    for before, after in pairs:
        old, new = _constants(before), _constants(after)
        if old == new:
            continue
        what = f"`{before.name}` in {before.place} computes with {old}, which the cut makes {new}"
        if before.name not in ("mul", "div") or len(old) != 1 or not old[0] * new[0]:
            raise PlanError(f"{what}, so nothing was cut: write it into the model's code, or ignore that width.")
        ratio = old[0] / new[0]
        found.append((before.args[0], ratio if before.name == "mul" else 1 / ratio, what))
    return found


def _constants(op: Op) -> list[float]:
    if torch.Tag.pointwise not in op.func.tags:
        return []
    return [value for value in tree_leaves((op.args, op.kwargs)) if type(value) in (int, float)]


def _makers(tensor: Tensor, made_by: dict[int, Op], graph: DependencyGraph) -> dict[str, Tensor]:
    """Return the parameters that a tensor is linear in, each with int64 row numbers laid out like the tensor.

    A product of two computed tensors is linear in all that makes the left one: those rows are one flat list.
    """
    op = made_by.get(id(tensor))
    if op is None:
        return {}
    if op.name in _SHAPES:
        place = next(place for place, out in enumerate(op.outputs) if out is tensor)
        source = _makers(op.args[0], made_by, graph)
        moved = {name: _same_shape_change(op, rows, place) for name, rows in source.items()}
        return {name: rows for name, rows in moved.items() if rows is not None}
    if op.name in ("mm", "addmm", "bmm", "baddbmm"):
        weight = _origin(op.args[-1], graph) or _origin(op.args[-2], graph)
        if weight is None:
            return {name: rows.unique() for name, rows in _makers(op.args[-2], made_by, graph).items()}
        bias = _origin(op.args[0], graph) if op.name.startswith(("add", "badd")) else None
        return {name: _last(tensor) for name in (weight, bias) if name}
    if op.name in _NORMS:
        names = [_origin(value, graph) for value in op.args[2:4] if isinstance(value, Tensor)]
        return {name: _last(tensor) for name in names if name}
    if op.name == "add":
        return {key: rows for value in op.args[:2] for key, rows in _term(value, tensor, made_by, graph).items()}
    if op.name in ("mul", "div", "clone", "_to_copy", "detach"):
        return _makers(op.args[0], made_by, graph)
    return {}


def _last(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.shape[-1]).expand(tensor.shape)


def _term(value: object, like: Tensor, made_by: dict[int, Op], graph: DependencyGraph) -> dict[str, Tensor]:
    if not isinstance(value, Tensor):
        return {}
    name = _origin(value, graph)
    return {name: _last(like)} if name and value.dim() == 1 else _makers(value, made_by, graph)


def _origin(tensor: object, graph: DependencyGraph) -> str | None:
    """Return the parameter that a tensor is a plain reshaping of."""
    names = {name for name, _ in graph.origins_of(tensor)} if isinstance(tensor, Tensor) else set()
    return names.pop() if len(names) == 1 else None


def _same_shape_change(op: Op, rows: Tensor, place: int) -> Tensor | None:
    """Do to row numbers what an operator did to the tensor; ``None`` where a flat list of them cannot follow."""
    if rows.shape != op.args[0].shape:
        return rows if op.outputs[place].numel() == op.args[0].numel() or op.name == "expand" else None
    if op.name in _VIEWS:
        return rows.reshape(op.outputs[0].shape)
    out = op.func(rows, *op.args[1:], **op.kwargs)
    return out[place] if isinstance(out, (list, tuple)) else out

"""Attention divides by √(head width): when entries of that width go, the queries make up for the changed default.

``scaled_dot_product_attention`` without a ``scale`` uses 1/√d of whatever width it is given.  A cut from d to d' would
change the function, so the rows that produce the queries are multiplied by √(d'/d).

Flows in: a traced graph and the kept sizes.  Flows out: which rows of which parameters to scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prunelab.axes import Axis
from prunelab.errors import PlanError
from prunelab.trace import DependencyGraph, Op

_SHAPES = {"view", "_unsafe_view", "reshape", "permute", "transpose", "select", "unbind", "slice", "split", "chunk"}
_SHAPES |= {"split_with_sizes", "unsqueeze", "squeeze", "expand"}
_NORMS = {"native_layer_norm", "_fused_rms_norm"}


@dataclass(frozen=True)
class ScaleFix:
    """Multiply ``rows`` of the parameter ``name`` by ``factor``."""

    name: str
    rows: Tensor
    factor: float


def scale_fixes(graph: DependencyGraph, kept_size: Callable[[Axis], int]) -> tuple[ScaleFix, ...]:
    """Return what to scale so that attention with a default scale stays the function that it was.

    Raises:
        PlanError: a head width is cut, and what makes the queries cannot be told.
    """
    made_by = {id(tensor): op for op in graph.tape for tensor in op.outputs}
    found: dict[str, ScaleFix] = {}
    for op in graph.tape:
        if "scaled_dot_product" not in op.name or op.kwargs.get("scale") is not None:
            continue
        query = op.args[0]
        width = graph.axes_of(query)[-1]
        if kept_size(width) == width.size:
            continue
        makers = _makers(query, made_by, graph)
        if not makers:
            raise PlanError(
                f"`{op.module}` attends with the default scale, which depends on the head width, and its queries are "
                "made in a way that cannot be scaled: pass `scale` in its code, or ignore its head width."
            )
        for name, rows in makers.items():
            found[name] = ScaleFix(name, rows.unique(), math.sqrt(kept_size(width) / width.size))
    return tuple(found.values())


def _makers(tensor: Tensor, made_by: dict[int, Op], graph: DependencyGraph) -> dict[str, Tensor]:
    """Return the parameters that a tensor is linear in, each with int64 row numbers laid out like the tensor."""
    op = made_by.get(id(tensor))
    if op is None:
        return {}
    if op.name in _SHAPES:
        source = _makers(op.args[0], made_by, graph)
        place = next(place for place, out in enumerate(op.outputs) if out is tensor)
        return {name: _same_shape_change(op, rows, place) for name, rows in source.items()}
    if op.name in ("mm", "addmm", "bmm"):
        operands = op.args[-2:]
        names = [_origin(operand, graph) for operand in operands] + [_origin(op.args[0], graph)]
        weight, bias = names[1], names[2] if op.name == "addmm" else None
        rows = torch.arange(tensor.shape[-1]).expand(tensor.shape)
        return {name: rows for name in (weight, bias) if name} if weight else {}
    if op.name in _NORMS:
        names = [_origin(value, graph) for value in op.args[2:4] if isinstance(value, Tensor)]
        rows = torch.arange(tensor.shape[-1]).expand(tensor.shape)
        return {name: rows for name in names if name}
    if op.name == "add":
        return {key: rows for value in op.args[:2] for key, rows in _term(value, tensor, made_by, graph).items()}
    if op.name in ("mul", "clone", "_to_copy", "detach"):
        return _makers(op.args[0], made_by, graph)
    return {}


def _term(value: object, like: Tensor, made_by: dict[int, Op], graph: DependencyGraph) -> dict[str, Tensor]:
    if not isinstance(value, Tensor):
        return {}
    name = _origin(value, graph)
    if name and value.dim() == 1:
        return {name: torch.arange(like.shape[-1]).expand(like.shape)}
    return _makers(value, made_by, graph)


def _origin(tensor: object, graph: DependencyGraph) -> str | None:
    """Return the parameter that a tensor is a plain reshaping of."""
    names = {name for name, _ in graph.origins_of(tensor)} if isinstance(tensor, Tensor) else set()
    return names.pop() if len(names) == 1 else None


def _same_shape_change(op: Op, rows: Tensor, place: int) -> Tensor:
    if op.name in ("view", "_unsafe_view", "reshape"):
        return rows.reshape(op.outputs[0].shape)
    out = op.func(rows, *op.args[1:], **op.kwargs)
    return out[place] if isinstance(out, (list, tuple)) else out

"""Rules for operators that move, pick or reduce rows by number: those dimensions freeze, all others pass.

Flows in: a call.  Flows out: the dimensions of its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunelab.tracing.recorder import Call, Dims
from prunelab.tracing.rules_entries import broadcast, is_tensor, made, made_like, reduced, unknown


def reorder(call: Call) -> list[Dims]:
    """Entries move along some dimensions (roll, flip, sort, cumsum): those may not be cut."""
    dims = call.dims("self")
    places = (-2, -1) if call.name.rstrip("_") in ("triu", "tril") else call.get("dims", call.get("dim"))
    places = [places] if isinstance(places, int) else places or range(len(dims))
    call.freeze([dims[place] for place in places if dims], "depends on the order of its entries")
    return [dims for _ in call.outputs]


def indexing(call: Call) -> list[Dims]:
    """``x[i, :, j]``: indexed dimensions are frozen, the others pass."""
    indices = [part for index in call["indices"] for part in _spread(index)]
    if any(index is not None and index.dtype in _MASKS for index in indices):
        return _masked(call, indices)
    return [_indexed(call, call.out.dim())] if any(index is not None for index in indices) else unknown(call)


_MASKS = (torch.bool, torch.uint8)


def _spread(index: Tensor | None) -> list[Tensor | None]:
    """Return an index for every dimension that it picks from: a mask picks from as many as it has."""
    return [index] * index.dim() if index is not None and index.dtype in _MASKS else [index]


def _masked(call: Call, indices: list[Tensor | None]) -> list[Dims]:
    """``x[:, mask]``: dimensions that a mask picks from are frozen, the others pass."""
    dims = call.dims("self")
    indexed = [place for place, index in enumerate(indices) if index is not None]
    call.freeze([dims[place] for place in indexed], "picks entries by number")
    together = indexed == list(range(indexed[0], indexed[-1] + 1))
    rest = [dim for place, dim in enumerate(dims) if place not in indexed]
    first, new = indexed[0] if together else 0, call.out.dim() - len(rest)
    picked = [call.fresh(size, "picks them") for size in call.out.shape[first : first + new]]
    return [[*rest[:first], *picked, *rest[first:]]]


def _indexed(call: Call, length: int) -> Dims:
    """Return the dimensions of ``x[indices]``, of which there are ``length``."""
    dims = call.dims("self")
    indices = list(call["indices"]) + [None] * (len(dims) - len(call["indices"]))
    indexed = [place for place, index in enumerate(indices) if index is not None]
    call.freeze([dims[place] for place in indexed], "picks entries by number")
    together = indexed == list(range(indexed[0], indexed[-1] + 1))
    rest = [dim for place, dim in enumerate(dims) if place not in indexed]
    first = indexed[0] if together else 0
    shape = torch.broadcast_shapes(*(index.shape for index in indices if index is not None))
    return [*rest[:first], *(call.fresh(size, "picks them") for size in shape), *rest[first:]]


def index_put(call: Call) -> list[Dims]:
    """``x[i, :, j] = y``: indexed dimensions are frozen; the others are those of ``y``."""
    dims, values = call.dims("self"), call.dims("values")
    indices = [index for index in call["indices"] if index is not None]
    if any(index.dtype == torch.bool for index in indices):
        if len(call["indices"]) > 1 or call["values"].numel() != 1:
            return unknown(call)
        mask = call.dims(indices[0])  # ``x[mask] = 0``: entry by entry
        for one, two in zip(dims, mask, strict=False):
            call.unify(one, two)
        return [dims]
    target = _indexed(call, 0)
    for one, two in zip(reversed(target), reversed(values), strict=False):
        if one.size == two.size:
            call.unify(one, two)
    return [dims]


def picking(call: Call) -> list[Dims]:
    """``index_select``, ``topk``: entries along one dimension are picked by number."""
    dims, out = list(call.dims("self")), call.outputs[0].shape
    if not dims:
        return made(call)
    place = call["dim"] % len(dims)
    call.freeze([dims[place]], "picks entries by number")
    dims[place] = call.fresh(out[place])
    return [[dim if dim.size == size else call.fresh(size) for dim, size in zip(dims, out, strict=True)]] * len(
        call.outputs
    )


def gathering(call: Call) -> list[Dims]:
    """``out[i][j] = x[index[i][j]][j]``: rows are picked by number; along all other dimensions places stay."""
    index = call.dims("index")
    _move_rows(call, [index])
    return [index]


def scattering(call: Call) -> list[Dims]:
    """``out[index[i][j]][j] += source[i][j]``: rows move, all other dimensions keep their places.

    With an index of one dimension (``index_add``) whole rows move.
    """
    index, source = call.dims("index"), call.get("src", call.get("source"))
    given = [call.dims(source)] if is_tensor(source) and source.dim() else []
    if call.name.startswith("index_"):
        call.freeze(index, "picks entries by number")
        _move_rows(call, given)
    else:
        _move_rows(call, [index, *given])
    return [call.dims("self")]


def _move_rows(call: Call, others: Sequence[Dims]) -> None:
    """Freeze what moves, in all tensors, and unify the rest; what has fewer entries takes the first ones."""
    dims = call.dims("self")
    place = call["dim"] % max(len(dims), 1)
    call.freeze(dims[place : place + 1], "picks entries by number")
    for other in others:
        for number, (one, two) in enumerate(zip(dims, other, strict=False)):
            if number == place or one.size != two.size:
                call.freeze([two] if number == place else [one, two], "picks entries by number")
            else:
                call.unify(one, two)


def index_fill(call: Call) -> list[Dims]:
    """Rows are filled by number."""
    dims = call.dims("self")
    call.freeze([dims[call["dim"]], *call.dims("index")] if dims else [], "picks entries by number")
    return [dims]


def segments(call: Call) -> list[Dims]:
    """Consecutive rows are reduced to one; everything else passes."""
    dims = list(call.dims("data"))
    place = call["axis"] % len(dims)
    for tensor in call.tensors:
        call.freeze([dims[place]] if tensor is call["data"] else call.dims(tensor), "reduces parts of it")
    dims[place] = call.fresh(call.out.shape[place])
    return [dims]


def embedding_bag(call: Call) -> list[Dims]:
    """Rows of a table are looked up by number and reduced in bags; the width passes."""
    table, width = call.dims("weight")
    call.freeze([table], "looks entries up by number")
    call.mark(width, "produces")
    bags = call.fresh(call.outputs[0].shape[0])
    others = [
        [call.fresh(len(other)), width] if other.shape == call.outputs[0].shape else made_like(call, other)
        for other in call.outputs[1:]  # the last tells, for a maximum, where each feature was taken from
    ]
    return [[bags, width], *others]


def statistic(call: Call) -> list[Dims]:
    """A dimension becomes one number (median, mode) that changes when entries go: it may not be cut."""
    gone, kept = reduced(call)
    call.freeze_if_used(gone, "reduces it")
    return [kept for _ in call.outputs]


def renorm(call: Call) -> list[Dims]:
    """Slices along one dimension are scaled by their own norms: only that dimension is free."""
    dims = call.dims("self")
    place = call["dim"] % len(dims)
    call.freeze([dim for number, dim in enumerate(dims) if number != place], "takes a norm over it")
    return [dims]


def table_norm(call: Call) -> list[Dims]:
    """Rows of a table that are longer than allowed are shortened, before they are looked up."""
    table, width = call.dims("self")
    call.freeze([table, *call.dims("indices")], "looks entries up by number")
    return [[table, width]]


def distances(call: Call) -> list[Dims]:
    """Distances between all rows of two tensors: what they are measured over may not be cut."""
    first, second = call.dims("x1"), call.dims("x2")
    call.freeze([first[-1], second[-1]], "measures distances over it")
    batch = broadcast(call, [first[:-2], second[:-2]], call.out.shape[:-2])
    return [[*batch, first[-2], second[-2]]]

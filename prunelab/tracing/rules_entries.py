"""Rules for operators that work entry by entry, or make tensors; and what all rules share.

Flows in: a call.  Flows out: the dimensions of its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from prunelab.tracing.axes import leaf
from prunelab.tracing.recorder import Call, Dim, Dims


def is_tensor(value: Any) -> bool:
    """Tell a tensor from a number or ``None``."""
    return isinstance(value, Tensor)


def merge(call: Call, dims: Sequence[Dim]) -> Dim:
    """Unify dimensions and return the one that they are, made from all that they are made from."""
    for other in dims[1:]:
        call.unify(dims[0], other)
    return Dim(dims[0].axis, frozenset().union(*(dim.origins for dim in dims)))


def broadcast(call: Call, operands: Sequence[Dims], sizes: Sequence[int]) -> Dims:
    """Unify operands that are broadcast to one shape, from the right."""
    out = []
    for place, size in enumerate(sizes):
        back = len(sizes) - place
        met = [dims[-back] for dims in operands if back <= len(dims) and dims[-back].size == size]
        out.append(merge(call, met) if met else call.fresh(size, "broadcasts to it"))
    return out


def pointwise(call: Call) -> list[Dims]:
    """Every entry depends on the entries at the same place: all operands share their axes."""
    operands = [call.dims(tensor) for tensor in call.tensors]
    return [broadcast(call, operands, out.shape) for out in call.outputs]


def same(call: Call) -> list[Dims]:
    """The result has the axes of the first argument."""
    dims = call.dims(call.tensors[0])
    if any(list(out.shape) != [dim.size for dim in dims] for out in call.outputs):
        return unknown(call)
    return [dims for _ in call.outputs]


def reduced(call: Call) -> tuple[Dims, Dims]:
    """Return the dimensions that become one number each, all where none is named, and those of the result."""
    dims, chosen = call.dims(call.tensors[0]), call.get("dim")
    places = [chosen] if isinstance(chosen, int) else list(chosen or range(len(dims)))
    gone = {place % len(dims) for place in places} if dims else set()
    stays = call.outputs[0].dim() == len(dims)
    kept = [Dim(leaf(1)) if place in gone else dim for place, dim in enumerate(dims) if stays or place not in gone]
    return [dims[place] for place in sorted(gone)], kept


def restrided(call: Call) -> list[Dims]:
    """``as_strided``: the same entries only where those that there are more than one of keep their strides.

    Pooling to one pixel gives its result other strides so; anything else is a view by places in memory.
    """
    source, before = call.tensors[0], call.strides
    steps = zip(call.out.shape, before, call["stride"], strict=False)
    moved = len(before) != call.out.dim() or any(size > 1 and old != new for size, old, new in steps)
    if moved or call.get("storage_offset") not in (None, source.storage_offset()):
        return freeze_whole(call, "views it by places in memory")
    return same(call)


def made(call: Call) -> list[Dims]:
    """A tensor whose entries the model's code numbers or computes: none of them may go."""
    return [made_like(call, out) for out in call.outputs]


def made_like(call: Call, tensor: Tensor) -> Dims:
    """Frozen dimensions of an output of which nothing else is known."""
    return [call.fresh(size) for size in tensor.shape]


def uniform(call: Call) -> list[Dims]:
    """A tensor of one number, or of random ones: it can be made of any width, if something else gives it one.

    A recurrent layer's own first state cannot: its width is that of the layer's kernel.
    """
    if not any(tensor.numel() for tensor in call.outputs) or isinstance(call.owner, nn.RNNBase):
        return made(call)
    out = [[Dim(leaf(size)) for size in tensor.shape] for tensor in call.outputs]
    call.recorder.made += [(dim.axis, f"{call.where} makes it, and no weight does") for dims in out for dim in dims]
    return out


def unknown(call: Call) -> list[Dims]:
    """No rule: nothing that goes in or comes out may be cut."""
    return freeze_whole(call, "has no rule")


def freeze_whole(call: Call, why: str) -> list[Dims]:
    """Freeze all that goes in and comes out; where a weight is computed from other parameters, say how to end that."""
    layer, found, name = f".{call.recorder.module}".partition(".parametrizations.")
    own: list[Dims] = []
    if found:
        within = f"{layer}{found}{name.partition('.')[0]}."
        own = [dims for key, dims in call.recorder.parameters.items() if f".{key}".startswith(within)]
        of = f'model.get_submodule("{layer[1:]}")' if layer else "model"
        why += f"; torch.nn.utils.parametrize.remove_parametrizations({of}, {name.partition('.')[0]!r}) frees it"
    for dims in [*own, *(call.dims(tensor) for tensor in call.tensors)]:
        call.freeze(dims, why)
    return [[call.fresh(size, why) for size in out.shape] for out in call.outputs]


def looked_up(call: Call) -> list[Dims]:
    """Every entry is compared with a list of numbers."""
    first, *others = call.tensors
    for other in others:
        call.freeze(call.dims(other), "looks numbers up in it")
    return [call.dims(first)]


def matrices(call: Call) -> list[Dims]:
    """Inverses and decompositions need whole matrices, the last two dimensions; those before them pass."""
    first, *others = [call.dims(tensor) for tensor in call.tensors]
    batch = first[:-2]
    sizes = [dim.size for dim in batch]
    if ".parametrizations." in f".{call.recorder.module}":
        return whole(call)
    for dims in (first, *others):
        passes = len(dims) >= len(batch) and [dim.size for dim in dims[: len(batch)]] == sizes
        for one, two in zip(batch, dims, strict=False) if passes else ():
            call.unify(one, two)
        call.freeze(dims[len(batch) :] if passes else [*dims, *batch], "needs all of its entries")
    results = [list(out.shape[: len(batch)]) == sizes for out in call.outputs]
    return [
        [*batch, *made_like(call, out)[len(batch) :]] if fits else made_like(call, out)
        for out, fits in zip(call.outputs, results, strict=True)
    ]


def whole(call: Call) -> list[Dims]:
    """Every entry of the result depends on all entries."""
    return freeze_whole(call, "needs all of its entries")

"""Rules for operators that only arrange entries in other dimensions: views, slices, joins, padding, shuffles.

Flows in: a call.  Flows out: the dimensions of its outputs; axes become products and sums on the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from prunelab.tracing.axes import Axis, concatenation, freeze, is_frozen, leaf, product, regroup, split, unify
from prunelab.tracing.recorder import Call, Dim, Dims
from prunelab.tracing.rules_entries import made, merge, unknown


def view(call: Call) -> list[Dims]:
    """The same entries in other dimensions: factors are split and merged in row-major order."""
    dims, shape = call.dims("self"), call.out.shape
    axes = regroup([dim.axis for dim in dims], shape, call.where)
    return [[Dim(axis, origins) for axis, origins in zip(axes, _origins_of_view(dims, shape), strict=True)]]


def _origins_of_view(dims: Dims, shape: Sequence[int]) -> list[frozenset[tuple[str, int]]]:
    """Give every new dimension the origins of the old ones whose entries it shares."""

    def spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
        inner = [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
        return [(stride, stride * size) for stride, size in zip(inner, sizes, strict=True)]

    if not any(dim.origins for dim in dims):
        return [frozenset()] * len(shape)
    old = list(zip(dims, spans([dim.size for dim in dims]), strict=True))
    return [
        frozenset().union(*(dim.origins for dim, (low, high) in old if low < above and below < high))
        for below, above in spans(shape)
    ]


def permute(call: Call) -> list[Dims]:
    """Dimensions in another order."""
    dims = call.dims("self")
    return [[dims[place] for place in call["dims"]]]


def transpose(call: Call) -> list[Dims]:
    """Two dimensions change places."""
    dims = list(call.dims("self"))
    first, second = (call["dim0"], call["dim1"]) if "dim0" in call.values else (0, len(dims) - 1)
    if dims:
        dims[first], dims[second] = dims[second], dims[first]
    return [dims]


def squeeze(call: Call) -> list[Dims]:
    """Dimensions of one entry go."""
    dims = call.dims("self")
    chosen = call.get("dim")
    places = range(len(dims)) if chosen is None else [chosen] if isinstance(chosen, int) else chosen
    gone = {place % len(dims) for place in places if dims[place].size == 1}
    return [[dim for place, dim in enumerate(dims) if place not in gone]]


def unsqueeze(call: Call) -> list[Dims]:
    """A new dimension of one entry."""
    dims = list(call.dims("self"))
    dims.insert(call["dim"] % (len(dims) + 1), Dim(leaf(1)))
    return [dims]


def expand(call: Call) -> list[Dims]:
    """A dimension of one entry is repeated: the copies are a new axis that nothing is known of yet."""
    dims, shape = call.dims("self"), call.out.shape
    dims = [Dim(leaf(1))] * (len(shape) - len(dims)) + dims
    return [[dim if dim.size == size else Dim(leaf(size)) for dim, size in zip(dims, shape, strict=True)]]


def repeat(call: Call) -> list[Dims]:
    """Copies of a dimension, one after the other."""
    dims, shape = call.dims("self"), call.out.shape
    dims = [Dim(leaf(1))] * (len(shape) - len(dims)) + dims
    times = [size // dim.size for dim, size in zip(dims, shape, strict=True)]
    return [[Dim(product([leaf(n), dim.axis])) if n > 1 else dim for n, dim in zip(times, dims, strict=True)]]


def select(call: Call) -> list[Dims]:
    """Code picks entries by their number, so that none of them may go."""
    dims = list(call.dims("self"))
    call.freeze([dims.pop(call["dim"])], "picks entries by number")
    return [dims for _ in call.outputs]


def slice_(call: Call) -> list[Dims]:
    """Consecutive entries are a segment of their dimension; any others freeze it."""
    dims = call.dims("self")
    place = call["dim"] % len(dims)
    return [_sliced(call, dims, place, call.out.shape[place])]


def _sliced(call: Call, dims: Dims, place: int, length: int) -> Dims:
    """Return the dimensions of a slice of ``length`` entries of one of them."""
    size = dims[place].size
    if length == size:
        return dims
    start = min(max((call["start"] or 0) + (size if (call["start"] or 0) < 0 else 0), 0), size)
    if not length:  # a smaller tensor has no entries there either
        part = call.fresh(0)
    elif call["step"] != 1:
        call.freeze([dims[place]], "takes some entries of it")
        part = call.fresh(length)
    else:
        cuts = [start, length, size - start - length]
        pieces = split(dims[place].axis, [cut for cut in cuts if cut], call.where)
        part = Dim(pieces[1 if start else 0], dims[place].origins)
    return [*dims[:place], part, *dims[place + 1 :]]


def chunks(call: Call) -> list[Dims]:
    """Consecutive segments of one dimension."""
    dims = call.dims("self")
    place = call["dim"] % len(dims)
    sizes = [out.shape[place] for out in call.outputs]
    pieces = split(dims[place].axis, sizes, call.where)
    if len(set(sizes)) == 1 and call.name != "split_with_sizes":
        call.recorder.ties.append(pieces)  # code that asks for equal parts will ask again
    return [[*dims[:place], Dim(piece, dims[place].origins), *dims[place + 1 :]] for piece in pieces]


def cat(call: Call) -> list[Dims]:
    """One dimension has the entries of all parts, one after the other."""
    parts = [call.dims(tensor) for tensor in call["tensors"] if tensor.numel() or tensor.dim() > 1]
    out = call.out.shape
    place = call["dim"] % len(out)
    dims = [merge(call, [part[other] for part in parts]) if other != place else None for other in range(len(out))]
    segments = [part[place] for part in parts]
    origins = frozenset().union(*(dim.origins for dim in segments))
    if all(is_frozen(dim.axis) for dim in segments):
        return [[dim or Dim(call.fresh(out[place], "joins").axis, origins) for dim in dims]]
    return [[dim or Dim(concatenation([part.axis for part in segments]), origins) for dim in dims]]


def stack(call: Call) -> list[Dims]:
    """A new dimension counts the parts."""
    parts = [call.dims(tensor) for tensor in call["tensors"]]
    dims = [merge(call, met) for met in zip(*parts, strict=True)]
    dims.insert(call["dim"] % (len(dims) + 1), call.fresh(len(parts), "stacks"))
    return [dims]


def pad(call: Call) -> list[Dims]:
    """Padding with a constant joins constant channels, or drops some; other paddings freeze what they copy from."""
    dims = list(call.dims("self"))
    amounts = call["pad"] if call.name == "constant_pad_nd" else call["padding"]
    for back in range(len(amounts) // 2):
        before, after = amounts[2 * back], amounts[2 * back + 1]
        place = len(dims) - 1 - back
        if not before and not after:
            continue
        if is_frozen(dims[place].axis) or call.name != "constant_pad_nd":
            call.freeze([dims[place]], "pads it")
            dims[place] = call.fresh(call.out.shape[place], "pads")
        else:
            dropped = max(-before, 0), max(-after, 0)
            axis = _between(call, dims[place].axis, *dropped)
            ends = [call.fresh(max(amount, 0), "pads").axis for amount in (before, after)]
            dims[place] = Dim(concatenation([ends[0], axis, ends[1]]))
    return [dims]


def _between(call: Call, axis: Axis, first: int, last: int) -> Axis:
    """Return what is left of an axis without its first and last entries."""
    sizes = [first, axis.size - first - last, last]
    pieces = split(axis, [size for size in sizes if size], call.where)
    return pieces[1 if first else 0]


def glu(call: Call) -> list[Dims]:
    """The first half times the sigmoid of the second: the halves lose the same entries."""
    dims = list(call.dims("self"))
    place = call["dim"]
    half = call.out.shape[place]
    first, second = split(dims[place].axis, [half, half], call.where)
    unify(first, second, call.where)
    dims[place] = Dim(first, dims[place].origins)
    return [dims]


def windows(call: Call) -> list[Dims]:
    """``Tensor.unfold``: overlapping pieces of one dimension, which may not be cut."""
    dims = list(call.dims("self"))
    if not dims:
        return made(call)
    call.freeze([dims[call["dimension"]]], "slides over it")
    dims[call["dimension"]] = call.fresh(call.out.shape[call["dimension"]], "makes it")
    return [[*dims, call.fresh(call["size"], "makes it")]]


def scatter_part(call: Call) -> list[Dims]:
    """``x`` with one slice or one entry of a dimension replaced."""
    dims, part = call.dims("self"), call.dims("src")
    place = call["dim"] % len(dims)
    if call.name == "select_scatter":
        call.freeze([dims[place]], "picks entries by number")
        target = [dim for number, dim in enumerate(dims) if number != place]
    else:
        target = _sliced(call, dims, place, part[place].size)
    for one, two in zip(target, part, strict=True):
        call.unify(one, two)
    return [dims]


def spread_diagonal(call: Call) -> list[Dims]:
    """A dimension becomes the diagonal of two, which may not be cut."""
    *rest, last = call.dims("self")
    call.freeze([last], "makes it a diagonal")
    if (call["dim1"] % call.out.dim(), call["dim2"] % call.out.dim()) != (call.out.dim() - 2, call.out.dim() - 1):
        return unknown(call)
    return [[*rest, *(call.fresh(size, "makes it a diagonal") for size in call.out.shape[-2:])]]


def diagonal(call: Call) -> list[Dims]:
    """The diagonal of two dimensions: those may not be cut."""
    dims = call.dims("self")
    first, second = call["dim1"] % len(dims), call["dim2"] % len(dims)
    call.freeze([dims[first], dims[second]], "takes its diagonal")
    rest = [dim for place, dim in enumerate(dims) if place not in (first, second)]
    return [[*rest, call.fresh(call.out.shape[-1], "takes its diagonal")]]


def rotate(call: Call) -> list[Dims]:
    """Turn two dimensions by a multiple of 90°: they may not be cut."""
    dims = list(call.dims("self"))
    first, second = call["dims"]
    call.freeze([dims[first], dims[second]], "turns it")
    if call["k"] % 2:
        dims[first], dims[second] = dims[second], dims[first]
    return [dims]


def pair_up(call: Call) -> list[Dims]:
    """Complex numbers as pairs of real ones, or back: the last dimension holds the two parts."""
    dims = list(call.dims("self"))
    if call.name == "view_as_real":
        return [[*dims, call.fresh(2, "makes it")]]
    call.freeze(dims[-1:], "takes it as the parts of a complex number")
    return [dims[:-1]]


def pixel_shuffle(call: Call) -> list[Dims]:
    """Channels become channels × places in a square."""
    *batch, channels, high, wide = call.dims("self")
    factor = call["upscale_factor"]
    outer, inner = regroup([channels.axis], [channels.size // factor**2, factor**2], call.where)
    freeze(inner, f"{call.where} lays it out in space")
    return [[*batch, Dim(outer), call.fresh(high.size * factor), call.fresh(wide.size * factor)]]


def pixel_unshuffle(call: Call) -> list[Dims]:
    """Places in a square become channels."""
    *batch, channels, high, wide = call.dims("self")
    factor = call["downscale_factor"]
    call.freeze([high, wide], "folds it into channels")
    inner = call.fresh(factor**2, "takes it from space")
    places = [call.fresh(size // factor) for size in (high.size, wide.size)]
    return [[*batch, Dim(product([channels.axis, inner.axis])), *places]]


def channel_shuffle(call: Call) -> list[Dims]:
    """Groups change places with the channels in a group; the number of groups must be one that a cut can change."""
    batch, channels, *rest = call.dims("self")
    groups = call["groups"]
    outer, inner = regroup([channels.axis], [groups, channels.size // groups], call.where)
    if vars(call.owner).get("groups") == groups:
        call.recorder.sizes.append((call.recorder.module, "groups", outer))
    else:
        freeze(
            outer,
            f"{call.where} has its number of groups in the code; keep it as `self.groups`, or use nn.ChannelShuffle",
        )
    return [[batch, Dim(product([inner, outer])), *rest]]

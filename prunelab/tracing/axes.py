"""The algebra of axes: what a dimension of a tensor is made of, and which dimensions are the same.

Every dimension of every tensor has an *axis*.  An axis is a leaf of some size, a **product** of axes (the dimension was
or will be viewed as several: heads × head width) or a **sum** of axes (a concatenation).  Saying that two axes are the
same (``unify``) refines both until they agree, or freezes both where they cannot.  There is no tensor and no framework
in this file.  Notebook 01_tracing derives it.

>>> heads, width = leaf(4), leaf(8)
>>> channels = leaf(32)
>>> unify(channels, product([heads, width]), "a view")
>>> show(channels)
'4×8'
>>> left, right = split(channels, [16, 16], "a chunk")
>>> show(channels)
'2×8+2×8'
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeVar


class Axis:
    """One node of the algebra; compare axes by ``find``, since unified axes are one.

    Attributes:
        size: how many entries it has.
        kind: ``"leaf"``, ``"product"`` (``parts`` from outer to inner) or ``"sum"`` (``parts`` in order).
        parts: the axes it is made of; empty for a leaf.
        frozen: why no entry of this leaf may be removed, or ``None``.
        label: what the tracer knows the axis to be, such as ``"heads"``.
        fixed: a leaf that stands for itself when it is unified with another leaf.
    """

    __slots__ = ("size", "kind", "parts", "frozen", "label", "fixed", "_same")

    def __init__(self, size: int, kind: Literal["leaf", "product", "sum"] = "leaf", parts: Sequence[Axis] = ()) -> None:
        self.size = size
        self.kind = kind
        self.parts = tuple(parts)
        self.frozen: str | None = None
        self.label: str | None = None
        self.fixed = False
        self._same: Axis | None = None


class Mismatch(Exception):
    """Two axes cannot be refined into each other."""


def leaf(size: int, frozen: str | None = None) -> Axis:
    """Return a new axis of which nothing is known but its size; a size of one leaves nothing to remove."""
    axis = Axis(size)
    axis.frozen = "it has one entry" if size <= 1 and frozen is None else frozen
    return axis


def product(factors: Sequence[Axis]) -> Axis:
    """Return the axis whose entries are all combinations of the factors' entries, the first factor outermost."""
    flat = [part for factor in factors for part in factors_of(factor) if part.size != 1]
    if len(flat) == 1:
        return flat[0]
    size = math.prod(part.size for part in flat)
    if not flat or all(is_frozen(part) for part in flat):
        return leaf(size, flat[0].frozen or "it is frozen" if flat else None)
    return Axis(size, "product", flat)


def concatenation(segments: Sequence[Axis]) -> Axis:
    """Return the axis that has the segments' entries one after the other."""
    flat = [part for segment in segments for part in segments_of(segment) if part.size]
    if len(flat) == 1:
        return flat[0]
    return Axis(sum(part.size for part in flat), "sum", flat)


def find(axis: Axis) -> Axis:
    """Return the node that stands for all axes unified with this one."""
    if axis._same is None:
        return axis
    root = axis._same
    while root._same is not None:
        root = root._same
    while axis._same is not None:
        axis._same, axis = root, axis._same
    return root


def factors_of(axis: Axis) -> list[Axis]:
    """Return the factors of a product, down to leaves and sums; anything else is its own only factor."""
    axis = find(axis)
    return [deep for part in axis.parts for deep in factors_of(part)] if axis.kind == "product" else [axis]


def segments_of(axis: Axis) -> list[Axis]:
    """Return the segments of a sum, down to leaves and products; anything else is its own only segment."""
    axis = find(axis)
    return [deep for part in axis.parts for deep in segments_of(part)] if axis.kind == "sum" else [axis]


def leaves(axis: Axis) -> Iterator[Axis]:
    """Yield the leaves of an axis from left to right; one that occurs twice is yielded twice."""
    axis = find(axis)
    if axis.kind == "leaf":
        yield axis
    for part in axis.parts:
        yield from leaves(part)


def is_frozen(axis: Axis) -> bool:
    """Tell whether no entry of the axis may be removed."""
    axis = find(axis)
    if axis.kind == "leaf":
        return axis.frozen is not None
    return all(is_frozen(part) for part in axis.parts)


def freeze(axis: Axis, reason: str) -> None:
    """Forbid the removal of any entry; the first reason stays."""
    for part in leaves(axis):
        part.frozen = part.frozen or reason


def unify(first: Axis, second: Axis, reason: object) -> None:
    """Say that two axes are the same, entry by entry; freeze both, for ``reason`` in words, where they cannot be."""
    try:
        _unify(first, second)
    except Mismatch as mismatch:
        text = f"{reason}: {mismatch}"
        freeze(first, text)
        freeze(second, text)


def split(axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
    """Cut an axis into consecutive segments of the given sizes; frozen segments where it cannot be cut there."""
    if is_frozen(axis):
        why = next(leaves(axis)).frozen
        return [leaf(size, why) for size in sizes]
    pieces, rest = [], axis
    try:
        for size in sizes[:-1]:
            piece, rest = _cut(rest, size)
            pieces.append(piece)
    except Mismatch as mismatch:
        freeze(axis, f"{reason}: {mismatch}")
        return [leaf(size, f"{reason}: {mismatch}") for size in sizes]
    return [*pieces, rest]


def regroup(axes: Sequence[Axis], sizes: Sequence[int], reason: str) -> list[Axis]:
    """Return the axes of a view: the same entries in row-major order, arranged in dimensions of the given sizes."""
    if math.prod(axis.size for axis in axes) == 0:
        return [leaf(size, f"{reason}: it is empty") for size in sizes]
    waiting = [factor for axis in axes for factor in factors_of(axis) if factor.size != 1]
    try:
        return [product(_take(waiting, size)) for size in sizes]
    except Mismatch as mismatch:
        for axis in axes:
            freeze(axis, f"{reason}: {mismatch}")
        return [leaf(size, f"{reason}: {mismatch}") for size in sizes]


def _take(waiting: list[Axis], size: int) -> list[Axis]:
    """Take factors of a total size from the front of the list, splitting the last one if need be."""
    got: list[Axis] = []
    while size > 1:
        factor = waiting.pop(0)
        if factor.size > size:
            factor, rest = _divide(factor, size)
            waiting.insert(0, rest)
        if size % factor.size:
            raise Mismatch(f"factors of {factor.size} and {size} do not line up")
        size //= factor.size
        got.append(factor)
    return got


def _unify(first: Axis, second: Axis) -> None:
    first, second = find(first), find(second)
    if first is second:
        return
    if first.size != second.size:
        raise Mismatch(f"sizes {first.size} and {second.size} differ")
    if is_frozen(first) or is_frozen(second):
        reason = next((part.frozen for axis in (first, second) if is_frozen(axis) for part in leaves(axis)), None)
        freeze(first, reason or "it is frozen")
        freeze(second, reason or "it is frozen")
    elif first.kind == "leaf" and not (first.fixed and second.kind == "leaf"):
        _bind(first, second)
    elif second.kind == "leaf":
        _bind(second, first)
    elif first.kind == "sum" or second.kind == "sum":
        _align(segments_of(first), segments_of(second), _cut)
        if first.kind == second.kind:
            first._same = second
    else:
        _align(factors_of(first), factors_of(second), _divide)
        first._same = second


def _bind(free: Axis, other: Axis) -> None:
    other.label = other.label or free.label
    free._same = other


def _align(first: list[Axis], second: list[Axis], cut: Callable[[Axis, int], tuple[Axis, Axis]]) -> None:
    """Unify two lists of parts from left to right, cutting the larger part wherever the smaller one ends."""
    while first and second:
        one, two = first.pop(0), second.pop(0)
        if one.size > two.size:
            one, rest = cut(one, two.size)
            first.insert(0, rest)
        elif two.size > one.size:
            two, rest = cut(two, one.size)
            second.insert(0, rest)
        _unify(one, two)


def _cut(axis: Axis, size: int) -> tuple[Axis, Axis]:
    """Refine an axis into a sum of ``size`` entries and the rest."""
    axis = find(axis)
    if is_frozen(axis):
        why = next(leaves(axis)).frozen
        return leaf(size, why), leaf(axis.size - size, why)
    if axis.kind == "leaf":
        parts = (leaf(size), leaf(axis.size - size))
    elif axis.kind == "sum":
        return _cut_sum(segments_of(axis), size)
    else:
        outer, *inner = factors_of(axis)
        width = math.prod(part.size for part in inner)
        if size % width:
            raise Mismatch(f"{show(axis)} cannot be cut at {size}")
        first, second = _cut(outer, size // width)
        parts = (product([first, *inner]), product([second, *inner]))
    axis._same = concatenation(parts)
    return parts


def _cut_sum(segments: list[Axis], size: int) -> tuple[Axis, Axis]:
    before: list[Axis] = []
    while size:
        segment = segments.pop(0)
        if segment.size > size:
            segment, rest = _cut(segment, size)
            segments.insert(0, rest)
        size -= segment.size
        before.append(segment)
    return concatenation(before), concatenation(segments)


def _divide(axis: Axis, size: int) -> tuple[Axis, Axis]:
    """Refine an axis into the product of an outer axis of ``size`` entries and an inner one."""
    axis = find(axis)
    if axis.size % size:
        raise Mismatch(f"{show(axis)} is not a multiple of {size}")
    inner_size = axis.size // size
    if is_frozen(axis):
        why = next(leaves(axis)).frozen
        return leaf(size, why), leaf(inner_size, why)
    if axis.kind == "leaf":
        outer, inner = leaf(size), leaf(inner_size)
    elif axis.kind == "product":
        waiting = factors_of(axis)
        outer = product(_take(waiting, size))
        inner = product(waiting)
    else:
        if any(segment.size % inner_size for segment in segments_of(axis)):
            raise Mismatch(f"{show(axis)} is not a product of {size} and {inner_size}")
        pairs = [_divide(segment, segment.size // inner_size) for segment in segments_of(axis)]
        inner = pairs[0][1]
        for _, other in pairs[1:]:
            _unify(inner, other)
        outer = concatenation([pair[0] for pair in pairs])
    axis._same = product([outer, inner])
    return outer, inner


def show(axis: Axis) -> str:
    """Return an axis in words: sizes, ``×`` for products, ``+`` for sums."""
    axis = find(axis)
    if axis.kind == "leaf":
        return str(axis.size)
    if axis.kind == "product":
        return "×".join(f"({show(part)})" if find(part).kind == "sum" else show(part) for part in axis.parts)
    return "+".join(show(part) for part in axis.parts)


def copies(axes: Iterable[Axis], fixed: Iterable[Axis] = ()) -> tuple[Callable[[Axis], Axis], dict[int, Axis]]:
    """Copy axes, so that what is said of the copies does not reach them.

    Args:
        axes: what to copy.
        fixed: leaves whose copies stand for themselves when they are unified with other leaves.

    Returns:
        A function from an axis to its copy, and the copies of the fixed leaves by the ``id`` of the leaf.
    """
    made: dict[int, Axis] = {}
    own = {id(find(part)) for part in fixed}

    def twin(axis: Axis) -> Axis:
        axis = find(axis)
        if id(axis) not in made:
            new = made[id(axis)] = Axis(axis.size, axis.kind, [twin(part) for part in axis.parts])
            new.frozen, new.label, new.fixed = axis.frozen, axis.label, id(axis) in own
        return made[id(axis)]

    for axis in axes:
        twin(axis)
    return twin, {id(part): twin(part) for part in fixed}


T = TypeVar("T")


def fold(
    axis: Axis, at_leaf: Callable[[Axis], T], at_product: Callable[[list[T]], T], at_sum: Callable[[list[T]], T]
) -> T:
    """Compute something over an axis, from its leaves up (a kept size, a kept mask, the place of every unit)."""
    axis = find(axis)
    if axis.kind == "leaf":
        return at_leaf(axis)
    parts = [fold(part, at_leaf, at_product, at_sum) for part in axis.parts]
    return at_product(parts) if axis.kind == "product" else at_sum(parts)


def size_with(axis: Axis, leaf_sizes: Mapping[int, int]) -> int:
    """Return the size of an axis once some leaves (by ``id``) have other sizes."""

    def at_leaf(part: Axis) -> int:
        return leaf_sizes.get(id(part), part.size)

    return fold(axis, at_leaf, lambda parts: math.prod(parts), lambda parts: sum(parts))

"""Sizes as polynomials over the leaves of axes: what an integer must become for every number of units that may stay.

Flows in: axes, and which of their leaves keep equal numbers.  Flows out: sizes, quotients of them, and ties that would
make two sizes one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prunelab.tracing.axes import Axis, fold
from prunelab.tracing.integers import Attribute, Expression, Formula, attributes_of

Poly = dict[tuple[int, ...], int]
"""A size: (leaves by number, sorted) -> coefficient; frozen leaves are constants."""


class Sizes:
    """Sizes of axes as polynomials over leaves, of which those that are tied count as one."""

    def __init__(self, columns: list[list[Axis]]) -> None:
        self.leaves: list[Axis] = []
        self._numbers: dict[int, int] = {}
        self._parent: dict[int, int] = {}
        for column in columns:
            first, *others = (self._number(part) for part in column)
            for other in others:
                one, two = self._root(first), self._root(other)
                if one != two:
                    self._parent[two] = one

    def _number(self, part: Axis) -> int:
        """Return a leaf's number: they are counted as they are met, so that every trace counts alike."""
        if id(part) not in self._numbers:
            self._numbers[id(part)] = len(self.leaves)
            self.leaves.append(part)
        return self._numbers[id(part)]

    def _root(self, number: int) -> int:
        while number in self._parent:
            number = self._parent[number]
        return number

    def of(self, axis: Axis) -> Poly:
        def at_leaf(part: Axis) -> Poly:
            return {(): part.size} if part.frozen is not None else {(self._root(self._number(part)),): 1}

        return fold(axis, at_leaf, lambda parts: _reduce(_times, parts), lambda parts: _reduce(_plus, parts))

    def pairs(self, left: Poly, right: Poly) -> list[list[Axis]]:
        """Return leaves whose ties would make two sizes equal, none where there are no such leaves."""
        difference = _plus(left, _times(right, {(): -1}))
        plus, minus = ([key for key, n in difference.items() if (n > 0) == more] for more in (True, False))
        found: list[list[Axis]] = []
        for one in plus:
            two = next((key for key in minus if difference[one] == -difference[key] and len(key) == len(one)), None)
            if two is None:
                return []
            minus.remove(two)
            ours, theirs = list(one), list(two)
            for part in one:
                if part in theirs:
                    ours.remove(part)
                    theirs.remove(part)
            for part in ours:
                size = self.leaves[part].size
                match = next((other for other in theirs if self.leaves[other].size == size), None)
                if match is None:
                    return []
                theirs.remove(match)
                found.append([self.leaves[part], self.leaves[match]])
        return [] if minus else found

    def evaluate(self, source: Expression, known: Mapping[Attribute, Poly]) -> Poly | None:
        if isinstance(source, Attribute):
            return known.get(source)
        if isinstance(source, Axis):
            return self.of(source)
        if isinstance(source, int):
            return {(): source} if source else {}
        left, right = (self.evaluate(side, known) for side in source[1:])
        if left is None or right is None:
            return None
        if source.symbol == "*":
            return _times(left, right)
        if source.symbol == "//":
            return _over(left, right)
        return _plus(left, right if source.symbol == "+" else _times(right, {(): -1}))

    def solve(
        self, source: Expression, size: Poly | None, unknown: Attribute, known: Mapping[Attribute, Poly]
    ) -> Poly | None:
        """Return what the unknown attribute must be for the expression to be ``size``."""
        if size is None or source == unknown:
            return size
        if not isinstance(source, Formula):
            return None
        inside = [unknown in attributes_of(side) for side in source[1:]]
        if all(inside) or not any(inside):
            return None
        branch, other = (source.left, source.right) if inside[0] else (source.right, source.left)
        value = self.evaluate(other, known)
        if value is None:
            return None
        if source.symbol == "+":
            size = _plus(size, _times(value, {(): -1}))
        elif source.symbol == "-":
            size = _plus(size, value) if inside[0] else _plus(value, _times(size, {(): -1}))
        elif source.symbol == "*":
            size = _over(size, value)
        else:
            size = _times(size, value) if inside[0] else _over(value, size)
        return self.solve(branch, size, unknown, known)


def _reduce(join: Callable[[Poly, Poly], Poly], parts: list[Poly]) -> Poly:
    out = parts[0]
    for part in parts[1:]:
        out = join(out, part)
    return out


def _plus(left: Poly, right: Poly) -> Poly:
    out = {key: left.get(key, 0) + right.get(key, 0) for key in {**left, **right}}
    return {key: number for key, number in out.items() if number}


def _times(left: Poly, right: Poly) -> Poly:
    out: Poly = {}
    for one, first in left.items():
        for two, second in right.items():
            key = tuple(sorted(one + two))
            out[key] = out.get(key, 0) + first * second
    return {key: number for key, number in out.items() if number}


def _over(left: Poly, right: Poly) -> Poly | None:
    """Return a quotient without remainder, ``None`` where there is none (only single terms are divided by)."""
    if left == right and left:
        return {(): 1}
    if len(right) != 1:
        return None
    ((divisor, number),) = right.items()
    out: Poly = {}
    for key, count in left.items():
        rest = list(key)
        for part in divisor:
            if part not in rest:
                return None
            rest.remove(part)
        if count % number:
            return None
        out[tuple(rest)] = count // number
    return out

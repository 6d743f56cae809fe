"""Which axes must keep equal numbers, since one integer of the model describes them all.

An integer attribute can only have one new value.  So all axes whose size it is keep equal numbers of entries, and
``hidden = heads * width`` holds after a cut as before.  Sizes are compared as polynomials over the leaves of the axes.

Flows in: a recorder after the run, with ``(expression, axis)`` pairs.  Flows out: leaves that are tied to each other;
what cannot be tied is frozen, with a reason that names the attribute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prunelab.tracing.axes import (
    Axis,
    concatenation,
    find,
    fold,
    freeze,
    is_frozen,
    leaf,
    leaves,
    product,
    split,
    unify,
)
from prunelab.tracing.integers import Attribute, Expression, Formula, attributes_of, has_axis, show
from prunelab.tracing.polynomials import Poly, Sizes
from prunelab.tracing.recorder import Integer, Recorder

ROUNDS = 8
"""How often axes are refined until nothing changes; two or three rounds are usual."""


def tie(recorder: Recorder) -> list[set[int]]:
    """Return sets of leaves (by ``id``) that must keep equal numbers.

    Those are parts that code splits into equal sizes, and axes that one integer of the model describes.  Axes that are
    not built alike are refined until they are; where that cannot be they are frozen.
    """
    described = _Described(recorder)
    described.refine()
    columns: list[list[Axis]] = []
    for axes, reason in described.alike():
        found = _columns(axes)
        columns += found or []
        for axis in axes if found is None else []:
            freeze(axis, reason)
    _freeze_together(columns)
    while described.settle(columns):
        _freeze_together(columns)
    recorder.integers = described.integers()
    recorder.described = described.equations
    return [{id(part) for part in column} for column in columns]


def _freeze_together(columns: list[list[Axis]]) -> None:
    """Freeze whatever is tied to a frozen axis, directly or by way of others."""
    changed = True
    while changed:
        changed = False
        for column in columns:
            reason = next((part.frozen for part in column if part.frozen), None)
            for part in column if reason else []:
                changed |= part.frozen is None
                freeze(part, f"it must stay as large as another axis: {reason}")


def _columns(axes: list[Axis]) -> list[list[Axis]] | None:
    """Return the leaves of axes that are built alike, place by place; ``None`` if they are not."""
    rows = [list(leaves(axis)) for axis in axes]
    if len({_build(axis) for axis in axes}) != 1:
        return None
    return [list(column) for column in zip(*rows, strict=True) if len({id(part) for part in column}) > 1]


def _build(axis: Axis) -> tuple[Any, ...]:
    """Return what an axis is made of, nested products and sums as one, without regard to which leaves they are."""

    def join(kind: str) -> Callable[[list[tuple[Any, ...]]], tuple[Any, ...]]:
        return lambda parts: (kind, *(deep for part in parts for deep in (part[1:] if part[0] == kind else [part])))

    return fold(axis, lambda part: ("leaf", part.size), join("product"), join("sum"))


def _like(axis: Axis) -> Axis:
    """Return an axis that is built like another one, of leaves of its own."""
    return fold(axis, lambda part: leaf(part.size, part.frozen), product, concatenation)


class _Described:
    """The sizes in the model's code, as equations between attributes and axes."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.values = recorder.values
        self.equations = list(dict.fromkeys((source, find(axis)) for source, axis in recorder.described))
        self.axes: dict[Expression, list[Axis]] = {}
        self.sizes = Sizes([])
        self.known: dict[Attribute, Poly] = {}
        self._fit_layers()

    def _fit_layers(self) -> None:
        """Add what PyTorch's own layers keep as integers, where the model's code reads it."""
        places = {"in_features": 1, "in_channels": 1, "embedding_dim": 1}
        seen = dict.fromkeys(attribute for source, _ in self.equations for attribute in attributes_of(source))
        for attribute in seen:
            last = attribute.steps[-1]
            names = ("weight", "running_mean") if last == "num_features" else ("weight",)
            if last not in (*places, "out_features", "out_channels", "num_features"):
                continue
            for name in names:
                dims = self.recorder.parameters.get(f"{attribute.module}.{name}".lstrip("."), [])
                place = places.get(str(last), 0)
                if len(dims) > place and dims[place].size == self.values[attribute]:
                    self.equations.append((attribute, find(dims[place].axis)))
                    break

    # ── axes that are built alike ─────────────────────────────────────────────────────────────────────────────────

    def alike(self) -> list[tuple[list[Axis], str]]:
        """Return axes that must be built alike, with why."""
        parts = [
            (axes, "code splits it into parts of equal size that are not built alike") for axes in self.recorder.ties
        ]
        return [*parts, *((axes, _reason(expression)) for expression, axes in self.axes.items() if len(axes) > 1)]

    def refine(self) -> None:
        """Refine axes until those are built alike that one integer describes, as far as possible."""
        for _ in range(ROUNDS):
            self._collect()
            refined = [_refine(axes, reason) for axes, reason in self.alike()]
            imposed = [self._impose(source, axis) for source, axis in list(self.equations)]
            if not any((*refined, *imposed)):
                return

    def _collect(self) -> None:
        """Sort axes by the expression that is their size; ``3 * width`` and ``width // 2`` go with ``width``."""
        self.axes = {}
        for source, axis in self.equations:
            if has_axis(source):
                continue
            for expression, whole in _in_terms_of_one(source, find(axis), self.values):
                known = self.axes.setdefault(expression, [])
                if all(find(other) is not find(whole) for other in known):
                    known.append(whole)

    def _impose(self, source: Expression, axis: Axis) -> bool:
        """Give a plain axis the factors or segments that its size is computed from; tell whether it was one."""
        axis = find(axis)
        if isinstance(source, Attribute) or axis.kind != "leaf" or axis.frozen is not None or has_axis(source):
            return False
        parts: list[tuple[Attribute, Axis]] = []
        built = self._built(source, parts)
        if built is None or find(built).kind == "leaf":
            return False
        unify(axis, built, f"its size is {show(source)}")
        self.equations += parts
        return True

    def _built(self, source: Expression, parts: list[tuple[Attribute, Axis]]) -> Axis | None:
        if isinstance(source, int):
            return leaf(source, "a constant of the model's code") if source > 0 else None
        if isinstance(source, Attribute):
            if self.values[source] < 1:
                return None
            known = self.axes.get(source)
            part = _like(known[0]) if known else leaf(self.values[source])
            parts.append((source, part))
            return part
        if isinstance(source, Formula) and source.symbol in "+*":
            sides = [self._built(side, parts) for side in source[1:]]
            if sides[0] is not None and sides[1] is not None:
                return (product if source.symbol == "*" else concatenation)([sides[0], sides[1]])
        return None

    # ── sizes as polynomials ──────────────────────────────────────────────────────────────────────────────────────

    def settle(self, columns: list[list[Axis]]) -> bool:
        """Tie or freeze the axes of an equation that a cut could break; tell whether there was one."""
        sizes = Sizes(columns)
        self.sizes, self.known = sizes, {}
        equations = [(source, axis) for source, axis in self.equations if not has_axis(source)]
        mixed = [(source, axis) for source, axis in self.equations if has_axis(source)]
        waiting = self._solve(equations)
        waiting += self._solve(mixed)
        while waiting:
            source, axis = waiting.pop(0)
            if not self._choose(source, axis) and not has_axis(source) and self._freeze(source, axis):
                return True
            waiting = self._solve(waiting)
        for source, axis in equations:
            size, wanted = sizes.evaluate(source, self.known), sizes.of(axis)
            if size != wanted:
                pairs = [] if size is None else sizes.pairs(size, wanted)
                columns += pairs
                if pairs or self._freeze(source, axis):
                    return True
        return False

    def _solve(self, equations: list[tuple[Expression, Axis]]) -> list[tuple[Expression, Axis]]:
        """Solve equations with one unknown for as long as there are any; return those with more."""
        while True:
            rest = []
            for source, axis in equations:
                unknown = self._unknown(source)
                solved = len(unknown) == 1 and self._settle(source, axis, unknown[0])
                if unknown and not solved:
                    rest.append((source, axis))
            if len(rest) == len(equations):
                return rest
            equations = rest

    def _unknown(self, source: Expression) -> list[Attribute]:
        return [attribute for attribute in dict.fromkeys(attributes_of(source)) if attribute not in self.known]

    def _settle(self, source: Expression, axis: Axis, unknown: Attribute) -> bool:
        solved = self.sizes.solve(source, self.sizes.of(axis), unknown, self.known)
        if solved is not None:
            self.known[unknown] = solved
        return solved is not None

    def _choose(self, source: Expression, axis: Axis) -> bool:
        """Let one attribute of several follow the axis, and leave the others unchanged."""
        unknown = self._unknown(source)
        for attribute in unknown:
            others: dict[Attribute, Poly] = {
                other: {(): self.values[other]} for other in unknown if other is not attribute
            }
            self.known |= others
            if self._settle(source, axis, attribute):
                return True
            for other in others:
                del self.known[other]
        return False

    def integers(self) -> list[Integer]:
        """Return every attribute that gave a size, with what its value follows."""
        parts = self.sizes.leaves
        return [
            Integer(attribute, tuple((number, tuple(parts[part] for part in key)) for key, number in size.items()))
            for attribute, size in self.known.items()
        ]

    def _freeze(self, source: Expression, axis: Axis) -> bool:
        reason = f"its size is `{show(source)}`, which the model uses for other sizes too"
        involved = [axis]
        for attribute in attributes_of(source):
            involved += [other for given, other in self.equations if attribute in attributes_of(given)]
        free = [other for other in involved if not is_frozen(other)]
        for other in free:
            freeze(other, reason)
        return bool(free)


def _reason(expression: Expression) -> str:
    return f"`{show(expression)}` is one integer for axes that are not built alike"


def _in_terms_of_one(source: Expression, axis: Axis, values: Mapping[Attribute, int]) -> list[tuple[Expression, Axis]]:
    """Return what is known of simpler expressions if one says how large an axis is."""
    if isinstance(source, Formula) and source.symbol in ("*", "+", "//"):
        left, right = source.left, source.right
        if source.symbol == "//" and isinstance(left, Attribute) and isinstance(right, int):
            return [(left, concatenation([axis] * right))]
        if source.symbol == "+" and left == right:
            left, right = 2, left
        elif isinstance(right, int):
            left, right = right, left
        if source.symbol != "//" and isinstance(left, int) and isinstance(right, Attribute) and axis.kind == "sum":
            return [(right, part) for part in split(axis, [values[right]] * left, f"its size is {show(source)}")]
    return [(source, axis)]


def _refine(axes: list[Axis], reason: str) -> bool:
    """Give all axes the build of the finest one; tell whether anything changed."""
    builds = [_build(axis) for axis in axes]
    if len(set(builds)) == 1:
        return False
    finest = max(axes, key=lambda axis: sum(1 for _ in leaves(axis)))
    changed = False
    for axis, build in zip(axes, builds, strict=True):
        if build == _build(finest):
            continue
        if is_frozen(axis) and is_frozen(finest):
            continue
        changed = True
        if is_frozen(axis) or is_frozen(finest):
            why = next(part.frozen for whole in (axis, finest) if is_frozen(whole) for part in leaves(whole))
            for whole in (axis, finest):
                freeze(whole, f"{reason}, and one of them must stay: {why}")
        else:
            unify(axis, _like(finest), reason)
    return changed

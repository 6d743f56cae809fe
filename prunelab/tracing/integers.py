"""Integers that remember where they came from, so that a size in a model's code leads back to an attribute.

For the time of a trace, ``Observed`` integers stand in for those that a model holds (``planting``).  They behave as
integers everywhere, and what is computed from them remembers how.

Flows in: the arithmetic of a model's code.  Flows out: expressions over attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from prunelab.tracing.axes import Axis


class Attribute(NamedTuple):
    """An integer that a module holds: ``steps`` lead from the module to it, by attribute name, key or place."""

    module: str
    steps: tuple[str | int, ...]

    @property
    def name(self) -> str:
        """The attribute as one would write it."""
        parts = [f".{step}" if isinstance(step, str) else f"[{step}]" for step in self.steps]
        return (self.module + "".join(parts)).lstrip(".")


class Formula(NamedTuple):
    """An operation on two sizes; ``symbol`` is one of ``+ - * //``, and ``//`` leaves no remainder."""

    symbol: str
    left: Expression
    right: Expression


Expression = int | Attribute | Axis | Formula
"""How a size was computed: from constants, attributes, and sizes of tensors (their axes)."""


class Notes:
    """What belongs to one trace: integers that Python made plain (``int(x)``), by module and value.

    Args:
        stack: names of the modules that run now, the innermost last.
    """

    def __init__(self, stack: list[str]) -> None:
        self.stack = stack
        self.plain: dict[tuple[str, int], Expression | None] = {}

    @property
    def module(self) -> str:
        return self.stack[-1] if self.stack else ""

    def keep(self, value: int, source: Expression) -> None:
        """Remember where a plain integer came from, as long as there is only one thing that it can be."""
        key = (self.module, value)
        self.plain[key] = source if self.plain.get(key, source) == source else None


_NEUTRAL = {"+": 0, "-": 0, "*": 1, "//": 1}


class Observed(int):
    """An integer that knows its expression.

    Attributes:
        source: how it was computed.
        notes: of the trace that it belongs to.
        held: whether attributes play a part, not only sizes of tensors.
    """

    source: Expression
    notes: Notes
    held: bool

    def _with(self, symbol: str, other: Any, value: Any, swapped: bool = False) -> Any:
        if not isinstance(value, int):
            return value
        if type(other) is int and _NEUTRAL[symbol] == other and not (swapped and symbol in ("-", "//")):
            return self
        held, source = self.held, other
        if type(other) is not int:
            known = type(other) is Observed and other.notes is self.notes
            held, source = (held or other.held, other.source) if known else (held, int.__int__(other))
        pair = (source, self.source) if swapped else (self.source, source)
        return observe(value, Formula(symbol, *pair), self.notes, held)

    def __add__(self, other: Any) -> Any:
        return self._with("+", other, int.__add__(self, other))

    def __radd__(self, other: Any) -> Any:
        return self._with("+", other, int.__radd__(self, other), swapped=True)

    def __sub__(self, other: Any) -> Any:
        return self._with("-", other, int.__sub__(self, other))

    def __rsub__(self, other: Any) -> Any:
        return self._with("-", other, int.__rsub__(self, other), swapped=True)

    def __mul__(self, other: Any) -> Any:
        return self._with("*", other, int.__mul__(self, other))

    def __rmul__(self, other: Any) -> Any:
        return self._with("*", other, int.__rmul__(self, other), swapped=True)

    def __floordiv__(self, other: Any) -> Any:
        value = int.__floordiv__(self, other)
        return self._with("//", other, value) if isinstance(value, int) and value * other == self else value

    def __rfloordiv__(self, other: Any) -> Any:
        value = int.__rfloordiv__(self, other)
        exact = isinstance(value, int) and value * self == other
        return self._with("//", other, value, swapped=True) if exact else value

    def __divmod__(self, other: Any) -> Any:
        return (self // other, self % other) if isinstance(other, int) else int.__divmod__(self, other)

    def __truediv__(self, other: Any) -> Any:
        return _quotient(int.__truediv__(self, other), self // other if _divides(other, self) else None)

    def __rtruediv__(self, other: Any) -> Any:
        return _quotient(int.__rtruediv__(self, other), other // self if _divides(self, other) else None)

    def __pow__(self, power: Any, modulus: Any = None) -> Any:
        if modulus is None and type(power) is int and 1 <= power <= 4:
            return math.prod([self] * power)  # multiplied one by one
        return int.__pow__(self, power, modulus)

    def __neg__(self) -> Any:
        return 0 - self

    def __pos__(self) -> Any:
        return self

    def __abs__(self) -> Any:
        return self if self >= 0 else -self

    def __int__(self) -> int:
        value = int.__int__(self)
        if self.held:
            self.notes.keep(value, self.source)
        return value

    __trunc__ = __floor__ = __ceil__ = __pos__

    def __round__(self, digits: Any = None) -> Any:
        return self if digits is None else int.__round__(self, digits)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return int, (int.__int__(self),)  # a copy is a plain integer


class Quotient(float):
    """A whole number that a division gave as a float; made an integer, it is ``whole`` again."""

    whole: Observed

    def __int__(self) -> int:
        return int(self.whole)

    def __trunc__(self) -> int:
        return self.whole

    __floor__ = __ceil__ = __trunc__

    def __round__(self, digits: Any = None) -> Any:
        return self.whole if digits is None else float.__round__(self, digits)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return float, (float.__float__(self),)


def _divides(divisor: Any, number: Any) -> bool:
    return isinstance(divisor, int) and isinstance(number, int) and divisor != 0 and number % divisor == 0


def _quotient(value: Any, whole: Any) -> Any:
    if type(whole) is not Observed:
        return value
    found = Quotient(value)
    found.whole = whole
    return found


def observe(value: int, source: Expression, notes: Notes, held: bool = True) -> Observed:
    """Return an integer that remembers where it came from; ``held`` says that attributes play a part.

    >>> heads = observe(4, Attribute("attention", ("heads",)), Notes([]))
    >>> show(((heads + 2) * 8).source), (heads + 2) * 8
    ('(attention.heads + 2) * 8', 48)
    """
    found = int.__new__(Observed, value)
    found.source, found.notes, found.held = source, notes, held
    return found


def holds(value: Any) -> bool:
    """Tell whether a value is an integer that depends on attributes, or a list with one."""
    kind = type(value)
    if kind is Observed:
        return bool(value.held)
    if kind is tuple or kind is list or kind is torch.Size:
        return any(type(part) is Observed and part.held for part in value)
    return False


# ── expressions ───────────────────────────────────────────────────────────────────────────────────────────────────


def show(expression: Expression) -> str:
    """Return an expression as one would write it."""
    if isinstance(expression, Formula):
        sides = [f"({show(side)})" if isinstance(side, Formula) else show(side) for side in expression[1:]]
        return f" {expression.symbol} ".join(sides)
    if isinstance(expression, Attribute):
        return expression.name
    return str(expression) if isinstance(expression, int) else "the size of a tensor"


def attributes_of(expression: Expression) -> Iterator[Attribute]:
    """Yield the attributes in an expression, from left to right."""
    if isinstance(expression, Attribute):
        yield expression
    elif isinstance(expression, Formula):
        yield from attributes_of(expression.left)
        yield from attributes_of(expression.right)


def has_axis(expression: Expression) -> bool:
    """Tell whether the size of a tensor plays a part."""
    if isinstance(expression, Formula):
        return has_axis(expression.left) or has_axis(expression.right)
    return isinstance(expression, Axis)


def evaluate(expression: Expression, values: Mapping[Attribute, int], size: Callable[[Axis], int]) -> int | None:
    """Return what an expression is for given attributes and sizes; ``None`` where a division would not be exact."""
    if isinstance(expression, Attribute):
        return values[expression]
    if isinstance(expression, Axis):
        return size(expression)
    if isinstance(expression, int):
        return expression
    left, right = (evaluate(side, values, size) for side in expression[1:])
    if left is None or right is None:
        return None
    if expression.symbol == "//":
        return left // right if right and left % right == 0 else None
    return {"+": left + right, "-": left - right, "*": left * right}[expression.symbol]

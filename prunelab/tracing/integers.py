"""Integers that remember where they came from, so that a size in a model's code leads back to an attribute.

For the time of a trace, the integers that the fake copy's modules and their configurations hold are replaced by
``Observed`` ones.  They are integers in every respect, and what is computed from them remembers how.

Flows in: a fake copy of a model.  Flows out: expressions over attributes, and integers put
into a model.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

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
        """Remember where a plain integer came from, as long as only one thing it can be."""
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
        if type(other) is int and _NEUTRAL[symbol] == other and not (swapped and symbol in "-//"):
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


# ── attributes of modules ─────────────────────────────────────────────────────────────────────────────────────────

_LAYERS: dict[str, tuple[str, ...]] = {
    "Linear": ("in_features", "out_features"),
    "Unflatten": ("unflattened_size",),
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), ("in_channels", "out_channels")),
    **dict.fromkeys(("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"), ("num_features",)),
    "Embedding": ("embedding_dim",),
}
"""Sizes of PyTorch's own layers that models read; the rest of what those hold is none of a model's business."""

_PRIVATE = frozenset(vars(nn.Module())) | {"training", "__dict__"}
_NO_HOLDERS = (type, Tensor, nn.Module, Enum)
_FOREIGN = ("builtins", "torch", "functools", "types", "collections", "numpy", "threading", "logging")
_DEPTH = 4


def plant(model: nn.Module, notes: Notes) -> tuple[dict[Attribute, int], list[tuple[dict, str, Any]]]:
    """Replace the integers that modules and their configurations hold by observed ones.

    Returns:
        The value of every attribute, and what ``restore`` needs.
    """
    planter = _Planter(notes)
    for name, module in model.named_modules():
        planter.module(name, module)
    return planter.values, planter.before


def restore(before: list[tuple[dict, str, Any]]) -> None:
    """Put back what ``plant`` replaced."""
    for store, name, value in before:
        if value is _ABSENT:
            store.pop(name, None)
        else:
            store[name] = value


_ABSENT = object()


class _Planter:
    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.values: dict[Attribute, int] = {}
        self.before: list[tuple[dict, str, Any]] = []
        self.seen: set[int] = set()
        self.classes: dict[type, list[tuple[str, int]]] = {}
        self.holders: dict[type, bool] = {}

    def module(self, path: str, module: nn.Module) -> None:
        kind, store = type(module), vars(module)
        if kind.__module__.startswith("torch."):
            if kind.__module__.startswith("torch.nn.") and not isinstance(module, torch.jit.ScriptModule):
                for name in _LAYERS.get(kind.__name__, ()):
                    self.entry(store, name, store.get(name), Attribute(path, (name,)))
            return
        if isinstance(module, torch.jit.ScriptModule):
            return
        for name, value in list(store.items()):
            if name not in _PRIVATE and not isinstance(value, (bool, str, float, Tensor)):
                self.entry(store, name, value, Attribute(path, (name,)))
        for name, value in self.class_integers(kind):
            if name not in store:
                self.entry(store, name, value, Attribute(path, (name,)), _ABSENT)

    def entry(self, store: dict, name: str, value: Any, where: Attribute, before: Any = None) -> None:
        new = self.observed(value, where)
        if new is not value:
            self.before.append((store, name, value if before is None else before))
            store[name] = new

    def observed(self, value: Any, where: Attribute) -> Any:
        """Return what stands in for a value; itself, if it is not made of integers."""
        kind = type(value)
        if kind is int or isinstance(value, np.integer):
            self.values[where] = int(value)
            return observe(self.values[where], where, self.notes)
        if kind is tuple or kind is list or kind is torch.Size or (isinstance(value, tuple) and hasattr(kind, "_make")):
            if len(where.steps) >= _DEPTH or len(value) > 16:
                return value
            inner = [self.observed(part, Attribute(where.module, (*where.steps, n))) for n, part in enumerate(value)]
            if all(new is old for new, old in zip(inner, value, strict=True)):
                return value
            return kind._make(inner) if hasattr(kind, "_make") else kind(inner)
        if isinstance(value, dict):
            self.holder(value, where, value, getattr(value, "__dict__", {}))
        elif self.is_holder(value):
            self.holder(value, where, vars(value))
        return value

    def holder(self, owner: Any, where: Attribute, *stores: dict) -> None:
        """Go into a configuration object or a dictionary, once."""
        if id(owner) in self.seen or len(where.steps) >= _DEPTH:
            return
        self.seen.add(id(owner))
        for store in stores:
            for name, value in list(store.items()):
                if type(name) is str:
                    self.entry(store, name, value, Attribute(where.module, (*where.steps, name)))

    def class_integers(self, kind: type) -> list[tuple[str, int]]:
        """Return integers that a class holds for its instances."""
        if kind not in self.classes:
            self.classes[kind] = [
                (name, value)
                for base in reversed(kind.__mro__)
                if not base.__module__.startswith(("torch.", "torchvision.", "builtins"))
                for name, value in vars(base).items()
                if type(value) is int and not name.startswith("_")
            ]
        return self.classes[kind]

    def is_holder(self, value: Any) -> bool:
        """Tell whether an object is a configuration: plain attributes, and copied when the model is."""
        kind = type(value)
        if kind not in self.holders:
            plain = getattr(kind, "__dictoffset__", 0) != 0 and not hasattr(kind, "__deepcopy__")
            known = kind in (SimpleNamespace, argparse.Namespace)
            foreign = kind.__module__.split(".")[0] not in _FOREIGN and not issubclass(kind, _NO_HOLDERS)
            self.holders[kind] = plain and (known or foreign)
        return self.holders[kind]


def put(model: nn.Module, attribute: Attribute, value: int) -> None:
    """Set an attribute of a module of ``model``, in place; tuples on the way are made again."""
    module = model.get_submodule(attribute.module)
    _put(module, attribute.steps, value)


def _put(owner: Any, steps: tuple[str | int, ...], value: Any) -> None:
    first, *rest = steps
    if rest:
        inner = _get(owner, first)
        if isinstance(inner, tuple):
            value = _replaced(inner, tuple(rest), value)
        else:
            _put(inner, tuple(rest), value)
            return
    if isinstance(owner, (dict, list)):
        owner[first] = value  # type: ignore[index, call-overload]
        if first in getattr(owner, "__dict__", {}):  # a dictionary whose keys are attributes too
            vars(owner)[first] = value
    elif isinstance(owner, nn.Module):
        setattr(owner, str(first), value)
    else:
        vars(owner)[str(first)] = value  # frozen dataclasses too


def _get(owner: Any, step: Any) -> Any:
    return owner[step] if isinstance(owner, (dict, list, tuple)) else getattr(owner, str(step))


def _replaced(inner: tuple, steps: tuple[str | int, ...], value: Any) -> tuple:
    first, *rest = steps
    parts = list(inner)
    assert isinstance(first, int)
    if rest and isinstance(parts[first], tuple):
        parts[first] = _replaced(parts[first], tuple(rest), value)
    elif rest:
        _put(parts[first], tuple(rest), value)
    else:
        parts[first] = value
    make: Any = getattr(type(inner), "_make", type(inner))
    return make(parts)

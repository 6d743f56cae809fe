"""Sheltered: a function runs, and nothing that the user holds sees what it did.

A hook that is part of a model's function runs on tensors without data; whatever it keeps goes into copies of the
user's lists, dictionaries and objects.

Flows in: a function.  Flows out: the same function on copies of what it refers to.
"""

from __future__ import annotations

import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

LIMIT = 10_000
"""How many objects are copied at most; what holds more is a data set, and not what a hook keeps."""

_DICTIONARIES = (dict, OrderedDict, defaultdict)
_SHARED = (Tensor, nn.Module, type, types.ModuleType, types.BuiltinFunctionType, str, bytes, int, float, type(None))


class Sheltered:
    """Copies functions with what they refer to: variables, containers and plain objects, each one once.

    Args:
        memo: ``id`` of a module or tensor -> what stands for it in the copies; others are shared.
        is_shared: tells which functions need no copy.
    """

    def __init__(self, memo: dict[int, Any], is_shared: Callable[[Any], bool]) -> None:
        self.memo, self.is_shared, self.left = memo, is_shared, LIMIT
        self.made: dict[int, Any] = {}
        self.keep: list[Any] = []  # an id means its object only as long as that lives
        self.globals: dict[int, dict[str, Any]] = {}

    def __call__(self, value: Any) -> Any:
        for known in (self.memo, self.made):
            if id(value) in known:
                return known[id(value)]
        if isinstance(value, _SHARED) or self.left <= 0:
            return value
        self.left -= 1
        self.keep.append(value)
        if isinstance(value, types.FunctionType):
            return value if self.is_shared(value) else self._function(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self(value.__self__))
        if isinstance(value, partial):
            return partial(self(value.func), *map(self, value.args), **{k: self(v) for k, v in value.keywords.items()})
        if isinstance(value, types.CellType):
            return self._cell(value)
        if type(value) is tuple:
            return tuple(map(self, value))
        if type(value) in _DICTIONARIES:
            new = defaultdict(value.default_factory) if isinstance(value, defaultdict) else type(value)()
            self.made[id(value)] = new
            new.update({self.memo.get(id(key), key): self(part) for key, part in value.items()})
            return new
        if type(value) in (list, set, deque):
            filled = self.made[id(value)] = type(value)()
            parts = list(map(self, value))
            filled.update(parts) if isinstance(filled, set) else filled.extend(parts)
            return filled
        return self._object(value)

    def _object(self, value: Any) -> Any:
        """Copy an instance of a class that is written in Python and has no way of its own to be copied."""
        kind = type(value)
        plain = all(getattr(kind, name, None) is getattr(object, name, None) for name in ("__reduce_ex__", "__new__"))
        if not hasattr(value, "__dict__") or not plain or hasattr(kind, "__slots__"):
            return value
        self.made[id(value)] = new = object.__new__(kind)
        vars(new).update({key: self(part) for key, part in vars(value).items()})
        return new

    def _cell(self, cell: types.CellType) -> types.CellType:
        """Copy a variable that functions share."""
        self.made[id(cell)] = new = types.CellType()
        try:
            content = cell.cell_contents
        except ValueError:  # not assigned yet
            return new
        new.cell_contents = self(content)
        return new

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        outside = self.globals.setdefault(id(value.__globals__), dict(value.__globals__))
        for name in value.__code__.co_names:
            if type(value.__globals__.get(name)) in (*_DICTIONARIES, list, set, deque):
                outside[name] = self(value.__globals__[name])
        closure = tuple(self(cell) for cell in value.__closure__ or ())
        defaults = self(value.__defaults__)
        new = types.FunctionType(value.__code__, outside, value.__name__, defaults, closure or None)
        new.__kwdefaults__ = self(value.__kwdefaults__)
        self.made[id(value)] = new
        return new

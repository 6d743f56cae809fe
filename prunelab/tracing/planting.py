"""Observed integers in the place of those that a model holds, and integers put into a model that was cut.

Flows in: a fake copy of a model, for the time of a trace.  Flows out: the value of every attribute that may give a
size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from enum import Enum
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunelab.tracing.integers import Attribute, Notes, observe

_LAYERS: dict[str, tuple[str, ...]] = {
    "Linear": ("in_features", "out_features"),
    "Unflatten": ("unflattened_size",),
    "ChannelShuffle": ("groups",),
    **dict.fromkeys(("LayerNorm", "RMSNorm"), ("normalized_shape",)),
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), ("in_channels", "out_channels")),
    **dict.fromkeys(("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"), ("num_features",)),
    "Embedding": ("embedding_dim",),
}
"""Sizes of PyTorch's own layers that models read; models do not read the rest of what those hold."""

_PRIVATE = frozenset(vars(nn.Module())) | {"training", "__dict__"}
_NO_HOLDERS = (type, Tensor, nn.Module, Enum)
_FOREIGN = ("builtins", "torch", "functools", "types", "collections", "numpy", "threading", "logging")
_DEPTH = 4


def plant(
    modules: Iterable[tuple[str, nn.Module]], notes: Notes
) -> tuple[dict[Attribute, int], list[tuple[dict[str, Any], str, Any]]]:
    """Replace the integers that modules and their configurations hold by observed ones.

    Returns:
        The value of every attribute, and what ``restore`` needs.
    """
    planter = _Planter(notes)
    for name, module in modules:
        planter.module(name, module)
    return planter.values, planter.before


def restore(before: list[tuple[dict[str, Any], str, Any]]) -> None:
    """Put back what ``plant`` replaced."""
    for store, name, value in before:
        if value is _ABSENT:
            store.pop(name, None)
        else:
            store[name] = value


_ABSENT = object()


@cache
def _own_sizes(kind: type[nn.Module]) -> tuple[str, ...] | None:
    """Return the attributes of a class of PyTorch that models read; ``None`` for classes of others."""
    if issubclass(kind, torch.jit.ScriptModule):
        return ()
    if not kind.__module__.startswith("torch."):
        return None
    return _LAYERS.get(kind.__name__, ()) if kind.__module__.startswith("torch.nn.") else ()


class _Planter:
    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.values: dict[Attribute, int] = {}
        self.before: list[tuple[dict[str, Any], str, Any]] = []
        self.seen: set[int] = set()
        self.classes: dict[type, list[tuple[str, int]]] = {}
        self.holders: dict[type, bool] = {}

    def module(self, path: str, module: nn.Module) -> None:
        kind, store = type(module), vars(module)
        names = _own_sizes(kind)  # type: ignore[arg-type]  # classes are hashable
        if names is not None:
            for name in names:
                if name != "normalized_shape" or module.weight is None:  # surgery reads it off the weight
                    self.entry(store, name, store.get(name), Attribute(path, (name,)))
            return
        for name, value in list(store.items()):
            if name not in _PRIVATE and not isinstance(value, (bool, str, float, Tensor)):
                self.entry(store, name, value, Attribute(path, (name,)))
        for name, value in self.class_integers(kind):
            if name not in store:
                self.entry(store, name, value, Attribute(path, (name,)), _ABSENT)

    def entry(self, store: dict[str, Any], name: str, value: Any, where: Attribute, before: Any = None) -> None:
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

    def holder(self, owner: Any, where: Attribute, *stores: dict[str, Any]) -> None:
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
        items: Any = owner
        items[first] = value
        if first in getattr(owner, "__dict__", {}):  # a dictionary whose keys are attributes too
            vars(owner)[str(first)] = value
    elif isinstance(owner, nn.Module):
        setattr(owner, str(first), value)
    else:
        vars(owner)[str(first)] = value  # frozen dataclasses too


def _get(owner: Any, step: Any) -> Any:
    return owner[step] if isinstance(owner, (dict, list, tuple)) else getattr(owner, str(step))


def _replaced(inner: tuple[Any, ...], steps: tuple[str | int, ...], value: Any) -> tuple[Any, ...]:
    first, *rest = steps
    parts = list(inner)
    assert isinstance(first, int)
    if rest and isinstance(parts[first], tuple):
        parts[first] = _replaced(parts[first], tuple(rest), value)
    elif rest:
        _put(parts[first], tuple(rest), value)
    else:
        parts[first] = value
    make: Callable[[list[Any]], tuple[Any, ...]] = getattr(type(inner), "_make", type(inner))
    return make(parts)

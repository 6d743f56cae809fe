"""Trees: nested tuples, lists, dicts, and whatever else models take and return, as a flat list of leaves.

PyTorch's own pytrees know tuples, lists, dicts and registered classes.  Here any other mapping (``UserDict``, a
tokenizer's ``BatchEncoding``) and any dataclass is opened too.

Flows in: inputs, targets or outputs of any structure.  Flows out: their leaves, and the same structure on other leaves.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree


class Spec(NamedTuple):
    """A structure without its leaves: PyTorch's, and for each of its leaves that holds more what that is."""

    outer: Any
    inner: tuple[tuple[Any, tuple[Any, ...], tuple[Spec, ...]] | None, ...]


def tree_flatten(tree: Any) -> tuple[list[Any], Spec]:
    """Return all leaves, and the structure for ``tree_unflatten``."""
    found, outer = pytree.tree_flatten(tree)
    leaves: list[Any] = []
    inner: list[tuple[Any, tuple[Any, ...], tuple[Spec, ...]] | None] = []
    for leaf in found:
        fields = _fields(leaf)
        if fields is None:
            leaves.append(leaf)
            inner.append(None)
            continue
        parts = [tree_flatten(value) for value in fields.values()]
        leaves += [value for values, _ in parts for value in values]
        inner.append((leaf, tuple(fields), tuple(spec for _, spec in parts)))
    return leaves, Spec(outer, tuple(inner))


def tree_unflatten(leaves: list[Any], spec: Spec) -> Any:
    """Return the structure with other leaves; mappings and dataclasses are copies of those that were flattened."""
    return _filled(iter(leaves), spec)


def tree_leaves(tree: Any) -> list[Any]:
    """Return all leaves."""
    return tree_flatten(tree)[0]


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return the structure with a function applied to every leaf."""
    leaves, spec = tree_flatten(tree)
    return tree_unflatten([function(leaf) for leaf in leaves], spec)


def _fields(leaf: Any) -> dict[Any, Any] | None:
    """Return what a leaf holds, if it is a mapping or a dataclass that PyTorch does not know."""
    if isinstance(leaf, (Tensor, type)):
        return None
    if isinstance(leaf, Mapping):
        return {key: leaf[key] for key in leaf}
    if dataclasses.is_dataclass(leaf):
        return {
            field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf) if hasattr(leaf, field.name)
        }
    return None


def _filled(leaves: Iterator[Any], spec: Spec) -> Any:
    filled = []
    for held in spec.inner:
        if held is None:
            filled.append(next(leaves))
            continue
        old, names, specs = held
        filled.append(_like(old, {name: _filled(leaves, inner) for name, inner in zip(names, specs, strict=True)}))
    return pytree.tree_unflatten(filled, spec.outer)


def _like(old: Any, values: dict[Any, Any]) -> Any:
    """Return a copy of a mapping or dataclass with other values."""
    if isinstance(old, Mapping):
        if not isinstance(old, MutableMapping):
            return values
        new = copy.copy(old)
        if hasattr(new, "data") and getattr(new, "data", None) is getattr(old, "data", None):
            new.data = dict(new.data)  # copies of some mappings share what they hold
        new.update(values)
        return new
    new = copy.copy(old)
    for name, value in values.items():
        object.__setattr__(new, name, value)
    return new

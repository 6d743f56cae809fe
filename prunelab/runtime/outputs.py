"""Tensors inside of anything: what a model returns, or keeps, is not always a tuple, a list or a dict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

_CLOSED: tuple[type, ...] = (
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    type,
    Enum,
    torch.dtype,
    torch.device,
    torch.Size,
)
_CLOSED += (FunctionType, BuiltinFunctionType, MethodType, ModuleType, nn.Module, torch.Generator)
"""What holds no result; modules hold parameters, which are none."""


def tensors_of(value: Any) -> list[Tensor]:
    """Return every tensor inside of a value, once, in order.

    Looked through are the containers that PyTorch knows, other mappings and sets, dataclasses, and the attributes of
    any other object.

    >>> from types import SimpleNamespace
    >>> [tensor.item() for tensor in tensors_of([SimpleNamespace(score=torch.tensor(1)), {"loss": torch.tensor(2)}])]
    [1, 2]
    """
    found: dict[int, Tensor] = {}
    _collect(value, found, set())
    return list(found.values())


def result_tensors(value: Any) -> list[Tensor]:
    """Return every tensor of what a model returns, without those in a cache of keys and values.

    Such a cache is handed to the next call of the same model, which takes it at any width.
    """
    found: dict[int, Tensor] = {}
    _collect(value, found, set(), closed=_is_cache)
    return list(found.values())


def _is_cache(value: Any) -> bool:
    return any(kind.__name__.endswith("Cache") for kind in type(value).__mro__)


def _collect(
    value: Any, found: dict[int, Tensor], seen: set[int], closed: Callable[[Any], bool] = lambda _: False
) -> None:
    if isinstance(value, Tensor):
        found.setdefault(id(value), value)
        return
    if value is None or isinstance(value, _CLOSED) or id(value) in seen or closed(value):
        return
    seen.add(id(value))
    for part in _parts(value):
        _collect(part, found, seen, closed)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    leaves, _ = tree_flatten(value, is_leaf=lambda part: part is not value)
    if not (len(leaves) == 1 and leaves[0] is value):
        return leaves
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]


def _slots(kind: type) -> list[str]:
    names = kind.__dict__.get("__slots__", ())
    names = [names] if isinstance(names, str) else list(names)
    return [f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") else name for name in names]

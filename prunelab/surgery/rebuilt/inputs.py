"""The inputs of a rebuilt model: the arguments of the original by their names, and a check of what was recorded.

Flows in: the inputs of the tapes.  Flows out: placeholders in the graph, and nodes for the tensors in them.
"""

from __future__ import annotations

import inspect
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils._pytree import GetAttrKey, MappingKey

from prunelab.surgery.rebuilt.calls import fitting, same
from prunelab.surgery.rebuilt.tape import Ref

if TYPE_CHECKING:
    from prunelab.surgery.rebuilt.graph import Builder

Sizes = dict[str, tuple[int | None, ...]]


def add_inputs(builder: Builder) -> None:
    """Add a placeholder per argument, a check of its sizes or value, and nodes for the tensors in it."""
    base, names = builder.tapes[0], _parameters(builder.model)
    places: dict[Any, fx.Node] = {}
    for path in sorted(base.inputs, key=lambda path: _order(path, names)):
        value, name = base.inputs[path], _name(path, names)
        if path[:2] not in places:
            places[path[:2]] = builder.nodes.placeholder(name)
        node = places[path[:2]]
        for key in path[2:]:
            step = key.name if isinstance(key, GetAttrKey) else key.key if isinstance(key, MappingKey) else key.idx
            node = builder.call(getattr if isinstance(key, GetAttrKey) else operator.getitem, node, step)
            name += f"{key}"
        if not isinstance(value, torch.Size):
            builder.call(same, node, value, name)
            continue
        shapes = zip(*(tape.inputs[path] for tape in builder.tapes), strict=True)
        builder.sizes[name] = tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in shapes)
        checked = builder.call(fitting, node, builder.sizes[name], name, builder.least)
        builder.give(Ref("input", path), checked)
        if base.types[path].is_floating_point:
            builder.floating.append(checked)


def _parameters(model: nn.Module) -> list[str]:
    """Return the names of the arguments that may be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(model.forward).parameters.values()
    return [parameter.name for parameter in found if parameter.kind in kinds]


def _name(path: tuple[Any, ...], names: list[str]) -> str:
    if isinstance(path[1], MappingKey):
        return path[1].key
    return names[path[1].idx] if path[1].idx < len(names) else f"input_{path[1].idx}"


def _order(path: tuple[Any, ...], names: list[str]) -> int:
    if not isinstance(path[1], MappingKey):
        return path[1].idx
    return names.index(path[1].key) if path[1].key in names else len(names)

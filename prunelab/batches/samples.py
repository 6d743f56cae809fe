"""Samples: where they are in the tensors of a batch, and how to take some of them.

Flows in: inputs or targets of any structure.  Flows out: for every leaf the dimension that counts samples, or ``None``
for what all samples share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunelab.batches.trees import tree_flatten, tree_leaves, tree_unflatten
from prunelab.errors import BatchError

Places = tuple[int | None, ...] | str
"""A dimension for every leaf; or ``LIST``."""

LIST = "list"
"""The structure is a list with one entry for every sample, as detection has them."""


def length(inputs: Any, targets: Any, said: Any = None) -> int:
    """Return how many samples a batch has.

    Args:
        inputs: of the model.
        targets: of the loss.
        said: what a ``Task`` says of dimensions.
    """
    if said is not None:
        pair = said if isinstance(said, tuple) and len(said) == 2 else (said, said)
        for tree, dims in ((targets, pair[1]), (inputs, pair[0])):
            for leaf, dim in zip(tree_leaves(tree), _spread(tree, dims), strict=True):
                if isinstance(leaf, Tensor) and dim is not None and -leaf.dim() <= dim < leaf.dim():
                    return leaf.shape[dim]
    if isinstance(targets, Tensor) and targets.dim():
        return len(targets)
    given = _lengths(inputs)
    is_list = isinstance(targets, (list, tuple)) and not all(isinstance(one, Tensor) for one in targets)
    if is_list and (not given or len(targets) in given):
        return len(targets)
    wanted = _lengths(targets)
    both = [number for number in wanted if number in given]
    return next(iter(both or wanted or given), 1)


def _lengths(tree: Any) -> list[int]:
    return [len(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.dim()]


def places_of(tree: Any, size: int, said: Any = None) -> tuple[Places, torch.Size | None]:
    """Return where samples are, and the shape of the first tensor for which nobody knows.

    Args:
        tree: inputs or targets.
        size: how many samples there are.
        said: what a ``Task`` says: a dimension for all tensors, or the structure with one for each.
    """
    if said is None and _is_list(tree, size):
        return LIST, None
    leaves = tree_leaves(tree)
    if said is not None:
        dims = _spread(tree, said)
        for leaf, dim in zip(leaves, dims, strict=True):
            if (
                isinstance(leaf, Tensor)
                and dim is not None
                and (not -leaf.dim() <= dim < leaf.dim() or leaf.shape[dim] != size)
            ):
                raise BatchError(
                    f"`samples` of the task says that dimension {dim} of a tensor of shape {list(leaf.shape)} counts "
                    f"samples, but there are {size}."
                )
        plain = [
            None if not isinstance(leaf, Tensor) or dim is None else dim % leaf.dim()
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        return tuple(plain), None
    found: list[int | None] = []
    odd: torch.Size | None = None
    for leaf in leaves:
        dim = None
        if isinstance(leaf, Tensor) and leaf.dim():
            dim = _dimension(leaf.shape, size)
            if dim is None and leaf.shape[0] != 1:
                odd = odd if odd is not None else leaf.shape
        found.append(dim)
    return tuple(found), odd


def _dimension(shape: torch.Size, size: int) -> int | None:
    """Return the first dimension if it counts samples, or else the only one that may; ``None`` if none does."""
    if shape[0] == size:
        return 0
    if shape[0] == 1 or size == 1:
        return None
    fitting = [dim for dim, number in enumerate(shape) if number == size]
    return fitting[0] if len(fitting) == 1 else None


def _is_list(tree: Any, size: int) -> bool:
    """Return whether a structure is a list with one entry, no tensor, for every sample."""
    if not isinstance(tree, (list, tuple)) or len(tree) != size or not tree:
        return False
    if all(isinstance(one, Tensor) for one in tree):
        return len({one.shape for one in tree}) > 1 and any(one.dim() == 0 or len(one) != size for one in tree)
    return all(isinstance(one, (Mapping, tuple, list, str, int, float)) for one in tree)


def _spread(tree: Any, dims: Any) -> list[int | None]:
    """Return one dimension for every leaf."""
    leaves = tree_leaves(tree)
    if dims is None or isinstance(dims, int):
        return [dims for _ in leaves]
    if isinstance(tree, Mapping) and isinstance(dims, Mapping) and set(tree) == set(dims):
        return [dim for key in tree for dim in _spread(tree[key], dims[key])]
    if isinstance(tree, (tuple, list)) and isinstance(dims, (tuple, list)) and len(tree) == len(dims):
        return [dim for part, of in zip(tree, dims, strict=True) for dim in _spread(part, of)]
    raise BatchError(
        f"`samples` of the task must be a dimension or have the structure of what it is for; {dims!r} does not fit."
    )


def taken(tree: Any, places: Places, index: slice | list[int]) -> Any:
    """Return some of the samples."""
    if places == LIST:
        return (
            [tree[place] for place in range(len(tree))[index]] if isinstance(index, slice) else [tree[n] for n in index]
        )
    leaves, spec = tree_flatten(tree)
    picked = [
        leaf if dim is None or not isinstance(leaf, Tensor) else leaf[(slice(None),) * int(dim) + (index,)]
        for leaf, dim in zip(leaves, places, strict=True)
    ]
    return tree_unflatten(picked, spec)

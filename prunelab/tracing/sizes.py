"""Other sizes of the example inputs: what holds at one size may be a coincidence.

A table of positions that is sliced to the length of the example, or a view whose sizes happen to factor, says
something at one size that is wrong at others.  So a model whose code gives sizes runs once more, and what either run
couples stays coupled.

Flows in: the example inputs.  Flows out: inputs of other sizes, the most different first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from prunelab.tracing.axes import is_frozen, leaves
from prunelab.tracing.recorder import Call

GIVES_SIZES = {"view", "_unsafe_view", "_reshape_alias", "slice", "split", "split_with_sizes", "unsafe_split", "repeat"}
"""Operators that the model's code gives a size or a bound."""


GIVEN_NONE = {"linear", "matmul", "__matmul__", "flatten"}
"""Functions that call such an operator at a size of their own, which fits at every size."""


def depends_on_size(call: Call) -> bool:
    """Tell whether a size in the code may mix what can be cut with what follows the inputs.

    That takes a dimension of each kind beside the first one, in which the samples are.
    """
    if call.name not in GIVES_SIZES or call.recorder.function in GIVEN_NONE:
        return False
    dims, out = call.dims(call.tensors[0]), call.outputs[0]
    if dims and out.dim() and out.shape[0] == dims[0].size and not dims[0].origins:
        dims = dims[1:]
    if call.name == "slice" and any(dim.origins and not is_frozen(dim.axis) for dim in dims):
        return True  # of a parameter: how much of it may follow the inputs
    parts = [part for dim in dims for part in leaves(dim.axis)]
    return any(part.frozen is None for part in parts) and any(part.frozen and part.size > 1 for part in parts)


def others(inputs: Any, make: Callable[[Tensor, list[int]], Tensor]) -> Iterator[Any]:
    """Yield inputs of other sizes.

    The number of samples becomes odd.  Lengths, heights and widths become odd and larger, odd and smaller, larger by 32
    or doubled (for code that halves them), or stay.

    Args:
        inputs: nested tuples, lists and dicts with tensors.
        make: returns a tensor like the given one, of another shape.
    """
    tensors = [value for value in tree_leaves(inputs) if isinstance(value, Tensor) and value.dim()]
    if not tensors:
        return
    batch = tensors[0].shape[0]
    number = 3 if batch != 3 else 5
    steps: list[Callable[[int], int]] = [
        lambda n: n + 1 + n % 2,
        lambda n: max(n - 2 + (n + 1) % 2, 1),
        lambda n: n + 32,
        lambda n: 2 * n,
    ]
    tried: list[list[tuple[int, ...]]] = [[tuple(tensor.shape) for tensor in tensors]]
    for free in (_lengths, _last):
        for step in [*steps, lambda n: n]:

            def shape(tensor: Tensor, free: Any = free, step: Any = step) -> list[int]:
                places = free(tensor)
                sizes = [step(n) if place in places and n > 1 else n for place, n in enumerate(tensor.shape)]
                return [number if tensor.shape[0] == batch else sizes[0], *sizes[1:]]

            shapes = [tuple(shape(tensor)) for tensor in tensors]
            if shapes not in tried:
                tried.append(shapes)

                def made(tensor: Tensor, shape: Any = shape) -> Tensor:
                    return make(tensor, shape(tensor)) if tensor.dim() else tensor

                yield tree_map_only(Tensor, made, inputs)


def _lengths(tensor: Tensor) -> range:
    """Return the dimensions that hold places: after samples and channels, or between samples and features."""
    if tensor.dtype in (torch.int64, torch.int32, torch.bool):
        return range(1, tensor.dim())
    return range(1, 2) if tensor.dim() == 3 else range(2, tensor.dim())


def _last(tensor: Tensor) -> range:
    """Return the same for signals, ``[samples, channels, length]``."""
    return range(2, 3) if tensor.dim() == 3 else _lengths(tensor)

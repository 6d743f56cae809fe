"""Per sample: the gradients of single samples, from one backward pass over all of them.

A call's output gradients and its inputs hold every sample's own parameter gradient: a sum over that sample's positions
of (output gradient) ⊗ (input).  This module writes it down for each kind of call, a few samples at a time.

Flows in: calls with their layouts and output gradients.  Flows out: ``Part``s, which make gradients when
asked.  Notebook 04_obd derives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prunelab.curvature.statistics.squared_products import Stack, squared_products
from prunelab.curvature.watching.layer_calls import LayerCall
from prunelab.curvature.watching.patches import patches
from prunelab.curvature.watching.samples import Layout


@dataclass(frozen=True)
class Part:
    """What one call adds to the per-sample gradients of some rows of one parameter.

    Attributes:
        name: of the parameter.
        rows: which rows of it.
        samples: how many samples.
        device: where they are.
        size: how many numbers are held for each sample while its gradient is made.
        gradients: a range of samples -> their gradients ``[n, *rows of the parameter]``, new tensors.
        squares: ``Σ_n g_n²`` at once, where there is a shorter way.
    """

    name: str
    rows: slice
    samples: int
    device: torch.device
    size: int
    gradients: Callable[[slice], Tensor]
    squares: Callable[[], Tensor] | None = None


def parts(call: LayerCall, layout: Layout, gradient: Tensor, weight: Tensor) -> Iterator[Part]:
    """Yield what a call adds to the gradients of its weight and its bias.

    Args:
        call: as recorded by ``ParameterCalls``.
        layout: where its samples are.
        gradient: of its output, for the sum of the samples' losses.
        weight: the parameter.
    """
    g = layout.by_sample(gradient)
    if call.kind == "linear":
        yield linear_part(call, layout.by_sample(call.input).flatten(1, -2), g.flatten(1, -2))
    elif call.kind in ("conv", "conv_transpose"):
        yield conv_part(call, layout.by_sample(call.input), g)
    elif call.kind == "embedding":
        yield _embedding_part(call, layout.by_sample(call.input[..., None]).flatten(1), g.flatten(1, -2), len(weight))
    elif call.kind == "broadcast":
        yield _summed_part(call.weight, call.rows, lambda n: as_float(g[n]), g, weight.shape)
    else:
        yield _summed_part(call.weight, call.rows, _times_plain(call, layout, g), g, _place(call, weight, g))
    if call.bias is not None:
        yield _summed_part(call.bias, call.bias_rows, lambda n: as_float(g[n]), g, _place(call, weight, g))


def linear_part(call: LayerCall, inputs: Tensor, gradients: Tensor) -> Part:
    """Return the part of a linear layer's weight: inputs ``[B, R, in]`` and output gradients ``[B, R, out]``."""
    rows, columns = call.view.ordered(gradients, inputs)
    shape = (1, rows.shape[2], columns.shape[2], rows.shape[1])

    def left(n: slice) -> Tensor:
        return as_float(rows[n]).mT[:, None]

    def right(n: slice) -> Tensor:
        return as_float(columns[n]).mT[:, None]

    return _product_part(call, left, right, len(inputs), shape, shape[1:3], inputs.device)


def conv_part(call: LayerCall, inputs: Tensor, gradients: Tensor, basis: Tensor | None = None) -> Part:
    """Return the part of a convolution's weight: inputs ``[B, R, in, …]`` and output gradients ``[B, R, out, …]``.

    The kernel slides over what dimension 1 of the weight counts: over the inputs, and for a transposed convolution
    over the output gradients.  With a basis
    ``[groups, n, n]`` the patches, flattened, are given in its coordinates.
    """
    rows, seen = call.view.ordered(gradients, inputs)
    samples, copies, channels, *_ = seen.shape
    groups, kernel, places = call.view.groups, call.view.kernel, rows.shape[3:]
    positions = math.prod(places)

    def by_group(images: Tensor) -> Tensor:  # the images of a sample are positions of its own
        split = images.reshape(-1, copies, groups, images[0].numel() // (groups * positions), positions)
        return split[:, 0] if copies == 1 else split.movedim(1, 3).flatten(3)

    def left(n: slice) -> Tensor:
        return by_group(as_float(rows[n]).flatten(0, 1))

    def right(n: slice) -> Tensor:
        found = by_group(patches(as_float(seen[n]).flatten(0, 1), call, places))
        return found if basis is None else torch.einsum("bgkp,gkc->bgcp", found, basis.to(found))

    sizes = (groups, rows.shape[2] // groups, channels // groups * math.prod(kernel), copies * positions)
    part_shape = (rows.shape[2], channels // groups, *kernel)
    return _product_part(call, left, right, samples, sizes, part_shape, seen.device)


def _product_part(
    call: LayerCall,
    left: Stack,
    right: Stack,
    samples: int,
    sizes: tuple[int, int, int, int],
    shape: tuple[int, ...],
    device: torch.device,
) -> Part:
    """Return the part whose gradients are L Rᵀ, see ``squared_products``; ``shape`` is that of the weight's rows."""
    groups, rows, columns, positions = sizes
    size = groups * ((rows + columns) * positions + rows * columns)

    def gradients(n: slice) -> Tensor:
        return (left(n) @ right(n).mT).reshape(-1, *shape)

    def squares() -> Tensor:
        return squared_products(left, right, samples, sizes).view(shape)

    return Part(call.weight, call.rows, samples, device, size, gradients, squares)


def as_float(tensor: Tensor) -> Tensor:
    """Return half precision as float32: squares and sums need its range."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _times_plain(call: LayerCall, layout: Layout, gradients: Tensor) -> Callable[[slice], Tensor]:
    """Return a function: range of samples -> g · x̂; x̂ is computed when it is first needed."""
    kept: list[Tensor] = []
    plain = call.plain

    def product(n: slice) -> Tensor:
        if not kept:
            kept.append(layout.by_sample(plain()))
        return as_float(gradients[n]) * as_float(kept[0][n])

    return product


def _place(call: LayerCall, weight: Tensor, gradients: Tensor) -> tuple[int, ...]:
    """Return the shape that aligns the call's bias, or its norm's weight, with its output."""
    if call.kind == "linear":
        return (gradients.shape[-1],)
    if call.kind == "last_norm":
        return tuple(weight.shape)
    return (gradients.shape[2], *(1,) * (gradients.dim() - 3))


def _summed_part(
    name: str, rows: slice, values: Callable[[slice], Tensor], like: Tensor, shape: tuple[int, ...]
) -> Part:
    """Return the part of a parameter that was broadcast: values ``[n, …]`` are summed to its shape."""
    inner = like.dim() - 1
    padded = (1,) * (inner - len(shape)) + tuple(shape)
    dims = [place + 1 for place in range(inner) if padded[place] == 1 and like.shape[place + 1] != 1]

    def gradients(n: slice) -> Tensor:
        found = values(n)
        return (found.sum(dims, keepdim=True) if dims else found.clone()).reshape(-1, *shape)

    return Part(name, rows, len(like), like.device, 2 * like[0].numel(), gradients)


def _embedding_part(call: LayerCall, indices: Tensor, gradients: Tensor, words: int) -> Part:
    """Return the part of an embedding: indices ``[B, R]``, output gradients ``[B, R, width]``."""
    if call.plain is not None:
        gradients = gradients * (indices != call.plain % words)[..., None]
    gradients = as_float(gradients)
    samples, positions, width = gradients.shape
    keys = indices + words * torch.arange(samples, device=indices.device)[:, None]

    def dense(n: slice) -> Tensor:
        found = gradients.new_zeros(len(gradients[n]) * words, width)
        places = (keys[n] - words * n.start).flatten()
        return found.index_add_(0, places, gradients[n].flatten(0, 1)).view(-1, words, width)

    def squares() -> Tensor:
        pairs, place = keys.flatten().unique(return_inverse=True)  # a word may occur in a sample more than once
        sums = gradients.new_zeros(len(pairs), width).index_add_(0, place, gradients.flatten(0, 1))
        return gradients.new_zeros(words, width).index_add_(0, pairs % words, sums.square_())

    size = (words + positions) * width
    return Part(call.weight, call.rows, samples, gradients.device, size, dense, squares)

"""Rules for operators that work on images: pooling, resizing, patches, sampling, boxes, Fourier transforms.

Flows in: a call.  Flows out: the dimensions of its outputs; space is frozen, channels pass.
"""

from __future__ import annotations

import math

from prunelab.tracing.axes import freeze, product, regroup
from prunelab.tracing.recorder import Call, Dim, Dims
from prunelab.tracing.rules_entries import made_like, merge


def spatial(call: Call) -> list[Dims]:
    """Pooling and resizing: batch and channels stay, the rest is space."""
    dims = call.dims(call.tensors[0])
    keep = len(dims) - _space(call)
    call.freeze(dims[keep:], "slides over it")
    return [
        [*dims[:keep], *(call.fresh(size, "makes this spatial dimension") for size in out.shape[keep:])]
        if out.dim() == len(dims)
        else made_like(call, out)
        for out in call.outputs
    ]


def _space(call: Call) -> int:
    """Return how many dimensions are space, which the name of every such operator tells."""
    return next(number for number in (1, 2, 3) if f"{number}d" in call.name)


def unpool(call: Call) -> list[Dims]:
    """Entries go back to where pooling took them from; indices are places in space."""
    for one, two in zip(call.dims("self"), call.dims("indices"), strict=True):
        call.unify(one, two)
    return spatial(call)


def fractional_pool(call: Call) -> list[Dims]:
    """Pooling over regions of random size, drawn for every channel."""
    dims, samples = call.dims("self"), call.dims("random_samples")
    keep = len(dims) - _space(call)
    for one, two in zip(reversed(dims[:keep]), reversed(samples[:-1]), strict=False):
        call.unify(one, two)
    call.freeze(samples[-1:], "samples it")
    return spatial(call)


def patches(call: Call) -> list[Dims]:
    """``im2col``: channels × places in the kernel, for every position of the kernel."""
    *batch, channels, high, wide = call.dims("self")
    call.freeze([high, wide], "slides over it")
    kernel = call.fresh(math.prod(call["kernel_size"]), "takes it from space")
    return [[*batch, Dim(product([channels.axis, kernel.axis])), call.fresh(call.out.shape[-1])]]


def unpatches(call: Call) -> list[Dims]:
    """``col2im``: channels × places in the kernel become channels again."""
    *batch, columns, positions = call.dims("self")
    places = math.prod(call["kernel_size"])
    channels, kernel = regroup([columns.axis], [columns.size // places, places], call.where)
    freeze(kernel, f"{call.where} lays it out in space")
    call.freeze([positions], "lays it out in space")
    return [[*batch, Dim(channels), *(call.fresh(size) for size in call.out.shape[-2:])]]


def sampled(call: Call) -> list[Dims]:
    """``grid_sample``: every channel is read at the same places."""
    batch, channels, *space = call.dims(call.tensors[0])
    image, *grid = call.dims("grid")
    call.freeze([*space, *grid], "samples it")
    return [[merge(call, [batch, image]), channels, *(call.fresh(size) for size in call.out.shape[2:])]]


def sampling_grid(call: Call) -> list[Dims]:
    """``affine_grid``: places in space, from matrices."""
    batch, *matrix = call.dims("theta")
    call.freeze(matrix, "computes places from it")
    return [[batch, *(call.fresh(size) for size in call.out.shape[1:])]]


def regions(call: Call) -> list[Dims]:
    """``roi_align``: every channel is pooled over the same boxes; images are picked by number."""
    batch, channels, *space = call.dims("input")
    call.freeze([batch, *space, *call.dims("rois")], "pools boxes of it")
    return [[call.fresh(out.shape[0]), channels, *(call.fresh(size) for size in out.shape[2:])] for out in call.outputs]


def fourier(call: Call) -> list[Dims]:
    """The dimensions that are transformed may not be cut; all others pass."""
    dims = list(call.dims("self"))
    for place in call["dim"]:
        call.freeze([dims[place]], "transforms it")
        dims[place] = call.fresh(call.out.shape[place], "transforms it")
    return [dims]

"""Patches: what a convolution's kernel sees at every position, and how many patches see a pixel.

Flows in: images ``[N, C, *space]`` and the options of a layer call.  Flows out: patches, as a view, and counts
``[*space]``.  Notebook 07_kfac derives the use of the counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prunelab.curvature.watching.layer_calls import LayerCall


def patches(images: Tensor, call: LayerCall, positions: Sequence[int]) -> Tensor:
    """Return the patches of a call's convolution: a view ``[N, C, *kernel, *positions]``, only padding is copied.

    For a transposed convolution these are the patches of its *output*: it is the transpose of the convolution that
    slides over them.

    Args:
        images: ``[N, C, *space]``.
        call: gives the kernel, stride, padding and dilation.
        positions: how many patches there are in each direction.
    """
    kernel = call.view.kernel
    needed = [
        (count - 1) * stride + dilation * (size - 1) + 1
        for count, stride, dilation, size in zip(positions, call.stride, call.dilation, kernel, strict=True)
    ]
    space = images.shape[2:]
    after = [max(0, need - size - pad) for need, size, pad in zip(needed, space, call.padding, strict=True)]
    sides = [side for pair in reversed(list(zip(call.padding, after, strict=True))) for side in pair]
    images = F.pad(images, sides) if any(sides) else images
    batch, channel, *steps = images.stride()
    inner = [step * dilation for step, dilation in zip(steps, call.dilation, strict=True)]
    outer = [step * stride for step, stride in zip(steps, call.stride, strict=True)]
    return images.as_strided((*images.shape[:2], *kernel, *positions), (batch, channel, *inner, *outer))


def coverage(call: LayerCall, space: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Return how many patches of a call cover each pixel: ``[*space]``, an outer product over the directions.

    Args:
        call: gives the kernel, stride, padding and dilation.
        space: size of the images that the patches are taken from.
        positions: how many patches there are in each direction.
    """
    counts = torch.ones((), dtype=torch.int64)
    for place, size in enumerate(space):
        starts = torch.arange(positions[place]) * call.stride[place] - call.padding[place]
        seen = (starts[:, None] + torch.arange(call.view.kernel[place]) * call.dilation[place]).flatten()
        counts = counts[..., None] * torch.bincount(seen[(seen >= 0) & (seen < size)], minlength=size)
    return counts

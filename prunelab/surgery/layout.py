"""How a tensor lies in memory: a cut keeps the order of its dimensions there (``channels_last``).

Flows in: a tensor and the one that it takes the place of.  Flows out: the same values in the other's order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from prunelab.tracing.fakes import FakeMode


def laid_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return ``tensor``, dense, with its dimensions in the order in memory that those of ``like`` have.

    >>> like = torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last)
    >>> laid_out_like(torch.ones(2, 3, 2, 2), like).stride()
    (12, 1, 6, 3)
    """
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda dim: -strides[dim])
    if isinstance(tensor, FakeTensor) and isinstance(tensor.fake_mode, FakeMode):
        shape = torch.empty_permuted(tensor.shape, order, dtype=tensor.dtype, device="meta")
        return tensor.fake_mode.make(shape, tensor.fake_device)
    out = torch.empty_permuted(tensor.shape, order, dtype=tensor.dtype, device=tensor.device)
    return tensor if tensor.stride() == out.stride() else out.copy_(tensor)

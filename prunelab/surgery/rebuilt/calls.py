"""What a model rebuilt from its operators calls besides PyTorch's own functions.

Flows in: its inputs.  Flows out: the same inputs, or an error where the recorded operators would not be right for them.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from prunelab.errors import BatchError


def fitting(x: Tensor, sizes: tuple[int | None, ...], name: str, least: int) -> Tensor:
    """Return ``x`` if it has the sizes that the module was rebuilt for.

    ``None`` stands for any size, in the first place for any from ``least`` on.

    Raises:
        BatchError: it has not.
    """
    fits = len(x.shape) == len(sizes) and all(n is None or n == m for n, m in zip(sizes, x.shape, strict=True))
    if not fits or (sizes and sizes[0] is None and x.shape[0] < least):
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        wanted += f" with a batch of {least} or more" if least > 1 else ""
        raise BatchError(f"`{name}` has the sizes {list(x.shape)}, this module was rebuilt for [{wanted}].")
    return x


def same(value: Any, wanted: Any, name: str) -> None:
    """Check an argument that is not a tensor: the recorded operators depend on it.

    Raises:
        BatchError: it has another value.
    """
    if value != wanted:
        raise BatchError(f"`{name}` is {value!r}, this module was rebuilt for {wanted!r}.")


def batch_norm_in_mode(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    count: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Batch norm as ``nn.BatchNorm2d`` computes it: in training it takes part in the running statistics."""
    factor = 0.0 if momentum is None else momentum
    if training and count is not None:
        count.add_(1)
        factor = 1.0 / float(count) if momentum is None else momentum
    return F.batch_norm(x, mean, variance, weight, bias, training, factor, eps)

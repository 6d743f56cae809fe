"""Weight view: where the weight of a layer holds its outputs, its inputs, its groups and its kernel positions.

    layer                                    weight                          ``out_dim``
    linear                                   ``[out, in]``                   0
    product with a matrix                    ``[in, out]``                   1
    convolution                              ``[out, in / groups, *kernel]`` 0
    transposed convolution                   ``[in, out / groups, *kernel]`` 1

Dimension 0 counts the channels of all groups one after the other, dimension 1 those of one group.

Flows in: one view per layer call, made where the call is seen.  Flows out: every weight in one order of axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class WeightView:
    """How a weight is laid out.

    Attributes:
        out_dim: the dimension that counts outputs, 0 or 1.
        groups: of the convolution.
        kernel: size of the kernel; ``()`` for linear layers.

    Example:
        >>> import torch
        >>> transposed = torch.nn.ConvTranspose2d(4, 6, 3, groups=2)
        >>> view = WeightView(out_dim=1, groups=2, kernel=(3, 3))
        >>> list(transposed.weight.shape), list(view.as_matrix(transposed.weight).shape)
        ([4, 3, 3, 3], [2, 3, 2, 3, 3])
    """

    out_dim: int = 0
    groups: int = 1
    kernel: tuple[int, ...] = ()

    @property
    def in_dim(self) -> int:
        """The dimension that counts inputs."""
        return 1 - self.out_dim

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a matrix per group and kernel position: ``[groups, out / groups, in / groups, *kernel]``, a view."""
        split = weight.unflatten(0, (self.groups, -1))
        return split.transpose(1, 2) if self.out_dim else split

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Return the weight that ``as_matrix`` took apart; also from ``[groups, out / groups, in / groups · K]``."""
        split = matrix.reshape(*matrix.shape[:2], -1, *self.kernel)
        return (split.transpose(1, 2) if self.out_dim else split).flatten(0, 1)

    def rows_of(self, channels: Tensor, dim: int, rows: slice) -> Tensor:
        """Return what is known of the channels along one dimension of a parameter by group, ``[groups, channels]``.

        Args:
            channels: one value for each entry of that dimension: a mask, or which unit owns it.
            dim: the dimension, 0 or 1; what is known of dimension 1 is true in every group.
            rows: which entries of dimension 0 the layer uses.
        """
        return channels.expand(self.groups, -1) if dim else channels[rows].unflatten(0, (self.groups, -1))

    def ordered(self, of_outputs: T, of_inputs: T) -> tuple[T, T]:
        """Return what belongs to the outputs and to the inputs in the order of the weight's dimensions."""
        return (of_inputs, of_outputs) if self.out_dim else (of_outputs, of_inputs)

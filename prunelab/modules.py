"""Layers that take the place of others: norms whose statistics leave silenced entries out."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class KeptLayerNorm(nn.LayerNorm):
    """A LayerNorm that takes mean and variance over the kept entries only, and gives zero elsewhere."""

    kept: Tensor

    @classmethod
    def of(cls, norm: nn.LayerNorm, kept: Tensor) -> KeptLayerNorm:
        """Return ``norm`` with statistics over ``kept``, a bool tensor of its normalised shape."""
        new = cls(norm.normalized_shape, norm.eps, norm.elementwise_affine)
        new.__dict__.update({key: value for key, value in norm.__dict__.items() if not key.startswith("_backward")})
        new._buffers = {"kept": kept}
        new._non_persistent_buffers_set = {"kept"}
        return new

    def forward(self, x: Tensor) -> Tensor:
        places = tuple(range(-self.kept.dim(), 0))
        kept = self.kept.to(x.dtype)
        mean = (x * kept).sum(places, keepdim=True) / kept.sum()
        centred = (x - mean) * kept
        out = centred * torch.rsqrt(centred.square().sum(places, keepdim=True) / kept.sum() + self.eps)
        if self.weight is not None:
            out = out * self.weight
        return (out if self.bias is None else out + self.bias) * kept


class KeptGroupNorm(nn.GroupNorm):
    """A GroupNorm that takes mean and variance over the kept channels only, and gives zero elsewhere."""

    kept: Tensor

    @classmethod
    def of(cls, norm: nn.GroupNorm, kept: Tensor) -> KeptGroupNorm:
        """Return ``norm`` with statistics over ``kept``, bool ``[num_channels]``."""
        new = cls(norm.num_groups, norm.num_channels, norm.eps, norm.affine)
        new.__dict__.update(norm.__dict__)
        new._buffers = {"kept": kept}
        new._non_persistent_buffers_set = {"kept"}
        return new

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        kept = self.kept.to(x.dtype).view(shape).expand(1, -1, *x.shape[2:])
        grouped = (x * kept).reshape(len(x), self.num_groups, -1)
        mask = kept.reshape(1, self.num_groups, -1)
        number = mask.sum(-1, keepdim=True).clamp_min(1)
        centred = (grouped - grouped.sum(-1, keepdim=True) / number) * mask
        out = centred * torch.rsqrt(centred.square().sum(-1, keepdim=True) / number + self.eps)
        out = out.reshape(x.shape)
        if self.weight is not None:
            out = out * self.weight.view(shape)
        return (out if self.bias is None else out + self.bias.view(shape)) * kept

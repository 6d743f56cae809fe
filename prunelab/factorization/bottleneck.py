"""Bottlenecks: a linear or convolution layer as two or three smaller ones, the outer ones mixing channels only.

    y = U · (C ∗ (V x)) + b,     V [r_in, in],  C [r_out, r_in, *kernel],  U [out, r_out]

The inner layer, the core, keeps stride, dilation, groups and the padding of every mode: V mixes the channels of each
pixel alone and has no bias, so that padding before it and after it are the same thing.  The bias comes last.  At full
rank with orthogonal V and U this is the layer that it stands for, borders included.

Flows in: a layer and two ranks.  Flows out: a ``Bottleneck`` to put in its place.  Notebook 08_eigendamage derives it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize, skip_init

from prunelab.curvature.watching.weight_view import WeightView
from prunelab.surgery.layers import FreeMultiheadAttention

CONVOLUTIONS: tuple[type[_ConvNd], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[type[_ConvNd], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LINEAR: tuple[type[nn.Module], ...] = (nn.Linear, NonDynamicallyQuantizableLinear)

_FIRST = ("in_features", "in_channels")
_LAST = ("out_features", "out_channels", "bias")
_CORE = ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups", "padding_mode")


class Bottleneck(nn.Sequential):
    """``inward`` (1×1, in → r_in), ``core`` (r_in → r_out), ``outward`` (1×1, r_out → out); one side may be missing.

    What code may ask of the layer that it stands for (``weight``, ``bias``, ``in_features``, ``stride``, …) it answers;
    ``weight`` is the product of the three, so that code which reads it computes the same, at the old price.
    """

    core: nn.Linear | _ConvNd

    def __init__(self, core: nn.Module, inward: nn.Module | None = None, outward: nn.Module | None = None) -> None:
        parts = {"inward": inward, "core": core, "outward": outward}
        super().__init__(OrderedDict((name, part) for name, part in parts.items() if part is not None))

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            return self.parts().merged()
        if name in _FIRST:
            return getattr(self[0], name)
        if name in _LAST:
            return getattr(self[-1], name)
        if name in _CORE:
            return getattr(self.core, name)
        return super().__getattr__(name)

    def parts(self) -> Parts:
        """Return the matrices of the three layers."""
        return parts_of(self)


@dataclass(frozen=True, eq=False)
class Parts:
    """The matrices of a layer or bottleneck, per group of a convolution (one group for everything else).

    Attributes:
        core: C, ``[groups, r_out, r_in, *kernel]``.
        inward: V, ``[groups, r_in, in]``, or ``None``.
        outward: U, ``[groups, out, r_out]``, or ``None``.
        bias: ``[groups · out]`` or ``None``.
        view: how the weight of the core, and of the whole layer, is laid out.
    """

    core: Tensor
    inward: Tensor | None
    outward: Tensor | None
    bias: Tensor | None
    view: WeightView

    def merged(self) -> Tensor:
        """Return ``U C V`` in the shape of the weight of the whole layer."""
        core = self.core
        if self.inward is not None:
            core = torch.einsum("gab...,gbi->gai...", core, self.inward)
        if self.outward is not None:
            core = torch.einsum("goa,gai...->goi...", self.outward, core)
        return self.view.from_matrix(core)

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Parts:
        """Return the parts after a change of basis of the core: ``C → LᵀCR``, ``U → U L``, ``V → Rᵀ V``.

        Nothing changes but rounding if L and R are square and orthogonal; with columns left out, their part of C goes.
        Computed in float32 at least.

        Args:
            left: L, ``[groups, r_out, new r_out]``, or ``None`` to leave that side alone.
            right: R, ``[groups, r_in, new r_in]``, or ``None``.
        """
        dtype = torch.promote_types(self.core.dtype, torch.float32)
        core, inward, outward, left, right = (
            None if part is None else part.to(self.core.device, dtype)
            for part in (self.core, self.inward, self.outward, left, right)
        )
        assert core is not None
        if right is not None:
            core = torch.einsum("gab...,gbc->gac...", core, right)
            inward = right.mT if inward is None else right.mT @ inward
        if left is not None:
            core = torch.einsum("gac,gab...->gcb...", left, core)
            outward = left if outward is None else outward @ left
        return Parts(core, inward, outward, self.bias, self.view)


def parts_of(layer: nn.Module) -> Parts:
    """Return the matrices of a linear or convolution layer, or of a bottleneck."""
    if not isinstance(layer, Bottleneck):
        return _parts(layer, None, None, getattr(layer, "bias", None))
    named = dict(layer.named_children())
    return _parts(named["core"], named.get("inward"), named.get("outward"), layer[-1].bias)  # type: ignore[arg-type]


def _parts(core: nn.Module, inward: nn.Module | None, outward: nn.Module | None, bias: Tensor | None) -> Parts:
    weight: Tensor = core.weight  # type: ignore[assignment]
    groups: int = getattr(core, "groups", 1)
    view = WeightView(int(isinstance(core, _ConvTransposeNd)), groups, tuple(weight.shape[2:]))

    def channels(layer: nn.Module | None) -> Tensor | None:
        if layer is None:
            return None
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return WeightView(groups=groups).as_matrix(weight.flatten(1))

    return Parts(view.as_matrix(weight), channels(inward), channels(outward), bias, view)


# ── building them ─────────────────────────────────────────────────────────────────────────────────────────────────


def shell(layer: nn.Module, inward: int | None, outward: int | None, trainable: bool = True) -> Bottleneck:
    """Return a bottleneck in place of ``layer`` whose weights are not set yet.

    Args:
        layer: a linear or convolution layer, or a bottleneck, whose core is then the layer that is split; the sides
            that it has stay.
        inward: r_in of every group; ``None`` leaves that side unchanged.
        outward: r_out of every group, or ``None``.
        trainable: whether the weights of ``inward`` and ``outward`` require gradients.
    """
    parts = parts_of(layer)
    groups, full_out, full_in = parts.core.shape[:3]
    old: Any = layer.core if isinstance(layer, Bottleneck) else layer
    like = {"device": parts.core.device, "dtype": parts.core.dtype}
    has_in, has_out = inward is not None or parts.inward is not None, outward is not None or parts.outward is not None
    r_in, r_out, bias = inward or full_in, outward or full_out, parts.bias is not None
    whole_in = full_in if parts.inward is None else parts.inward.shape[2]
    whole_out = full_out if parts.outward is None else parts.outward.shape[1]

    def mixing(size_in: int, size_out: int, bias: bool) -> nn.Module:
        if not isinstance(old, _ConvNd):
            made: nn.Module = skip_init(nn.Linear, size_in, size_out, bias=bias, **like)
        else:
            kind = CONVOLUTIONS[len(old.kernel_size) - 1]
            made = skip_init(kind, groups * size_in, groups * size_out, 1, groups=groups, bias=bias, **like)
        made.weight.requires_grad_(trainable)
        return made

    if isinstance(old, _ConvNd):
        options = {"stride": old.stride, "padding": old.padding, "dilation": old.dilation, "groups": groups}
        options["padding_mode"] = old.padding_mode
        if isinstance(old, _ConvTransposeNd):
            options["output_padding"] = old.output_padding
        kind = _base(old)
        core = skip_init(
            kind, groups * r_in, groups * r_out, old.kernel_size, bias=bias and not has_out, **options, **like
        )
    else:
        core = skip_init(nn.Linear, r_in, r_out, bias=bias and not has_out, **like)
    made = Bottleneck(
        core, mixing(whole_in, r_in, False) if has_in else None, mixing(r_out, whole_out, bias) if has_out else None
    )
    made.core.weight.requires_grad_(old.weight.requires_grad)
    if parts.bias is not None:
        made[-1].bias.requires_grad_(parts.bias.requires_grad)
    return made.train(layer.training)


@torch.no_grad()
def fill(made: Bottleneck, parts: Parts) -> Bottleneck:
    """Set the weights of a bottleneck."""
    values = {"core": parts.view.from_matrix(parts.core), "inward": parts.inward, "outward": parts.outward}
    for name, layer in made.named_children():
        value = values[name]
        assert value is not None
        weight: Tensor = layer.weight  # type: ignore[assignment]
        weight.copy_(value.reshape(weight.shape))
    if parts.bias is not None:
        bias: Tensor = made[-1].bias  # type: ignore[assignment]
        bias.copy_(parts.bias)
    return made


def _base(layer: nn.Module) -> Any:
    return next(kind for kind in (*CONVOLUTIONS, *TRANSPOSED) if isinstance(layer, kind))


def refusal(layer: nn.Module) -> str | None:
    """Return why a layer cannot be split, in words; ``None`` if it can."""
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks, which may change its weight"
    kinds = (*LINEAR, *CONVOLUTIONS, *TRANSPOSED)
    base = next((kind for kind in kinds if isinstance(layer, kind)), None)
    if base is None:
        return f"a {type(layer).__name__} is not a linear or convolution layer"
    own = [name for name in ("forward", "_conv_forward") if getattr(type(layer), name, 0) is not getattr(base, name, 0)]
    return f"{type(layer).__name__} has a forward of its own" if own else None


class BottleneckAttention(FreeMultiheadAttention):
    """Multi-head attention whose fused input projection is a bottleneck, ``in_proj``; called in the same way.

    Where queries, keys and values are not one tensor the product of its layers is used, at the old price.
    """

    in_proj: Bottleneck

    def _project(self, query: Tensor, key: Tensor, value: Tensor, itself: bool) -> list[Tensor]:
        if itself:
            return list(self.in_proj(query).unflatten(-1, (3, -1)).unbind(-2))
        weights = self.in_proj.weight.unflatten(0, (3, -1)).unbind(0)
        bias = self.in_proj.bias
        biases = [None] * 3 if bias is None else list(bias.unflatten(0, (3, -1)).unbind(0))
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

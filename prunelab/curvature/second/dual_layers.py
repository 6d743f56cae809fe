"""Dual layers: what the costly operators do to a tensor and to its derivative along a direction, in one go.

Flows in: x and ẋ, a layer's parameters and the direction that they move in, which stays fixed.  Flows out: y and ẏ; and
on the way back, from the derivatives ``a`` and ``c`` of some number in y and in ẏ, those in x, ẋ and the parameters.
``a`` or ``c`` is ``None`` where the number does not depend on it.  `dual.py` says what that is good for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from prunelab.curvature.second.double_backward import Setting

aten = torch.ops.aten
Grads = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Moving:
    """How a layer's weight and bias move.

    Args:
        weight: the direction of the weight; ``None`` if it stays.
        bias: that of the bias, or ``None``.
        along: whether each of them moves along itself.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    along: bool = False

    def __bool__(self) -> bool:
        return self.along or self.weight is not None or self.bias is not None


class Layer(Function):
    """y = f(x, w) + b, f a convolution or a product: ẏ = f(ẋ, w) + f(x, ẇ) + ḃ, and f(x, ẇ) + ḃ = y if ẇ = w, ḃ = b."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, xt: Tensor | None, w: Tensor, b: Tensor | None, moving: Moving, setting: Setting | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, xt, w)
        ctx.moving, ctx.setting = moving, setting
        ctx.set_materialize_grads(False)
        y, moved = _apply(x, w, b, setting), None
        if moving.along:
            moved = y
        elif moving.weight is not None:
            moved = _apply(x, moving.weight, moving.bias, setting)
        elif moving.bias is not None:
            moved = moving.bias.view(-1, *(1,) * (y.dim() - 2 if setting else 0)).expand_as(y)
        yt = torch.zeros_like(y) if xt is None else _apply(xt, w, None, setting)
        return y, yt if moved is None else yt.add_(moved)

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, c: Tensor | None) -> Grads:
        x, xt, w = ctx.saved_tensors
        moving, setting = ctx.moving, ctx.setting
        need_x, need_xt, need_w, need_b = ctx.needs_input_grad[:4]
        grad_x, grad_xt, grad_w, grad_b = (None,) * 4
        both = moving.along and c is not None
        if a is not None:
            grad_x, grad_w = _adjoints(a, x, w, setting, need_x and not both, need_w)
            grad_b = _over_channels(a, setting) if need_b else None
        if both:
            grad_x, _ = _adjoints(_plus(a, c), x, w, setting, need_x, False)
        elif c is not None and moving.weight is not None:
            grad_x = _plus(grad_x, _adjoints(c, x, moving.weight, setting, need_x, False)[0])
        if c is not None and xt is not None:
            grad_xt, more = _adjoints(c, xt, w, setting, need_xt, need_w)
            grad_w = _plus(grad_w, more)
        return grad_x, grad_xt, grad_w, grad_b, None, None


class Scale(Function):
    """Batch norm in eval mode: y = w x̂ + b, x̂ = (x − μ) / σ, and ẏ = w ẋ / σ + ẇ x̂ + ḃ."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, xt: Tensor, w: Tensor, b: Tensor, moving: Moving, mean: Tensor, var: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        shape = (1, -1, *(1,) * (x.dim() - 2))
        rate = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, xt, w, mean, rate)
        ctx.moving, ctx.shape = moving, shape
        ctx.set_materialize_grads(False)
        scale = rate * w
        y = torch.addcmul((b - mean * scale).view(shape), x, scale.view(shape))
        if moving.along:
            return y, torch.addcmul(y, xt, scale.view(shape))
        yt = xt * scale.view(shape)
        if moving.weight is not None:
            turned = rate * moving.weight
            yt.addcmul_(x, turned.view(shape)).sub_((mean * turned).view(shape))
        return y, yt if moving.bias is None else yt.add_(moving.bias.view(shape))

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, c: Tensor | None) -> Grads:
        x, xt, w, mean, rate = ctx.saved_tensors
        moving, scale = ctx.moving, (rate * w).view(ctx.shape)
        grad_x, grad_w, grad_b = (None,) * 3
        if a is not None:
            grad_b = _over_channels(a, ())
            grad_w = (_over_channels(a * x, ()) - grad_b * mean) * rate
        if moving.along:
            grad_x = _plus(a, c) * scale
        else:
            grad_x = None if a is None else a * scale
            if c is not None and moving.weight is not None:
                grad_x = _plus(grad_x, c * (rate * moving.weight).view(ctx.shape))
        if c is not None:
            grad_w = _plus(grad_w, _over_channels(c * xt, ()) * rate)
        return grad_x, None if c is None else c * scale, grad_w, grad_b, None, None, None, None


class LayerNorm(Function):
    """y = w x̂ + b, x̂ = (x − mean) / σ: with J the derivative of x̂, a symmetric matrix, ẏ = w Jẋ + ẇ x̂ + ḃ.

    With d = w c and ⟨⟩ the mean over the normalised entries, the derivative of d·Jẋ in x is, for J moves with x,

        −(x̂ ⟨d Jẋ⟩ + Jd ⟨x̂ ẋ⟩ + Jẋ ⟨x̂ d⟩) / σ.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        xt: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        moving: Moving,
        shape: list[int],
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        x, xt = x.contiguous(), xt.contiguous()
        y, mean, rate = aten.native_layer_norm(x, shape, w, b, eps)
        ctx.save_for_backward(x, xt, w, b, mean, rate)
        ctx.moving, ctx.normal = moving, shape
        ctx.set_materialize_grads(False)
        yt = _normed(xt, x, shape, mean, rate)
        yt = yt if w is None else yt.mul_(w)
        if moving.along:
            return y, yt.add_(y)
        if moving.weight is not None or moving.bias is not None:
            turned = torch.zeros(shape, dtype=x.dtype, device=x.device) if moving.weight is None else moving.weight
            yt += aten.native_layer_norm(x, shape, turned, moving.bias, eps)[0]
        return y, yt

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, c: Tensor | None) -> Grads:
        x, xt, w, b, mean, rate = ctx.saved_tensors
        shape, moving = ctx.normal, ctx.moving
        grad_x, grad_xt, grad_w, grad_b = (None,) * 4
        if a is not None:
            a = a.contiguous()
            needed = (not moving.along or c is None, w is not None, b is not None)
            grad_x, grad_w, grad_b = aten.native_layer_norm_backward(a, x, shape, mean, rate, w, b, needed)
        if c is None:
            return grad_x, None, grad_w, grad_b, None, None, None
        c = c.contiguous()
        if moving.along:
            grad_x = _normed(_plus(a, c), x, shape, mean, rate, w)
        elif moving.weight is not None:
            grad_x = _plus(grad_x, _normed(c, x, shape, mean, rate, moving.weight))
        d = c if w is None else c * w
        grad_xt = _normed(d, x, shape, mean, rate)
        turned = _normed(xt, x, shape, mean, rate)
        unit = (x - mean).mul_(rate)
        dims, part = tuple(range(-len(shape), 0)), torch.empty_like(unit)
        bend = unit * torch.mul(d, turned, out=part).mean(dims, keepdim=True)
        bend.addcmul_(grad_xt, torch.mul(unit, xt, out=part).mean(dims, keepdim=True))
        bend.addcmul_(turned, torch.mul(unit, d, out=part).mean(dims, keepdim=True)).mul_(rate)
        if w is not None:
            grad_w = _plus(grad_w, torch.mul(c, turned, out=part).flatten(0, -1 - len(shape)).sum(0))
        return -bend if grad_x is None else grad_x.sub_(bend), grad_xt, grad_w, grad_b, None, None, None


class Relu(Function):
    """y = x where x > 0, and ẏ = ẋ there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        y = x.relu()
        ctx.save_for_backward(y)
        ctx.set_materialize_grads(False)
        return y, aten.threshold_backward(xt, y, 0)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Grads:
        (y,) = ctx.saved_tensors
        return tuple(None if g is None else aten.threshold_backward(g, y, 0) for g in given)


class Gelu(Function):
    """y = x Φ(x), ẏ = GELU'(x) ẋ; GELU''(x) = φ(x) (2 − x²)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, xt)
        ctx.set_materialize_grads(False)
        return F.gelu(x), aten.gelu_backward(xt, x)

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, c: Tensor | None) -> Grads:
        x, xt = ctx.saved_tensors
        grad_x = None if a is None else aten.gelu_backward(a, x)
        if c is None:
            return grad_x, None
        square = x * x
        density = (square * -0.5).exp_().mul_((2 * math.pi) ** -0.5)
        bend = square.neg_().add_(2).mul_(density).mul_(xt).mul_(c)
        return bend if grad_x is None else bend.add_(grad_x), aten.gelu_backward(c, x)


def _apply(x: Tensor, w: Tensor, b: Tensor | None, setting: Setting | None) -> Tensor:
    return F.linear(x, w, b) if setting is None else aten.convolution(x, w, b, *setting)


def _adjoints(g: Any, x: Tensor, w: Tensor, setting: Setting | None, need_x: bool, need_w: bool) -> Any:
    """Return the derivatives of ``g · f(x, w)`` in x and in w."""
    if setting is not None and (need_x or need_w):
        return aten.convolution_backward(g, x, w, None, *setting, (need_x, need_w, False))[:2]
    flat = g.reshape(-1, g.shape[-1]).mT @ x.reshape(-1, x.shape[-1]) if need_w else None
    return g @ w if need_x else None, flat


def _over_channels(g: Tensor, setting: Setting | None) -> Tensor:
    """Return the sum over all but the channels: dimension 1 of a convolution, the last of a linear layer."""
    return g.sum([dim for dim in range(g.dim()) if dim != (g.dim() - 1 if setting is None else 1)])


def _normed(u: Any, x: Tensor, shape: list[int], mean: Tensor, rate: Tensor, w: Tensor | None = None) -> Tensor:
    """Return J(w u), the layer norm's derivative times a vector, or the other way round."""
    return aten.native_layer_norm_backward(u, x, shape, mean, rate, w, None, (True, False, False))[0]


def _plus(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Return the sum of what is there."""
    if first is None or second is None:
        return second if first is None else first
    return first + second

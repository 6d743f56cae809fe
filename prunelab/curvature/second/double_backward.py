"""Twice: run a model so that its loss can be differentiated twice, without more work than that takes.

Flows in: a forward pass inside ``with twice_differentiable()``.  Flows out: the same numbers, on a graph with second
derivatives: those of fused attention do not exist, and those of convolutions, batch norm, ReLU and GELU do more than
they must.  Convolution is bilinear in input and weight, so that its derivatives of every order are three maps:
y = C(x, w) and its two adjoints, I(g, w) with respect to x and K(g, x) with respect to w.  Notebook 09_oba uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from prunelab.runtime.switches import plain_attention

CONVOLUTIONS: dict[Callable[..., Any], tuple[int, bool]] = {
    F.conv1d: (1, False),
    F.conv2d: (2, False),
    F.conv3d: (3, False),
    F.conv_transpose1d: (1, True),
    F.conv_transpose2d: (2, True),
    F.conv_transpose3d: (3, True),
}
"""Function -> how many dimensions it slides over, whether it is transposed."""

Setting = tuple[Any, ...]  # stride, padding, dilation, transposed, output_padding, groups


@contextmanager
def twice_differentiable(mode: Rewrite | None = None) -> Iterator[None]:
    """Replace, in every forward pass inside, operators whose second derivative is missing or slow.

    Args:
        mode: a ``Rewrite`` of one's own.
    """
    with plain_attention, mode or Rewrite():
        yield


class Rewrite(TorchFunctionMode):
    """While on, convolutions, batch norm in eval mode, ReLU, GELU and attention are those of this module."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in REPLACED:
            replaced = REPLACED[func](func, *args, **kwargs)
            if replaced is not None:
                return replaced
        return func(*args, **kwargs)


def _convolution(
    func: Callable[..., Any], input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor | None:
    """Return the convolution with derivatives as maps; ``None`` for settings that need more than these maps."""
    setting = convolution_setting(func, input, args, kwargs)
    if setting is None:
        return None
    out = _Conv.apply(input, weight, setting)
    return out if bias is None else out + bias.view(-1, *(1,) * CONVOLUTIONS[func][0])


def convolution_setting(
    func: Callable[..., Any], input: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Setting | None:
    """Return what ``aten.convolution`` takes after the bias; ``None`` for padding by name or inputs without a batch.

    Args:
        func: one of ``CONVOLUTIONS``.
        input: of the layer.
        args: of the call, after the bias.
        kwargs: of the call.
    """
    space, transposed = CONVOLUTIONS[func]
    names = ["stride", "padding", "output_padding", "groups", "dilation"]
    if not transposed:
        names = ["stride", "padding", "dilation", "groups"]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if isinstance(given.get("padding"), str) or input.dim() != space + 2:
        return None
    stride, padding, out_padding, dilation = (
        _each(given.get(name, default), space)
        for name, default in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))
    )
    return stride, padding, dilation, transposed, out_padding, given.get("groups", 1)


def _batch_norm(
    func: Callable[..., Any],
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if training or running_mean is None or running_var is None:
        return None
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    shift = shift if bias is None else shift + bias
    shape = (1, -1, *(1,) * (input.dim() - 2))
    return torch.addcmul(shift.view(shape), input, scale.view(shape))


def _relu(func: Callable[..., Any], input: Tensor, inplace: bool = False) -> Tensor | None:
    return None if inplace else _Relu.apply(input)  # in place, others may count on the change


def _gelu(func: Callable[..., Any], input: Tensor, approximate: str = "none") -> Tensor | None:
    return _Gelu.apply(input) if approximate == "none" else None


def _hardsigmoid(func: Callable[..., Any], input: Tensor, inplace: bool = False) -> Tensor | None:
    return None if inplace else (input + 3).clamp(0, 6) / 6  # PyTorch's own has no second derivative


def normalize(
    func: Callable[..., Any], input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor | None:
    """Return x / max(‖x‖, ε): at zero, where padding is, the norm has no second derivative, but this function has."""
    if p != 2 or out is not None:
        return None
    least = max(eps**2, torch.finfo(input.dtype).tiny)
    return input * input.square().sum(dim, keepdim=True).clamp_min(least).rsqrt()


def _attention(
    func: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if dropout_p or enable_gqa or is_causal:
        return None
    logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        return None  # rows that are masked as a whole are a matter of their own
    return (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ value


REPLACED: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    F.batch_norm: _batch_norm,
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    F.gelu: _gelu,
    F.hardsigmoid: _hardsigmoid,
    F.normalize: normalize,
    F.scaled_dot_product_attention: _attention,
}


class _Conv(Function):
    """y = C(x, w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, setting: Setting) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.setting = setting
        return torch.ops.aten.convolution(x, w, None, *setting)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        need_x, need_w, _ = ctx.needs_input_grad
        if not torch.is_grad_enabled():  # nothing is differentiated again: both at once
            return *_adjoints(g, x, w, ctx.setting, need_x, need_w), None
        grad_x = _ConvInput.apply(g, w, x.shape, ctx.setting) if need_x else None
        return grad_x, _ConvWeight.apply(g, x, w.shape, ctx.setting) if need_w else None, None


class _ConvInput(Function):
    """I(g, w), the adjoint of x -> C(x, w)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, shape: torch.Size, setting: Setting) -> Tensor:
        ctx.save_for_backward(g, w)
        ctx.setting = setting
        return _adjoints(g, g.new_empty(1).expand(shape), w, setting, True, False)[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, w = ctx.saved_tensors
        need_g, need_w = ctx.needs_input_grad[:2]
        if not torch.is_grad_enabled():
            grad_g = torch.ops.aten.convolution(v, w, None, *ctx.setting) if need_g else None
            return grad_g, _adjoints(g, v, w, ctx.setting, False, need_w)[1], None, None
        grad_g = _Conv.apply(v, w, ctx.setting) if need_g else None
        return grad_g, _ConvWeight.apply(g, v, w.shape, ctx.setting) if need_w else None, None, None


class _ConvWeight(Function):
    """K(g, x), the adjoint of w -> C(x, w)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, shape: torch.Size, setting: Setting) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.setting = setting
        return _adjoints(g, x, g.new_empty(1).expand(shape), setting, False, True)[1]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, x = ctx.saved_tensors
        need_g, need_x = ctx.needs_input_grad[:2]
        if not torch.is_grad_enabled():
            grad_g = torch.ops.aten.convolution(x, v, None, *ctx.setting) if need_g else None
            return grad_g, _adjoints(g, x, v, ctx.setting, need_x, False)[0], None, None
        grad_g = _Conv.apply(x, v, ctx.setting) if need_g else None
        return grad_g, _ConvInput.apply(g, v, x.shape, ctx.setting) if need_x else None, None, None


def _adjoints(g: Tensor, x: Tensor, w: Tensor, setting: Setting, need_x: bool, need_w: bool) -> Sequence[Any]:
    if not (need_x or need_w):
        return None, None
    return torch.ops.aten.convolution_backward(g, x, w, None, *setting, (need_x, need_w, False))[:2]


class _Relu(Function):
    """ReLU, whose derivative is a constant as far as further derivatives go."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.relu()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(g, out.detach(), 0)


class _Gelu(Function):
    """GELU(x) = x Φ(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _GeluSlope.apply(g, x) if torch.is_grad_enabled() else torch.ops.aten.gelu_backward(g, x)


class _GeluSlope(Function):
    """g · GELU'(x); GELU''(x) = φ(x) (2 − x²)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return torch.ops.aten.gelu_backward(g, x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, x = ctx.saved_tensors
        square = x * x
        density = torch.exp(square * -0.5) * (2 * math.pi) ** -0.5
        bend = density * (2 - square) * g * v if ctx.needs_input_grad[1] else None
        return torch.ops.aten.gelu_backward(v, x) if ctx.needs_input_grad[0] else None, bend


def _each(value: int | Sequence[int], space: int) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * space if len(sizes) == 1 else sizes

"""Dual mode: while it is on, operators on dual numbers take shorter ways than PyTorch's, where there are any.

Flows in: calls of a model whose tensors carry derivatives.  Flows out: the same results, from `dual_layers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from prunelab.curvature.second.double_backward import CONVOLUTIONS, convolution_setting, normalize
from prunelab.curvature.second.dual_attention import Attention, Softmax, causal
from prunelab.curvature.second.dual_layers import Gelu, Layer, LayerNorm, Moving, Relu, Scale
from prunelab.errors import BatchError


def pair(value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a tensor without its derivative, and this, if it has any."""
    return forward_ad.unpack_dual(value)


class Duals(TorchFunctionMode):
    """While on, costly operators take the shorter ways of `dual_layers.py`; the others are PyTorch's.

    Args:
        known: ``id`` of a parameter as the model sees it -> the parameter itself and the direction it moves in, if any.
    """

    def __init__(self, known: Mapping[int, tuple[Tensor, Tensor | None]]) -> None:
        super().__init__()
        self.known = known

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not torch.is_grad_enabled():  # a constant for gradients is one for derivatives along a direction as well
            args, kwargs = tree_map(lambda leaf: pair(leaf)[0] if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            return func(*args, **kwargs)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.requires_grad and pair(leaf)[1] is None:
                raise BatchError("Something in the model has lost the derivative along the direction.")
        place = OVERWRITING.get(func)
        if place is not None and (kwargs.get("inplace") or (len(args) > place and args[place])):
            apart = [args[0].clone(), *args[1:place]]  # what it overwrites is needed on the way back
            kwargs.pop("inplace", None)
            return args[0].copy_(self.__torch_function__(func, types, apart, kwargs))
        if func in SHORTER:
            found = SHORTER[func](self, func, *args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)

    def moving(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Moving] | None:
        """Return a layer's parameters and how they move; ``None`` where one is computed from others."""
        found = [(None, None) if value is None else self.known.get(id(value)) for value in (weight, bias)]
        if None in found:
            return None
        (w, w_moves), (b, b_moves) = found  # type: ignore[misc]
        itself = all(value is None or _same(value, move) for value, move in found)  # type: ignore[misc]
        return w, b, Moving(w_moves, b_moves, itself and weight is not None)


def _same(value: Tensor, move: Tensor | None) -> bool:
    return move is not None and move.data_ptr() == value.data_ptr() and move.stride() == value.stride()


def _linear(
    mode: Duals, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor | None:
    given, (x, xt) = mode.moving(weight, bias), pair(input)
    setting = convolution_setting(func, input, args, kwargs) if func in CONVOLUTIONS else None
    if given is None or (setting is None and func in CONVOLUTIONS) or (xt is None and not given[2]):
        return None
    return forward_ad.make_dual(*Layer.apply(x, xt, *given, setting))


def _batch_norm(
    mode: Duals,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    given, (x, xt) = mode.moving(weight, bias), pair(input)
    if training or running_mean is None or running_var is None:
        _refuse(mode, func)
    if weight is None or bias is None:
        return None
    if given is None or (xt is None and not given[2]):
        return None
    return forward_ad.make_dual(
        *Scale.apply(x, torch.zeros_like(x) if xt is None else xt, *given, running_mean, running_var, eps)
    )


def _refuse(mode: Duals, func: Any, *args: Any, **kwargs: Any) -> None:
    """Raise: PyTorch takes statistics or places for constants when it differentiates the forward derivative.

    Of all operators in PyTorch's own list of samples only these give wrong numbers; others have no such derivative and
    raise by themselves.
    """
    raise BatchError(f"{func.__name__} has no forward derivative that could be differentiated.")


def _layer_norm(
    mode: Duals,
    func: Any,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    given, (x, xt) = mode.moving(weight, bias), pair(input)
    if given is None:
        _refuse(mode, func)
    if given is None or (xt is None and not given[2]):
        return None
    return forward_ad.make_dual(
        *LayerNorm.apply(x, torch.zeros_like(x) if xt is None else xt, *given, list(normalized_shape), eps)
    )


def _relu(mode: Duals, func: Any, input: Tensor, inplace: bool = False) -> Tensor | None:
    x, xt = pair(input)
    return (
        None if inplace or xt is None else forward_ad.make_dual(*Relu.apply(x, xt))
    )  # in place, others may count on the change


def _gelu(mode: Duals, func: Any, input: Tensor, approximate: str = "none") -> Tensor | None:
    x, xt = pair(input)
    return None if approximate != "none" or xt is None else forward_ad.make_dual(*Gelu.apply(x, xt))


def _hardsigmoid(mode: Duals, func: Any, input: Tensor, inplace: bool = False) -> Tensor | None:
    return (input + 3).clamp(0, 6) / 6  # PyTorch's own cannot be differentiated again


def _softmax(mode: Duals, func: Any, input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Tensor | None:
    x, xt = pair(input)
    if dim is None or xt is None or kwargs.get("dtype") is not None or any(type(value) is not int for value in args):
        return None
    return forward_ad.make_dual(*Softmax.apply(x, xt, dim))


def _attention(
    mode: Duals,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if dropout_p or enable_gqa or query.dim() < 3 or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return None
    scale, pairs = query.shape[-1] ** -0.5 if scale is None else scale, [pair(x) for x in (query, key, value)]
    shape = (*query.shape[:-1], key.shape[-2])
    if attn_mask is not None and attn_mask.requires_grad:
        logits = (query * scale) @ key.mT + attn_mask
        return forward_ad.make_dual(*Softmax.apply(*pair(logits), -1)) @ value
    if all(xt is None for _, xt in pairs):
        return None
    mask = causal(shape[-2], shape[-1], pairs[0][0]) if is_causal else attn_mask
    if mask is not None and mask.dtype == torch.bool:
        if not bool(mask.any(-1).all()):
            return None  # rows that are masked as a whole are a matter of their own
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, -torch.inf)
    if mask is not None and mask.dim() > 2:
        mask = mask.expand(shape).flatten(0, -3)
    moved = [torch.zeros_like(x) if xt is None else xt for x, xt in pairs]
    return forward_ad.make_dual(*Attention.apply(scale, mask, *(x for x, _ in pairs), *moved))


def _multi_head(
    mode: Duals,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    weight: Tensor,
    bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    **rest: Any,
) -> tuple[Tensor, None] | None:
    """Return what `nn.MultiheadAttention` gives: its function calls others that a mode does not see."""
    unusual = (bias_k, bias_v, key_padding_mask, rest.get("static_k"), rest.get("static_v"))
    if any(one is not None for one in unusual) or add_zero_attn or need_weights or use_separate_proj_weight:
        return None
    if query is not key or key is not value or query.dim() != 3 or (dropout_p and training):
        return None
    if attn_mask is not None and attn_mask.dim() != 2:
        return None
    with mode:
        q, k, v = F.linear(query, weight, bias).unflatten(-1, (3, heads, -1)).permute(2, 1, 3, 0, 4)
        out = F.scaled_dot_product_attention(
            q, k, v, None if attn_mask is None else ~attn_mask if attn_mask.dtype == torch.bool else attn_mask
        )
        return F.linear(out.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias), None


WRONG = (
    *(F.instance_norm, torch.instance_norm, torch.batch_norm, torch.native_batch_norm),
    *(torch.layer_norm, torch.native_layer_norm, torch.as_strided_scatter),
    *(F.max_unpool1d, F.max_unpool2d, F.max_unpool3d),
)

SHORTER: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((F.linear, *CONVOLUTIONS), _linear),
    **dict.fromkeys(WRONG, _refuse),
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    F.gelu: _gelu,
    F.hardsigmoid: _hardsigmoid,
    F.normalize: lambda mode, func, *args, **kwargs: normalize(func, *args, **kwargs),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _softmax),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head,
}
"""Function -> what does the same with derivatives; ``None`` where it cannot."""

OVERWRITING: dict[Callable[..., Any], int] = {
    F.hardswish: 1,
    F.hardsigmoid: 1,
    F.mish: 1,
    F.relu6: 1,
    F.selu: 1,
    F.silu: 1,
    F.celu: 2,
    F.elu: 2,
    F.leaky_relu: 2,
    F.hardtanh: 3,
}
"""Function -> the position of its `inplace`."""

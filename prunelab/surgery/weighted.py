"""Means, variances and norms in which every entry counts with a weight: 1 where it stays, 0 where it is gone.

Flows in: a call of one of PyTorch's functions, and weights of the entries of its input.  Flows out: what the function
gives over weighted entries.  With weights of 0 and 1 that is the statistic over the entries that stay, as in the cut
network; gates take derivatives in the weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def _mean(x: Tensor, w: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None, out: Any = None) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    return _average(x, w, _places(x, dim), keepdim)


def _average(x: Tensor, w: Tensor, places: Sequence[int], keepdim: bool = True) -> Tensor:
    """Return ``Σ w x / Σ w`` over some dimensions."""
    return (x * w).sum(tuple(places), keepdim) / w.expand_as(x).sum(tuple(places), keepdim)


def _var_mean(
    x: Tensor, w: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, correction: Any = None
) -> tuple[Tensor, Tensor]:
    if isinstance(dim, bool):  # var(unbiased)
        dim, unbiased = None, dim
    places = _places(x, dim)
    correction = int(unbiased) if correction is None else correction
    mean = _average(x, w, places)
    number = (w.expand_as(x).sum(tuple(places), keepdim) - correction).clamp_min(0)
    variance = ((x - mean).square() * w).sum(tuple(places), keepdim) / number
    return variance, _average(x, w, places, keepdim)


def _var(*args: Any, **kwargs: Any) -> Tensor:
    return _var_mean(*args, **kwargs)[0]


def _std(*args: Any, **kwargs: Any) -> Tensor:
    return _var_mean(*args, **kwargs)[0].sqrt()


def _std_mean(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    variance, mean = _var_mean(*args, **kwargs)
    return variance.sqrt(), mean


def _layer_norm(
    x: Tensor,
    w: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    places = range(x.dim() - len(normalized_shape), x.dim())
    x = x - _average(x, w, places)
    return _affine(x * torch.rsqrt(_average(x.square(), w, places) + eps), weight, bias)


def _rms_norm(
    x: Tensor, w: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    places = range(x.dim() - len(normalized_shape), x.dim())
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(x * torch.rsqrt(_average(x.square(), w, places) + eps), weight, None)


def _group_norm(
    x: Tensor,
    w: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """A group of which nothing is left has weights of 0 only; its entries are 0."""
    shape = (-1, *(1 for _ in x.shape[2:]))
    grouped, w = (part.reshape(len(x), num_groups, -1) for part in (x, w.expand_as(x)))
    number = w.sum(-1, keepdim=True)
    number = torch.where(number == 0, torch.ones_like(number), number)
    grouped = grouped - (grouped * w).sum(-1, keepdim=True) / number
    grouped = grouped * torch.rsqrt((grouped.square() * w).sum(-1, keepdim=True) / number + eps)
    weight, bias = (None if part is None else part.view(shape) for part in (weight, bias))
    return _affine(grouped.reshape(x.shape), weight, bias)


def _batch_norm(
    x: Tensor,
    w: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Models that standardise the weights of a convolution do it so, with the weights as one image."""
    places, shape = (0, *range(2, x.dim())), (-1, *(1 for _ in x.shape[2:]))
    x = x - _average(x, w, places)
    weight, bias = (None if part is None else part.view(shape) for part in (weight, bias))
    return _affine(x * torch.rsqrt(_average(x.square(), w, places) + eps), weight, bias)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _places(x: Tensor, dim: Any) -> list[int]:
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return list(range(x.dim()))
    return [place % x.dim() for place in ([dim] if isinstance(dim, int) else dim)]


WEIGHTED: Mapping[str, Callable[..., Any]] = {
    "mean": _mean,
    "var": _var,
    "std": _std,
    "var_mean": _var_mean,
    "std_mean": _std_mean,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
}
"""PyTorch's function by its name -> the same with weights as its second argument."""


def statistic(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, list[int]] | None:
    """Return the input of a function that takes a mean or variance, and over which dimensions; ``None`` for others."""
    if name not in WEIGHTED:
        return None
    given = _given(name, args, kwargs)
    x = given["x"]
    if name == "group_norm":
        return x, [1]
    if name == "batch_norm":
        return x, [0, *range(2, x.dim())] if given["training"] else []
    if "normalized_shape" in given:
        return x, list(range(x.dim() - len(given["normalized_shape"]), x.dim()))
    dim = given.get("dim")
    return x, _places(x, None if isinstance(dim, bool) else dim)


def weighted(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], w: Tensor) -> Any:
    """Return what the function ``name`` gives when the entries of its input count with weights ``w``.

    Args:
        name: one of ``WEIGHTED``.
        args: of the function.
        kwargs: of the function.
        w: weights, of a shape that broadcasts to that of the input.
    """
    given = _given(name, args, kwargs)
    x = given.pop("x")
    return WEIGHTED[name](x, w.to(x.dtype), **given)


def _given(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    known = {"x" if key in ("input", "self") else key: value for key, value in kwargs.items()}
    func = _var_mean if WEIGHTED[name] in (_var, _std, _std_mean) else WEIGHTED[name]
    names = [key for key in inspect.signature(func).parameters if key != "w"]
    return {**dict(zip(names, args, strict=False)), **known}

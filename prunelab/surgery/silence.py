"""Silencing: the function of the cut network, with nothing removed; the truth that surgery is tested against.

Flows in: a model and a ``Plan``.  Flows out: a copy whose removed entries are zero, and whose normalisations take their
statistics over the kept entries only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunelab.isolation import copied
from prunelab.planning.plan import Plan
from prunelab.surgery.apply import Kept, masks, open_plan
from prunelab.switches import undisturbed
from prunelab.tracing.fakes import forget
from prunelab.tracing.trace import DependencyGraph

_BATCH_NORMS = (F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm)
NORMS = {
    "native_batch_norm": _BATCH_NORMS,
    "cudnn_batch_norm": _BATCH_NORMS,
    "miopen_batch_norm": _BATCH_NORMS,
    "native_layer_norm": (F.layer_norm, torch.layer_norm),
    "_fused_rms_norm": (F.rms_norm, torch.rms_norm),
    "native_group_norm": (F.group_norm, torch.group_norm),
}


@undisturbed()
def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` that computes what ``apply(model, plan)`` does, with nothing removed.

    The removed entries of every member are zero, and layer, group and root-mean-square norms leave them out of their
    statistics, whether they are modules or calls in the model's code.

    Raises:
        PlanError: the plan does not fit the model.
    """
    graph, kept = open_plan(model, plan)
    silent = forget(copied(model))
    parameters = dict(silent.named_parameters())
    with torch.no_grad():
        for name, place, mask in masks(graph, kept):
            if name in parameters:
                parameters[name].index_fill_(place, (~mask).nonzero().flatten().to(parameters[name].device), 0)
    norms = _norms(graph, kept)
    if any(mask is not None for _, mask in norms):
        mode = KeptNorms(norms)
        silent.register_forward_pre_hook(lambda *_: mode.start())
        silent.register_forward_hook(lambda *_: mode.stop(), always_call=True)
    return silent


def _norms(graph: DependencyGraph, kept: Kept) -> list[tuple[str, Tensor | None]]:
    """Return, for every norm in the order of calls, its operator and the mask of the entries it normalises over."""
    found: list[tuple[str, Tensor | None]] = []
    for op in graph.tape:
        if op.name not in NORMS:
            continue
        axes = graph.axes_of(op.args[0])
        if NORMS[op.name] is _BATCH_NORMS:
            axes = axes[2:] if op.args[5] else ()  # in eval mode it takes no statistics
        else:
            axes = axes[1:2] if op.name == "native_group_norm" else axes[len(axes) - len(op.args[1]) :]
        if not axes:
            found.append((op.name, None))
            continue
        mask = kept.mask(axes[0])
        for axis in axes[1:]:
            mask = mask[..., None] & kept.mask(axis)
        found.append((op.name, None if mask.all() else mask))
    return found


class KeptNorms(TorchFunctionMode):
    """While on, the n-th norm that the model calls takes its statistics over the n-th mask."""

    def __init__(self, norms: list[tuple[str, Tensor | None]]) -> None:
        super().__init__()
        self.norms, self.place = norms, 0

    def start(self) -> None:
        """Begin a forward pass."""
        self.place = 0
        self.__enter__()

    def stop(self) -> None:
        """End a forward pass."""
        self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not any(func in functions for functions in NORMS.values()):
            return func(*args, **kwargs)
        name, mask = self.norms[self.place]
        self.place += 1
        if mask is None:
            return func(*args, **kwargs)
        if NORMS[name] is _BATCH_NORMS:
            return kept_batch_norm(*_batch_norm_arguments(*args, **kwargs), mask.to(args[0].device))
        keys = ["input", "num_groups" if name == "native_group_norm" else "shape", "weight", "bias", "eps"]
        if name == "_fused_rms_norm":
            keys.remove("bias")
        given = dict(zip(keys, args, strict=False)) | {k: v for k, v in kwargs.items() if k != "normalized_shape"}
        x, weight, bias, eps = given["input"], given.get("weight"), given.get("bias"), given.get("eps")
        mask = mask.to(x.device)
        if name == "native_group_norm":
            return kept_group_norm(x, given["num_groups"], weight, bias, 1e-5 if eps is None else eps, mask)
        if name == "_fused_rms_norm":
            return kept_norm(x, weight, bias, torch.finfo(x.dtype).eps if eps is None else eps, mask, centred=False)
        return kept_norm(x, weight, bias, 1e-5 if eps is None else eps, mask)


def _batch_norm_arguments(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
    return input, weight, bias, eps


def kept_batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kept: Tensor) -> Tensor:
    """Batch norm over the batch and the kept entries of the dimensions after the channels; zero elsewhere.

    Models that standardise the weights of a convolution do it so, with the weights as one image.
    """
    x, places = x * kept, (0, *range(2, x.dim()))
    number = kept.sum() * len(x)
    x = (x - x.sum(places, keepdim=True) / number) * kept
    out = x * torch.rsqrt(x.square().sum(places, keepdim=True) / number + eps)
    shape = (-1, *(1 for _ in x.shape[2:]))
    out = out if weight is None else out * weight.view(shape)
    return (out if bias is None else out + bias.view(shape)) * kept


def kept_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kept: Tensor, *, centred: bool = True
) -> Tensor:
    """Layer norm, or root-mean-square norm, over the kept entries of the last dimensions; zero elsewhere."""
    places, number = tuple(range(-kept.dim(), 0)), kept.sum()
    x = x * kept
    if centred:
        x = (x - x.sum(places, keepdim=True) / number) * kept
    out = x * torch.rsqrt(x.square().sum(places, keepdim=True) / number + eps)
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias) * kept


def kept_group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, kept: Tensor
) -> Tensor:
    """Group norm over the kept channels of every group; zero elsewhere."""
    shape = (-1, *(1 for _ in x.shape[2:]))
    inside = kept.view(shape).expand(x.shape[1:]).reshape(groups, -1)
    number = inside.sum(-1, keepdim=True).clamp_min(1)
    grouped = x.reshape(len(x), groups, -1) * inside
    grouped = (grouped - grouped.sum(-1, keepdim=True) / number) * inside
    out = (grouped * torch.rsqrt(grouped.square().sum(-1, keepdim=True) / number + eps)).reshape(x.shape)
    out = out if weight is None else out * weight.view(shape)
    return (out if bias is None else out + bias.view(shape)) * kept.view(shape)

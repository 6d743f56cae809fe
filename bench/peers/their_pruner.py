"""Torch-Pruning as its documentation uses it: importances, a pruner, and the ratio that ends at a number of FLOPs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from bench.peers.libraries import peer
from bench.peers.problems import Batches, classifier
from prunelab.networks import Attention

INPUTS = torch.ones(1, 3, 32, 32)
Cut = Callable[[nn.Module, Batches], tuple[Any, dict[str, Tensor]]]


def pruner(model: nn.Module, importance: object, ratio: float, *, isomorphic: bool = False) -> Any:
    """Return its pruner, ranking globally, for networks of 32 × 32 pixels; a Transformer's heads are named to it."""
    heads = {module.qkv: module.heads for module in model.modules() if isinstance(module, Attention)}
    return peer("torch_pruning").pruner.BasePruner(
        model,
        INPUTS.to(next(model.parameters()).device),
        importance=importance,
        global_pruning=True,
        isomorphic=isomorphic,
        pruning_ratio=ratio,
        ignored_layers=[classifier(model)],
        num_heads=heads,
        in_channel_groups={},  # its defaults are one dictionary for all pruners
        out_channel_groups={},
    )


def backward(model: nn.Module, batches: Batches) -> None:
    """Leave the gradient of the loss over all batches on the model, as its Taylor importance wants it."""
    model.zero_grad()
    number = sum(len(targets) for _, targets in batches)
    for inputs, targets in batches:
        (F.cross_entropy(model(inputs), targets, reduction="sum") / number).backward()


def plain(name: str, **options: Any) -> Cut:
    """Return what makes an importance that looks at weights and gradients."""

    def scored(model: nn.Module, batches: Batches) -> tuple[Any, dict[str, Tensor]]:
        if "Taylor" in name:
            backward(model, batches)
        return getattr(peer("torch_pruning").importance, name)(**options), gradients(model)

    return scored


def hessian(repaired: bool) -> Cut:
    """Return what makes the importance of optimal brain damage, one backward pass per sample.

    `accumulate_grad` keeps the last sample only (see the table of moments); `repaired` gives it the sum over all.
    """

    def scored(model: nn.Module, batches: Batches) -> tuple[Any, dict[str, Tensor]]:
        scorer = peer("torch_pruning").importance.GroupHessianImportance()
        total: dict[nn.Parameter, Tensor] = {}
        for inputs, targets in batches:
            for x, y in zip(inputs, targets, strict=True):  # batches of one: the same numbers in less time
                model.zero_grad()
                F.cross_entropy(model(x[None]), y[None]).backward()
                scorer.accumulate_grad(model)
                for parameter in model.parameters():
                    total[parameter] = total.get(parameter, 0) + parameter.grad.square()
        if repaired:
            scorer._accu_grad = total
            scorer._counter = dict.fromkeys(total, sum(len(targets) for _, targets in batches))
        return scorer, gradients(model)

    return scored


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the values of `.grad`, which a copy of a model does not have."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


IMPORTANCES: dict[str, Cut] = {
    "random": plain("RandomImportance"),
    "magnitude, L2": plain("GroupMagnitudeImportance", p=2),
    "magnitude, L1": plain("GroupMagnitudeImportance", p=1),
    "LAMP": plain("LAMPImportance"),
    "BN scale": plain("BNScaleImportance"),
    "FPGM": plain("FPGMImportance"),
    "Taylor": plain("GroupTaylorImportance"),
    "Hessian": hessian(repaired=False),
    "Hessian, all samples counted": hessian(repaired=True),
}
"""Its importances with their defaults; OBDC, which needs a hook per layer and pruner, is `c_obd` here."""


def cut(model: nn.Module, scored: tuple[Any, dict[str, Tensor]], ratio: float, isomorphic: bool) -> nn.Module:
    """Return a copy of a model without the channels that its pruner takes at a ratio."""
    importance, slopes = scored
    small, importance = copy.deepcopy((model, importance))  # together: it knows parameters by identity
    for name, parameter in small.named_parameters():
        parameter.grad = slopes[name].clone() if name in slopes else None
    pruner(small, importance, ratio, isomorphic=isomorphic).step()
    small.zero_grad()
    return small


def at_flops(model: nn.Module, scored: tuple[Any, dict[str, Tensor]], share: float, isomorphic: bool) -> nn.Module:
    """Search the ratio at which its cut keeps at most a share of the FLOPs, and return that cut."""
    inputs = INPUTS.to(next(model.parameters()).device)
    whole, low, high = pl.count(model, inputs).flops, 0.0, 1.0
    best: nn.Module | None = None
    for _ in range(9):  # to 0.2 % of the channels
        ratio = (low + high) / 2
        small = cut(model, scored, ratio, isomorphic)
        if pl.count(small, inputs).flops <= share * whole:
            best, high = small, ratio
        else:
            low = ratio
    if best is None:
        raise RuntimeError(f"no ratio leaves {share:.0%} of the FLOPs")
    return best

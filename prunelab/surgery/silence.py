"""Silencing: the function of the cut network, with nothing removed; the truth that surgery is tested against.

A unit is removed where it is consumed: in the cut network nothing reads it any more.  Layers read it through the
columns of their weights; sums, products of activations, norms, means and variances read it too, whether they are
modules or calls in the model's code.  So all these leave the unit out, and means and variances are over what stays.

Flows in: a model and a ``Plan``.  Flows out: a copy whose removed entries are zero in its parameters, and
are left out wherever entries are added up or a mean or a variance is taken.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from prunelab.errors import PlanError
from prunelab.kept import Kept, masks, open_plan
from prunelab.plans import Plan
from prunelab.runtime.isolation import copied
from prunelab.runtime.switches import undisturbed
from prunelab.surgery.layers import pack_by_hand
from prunelab.surgery.weight_norm import folded, scaled_rows
from prunelab.surgery.weighted import WEIGHTED, statistic, weighted
from prunelab.tracing.axes import Axis
from prunelab.tracing.calls import FunctionCall, Given, RealAxes, WatchedCalls, tensors_of
from prunelab.tracing.fakes import forget
from prunelab.tracing.trace import DependencyGraph


@undisturbed()
def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` that computes what ``apply(model, plan)`` does, with nothing removed.

    The removed entries of every parameter are zero.  Sums and products of activations, means, variances, and layer,
    group and root-mean-square norms leave them out, whether they are modules or calls in the model's code.  Inputs may
    have other sizes than the example that the model was traced with.

    Args:
        model: the model that the plan was made for, in any mode and on any device.
        plan: what goes.

    Returns:
        The copy, with all its parameters in their old shapes, in the same mode, on the same device.

    Raises:
        PlanError: the plan does not fit the model.  When the copy runs: its code takes a statistic over removed units
            that is not known here, or couples units otherwise with these inputs.

    >>> import prunelab as pl
    >>> model = nn.Sequential(nn.Linear(2, 4), nn.Sigmoid(), nn.Linear(4, 1))
    >>> scores = pl.criteria.get("magnitude")(pl.trace(model, torch.ones(1, 2)))
    >>> plan = pl.plan(scores, ratio=0.5)
    >>> x = torch.randn(3, 2)
    >>> torch.allclose(pl.masked(model, plan)(x), pl.apply(model, plan)(x), atol=1e-6)
    True
    """
    return silenced(model, *open_plan(model, plan))


Seen = Callable[[str, list[Tensor]], None]


def silenced(model: nn.Module, graph: DependencyGraph, kept: Kept, seen: Seen | None = None) -> nn.Module:
    """Return a copy of ``model`` in which nothing reads what does not stay.

    Args:
        model: the model, or one with the same parameters as the one that was traced.
        graph: its trace.
        kept: what stays.
        seen: called with the name of every function and the kept entries of what it returns.
    """
    silent = forget(copied(model))
    for module in silent.modules():
        pack_by_hand(module)  # while calls are watched, PyTorch does not pack batches by itself
    parameters = dict(silent.named_parameters())
    with torch.no_grad():
        for name, length in folded(graph, kept, parameters).items():
            parameters[name].copy_(length)
        scaled = scaled_rows(graph)
        for name, place, mask in masks(graph, kept):
            if name in parameters and (name, place) not in scaled:
                parameters[name].index_fill_(place, (~mask).nonzero().flatten().to(parameters[name].device), 0)
    running = threading.local()

    def start(module: nn.Module, *_: Any) -> None:
        axes, modes = getattr(running, "spare", None), ExitStack()
        running.spare = None
        if axes is None or not axes.fits(module):
            axes = RealAxes(module, graph)
        if torch.is_inference_mode_enabled():  # where operators do not show what they are made of
            modes.enter_context(undisturbed())
            modes.enter_context(torch.no_grad())
        modes.enter_context(axes)
        modes.enter_context(Silence(axes, kept, seen))
        running.all = [*getattr(running, "all", []), (axes, modes)]

    def stop(module: nn.Module, args: Any, out: Any) -> None:
        axes, modes = running.all.pop()
        modes.close()
        if out is not None:  # as after an error, which is to be heard instead
            axes.check(kept.masks)
            running.spare = axes  # it knows the axes of tensors that the model keeps for its next run

    if kept.masks:
        silent.register_forward_pre_hook(start)
        silent.register_forward_hook(stop, always_call=True)
    return silent


class Silence(WatchedCalls):
    """While on, removed entries count for nothing wherever the model adds entries up or takes a mean or a variance.

    Args:
        axes: the axes of what the model computes; on for as long as this mode is.
        kept: what stays, by the leaves of the trace.
        seen: as for ``silenced``.
    """

    def __init__(self, axes: RealAxes, kept: Kept, seen: Seen | None = None) -> None:
        super().__init__(axes)
        self.seen = seen
        self.changes = Changes(Kept({id(axes.leaves[leaf]): mask for leaf, mask in kept.masks.items()}))

    def after_call(self, call: FunctionCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Return what the call returns in the cut network; removed entries of it may be anything."""
        change = self.changes.of(call)
        if change is not None:
            old = tensors_of(out)
            with self.axes.quiet():
                out = change.make(func, args, kwargs)
            for one, before in zip(tensors_of(out), old, strict=True):
                self.axes.know(one, self.axes.dims(before))
        if self.seen is not None:
            with self.axes.quiet():
                made = [restricted(one, map(self.changes.mask, self.axes.axes(one))) for one in tensors_of(out)]
            self.seen(call.name, made)
        return out


Masks = tuple[Tensor | None, ...]
"""For every dimension of a tensor which entries stay, bool ``[size]``; ``None`` where all do."""


@dataclass(frozen=True)
class Change:
    """What makes of a call the call of the cut network.

    Attributes:
        name: of the function.
        zeroed: which of its tensors are given with zeros at removed entries, with their masks.
        counted: masks of the input of a statistic; ``None`` for other functions.
    """

    name: str
    zeroed: dict[int, Masks]
    counted: Masks | None

    def make(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the function gives in the cut network."""
        flat, spec = tree_flatten((args, kwargs))
        places = [place for place, part in enumerate(flat) if isinstance(part, Tensor)]
        for operand, kept in self.zeroed.items():
            neutral = int(self.name == "all")  # what changes no result: zero in a sum, true in a test of all
            flat[places[operand]] = zeroed(flat[places[operand]], kept, neutral)
        args, kwargs = tree_unflatten(flat, spec)
        if self.counted is None:
            return func(*args, **kwargs)
        found = statistic(self.name, args, kwargs)
        assert found is not None
        x, over = found
        weights = torch.ones((), device=x.device)
        for dim, mask in enumerate(self.counted):
            if dim in over and mask is not None:
                weights = weights * mask.to(x.device).view(-1, *(1 for _ in x.shape[dim + 1 :]))
        return weighted(self.name, args, kwargs, weights)


class Changes:
    """Tells for every call what is different in the cut network.

    Args:
        kept: what stays.
    """

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self._masks: dict[int, tuple[Axis, Tensor | None]] = {}

    def of(self, call: FunctionCall) -> Change | None:
        """Return what to change, ``None`` where removed entries do not reach what the call returns of others.

        Raises:
            PlanError: it takes a statistic over removed units, and is not one of those known here.
        """
        gone = [leaf for key, leaf in call.consumed().items() if key in self.kept.masks]
        if not gone:
            return None
        change = {n: self._masks_of(one) for n, one in enumerate(call.given) if any(map(one.holds, gone))}
        counted = None
        if any(self.mask(axis) is not None for axis in call.averaged):
            if call.name not in WEIGHTED:
                raise PlanError(
                    f"`{call.name}` takes a mean or a variance over units that are removed, in a way that prunelab "
                    "does not know: write it with mean, var or a norm of torch.nn.functional, or ignore these units."
                )
            counted = change[0]
        change = {operand: masks for operand, masks in change.items() if not call.given[operand].silent}
        if change and call.writes:
            raise PlanError(
                f"`{call.name}` adds up removed units and writes the sum into one of its tensors, which prunelab "
                "cannot silence: write it without an underscore, or ignore these units."
            )
        return Change(call.name, change, counted) if change or counted else None

    def _masks_of(self, given: Given) -> Masks:
        return tuple(map(self.mask, given.axes))

    def mask(self, axis: Axis) -> Tensor | None:
        """Return which entries of an axis stay; ``None`` where all do."""
        if id(axis) not in self._masks:
            mask = self.kept.mask(axis) if self.kept.size(axis) != axis.size else None
            self._masks[id(axis)] = (axis, mask)
        return self._masks[id(axis)][1]


def restricted(tensor: Tensor, masks: Iterable[Tensor | None]) -> Tensor:
    """Return a copy of the entries that stay in all dimensions."""
    tensor = tensor.detach().clone()
    for dim, mask in enumerate(masks):
        if mask is not None:
            tensor = tensor.index_select(dim, mask.nonzero().flatten().to(tensor.device))
    return tensor


def zeroed(tensor: Tensor, masks: Masks, value: int = 0) -> Tensor:
    """Return a copy of a tensor with zeros, or another value, wherever an entry of a dimension does not stay."""
    for dim, mask in enumerate(masks):
        if mask is not None:
            tensor = tensor.index_fill(dim, (~mask).nonzero().flatten().to(tensor.device), value)
    return tensor

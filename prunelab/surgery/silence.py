"""Silencing: the function of the cut network, with nothing removed; the truth that surgery is tested against.

A unit is removed where it is consumed: in the cut network nothing reads it any more.  Layers read it through the
columns of their weights; sums, products of activations, norms, means and variances read it too, whether they are
modules or calls in the model's code.  So all these leave the unit out, and means and variances are over what stays.

Flows in: a model and a ``Plan``.  Flows out: a copy whose removed entries are zero, in parameters and in everything
that it computes, and whose statistics are taken over the kept entries only.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunelab.errors import PlanError
from prunelab.planning.plan import Plan
from prunelab.surgery.apply import Kept, masks, open_plan
from prunelab.surgery.weighted import WEIGHTED, statistic, weighted
from prunelab.tracing.axes import Axis
from prunelab.tracing.calls import FunctionCall, RealAxes, WatchedCalls, tensors_of
from prunelab.tracing.fakes import forget

_ONE = (
    "relu relu_ leaky_relu leaky_relu_ gelu silu silu_ tanh tanh_ hardswish hardswish_ hardtanh hardtanh_ neg abs "
    "square clone contiguous detach to type float double half mul mul_ __mul__ __rmul__ __imul__ multiply view reshape "
    "flatten unflatten permute transpose t expand expand_as squeeze unsqueeze chunk split unbind dropout __get__"
)
FOLLOWS = frozenset(_ONE.split())
"""Functions whose result is zero where one of their tensors is."""

ADDS = frozenset(("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__", "__rsub__"))
_ALL = (
    "cat concat stack linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul __matmul__ "
    "bmm mm einsum sum scaled_dot_product_attention __getitem__ __setitem__"
)
ALL = ADDS | frozenset(_ALL.split())
"""Functions whose result is zero where all their tensors are."""


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` that computes what ``apply(model, plan)`` does, with nothing removed.

    The removed entries of every parameter are zero, and so are those of all that the model computes from them.  Means,
    variances, and layer, group and root-mean-square norms leave them out, whether they are modules or calls in the
    model's code.  Inputs may have other sizes than the example that the model was traced with.

    Args:
        model: the model that the plan was made for, in any mode and on any device.
        plan: what goes.

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
    graph, kept = open_plan(model, plan)
    silent = forget(copy.deepcopy(model))
    parameters = dict(silent.named_parameters())
    with torch.no_grad():
        for name, place, mask in masks(graph, kept):
            if name in parameters:
                parameters[name].index_fill_(place, (~mask).nonzero().flatten().to(parameters[name].device), 0)
    running = threading.local()

    def start(module: nn.Module, *_: Any) -> None:
        axes, modes = RealAxes(module, graph), ExitStack()
        if torch.is_inference_mode_enabled():  # where operators do not show what they are made of
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())
        modes.enter_context(axes)
        modes.enter_context(Silence(axes, kept))
        running.all = [*getattr(running, "all", []), (axes, modes)]

    def stop(*_: Any) -> None:
        axes, modes = running.all.pop()
        modes.close()
        axes.check(kept.masks)

    if kept.masks:
        silent.register_forward_pre_hook(start)
        silent.register_forward_hook(stop, always_call=True)
    return silent


class Silence(WatchedCalls):
    """While on, whatever the model computes is zero at removed entries, and statistics leave these out.

    Args:
        axes: the axes of what the model computes; on for as long as this mode is.
        kept: what stays, by the leaves of the trace.
    """

    def __init__(self, axes: RealAxes, kept: Kept) -> None:
        super().__init__(axes)
        self.changes = Changes(Kept({id(axes.leaves[leaf]): mask for leaf, mask in kept.masks.items()}))

    def after_call(self, call: FunctionCall, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
        """Return what the call returns in the cut network, with zeros in the place of what is not there."""
        change = self.changes.of(call)
        if change is None:
            return out
        with self.axes.quiet():
            return change.make(args, kwargs, out, self.know)


Masks = tuple[Tensor | None, ...]
"""For every dimension of a tensor which entries stay, bool ``[size]``; ``None`` where all do."""


@dataclass(frozen=True)
class Change:
    """What makes of a call the call of the cut network.

    Attributes:
        name: of the function.
        counted: masks of the input of a statistic, of the dimensions that it is taken over; ``None`` for others.
        zeroed: masks of each tensor that the call returns, ``None`` where it is zero already.
        in_place: which of them are changed in place, since the model holds on to the argument.
    """

    name: str
    counted: Masks | None
    zeroed: tuple[Masks | None, ...]
    in_place: tuple[bool, ...]

    def make(self, args: tuple, kwargs: dict[str, Any], out: Any, know: Callable[[Tensor, Tensor], Tensor]) -> Any:
        """Return what is to come in place of ``out``; ``know(new, old)`` is told of every new tensor."""
        if self.name == "__setitem__":
            zeroed(args[0], self.zeroed[0] or (), in_place=True)
            return out
        if self.counted is not None:
            olds, out = tensors_of(out), weighted(self.name, args, kwargs, self._weights(args, kwargs))
            for new, old in zip(tensors_of(out), olds, strict=True):
                know(new, old)
        plans = iter(zip(self.zeroed, self.in_place, strict=True))

        def silenced(tensor: Tensor) -> Tensor:
            masks, in_place = next(plans)
            return tensor if masks is None else know(zeroed(tensor, masks, in_place=in_place), tensor)

        return tree_map_only(Tensor, silenced, out)

    def _weights(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        found = statistic(self.name, args, kwargs)
        assert found is not None and self.counted is not None
        x, places = found
        weights = torch.ones((), device=x.device)
        for place, mask in enumerate(self.counted):
            if place in places and mask is not None:
                weights = weights * mask.to(x.device).view(-1, *(1 for _ in x.shape[place + 1 :]))
        return weights


class Changes:
    """Tells for every call what is different in the cut network.

    Args:
        kept: what stays.
    """

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self._masks: dict[int, tuple[Axis, Tensor | None]] = {}

    def of(self, call: FunctionCall) -> Change | None:
        """Return what to change, ``None`` where a call is what it is in the cut network.

        Raises:
            PlanError: it takes a statistic over removed units, and is none of those known here.
        """
        counted = None
        if any(self._mask(axis) is not None for axis in call.averaged):
            if call.name not in WEIGHTED:
                raise PlanError(
                    f"`{call.name}` takes a mean or a variance over units that are removed, in a way that prunelab "
                    "does not know: write it with mean, var or a norm of torch.nn.functional, or ignore these units."
                )
            counted = self._masks_of(call.given[0].axes)
        out = [self._masks_of(axes) for axes in call.made]
        if counted is None and (not any(out) or self._follows(call)):
            return None
        return Change(call.name, counted, tuple(out), tuple(place is not None for place in call.writes))

    def _follows(self, call: FunctionCall) -> bool:
        """Tell whether a call gives zeros where its tensors are zero."""
        touched = [one for one in call.given if self._masks_of(one.axes)]
        if call.name in FOLLOWS:
            return any(one.silent for one in touched)
        if call.name not in ALL or (call.number and call.name in ADDS):
            return False
        return all(one.silent for one in touched)

    def _masks_of(self, axes: tuple[Axis, ...]) -> Masks | None:
        masks = tuple(map(self._mask, axes))
        return None if all(mask is None for mask in masks) else masks

    def _mask(self, axis: Axis) -> Tensor | None:
        if id(axis) not in self._masks:
            mask = self.kept.mask(axis) if self.kept.size(axis) != axis.size else None
            self._masks[id(axis)] = (axis, mask)
        return self._masks[id(axis)][1]


def zeroed(tensor: Tensor, masks: Masks, *, in_place: bool) -> Tensor:
    """Return a tensor with zeros wherever an entry of a dimension does not stay."""
    for place, mask in enumerate(masks):
        if mask is not None:
            gone = (~mask).nonzero().flatten().to(tensor.device)
            tensor = tensor.index_fill_(place, gone, 0) if in_place else tensor.index_fill(place, gone, 0)
    return tensor

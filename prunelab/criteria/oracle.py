"""Oracle: silence every unit by itself and measure what that does to the loss.  Notebook 10_oracle is about it.

Flows in: a graph and batches.  Flows out: the change of the mean loss, measured, for every unit; what the other
criteria estimate.  It is the truth for one unit at a time, no more: units that go together cost more, or less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from prunelab.batches import Batches, Loss, checked, mean_loss
from prunelab.criteria.base import Criterion, Scores
from prunelab.curvature.statistics.collect import Statistics
from prunelab.errors import BatchError, PlanError
from prunelab.kept import Kept
from prunelab.runtime.devices import exact
from prunelab.runtime.isolation import copied
from prunelab.runtime.switches import undisturbed
from prunelab.surgery.silence import Change, Changes
from prunelab.surgery.weight_norm import folded, scaled_rows
from prunelab.tracing.axes import Axis, leaves
from prunelab.tracing.calls import Calls, FunctionCall, RealAxes, WatchedCalls, tensors_of
from prunelab.tracing.fakes import forget
from prunelab.tracing.groups import Group
from prunelab.tracing.trace import DependencyGraph


@dataclass
class Oracle(Criterion, name="oracle"):
    """Score a unit by the measured ``L(without u) − L``, L the mean loss over the batches, in eval mode.

    Silencing is that of ``prunelab.masked``: nothing reads the unit, and means, variances and norms leave it out.

    In the quadratic model no term gives this: it is ΔL(u) itself, which the model approximates.  Cost: one forward
    pass over the data for every unit, from the first layer that the unit touches on; memory as for training on one
    batch.

    Args:
        loss: ``loss(outputs, targets)``, a mean over samples.
        cache: keep what comes before a unit's first layer instead of computing it again for every unit.
        progress: show a progress bar.

    Source: the oracle ranking of Molchanov et al. 2017, *Pruning CNNs for Resource Efficient Inference*, section 2.2,
    signed.
    """

    loss: Loss = F.cross_entropy
    cache: bool = True
    progress: bool = True

    def __call__(self, graph: DependencyGraph, batches: Batches | None = None) -> Scores:
        """Return the scores.

        Raises:
            BatchError: batches are missing or do not fit the model, or the loss is not finite.
        """
        everything = {group.name: range(group.size) for group in graph.groups}
        changes = loss_changes(graph, batches, everything, self.loss, cache=self.cache, progress=self.progress)
        return Scores(graph, {name: change.float() for name, change in changes.items()}, str(self))


@undisturbed()
@torch.no_grad()
def loss_changes(
    graph: DependencyGraph,
    batches: Batches | None,
    units: Mapping[str, Sequence[int]],
    loss: Loss = F.cross_entropy,
    *,
    cache: bool = True,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Return how the mean loss changes when each of some units is silenced, alone.

    Args:
        graph: of the model, which is not changed.
        batches: pairs ``(inputs, targets)``.
        units: group name -> units to measure.
        loss: ``loss(outputs, targets)``, a mean over samples.
        cache: see ``Oracle``.
        progress: show a progress bar.

    Returns:
        Group name -> float64 ``[number of its units]``, in the order asked for, on the CPU.

    Raises:
        PlanError: there is no such group or unit.
        BatchError: batches are missing or do not fit the model, or the loss is not finite.
    """
    groups = {group.name: group for group in graph.groups}
    for name, chosen in units.items():
        if name not in groups or not all(0 <= unit < groups[name].size for unit in chosen):
            raise PlanError(f"Cannot silence units {list(chosen)} of group `{name}`: the model has no such units.")
    batches = batches.batches if isinstance(batches, Statistics) else batches
    model = forget(copied(graph.model)).eval()
    parameters = dict(model.named_parameters())
    change = {name: torch.zeros(len(chosen), dtype=torch.float64) for name, chosen in units.items()}
    seen = 0.0
    total = sum(map(len, units.values())) * len(batches) if isinstance(batches, Sized) else None
    bar = tqdm(unit="unit", desc="oracle", total=total, disable=not progress, leave=False, delay=1)
    for number, batch in enumerate(checked(model, batches, "oracle", loss)):
        replay = _Replay(model, graph, partial(mean_loss, model, batch), cache)
        if not replay.base.isfinite():
            raise BatchError(f"The loss of batch {number} is {replay.base.item()}: check its inputs and targets.")
        for name, chosen in units.items():
            for place, unit in enumerate(chosen):
                lost = replay.without(graph, groups[name], unit, parameters) - replay.base
                change[name][place] += exact(lost).cpu() * batch.total
                bar.update()
        seen += batch.total
    bar.close()
    return {name: summed / seen for name, summed in change.items()}


class _Replay:
    """The forward pass over one batch, again and again, each time from the first call that a change reaches."""

    def __init__(self, model: nn.Module, graph: DependencyGraph, run: Callable[[], Tensor], cache: bool) -> None:
        self.run = run
        axes = RealAxes(model, graph)
        learned = _Learning(axes)
        with axes, learned:
            self.base = run()
        axes.check(axes.leaves)
        self.leaves, self.calls, self.in_place = axes.leaves, learned.calls, learned.in_place
        self.reached = _reached(self.calls, set(map(id, axes.leaves.values())))
        self.known: list[Any] = []
        if cache:
            calls = _Calls(self.in_place, keep=True)
            with calls:
                again = run()
            # Calls that write in place were given clones; where that made a difference nothing can be kept.
            self.known = calls.known if torch.equal(again, self.base) else []

    def without(self, graph: DependencyGraph, group: Group, unit: int, parameters: dict[str, nn.Parameter]) -> Tensor:
        """Return the loss with one unit silenced; the parameters are changed in place and restored."""
        mask = torch.ones(group.size, dtype=torch.bool)
        mask[unit] = False
        kept = Kept({id(group.axis): mask})
        leaf = self.leaves[id(group.axis)]
        changes = Changes(Kept({id(leaf): mask}))
        numbers = self.reached.get(id(leaf), [])
        changed = {number: changes.of(self.calls[number]) for number in numbers}
        known = self.known[: numbers[0] if numbers else len(self.known)]
        lengths = folded(graph, kept, parameters)
        scaled = scaled_rows(graph)
        names = [*lengths, *(member.name for member in group.members)]
        touched = {name: parameters[name] for name in names if name in parameters}
        saved = {name: parameter.clone() for name, parameter in touched.items()}
        try:
            for name, length in lengths.items():
                parameters[name].copy_(length)
            for member in group.members:
                if member.name in touched and (member.name, member.dim) not in scaled:
                    gone = (~kept.mask(graph.dims[member.name][member.dim].axis)).nonzero().flatten()
                    touched[member.name].index_fill_(member.dim, gone.to(touched[member.name].device), 0)
            with _Calls(self.in_place if self.known else set(), known, changed):
                return self.run()
        finally:
            for name, parameter in touched.items():
                parameter.copy_(saved[name])


def _reached(calls: Mapping[int, FunctionCall], targets: set[int]) -> dict[int, list[int]]:
    """Return, for every leaf of a group by its ``id``, the numbers of the calls that meet it."""
    met: dict[int, tuple[Axis, set[int]]] = {}
    found: dict[int, list[int]] = {}
    for number, call in calls.items():
        here: set[int] = set()
        for axis in (axis for axes in (*(one.axes for one in call.given), *call.made) for axis in axes):
            if id(axis) not in met:
                met[id(axis)] = axis, {id(part) for part in leaves(axis)} & targets
            here |= met[id(axis)][1]
        for leaf in here:
            found.setdefault(leaf, []).append(number)
    return found


class _Learning(WatchedCalls):
    """Numbers the calls of a forward pass; keeps the axes of each, and which of them write to their arguments."""

    def __init__(self, axes: RealAxes) -> None:
        super().__init__(axes)
        self.number = 0
        self.calls: dict[int, FunctionCall] = {}
        self.in_place: set[int] = set()

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function and see whether an argument has changed."""
        tensors = tensors_of((args, kwargs))
        versions = [tensor._version for tensor in tensors]
        out = super().on_call(func, args, kwargs)
        if versions != [tensor._version for tensor in tensors]:
            self.in_place.add(self.number)
        self.number += 1
        return out

    def after_call(self, call: FunctionCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Keep the call."""
        self.calls[self.number] = call
        return out


class _Calls(Calls):
    """Number the calls of a forward pass; keep what all return, or return what was kept and change some others.

    Args:
        in_place: numbers of the calls that change one of their arguments; they are given clones.
        known: what the first calls return; these are not made.
        changed: number of a call -> what is different there.
        keep: fill ``known``.
    """

    def __init__(
        self,
        in_place: set[int],
        known: Sequence[Any] = (),
        changed: Mapping[int, Change | None] | None = None,
        *,
        keep: bool = False,
    ) -> None:
        super().__init__()
        self.in_place, self.known, self.changed, self.keep = in_place, list(known), changed or {}, keep
        self.number = 0

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what was kept, or call the function."""
        number = self.number
        self.number += 1
        if not self.keep and number < len(self.known):
            return self.known[number]
        if number in self.in_place:
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        change = self.changed.get(number)
        out = func(*args, **kwargs) if change is None else change.make(func, args, kwargs)
        if self.keep:
            self.known.append(out)
        return out

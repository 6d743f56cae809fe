"""Oracle: silence every unit by itself and measure what that does to the loss.  Notebook 10_oracle is about it.

Flows in: a graph and batches.  Flows out: the change of the mean loss, measured, for every unit; what the other
criteria estimate.  It is the truth for one unit at a time, no more: units that go together cost more, or less.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from prunelab.batches import Batch, Batches, Loss, checked, mean_loss
from prunelab.criteria.base import Criterion, Scores
from prunelab.curvature.collect import Statistics
from prunelab.errors import BatchError, PlanError
from prunelab.surgery.apply import Kept
from prunelab.surgery.silence import KeptNorms, _norms
from prunelab.tracing.fakes import forget
from prunelab.tracing.groups import Group
from prunelab.tracing.trace import DependencyGraph
from prunelab.trees import tree_leaves, tree_map


@dataclass
class Oracle(Criterion):
    """Score a unit by the measured ``L(without u) − L``, L the mean loss over the batches, in eval mode.

    Silencing is that of ``prunelab.masked``: the unit's entries are zero in every member, and layer, group and
    root-mean-square norms leave it out of their statistics.

    In the quadratic model nothing stands for this: it is ΔL(u) itself, which the model approximates.  Cost: one forward
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
        graph: of the model, which is left as it is.
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
    model = forget(copy.deepcopy(graph.model)).eval()
    parameters = dict(model.named_parameters())
    change = {name: torch.zeros(len(chosen), dtype=torch.float64) for name, chosen in units.items()}
    seen = 0.0
    total = sum(map(len, units.values())) * len(batches) if isinstance(batches, Sized) else None
    bar = tqdm(unit="unit", desc="oracle", total=total, disable=not progress, leave=False, delay=1)
    for number, batch in enumerate(checked(model, batches, "oracle", loss)):
        replay = _Replay(model, batch, cache)
        if not replay.base.isfinite():
            raise BatchError(f"The loss of batch {number} is {replay.base.item()}: check its inputs and targets.")
        for name, chosen in units.items():
            for place, unit in enumerate(chosen):
                lost = replay.without(graph, groups[name], unit, parameters) - replay.base
                change[name][place] += lost.double().cpu() * batch.total
                bar.update()
        seen += batch.total
    bar.close()
    return {name: summed / seen for name, summed in change.items()}


class _Replay:
    """The forward pass over one batch, again and again, each time from the first call that a change reaches."""

    def __init__(self, model: nn.Module, batch: Batch, cache: bool) -> None:
        self.run = lambda: mean_loss(model, batch)
        first = _Calls()
        with first:
            self.base = self.run()
        self.in_place = first.in_place
        self.known: list[Any] = []
        if cache:
            norms = KeptNorms([("", None)] * first.number)
            calls = _Calls(self.in_place, keep=norms)
            with norms, calls:
                again = self.run()
            # Calls that write in place were given clones; where that made a difference nothing can be kept.
            self.known = calls.known if torch.equal(again, self.base) else []
            self.first_use, self.norms_before = calls.first_use, [*calls.norms_before, norms.place]

    def without(self, graph: DependencyGraph, group: Group, unit: int, parameters: dict[str, nn.Parameter]) -> Tensor:
        """Return the loss with one unit silenced; the parameters are changed in place and restored."""
        mask = torch.ones(group.size, dtype=torch.bool)
        mask[unit] = False
        kept = Kept({id(group.axis): mask})
        touched = {m.name: parameters[m.name] for m in group.members if m.name in parameters}
        saved = {name: parameter.clone() for name, parameter in touched.items()}
        norms = KeptNorms(_norms(graph, kept))
        calls = _Calls(set())
        if self.known:
            calls.in_place = self.in_place
            start = self._start(touched, norms)
            calls.known, norms.place = self.known[:start], self.norms_before[start]
        try:
            for member in group.members:
                if member.name in touched:
                    gone = (~kept.mask(graph.dims[member.name][member.dim].axis)).nonzero().flatten()
                    touched[member.name].index_fill_(member.dim, gone.to(touched[member.name].device), 0)
            with norms, calls:
                return self.run()
        finally:
            for name, parameter in touched.items():
                parameter.copy_(saved[name])

    def _start(self, touched: dict[str, nn.Parameter], norms: KeptNorms) -> int:
        """Return the first call that takes a touched parameter or is a norm over fewer entries."""
        end = len(self.known)
        starts = [self.first_use.get(id(parameter), end) for parameter in touched.values()]
        masked = next((place for place, (_, mask) in enumerate(norms.norms) if mask is not None), None)
        if masked is not None:
            starts.append(bisect_right(self.norms_before, masked) - 1)
        return min(starts)


class _Calls(TorchFunctionMode):
    """Number the calls of a forward pass; find which write in place, keep what all return, or return what was kept.

    Args:
        in_place: numbers of the calls that change one of their arguments; they are given clones.  ``None``: find out.
        keep: fill ``known``, ``first_use`` and ``norms_before``, the latter from this mode's count of norms.

    Attributes:
        number: of the next call.
        known: what the first calls return; if not kept here, those are not made.
        first_use: ``id`` of a parameter -> the first call that takes it.
        norms_before: how many norms came before each call.
    """

    def __init__(self, in_place: set[int] | None = None, keep: KeptNorms | None = None) -> None:
        super().__init__()
        self.find, self.in_place, self.keep = in_place is None, in_place or set(), keep
        self.number = 0
        self.known: list[Any] = []
        self.first_use: dict[int, int] = {}
        self.norms_before: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        number, kwargs = self.number, kwargs or {}
        self.number += 1
        if self.keep is None and number < len(self.known):
            return self.known[number]
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if self.keep is not None:
            self.norms_before.append(self.keep.place)
            for tensor in tensors:
                self.first_use.setdefault(id(tensor), number)
        if number in self.in_place:
            args, kwargs = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, (args, kwargs))
        versions = [tensor._version for tensor in tensors]
        out = func(*args, **kwargs)
        if self.find and versions != [tensor._version for tensor in tensors]:
            self.in_place.add(number)
        if self.keep is not None:
            self.known.append(out)
        return out

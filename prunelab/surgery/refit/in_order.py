"""Refitting in order: each layer makes up for what the cut and refitted layers before it could not.

The layers are refitted from the input on.  Each is fitted to the outputs y of the whole model, on the inputs u that it
gets once everything before it is cut and refitted:

    W = argmin E‖y − W u‖² + tr((W − W_K) D (W − W_K)ᵀ) = W_K + (E[y uᵀ] − W_K E[u uᵀ]) (E[u uᵀ] + D)⁻¹.

The work is done on the silenced network, which computes what the cut one does and has the shapes of the whole one.

Flows in: model, plan and batches.  Flows out: new values of weights.  Notebook 11_compensation derives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from prunelab.batches import Batch, call, checked
from prunelab.curvature.statistics.factor_sums import key
from prunelab.curvature.statistics.input_moments import columns, consumers, describe, matrix
from prunelab.curvature.statistics.per_sample import as_float
from prunelab.curvature.watching.layer_calls import LayerCall, LayerCalls
from prunelab.errors import BatchError
from prunelab.kept import Kept, masks
from prunelab.plans import Plan
from prunelab.runtime.devices import exact_on
from prunelab.runtime.isolation import evaluating
from prunelab.surgery.refit.moments import input_moments
from prunelab.surgery.refit.options import Compensation
from prunelab.surgery.refit.solve import (
    DEPENDENT,
    TWO_WAYS,
    UNSEEN,
    kept_channels,
    losing_inputs,
    refit_consumers,
    ridge,
)
from prunelab.surgery.refit.tied import tied_weights
from prunelab.surgery.silence import masked, zeroed
from prunelab.tracing.trace import DependencyGraph

STORE = 2**30
"""Bytes of outputs of the whole model that are kept at a time."""


def refit_in_order(
    model: nn.Module, plan: Plan, graph: DependencyGraph, kept: Kept, how: Compensation
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return new weights and biases of all layers from the first that loses columns on, and those left, and why.

    Layers that take the same input are refitted together, a weight that is used several times at its last use.  One
    whose patches would need more than ``how.memory`` is refitted beforehand, over channels, on the whole model's input.
    Cost: one forward pass of the whole model, and per layer a part of one of the silenced model, up to that layer.

    Raises:
        BatchError: there are no batches, they do not fit, or an input is not finite.
    """
    if how.batches is None:
        raise BatchError("sequential=True needs batches, and these statistics hold none: Compensation(batches, …).")
    held = list(checked(model, how.batches, "compensation", None))
    losing = losing_inputs(graph, kept)
    silent = masked(model, plan).eval()
    weights = {name: value.detach() for name, value in silent.named_parameters()}
    with evaluating(model), torch.no_grad():
        with LayerCalls(model) as taps:
            call(model, held[0].inputs)
        uses = _uses(taps.calls, weights)
        tied = tied_weights(model, held[0].take([0]).inputs, graph, kept)
        losing = [name for name in losing if name not in tied]
        large = _large(taps.calls, weights, graph, losing, how.memory)
        del taps
        left = {name: UNSEEN for name in losing if all(use.weight != name for use in uses)}
        left |= {name: TWO_WAYS for name in tied}
        fresh: dict[str, Tensor] = {}
        if large:
            moments = input_moments(model, held, large, how.memory)
            fresh, others = refit_consumers(model, moments, graph, kept, how.damping)
            left |= {name: why for name, why in others.items() if name in large}
            _put(fresh, weights, graph, kept)
        work = _Work(model, silent, weights, graph, kept, how.damping, held, uses)
        for window in _windows(_levels(uses, losing, {*large, *tied}), uses, STORE // len(held)):
            targets = work.outputs([number for level in window for number in work.of(level)])
            for level in window:
                work.refit(level, targets)
    return {name: weights[name] for name in weights if name in fresh or name in work.changed}, left | work.left


@dataclass(frozen=True)
class _Use:
    """One layer call of the model, and what is known of it before anything is refitted.

    Attributes:
        name: of the weight, with its rows if they are not all.
        weight: its parameter.
        again: whether it takes the same input as the call before.
        last: whether no later call uses these rows.
        constant: whether a bias belongs to this layer alone, and so can be refitted with it.
        size: bytes of its output.
    """

    name: str
    weight: str
    again: bool
    last: bool
    constant: bool
    size: int


def _uses(calls: Sequence[LayerCall], weights: Mapping[str, Tensor]) -> list[_Use]:
    names = [key(found, weights[found.weight]) for found in calls]
    owners: dict[tuple[str | None, int], set[str]] = {}
    for found, name in zip(calls, names, strict=True):
        owners.setdefault((found.bias, found.bias_rows.start), set()).add(name)
    uses = []
    for number, (found, name) in enumerate(zip(calls, names, strict=True)):
        again = number > 0 and found.input is calls[number - 1].input
        alone = found.bias is not None and len(owners[found.bias, found.bias_rows.start]) == 1
        size = 0 if found.output is None else found.output.numel() * found.output.element_size()
        uses.append(_Use(name, found.weight, again, name not in names[number + 1 :], alone, size))
    return uses


def _large(
    calls: Sequence[LayerCall], weights: Mapping[str, Tensor], graph: DependencyGraph, losing: list[str], memory: int
) -> dict[str, int]:
    """Return the weights whose patches need too much memory, with how many inputs each of their channels has."""
    taps = consumers(graph)
    found = [seen for seen in calls if seen.weight in losing]
    about = {seen.weight: describe(seen, weights[seen.weight], taps[seen.weight], memory) for seen in found}
    return {name: taps[name] for name in about if about[name]["over"] == "channels"}


def _put(fresh: Mapping[str, Tensor], weights: Mapping[str, Tensor], graph: DependencyGraph, kept: Kept) -> None:
    """Give the silenced network new weights; what it silences stays zero."""
    for name, place, mask in masks(graph, kept):
        if name in fresh:
            fresh[name].index_fill_(place, (~mask).nonzero().flatten().to(fresh[name].device), 0)
    for name, value in fresh.items():
        weights[name].copy_(value)


def _levels(uses: list[_Use], losing: list[str], large: Collection[str]) -> list[list[int]]:
    """Return the numbers of the calls at which weights are refitted, those with the same input together."""
    first = next((number for number, use in enumerate(uses) if use.weight in losing), len(uses))
    levels: list[list[int]] = []  # nothing before the first has changed
    for number in range(first, len(uses)):
        if not uses[number].last or uses[number].weight in large:
            continue
        if levels and uses[number].again and levels[-1][-1] == number - 1:
            levels[-1].append(number)
        else:
            levels.append([number])
    return levels


def _windows(levels: list[list[int]], uses: list[_Use], room: int) -> list[list[list[int]]]:
    """Put as many consecutive levels together as have room for their outputs, at least one."""
    windows: list[list[list[int]]] = []
    used = 0
    for level in levels:
        size = sum(uses[number].size for number in level)
        if not windows or used + size > room:
            windows.append([])
            used = 0
        windows[-1].append(level)
        used += size
    return windows


class _Stop(Exception):
    """Ends a forward pass early."""


@dataclass
class _Fit:
    """The normal equations of one layer: ``Σ u uᵀ`` and ``Σ y uᵀ``, by group; the last entry of u is one."""

    layer: LayerCall
    inputs: Tensor
    targets: Tensor

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = self.inputs + inputs, self.targets + targets


@dataclass
class _Work:
    """The whole model, the silenced one that is refitted in place, and the layer calls that both make."""

    model: nn.Module
    silent: nn.Module
    weights: dict[str, Tensor]
    graph: DependencyGraph
    kept: Kept
    damping: float | None
    held: list[Batch]
    uses: list[_Use]
    changed: set[str] = field(default_factory=set)
    left: dict[str, str] = field(default_factory=dict)

    def of(self, level: list[int]) -> list[int]:
        """Return the numbers of all calls of the level's weights."""
        names = {self.uses[number].name for number in level}
        return [number for number, use in enumerate(self.uses) if use.name in names]

    def outputs(self, numbers: list[int]) -> list[dict[int, Tensor]]:
        """Return what the whole model's layers give, for every batch, by the number of the call."""
        found: list[dict[int, Tensor]] = [{} for _ in self.held]

        def keep(batch: int, number: int, seen: LayerCall) -> None:
            if number in numbers and seen.output is not None:
                found[batch][number] = seen.output.clone()

        self._run(self.model, keep, max(numbers))
        return found

    def refit(self, level: list[int], targets: list[dict[int, Tensor]]) -> None:
        """Refit the weights of one level to the targets, which are then dropped."""
        fits: dict[str, _Fit] = {}
        numbers = self.of(level)

        def measure(batch: int, number: int, seen: LayerCall) -> None:
            if number in numbers:
                inputs, wanted = self._products(seen, targets[batch].pop(number))
                if not inputs.isfinite().all() or not wanted.isfinite().all():
                    raise BatchError(
                        f"The layer of `{seen.weight}` has inputs or outputs that are not finite in batch {batch}: "
                        "check the batch's inputs and the weights up to there."
                    )
                zero = torch.zeros((), dtype=torch.float64, device=inputs.device)
                fits.setdefault(self.uses[number].name, _Fit(seen, zero, zero)).add(inputs, wanted)

        self._run(self.silent, measure, level[-1])
        for number in level:
            self._solve(fits[self.uses[number].name], self.uses[number].constant)

    def _run(self, model: nn.Module, after: Callable[[int, int, LayerCall], None], last: int) -> None:
        """Run a model on every batch, up to and including its layer call ``last``."""
        for batch, held in enumerate(self.held):
            number = -1

            def count(seen: LayerCall, batch: int = batch) -> None:
                nonlocal number
                number += 1
                after(batch, number, seen)
                if number == last:
                    raise _Stop

            with suppress(_Stop), LayerCalls(model, after=count, keep=False):
                call(model, held.inputs)

    def _products(self, seen: LayerCall, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``Σ u uᵀ`` and ``Σ y uᵀ`` of one call, without groups over the inputs that stay only."""
        groups, device, wanted = seen.view.groups, seen.input.device, _by_columns(seen, wanted)
        stay = kept_channels(seen, seen.view.in_dim, self.graph, self.kept)
        keep = stay[0].nonzero().flatten().to(device)
        inputs = targets = torch.zeros((), dtype=torch.float64, device=exact_on(device))
        place = 0
        if groups > 1:  # what was removed may be anything
            seen = replace(seen, input=zeroed(seen.input, (None, stay.flatten())))
        for chunk, one in columns(seen, keep if groups == 1 else None):
            chunk = torch.cat([chunk, one.expand(groups, 1, chunk.shape[-1])], 1)
            rows = wanted[..., place : place + chunk.shape[-1]]
            place += chunk.shape[-1]
            inputs, targets = inputs + (chunk @ chunk.mT).to(inputs), targets + (rows @ chunk.mT).to(targets)
        return inputs, targets

    def _solve(self, fit: _Fit, constant: bool) -> None:
        layer, weight = fit.layer, self.weights[fit.layer.weight]
        flat = matrix(layer, weight).to(fit.inputs)
        stay = kept_channels(layer, layer.view.in_dim, self.graph, self.kept)
        stay = stay.repeat_interleave(math.prod(layer.view.kernel), 1)
        rows = kept_channels(layer, layer.view.out_dim, self.graph, self.kept).to(flat)
        shift = flat.new_zeros(flat.shape[:2])
        if layer.bias is not None:
            shift = self.weights[layer.bias][layer.bias_rows].to(flat).view(shift.shape)
        change, moved = torch.zeros_like(flat), torch.zeros_like(shift)
        for group, mask in enumerate(stay.to(flat.device)):
            number = int(mask.sum())
            if not number or not rows[group].any():
                continue
            used = mask.nonzero().flatten() if layer.view.groups > 1 else torch.arange(number, device=flat.device)
            used = torch.cat([used, used.new_full((1,), fit.inputs.shape[-1] - 1)])
            count = float(fit.inputs[group, -1, -1])
            now = torch.cat([flat[group][:, mask], shift[group][:, None]], 1)
            moment = fit.inputs[group][used][:, used] / count
            residual = (fit.targets[group][:, used] / count - now @ moment) * rows[group][:, None]
            free = number + constant
            solved = ridge(moment[:free, :free], residual[:, :free], self.damping, count, constant=constant)
            if solved is None:
                self.left[layer.weight] = DEPENDENT
                return
            change[group][:, mask] = solved[:, :number]
            if constant:
                moved[group] = solved[:, -1]
        weight[layer.rows] += layer.view.from_matrix(change).to(weight)
        self.changed.add(layer.weight)
        if constant and layer.bias is not None:
            self.weights[layer.bias][layer.bias_rows] += moved.flatten().to(weight)
            self.changed.add(layer.bias)


def _by_columns(seen: LayerCall, output: Tensor) -> Tensor:
    """Return outputs as ``[groups, out / groups, columns]``, samples and positions in the order of ``columns``."""
    output = as_float(output)
    if seen.kind == "linear":
        return output.reshape(-1, output.shape[-1]).mT[None]
    return output.movedim(1, 0).flatten(1).unflatten(0, (seen.view.groups, -1))

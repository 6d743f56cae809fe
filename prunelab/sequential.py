"""Refitting in order: each layer makes up for what the cut and refitted layers before it could not.

The layers are refitted from the input on.  Each is fitted to the outputs y of the whole model, on the inputs u that it
gets once everything before it is cut and refitted:

    W = argmin E‖y − W u‖² + tr((W − W_K) Λ (W − W_K)ᵀ) = W_K + (E[y uᵀ] − W_K E[u uᵀ]) (E[u uᵀ] + Λ)⁻¹.

The work is done on the silenced network, which computes what the cut one does and has the shapes of the whole one.

Flows in: model, plan and batches.  Flows out: new values of weights.  Notebook 11_compensation derives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunelab.batches import Batches, call, checked
from prunelab.curvature.factor_sums import key
from prunelab.curvature.inputs import columns, like_weight, matrix
from prunelab.curvature.one_pass import evaluating
from prunelab.curvature.per_sample import as_float
from prunelab.curvature.taps import LayerCall, Taps
from prunelab.errors import BatchError
from prunelab.plan import Plan
from prunelab.refit import kept_inputs, kept_outputs, losing_inputs, ridge
from prunelab.silence import masked
from prunelab.trace import DependencyGraph

if TYPE_CHECKING:
    from prunelab.surgery import Kept

STORE = 2**30
"""Bytes of outputs of the whole model that are kept at a time."""


def refit_in_order(
    model: nn.Module, plan: Plan, graph: DependencyGraph, kept: Kept, batches: Batches | None, damping: float
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return new weights and biases of all layers from the first that loses columns on, and those left, and why.

    Layers that take the same input are refitted together; a weight that is used several times at its last use.  Cost:
    one forward pass of the whole model, and per layer a part of one of the silenced model, up to that layer.

    Raises:
        BatchError: there are no batches, they do not fit, or an input is not finite.
    """
    if batches is None:
        raise BatchError("sequential=True needs batches, and these statistics hold none: Compensation(batches, …).")
    held = [inputs for inputs, _ in checked(model, batches, "compensation")]
    with evaluating(model), torch.no_grad():
        with Taps(model) as taps:
            call(model, held[0])
        work = _Work(model, masked(model, plan).eval(), graph, kept, damping, held, taps.calls)
        sizes = [found.output.numel() * found.output.element_size() for found in taps.calls if found.output is not None]
        del taps
        for window in _windows(work.levels(), sizes, STORE // len(held)):
            targets = work.outputs([number for level in window for number in work.uses(level)])
            for level in window:
                work.refit(level, targets)
    fresh = {name: value for name, value in work.parameters.items() if name in work.changed}
    return fresh, work.left


def _windows(levels: list[list[int]], sizes: list[int], room: int) -> list[list[list[int]]]:
    """Put as many consecutive levels together as have room for their outputs, at least one."""
    windows: list[list[list[int]]] = []
    used = 0
    for level in levels:
        size = sum(sizes[number] for number in level)
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
    """The normal equations of one layer: ``Σ u uᵀ`` and ``Σ y uᵀ``, by group."""

    layer: LayerCall
    inputs: Tensor
    targets: Tensor


class _Work:
    """The whole model, the silenced one that is refitted in place, and the layer calls that both make."""

    def __init__(
        self,
        model: nn.Module,
        silent: nn.Module,
        graph: DependencyGraph,
        kept: Kept,
        damping: float,
        held: list[Any],
        calls: Sequence[LayerCall],
    ) -> None:
        self.model, self.silent, self.graph, self.kept, self.held = model, silent, graph, kept, held
        self.damping = damping
        self.parameters = {name: value.detach() for name, value in silent.named_parameters()}
        self.names = [key(found, self.parameters[found.weight]) for found in calls]
        self.same_input = [number > 0 and found.input is calls[number - 1].input for number, found in enumerate(calls)]
        self.losing = [found.weight in losing_inputs(graph, kept) for found in calls]
        biases = {(found.bias, found.bias_rows.start, name) for found, name in zip(calls, self.names, strict=True)}
        places = [(bias, start) for bias, start, _ in biases]
        self.constant = [
            found.bias is not None and places.count((found.bias, found.bias_rows.start)) == 1 for found in calls
        ]
        self.changed: set[str] = set()
        seen = {found.weight for found in calls}
        self.left = {name: "no layer with it was seen" for name in losing_inputs(graph, kept) if name not in seen}

    def levels(self) -> list[list[int]]:
        """Return the numbers of the calls at which weights are refitted, those with the same input together."""
        levels: list[list[int]] = []
        for number, name in enumerate(self.names):
            if not any(self.losing[: number + 1]):
                continue  # nothing before this layer has changed
            if name in self.names[number + 1 :]:
                continue
            if levels and self.same_input[number] and levels[-1][-1] == number - 1:
                levels[-1].append(number)
            else:
                levels.append([number])
        return levels

    def uses(self, level: list[int]) -> list[int]:
        """Return the numbers of all calls of the level's weights."""
        names = {self.names[number] for number in level}
        return [number for number, name in enumerate(self.names) if name in names]

    def outputs(self, numbers: list[int]) -> list[dict[int, Tensor]]:
        """Return what the whole model's layers give, for every batch, by the number of the call."""
        found: list[dict[int, Tensor]] = []
        for inputs in self.held:
            kept: dict[int, Tensor] = {}

            def keep(number: int, seen: LayerCall, kept: dict[int, Tensor] = kept) -> None:
                if number in numbers and seen.output is not None:
                    kept[number] = seen.output.clone()

            self._run(self.model, inputs, keep, max(numbers))
            found.append(kept)
        return found

    def refit(self, level: list[int], targets: list[dict[int, Tensor]]) -> None:
        """Refit the weights of one level to the targets."""
        fits: dict[str, _Fit] = {}
        uses = self.uses(level)
        for place, inputs in enumerate(self.held):

            def measure(number: int, seen: LayerCall, place: int = place) -> None:
                if number in uses:
                    self._measure(fits, number, seen, targets[place][number], place)

            self._run(self.silent, inputs, measure, level[-1])
        for number in level:
            self._solve(fits[self.names[number]], self.constant[number])
        for batch in targets:
            for number in level:
                batch.pop(number)

    def _run(self, model: nn.Module, inputs: Any, after: Any, last: int) -> None:
        """Run a model up to and including its layer call ``last``."""
        number = -1

        def count(seen: LayerCall) -> None:
            nonlocal number
            number += 1
            after(number, seen)
            if number == last:
                raise _Stop

        try:
            with Taps(model, after=count, keep=False):
                call(model, inputs)
        except _Stop:
            pass

    def _measure(self, fits: dict[str, _Fit], number: int, seen: LayerCall, target: Tensor, batch: int) -> None:
        weight = self.parameters[seen.weight]
        wanted = _by_columns(seen, target)
        keep = kept_inputs(seen, self.graph, self.kept)[0].nonzero().flatten().to(weight.device)
        place = 0
        inputs = targets = torch.zeros((), dtype=torch.float64)
        for chunk, one in columns(seen, weight, keep if seen.groups == 1 else None):
            chunk = torch.cat([chunk, one.expand(seen.groups, 1, chunk.shape[-1])], 1)
            rows = wanted[..., place : place + chunk.shape[-1]]
            place += chunk.shape[-1]
            products = (chunk @ chunk.mT).double(), (rows @ chunk.mT).double()
            inputs, targets = inputs.to(products[0]) + products[0], targets.to(products[1]) + products[1]
        if not inputs.isfinite().all() or not targets.isfinite().all():
            raise BatchError(
                f"The layer of `{seen.weight}` has inputs or outputs that are not finite in batch {batch}: check the "
                "batch's inputs and the weights up to there."
            )
        name = self.names[number]
        if name in fits:
            inputs, targets = inputs + fits[name].inputs, targets + fits[name].targets
        fits[name] = _Fit(seen, inputs, targets)

    def _solve(self, fit: _Fit, constant: bool) -> None:
        layer = fit.layer
        weight = self.parameters[layer.weight]
        flat = matrix(layer, weight).to(fit.inputs)
        stay = kept_inputs(layer, self.graph, self.kept)
        stay = stay.repeat_interleave(flat.shape[-1] // stay.shape[1], 1).to(flat.device)
        rows = kept_outputs(layer, self.graph, self.kept).to(flat.device)
        change, shift = torch.zeros_like(flat), flat.new_zeros(flat.shape[:2])
        bias = None
        if layer.bias is not None:
            bias = self.parameters[layer.bias][layer.bias_rows].to(flat).view(shift.shape)
        for group, mask in enumerate(stay):
            if not mask.any() or not rows[group].any():
                continue
            # The sums are over the inputs that stay, without groups; else over all.
            used = torch.arange(int(mask.sum()), device=flat.device) if layer.groups == 1 else mask.nonzero().flatten()
            used = torch.cat([used, used.new_full((1,), fit.inputs.shape[-1] - 1)])
            count = fit.inputs[group, -1, -1]
            now = flat[group][:, mask]
            now = torch.cat([now, shift[group][:, None] if bias is None else bias[group][:, None]], 1)
            moment = fit.inputs[group][used][:, used] / count
            residual = (fit.targets[group][:, used] / count - now @ moment) * rows[group][:, None]
            if not constant:
                moment, residual = moment[:-1, :-1], residual[:, :-1]
            solved = ridge(moment, residual, self.damping)
            if solved is None:
                self.left[layer.weight] = "the inputs that stay are linearly dependent: raise damping"
                return
            change[group][:, mask] = solved[:, : now.shape[1] - 1]
            if constant:
                shift[group] = solved[:, -1]
        weight[layer.rows] += like_weight(layer, change, weight).to(weight)
        self.changed.add(layer.weight)
        if constant and layer.bias is not None:
            self.parameters[layer.bias][layer.bias_rows] += shift.flatten().to(weight)
            self.changed.add(layer.bias)


def _by_columns(seen: LayerCall, output: Tensor) -> Tensor:
    """Return outputs as ``[groups, out / groups, columns]``, samples and positions in the order of ``columns``."""
    output = as_float(output)
    if seen.kind == "linear":
        return output.reshape(-1, output.shape[-1]).mT[None]
    return output.movedim(1, 0).flatten(1).unflatten(0, (seen.groups, -1))

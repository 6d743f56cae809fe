"""Accumulators: what ``collect`` can add up over samples, one class each, all in one table.

Every accumulator owns named sums over samples, so that two of them add up by adding their sums.

Flows in: a batch after its forward pass, then the gradients of all layer outputs.  Flows out: ``sums`` and ``meta``,
and from them what ``Statistics`` shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.batches import Batch
from prunelab.curvature.statistics import factor_sums, input_moments, per_sample
from prunelab.curvature.statistics.by_vmap import squared_sums_by_vmap
from prunelab.curvature.statistics.kronecker import Factors
from prunelab.curvature.statistics.moments import squared_sums
from prunelab.curvature.statistics.per_sample import Part, as_float
from prunelab.curvature.watching.layer_calls import KINDS, LayerCall, restored
from prunelab.curvature.watching.samples import Layout, Routes
from prunelab.tracing.trace import DependencyGraph

Sums = dict[str, Tensor]
Meta = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is known before the first batch: where gradients are found, which factors, in which basis."""

    graph: DependencyGraph | nn.Module
    model: nn.Module
    routes: Routes | None
    factor: str
    basis: Mapping[str, Factors] = field(default_factory=dict)


class Accumulator:
    """Adds one statistic up over batches, call by call as they run, and again as their gradients arrive.

    Attributes:
        kinds: of the calls whose output gradients it takes; none if it needs no backward pass.
        wants_inputs: whether it needs the inputs of calls together with their gradients.
        wants_slopes: whether it needs the gradients of the parameters.
        weights: how much each sample of the batch counts, ``[samples]``; ``None`` where all count as one.
        sums: name -> sum over samples.
        meta: name -> plain values that say what the sums are of; the same for all batches.
    """

    kinds: tuple[str, ...] = ()
    wants_inputs = False
    wants_slopes = False

    def __init__(self, setting: Setting) -> None:
        self.setting, self.model = setting, setting.model
        self.parameters = dict(setting.model.named_parameters())
        self.weights: Tensor | None = None
        self.sums: Sums = {}
        self.meta: Meta = {}

    @property
    def routes(self) -> Routes:
        """Where gradients of samples are found."""
        assert self.setting.routes is not None
        return self.setting.routes

    def forward(self, call: LayerCall, layout: Layout | None) -> None:
        """Add what is known of a call that has just run."""

    def backward(self, call: LayerCall, layout: Layout, gradient: Tensor) -> None:
        """Add what one column of the Fisher brings to a call: the gradient of its output, summed over samples."""

    def finish(self, batch: Batch, column: list[Tensor]) -> None:
        """Add what is left when a column has gone all the way back."""

    def slopes(self, gradients: Mapping[str, Tensor]) -> None:
        """Add the parameters' gradients of the summed loss; only where ``wants_slopes``."""

    @classmethod
    def result(cls, sums: Sums, meta: Meta, samples: float) -> dict[str, Any]:
        """Return what the sums over so many samples mean; those that count less than one add up to less."""
        return {name: value / samples for name, value in sums.items()}

    def add(self, name: str, value: Tensor) -> None:
        """Add to one sum."""
        value = as_float(value.detach())
        self.sums[name] = value.clone() if name not in self.sums else self.sums[name].add_(value)


class Gradient(Accumulator):
    """The mean gradient, by parameter name."""

    wants_slopes = True

    def slopes(self, gradients: Mapping[str, Tensor]) -> None:
        for name, value in gradients.items():
            self.add(name, value)


class Moments(Accumulator):
    """``E[g_n²]`` by parameter name; parameters that nothing depends on have zeros."""

    kinds = (*KINDS, "channel_norm", "last_norm", "embedding", "broadcast")
    wants_inputs = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        for name, parameter in self.parameters.items():
            if parameter.is_floating_point():
                self.sums[name] = torch.zeros_like(as_float(parameter.detach()))

        self.pending: list[Part] = []

    def backward(self, call: LayerCall, layout: Layout, gradient: Tensor) -> None:
        found = per_sample.parts(call, layout, gradient, self.parameters[call.weight])
        parts = [part for part in found if part.name not in self.routes.rest]
        self._add_squares([part for part in parts if self.routes.uses[part.name] == 1])
        self.pending += [part for part in parts if self.routes.uses[part.name] > 1]

    def finish(self, batch: Batch, column: list[Tensor]) -> None:
        self._add_squares(self.pending)
        self.pending = []
        if self.routes.rest:
            for name, value in squared_sums_by_vmap(self.model, self.routes.rest, batch, column).items():
                self.add(name, value)

    def _add_squares(self, parts: list[Part]) -> None:
        for name, rows, value in squared_sums(parts):
            total = self.sums[name][rows] if self.sums[name].dim() else self.sums[name]
            total += value.view(total.shape)


class Kronecker(Accumulator):
    """``Factors`` by weight name."""

    kinds = KINDS

    def forward(self, call: LayerCall, layout: Layout | None) -> None:
        if call.kind in self.kinds and layout is not None:
            key = factor_sums.key(call, self.parameters[call.weight])
            self.meta.setdefault(key, factor_sums.description(call, self.setting.factor))
            found = factor_sums.input_sums(call, self.setting.factor)
            if self.weights is not None:
                found = factor_sums.weighted(call, layout, self.setting.factor, self.weights, found)
            for part, value in found.items():
                self.add(f"{part}:{key}", value)

    def backward(self, call: LayerCall, layout: Layout, gradient: Tensor) -> None:
        key = factor_sums.key(call, self.parameters[call.weight])
        self.add(f"S:{key}", factor_sums.gradient_sums(call, gradient))
        rows = gradient.numel() // gradient.shape[-1 if call.kind == "linear" else 1]
        self.add(f"rows:{key}", torch.tensor(float(rows), dtype=torch.float64))

    @classmethod
    def result(cls, sums: Sums, meta: Meta, samples: float) -> dict[str, Factors]:
        """Return the factors; with EKFAC's sums merged in, their moments and basis too."""
        found = {}
        for key, about in meta.items():
            if f"S:{key}" not in sums:
                continue
            positions = float(sums[f"positions:{key}"])
            values = {"A": sums[f"A:{key}"] / positions, "mean": sums[f"mean:{key}"] / positions}
            values["S"] = sums[f"S:{key}"] / samples
            if about["view"]["groups"] == 1:
                values = {name: value[0] for name, value in values.items()}
            found[key] = Factors(**restored({**about, **values}), samples=round(samples), positions=positions)
        return found


class Ekfac(Accumulator):
    """EKFAC: the second moments of the samples' gradients in the eigenbasis of given factors."""

    kinds = KINDS
    wants_inputs = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.pending: list[Part] = []

    def backward(self, call: LayerCall, layout: Layout, gradient: Tensor) -> None:
        weight = self.parameters[call.weight]
        key = factor_sums.key(call, weight)
        if key in self.setting.basis:
            factors = self.setting.basis[key]
            self.pending.append(factor_sums.rotated_part(call, layout, gradient, weight, key, factors))
            if self.routes.uses[call.weight] == 1:
                self._add_squares()

    def finish(self, batch: Batch, column: list[Tensor]) -> None:
        self._add_squares()

    def _add_squares(self) -> None:
        for name, _, value in squared_sums(self.pending):
            self.add(name, value)
        self.pending = []


class Inputs(Accumulator):
    """The second moments of what weights multiply; of those that consume units, where the graph is known."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        graph = setting.graph
        every = {name: 1 for name in self.parameters}
        self.wanted = every if isinstance(graph, nn.Module) else input_moments.consumers(graph)

    def forward(self, call: LayerCall, layout: Layout | None) -> None:
        if call.kind in KINDS and call.weight in self.wanted:
            weight, taps = self.parameters[call.weight], self.wanted[call.weight]
            key = factor_sums.key(call, weight)
            self.meta[key] = input_moments.describe(call, weight, taps)
            self.add(key, input_moments.summed(call, self.meta[key]["over"], taps))

    @classmethod
    def result(cls, sums: Sums, meta: Meta, samples: float) -> dict[str, Any]:
        """Return the moments by weight name."""
        return input_moments.read(sums, meta)


ACCUMULATORS: dict[str, type[Accumulator]] = {
    "grad": Gradient,
    "moments": Moments,
    "kronecker": Kronecker,
    "ekfac": Ekfac,
    "inputs": Inputs,
}

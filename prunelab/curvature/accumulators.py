"""Accumulators: what ``collect`` can add up over samples, one class each, all in one table.

Every accumulator owns named sums over samples, so that two of them add up by adding their sums.

Flows in: a batch after its forward pass, then the gradients of all layer outputs.  Flows out: ``sums`` and ``meta``,
and from them what ``Statistics`` shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.curvature import factor_sums, inputs, per_sample
from prunelab.curvature.kronecker import Factors
from prunelab.curvature.layout import Routes
from prunelab.curvature.moments import squared_sums
from prunelab.curvature.per_sample import Part, as_float
from prunelab.curvature.taps import LayerCall
from prunelab.curvature.vectorized import squared_sums_by_vmap
from prunelab.errors import BatchError
from prunelab.trace import DependencyGraph

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


@dataclass(frozen=True)
class Step:
    """One batch after its forward pass."""

    number: int
    inputs: Any
    samples: int
    calls: Sequence[LayerCall]


class Accumulator:
    """Adds one statistic up over batches.

    Attributes:
        kinds: of the calls whose output gradients it needs; none if it needs no backward pass.
        sums: name -> sum over samples.
        meta: name -> plain values that say what the sums are of; the same for all batches.
    """

    kinds: tuple[str, ...] = ()

    def __init__(self, setting: Setting) -> None:
        self.setting, self.model = setting, setting.model
        self.parameters = dict(setting.model.named_parameters())
        self.sums: Sums = {}
        self.meta: Meta = {}

    @property
    def routes(self) -> Routes:
        """Where gradients of samples are found."""
        assert self.setting.routes is not None
        return self.setting.routes

    def forward(self, step: Step) -> None:
        """Add what is known once the batch went forward."""

    def backward(self, step: Step, gradients: Sequence[Tensor | None], column: list[Tensor]) -> None:
        """Add what one column of the Fisher brings: the gradient of every call's output, and of the outputs."""

    def slopes(self, step: Step, gradients: Mapping[str, Tensor]) -> None:
        """Add the parameters' gradients of the summed loss; only where ``wants_slopes``."""

    wants_slopes = False

    @classmethod
    def result(cls, sums: Sums, meta: Meta, samples: int) -> dict[str, Any]:
        """Return what the sums over so many samples mean."""
        return {name: value / samples for name, value in sums.items()}

    def add(self, name: str, value: Tensor) -> None:
        """Add to one sum."""
        value = as_float(value.detach())
        self.sums[name] = value.clone() if name not in self.sums else self.sums[name].add_(value)


class Gradient(Accumulator):
    """The mean gradient, by parameter name."""

    wants_slopes = True

    def slopes(self, step: Step, gradients: Mapping[str, Tensor]) -> None:
        for name, value in gradients.items():
            self.add(name, value)


class Moments(Accumulator):
    """``E[g_n²]`` by parameter name; parameters that nothing depends on have zeros."""

    kinds = ("linear", "conv", "conv_transpose", "channel_norm", "last_norm", "embedding", "broadcast")

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        for name, parameter in self.parameters.items():
            if parameter.is_floating_point():
                self.sums[name] = torch.zeros_like(as_float(parameter.detach()))

    def backward(self, step: Step, gradients: Sequence[Tensor | None], column: list[Tensor]) -> None:
        routes = self.routes
        found: list[Part] = []
        for call, layout, gradient in zip(step.calls, routes.layouts, gradients, strict=True):
            if gradient is None or layout is None:
                if gradient is not None and call.weight not in routes.rest:
                    raise BatchError(f"`{call.weight}` has a gradient in batch {step.number} but had none in a probe.")
                continue
            parts = per_sample.parts(call, layout, gradient, self.parameters[call.weight])
            found += [part for part in parts if part.name not in routes.rest]
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        for name, rows, value in squared_sums(found, shapes):
            total = self.sums[name]
            total = total[rows] if total.dim() else total
            total += value.view(total.shape)
        if routes.rest:
            for name, value in squared_sums_by_vmap(self.model, routes.rest, step.inputs, column, step.samples).items():
                self.add(name, value)


class Kronecker(Accumulator):
    """``Factors`` by weight name."""

    kinds = factor_sums.KINDS

    def _calls(self, step: Step) -> list[tuple[int, str, LayerCall]]:
        layouts = self.routes.layouts
        return [
            (place, factor_sums.key(call, self.parameters[call.weight]), call)
            for place, call in enumerate(step.calls)
            if call.kind in self.kinds and layouts[place] is not None
        ]

    def forward(self, step: Step) -> None:
        for _, key, call in self._calls(step):
            weight = self.parameters[call.weight]
            self.meta.setdefault(key, factor_sums.description(call, weight, self.setting.factor))
            for part, value in factor_sums.input_sums(call, weight, self.setting.factor).items():
                self.add(f"{part}:{key}", value)

    def backward(self, step: Step, gradients: Sequence[Tensor | None], column: list[Tensor]) -> None:
        for place, key, call in self._calls(step):
            gradient = gradients[place]
            if gradient is not None:
                self.add(f"S:{key}", factor_sums.gradient_sums(call, gradient, self.parameters[call.weight]))
                rows = gradient.numel() // gradient.shape[-1 if call.kind == "linear" else 1]
                self.add(f"rows:{key}", torch.tensor(float(rows), dtype=torch.float64))

    @classmethod
    def result(cls, sums: Sums, meta: Meta, samples: int) -> dict[str, Factors]:
        """Return the factors; with EKFAC's sums merged in, their moments and basis too."""
        found = {}
        for key, about in meta.items():
            if f"S:{key}" not in sums:
                continue
            positions = float(sums[f"positions:{key}"])
            values = {"A": sums[f"A:{key}"] / positions, "mean": sums[f"mean:{key}"] / positions}
            values["S"] = sums[f"S:{key}"] / samples
            if about["groups"] == 1:
                values = {name: value[0] for name, value in values.items()}
            plain: Meta = {**about, "rows": slice(*about["rows"]), "kernel": tuple(about["kernel"]), **values}
            found[key] = Factors(**plain, samples=samples, positions=positions)
        return found


class Ekfac(Accumulator):
    """EKFAC: the second moments of the samples' gradients in the eigenbasis of given factors."""

    kinds = factor_sums.KINDS

    def backward(self, step: Step, gradients: Sequence[Tensor | None], column: list[Tensor]) -> None:
        found: list[Part] = []
        for call, layout, gradient in zip(step.calls, self.routes.layouts, gradients, strict=True):
            weight = self.parameters[call.weight]
            key = factor_sums.key(call, weight)
            if call.kind in self.kinds and gradient is not None and layout is not None and key in self.setting.basis:
                found.append(factor_sums.rotated_part(call, layout, gradient, weight, key, self.setting.basis[key]))
        for name, _, value in squared_sums(found, {}):
            self.add(name, value)

    @classmethod
    def result(cls, sums: Sums, meta: Meta, samples: int) -> dict[str, Any]:
        """Return the moments by weight name."""
        return {name: value / samples for name, value in sums.items()}


class Inputs(Accumulator):
    """The second moments of what weights multiply; of those that consume units, where the graph is known."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        graph = setting.graph
        every = {name: 1 for name in self.parameters}
        self.wanted = every if isinstance(graph, nn.Module) else inputs.consumers(graph)

    def forward(self, step: Step) -> None:
        for call in step.calls:
            if call.kind in factor_sums.KINDS and call.weight in self.wanted:
                weight, taps = self.parameters[call.weight], self.wanted[call.weight]
                key = factor_sums.key(call, weight)
                self.meta[key] = inputs.describe(call, weight, taps)
                self.add(key, inputs.summed(call, weight, self.meta[key]["over"], taps))

    @classmethod
    def result(cls, sums: Sums, meta: Meta, samples: int) -> dict[str, Any]:
        """Return the moments by weight name."""
        return inputs.read(sums, meta)


ACCUMULATORS: dict[str, type[Accumulator]] = {
    "grad": Gradient,
    "moments": Moments,
    "kronecker": Kronecker,
    "ekfac": Ekfac,
    "inputs": Inputs,
}

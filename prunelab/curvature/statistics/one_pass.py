"""One pass: a model goes once over the batches, and every accumulator takes what it needs.

Flows in: a model, batches and accumulators.  Flows out: ``Statistics``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from prunelab.batches import Batch, Batches, Loss, checked
from prunelab.batches.mean_check import check_apart, check_mean, check_own
from prunelab.batches.task import Task
from prunelab.batches.trees import tree_map
from prunelab.curvature.fisher import columns, slopes
from prunelab.curvature.second.vjp import finite
from prunelab.curvature.statistics.accumulators import ACCUMULATORS, Accumulator, Setting
from prunelab.curvature.statistics.by_vmap import floating
from prunelab.curvature.statistics.kronecker import Factors
from prunelab.curvature.statistics.statistics import Statistics
from prunelab.curvature.watching.checkpoints import no_checkpoints
from prunelab.curvature.watching.layer_calls import LayerCall
from prunelab.curvature.watching.parameter_calls import ParameterCalls
from prunelab.curvature.watching.samples import Layout, Routes, routes
from prunelab.errors import BatchError
from prunelab.options import module as a_module
from prunelab.runtime.isolation import evaluating
from prunelab.tracing.trace import DependencyGraph

T = TypeVar("T")


def one_pass(
    graph: DependencyGraph | nn.Module,
    batches: Batches | None,
    what: Collection[str],
    factor: str,
    basis: Mapping[str, Factors],
    *,
    fisher: str,
    loss: Loss,
    seed: int,
    first: int,
) -> Statistics:
    """Return the statistics of one pass; see ``collect``."""
    model, seen, total = model_of(graph), 0, 0.0
    wanted = any(ACCUMULATORS[name].kinds or ACCUMULATORS[name].wants_slopes for name in what)
    accumulators: list[Accumulator] = []
    ways: Routes | None = None
    with no_checkpoints(model, "collect"), evaluating(model):
        for number, batch in enumerate(checked(model, batches, "collect", loss if wanted else None)):
            cut = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, batch.inputs)
            batch = replace(batch, inputs=cut)
            if number == 0:
                if wanted and batch.problem is None:
                    check_apart(model, batch)
                backward = any(ACCUMULATORS[name].kinds for name in what)
                ways = _routes(model, batch.apart("collect")) if backward else None
                setting = Setting(graph, model, ways, factor, basis)
                accumulators = [ACCUMULATORS[name](setting) for name in sorted(what)]
            if wanted:
                check_own(model, batch)
            if fisher != "empirical" and ways is not None:
                batch.opened(f"fisher={fisher!r}")
            for accumulator in accumulators:
                accumulator.weights = batch.weights if wanted else None
            tape = _Tape(model, accumulators, ways, batch)
            try:
                outputs = tape.forward()
                if wanted and (ways is not None or batch.problem is None):
                    check_mean(outputs, batch if ways is None else batch.apart("collect"))
                tape.backward(outputs, fisher, seed, first + seen)
            finally:
                tape.clear()
            sums = [value for accumulator in accumulators for value in accumulator.sums.values()]
            if not _all_finite([*sums, *floating(outputs)]):
                raise _not_finite(model, batch, number)
            seen, total = seen + batch.size, total + batch.total
    return Statistics(
        seen,
        fisher,
        {name: accumulator.sums for name, accumulator in zip(sorted(what), accumulators, strict=True)},
        {name: accumulator.meta for name, accumulator in zip(sorted(what), accumulators, strict=True)},
        {f"{part}:{name}": q for name, found in basis.items() for part, q in _vectors(found)}
        if "ekfac" in what
        else {},
        batches if readable_again(batches) else None,
        total,
        loss,
    )


class _Tape:
    """One batch: what its calls leave behind for the way back.

    Gradients of outputs are taken as they pass and forgotten: kept until the end, they would take as much memory as all
    activations, and the time to get it.  They are taken by a hook on the output of every call.  A hook only fires where
    autograd has a reason to pass, so autograd is asked for the gradients of the first layers, wanted or not.
    """

    def __init__(self, model: nn.Module, accumulators: list[Accumulator], ways: Routes | None, batch: Batch) -> None:
        self.model, self.ways, self.batch, self.samples = model, ways, batch, batch.size
        self.accumulators = accumulators
        self.squaring = [accumulator for accumulator in accumulators if accumulator.kinds]
        self.sloping = [accumulator for accumulator in accumulators if accumulator.wants_slopes]
        self.count = 0
        self.calls: dict[int, tuple[LayerCall, Layout]] = {}
        self.ends: dict[int, GradientEdge] = {}
        self.passes: list[GradientEdge] = []
        self.listening, self.last = False, True

    def forward(self) -> Any:
        with torch.enable_grad(), ParameterCalls(self.model, after=self._ran, keep=False, cut=not self.sloping):
            return self.batch.run(self.model)

    def _ran(self, call: LayerCall) -> None:
        place, self.count = self.count, self.count + 1
        layout = None if self.ways is None else self.ways.layout(place, call, self.samples)
        with torch.no_grad():
            for accumulator in self.accumulators:
                accumulator.forward(call, layout)
        takers = [accumulator for accumulator in self.squaring if call.kind in accumulator.kinds]
        first = not call.input.requires_grad or call.kind == "broadcast"
        if call.edge is None or layout is None or not takers:
            if call.edge is not None and first:
                self.passes.append(call.edge)
            return
        assert call.output is not None
        if not first:
            call.output.register_hook(partial(self._arrived, place))
        else:
            self.ends[place] = call.edge
        call.output = call.edge = None  # autograd keeps what it needs; a way from here to its hooks would be a circle
        if not any(accumulator.wants_inputs for accumulator in takers):
            call.input, call.plain = torch.empty_like(call.input, device="meta"), None
        self.calls[place] = call, layout

    def _arrived(self, place: int, gradient: Tensor) -> None:
        if not self.listening:
            return
        call, layout = self.calls[place]
        with torch.no_grad():
            for accumulator in self.squaring:
                if call.kind in accumulator.kinds:
                    accumulator.backward(call, layout, gradient)
        if self.last:
            del self.calls[place]

    def backward(self, outputs: Any, fisher: str, seed: int, first: int) -> None:
        """Send every column of the Fisher back once, and the slope of the loss if it is not one of them."""
        if not self.sloping and not self.squaring:
            return
        parameters = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        leaves = floating(outputs)
        alike = self.batch.weights is None  # else slopes count c_n, and columns √c_n
        together = bool(self.sloping and self.squaring and fisher == "empirical" and alike)
        if self.sloping and not together:
            slope = slopes(outputs, self.batch)
            self._slopes(parameters, _pull(leaves, slope, list(parameters.values()), bool(self.squaring)))
        rest = [] if self.ways is None else [parameters[name] for name in self.ways.rest]
        ways = [*self.passes, *rest] if self.ends or self.passes else list(parameters.values())
        ends = [*self.ends.values(), *(parameters.values() if together else ways)]
        if not self.squaring:
            return
        self.listening, sent = True, False
        for column, last in _with_last(columns(outputs, self.batch, fisher, seed, first)):
            self.last, sent = last, True
            found = _pull(leaves, column, ends, not last)
            for place, gradient in zip(self.ends, found, strict=False):
                if gradient is not None:
                    self._arrived(place, gradient)
            if together:
                self._slopes(parameters, found[len(self.ends) :])
            with torch.no_grad():
                for accumulator in self.squaring:
                    accumulator.finish(self.batch, column)
        for missed, _ in self.calls.values() if sent else ():  # a loss without any curvature sends nothing back
            raise BatchError(
                f"No gradient arrived at the layer of `{missed.weight}`, though one did in a probe of some samples: "
                "its input requires the gradient of something that is not a parameter of the model."
            )

    def _slopes(self, parameters: Mapping[str, Tensor], found: Sequence[Tensor | None]) -> None:
        slopes = {name: value for name, value in zip(parameters, found, strict=True) if value is not None}
        for accumulator in self.sloping:
            accumulator.slopes(slopes)

    def clear(self) -> None:
        """Forget all calls; their inputs lead back to hooks that lead here."""
        self.calls, self.ends, self.passes = {}, {}, []


def _pull(leaves: list[Tensor], column: list[Tensor], ends: list[Any], keep: bool) -> list[Tensor | None]:
    """Return the gradients at some ends of a column that is sent back from the outputs."""
    pairs = [(leaf, back) for leaf, back in zip(leaves, column, strict=True) if leaf.requires_grad]
    if not pairs or not ends:
        return [None] * len(ends)
    roots, backs = zip(*pairs, strict=True)
    return list(torch.autograd.grad(roots, ends, backs, retain_graph=keep, allow_unused=True))


def _routes(model: nn.Module, batch: Batch) -> Routes:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise BatchError(
                f"`{name}` normalises over the batch (track_running_stats=False), so that no sample has a gradient of "
                'its own: only "grad" can be collected.'
            )
    return routes(model, batch)


def _not_finite(model: nn.Module, batch: Batch, number: int) -> BatchError:
    """Return the error that names the first layer with a number that is not finite: go through the batch once more."""
    with torch.enable_grad(), ParameterCalls(model, cut=True) as taps:
        outputs = batch.run(model)
    for seen in taps.calls:
        for value, what in ((seen.input, "input"), (seen.output, "output")):
            if value is not None and value.is_floating_point() and not bool(value.isfinite().all()):
                return BatchError(
                    f"The {what} of the layer of `{seen.weight}` is not finite in batch {number}: check the batch's "
                    "inputs and the weights up to there."
                )
    slope = slopes(outputs, batch)
    ends = [(seen.weight, seen.edge) for seen in reversed(taps.calls) if seen.edge is not None]
    found = _pull(floating(outputs), slope, [edge for _, edge in ends], False)
    for (name, _), gradient in zip(ends, found, strict=True):
        if gradient is not None and not bool(gradient.isfinite().all()):
            return BatchError(f"The gradient at the output of the layer of `{name}` is not finite in batch {number}.")
    return BatchError(
        f"The outputs, the loss or the squares of its gradients are not finite in batch {number}: check its targets, "
        "and whether the model's precision holds them."
    )


def _all_finite(values: Iterable[Tensor]) -> bool:
    """Return whether all entries are; the sums tell, unless one is too large for a number itself."""
    values = list(values)
    flags: dict[torch.device, list[Tensor]] = {}
    for value in values:
        flags.setdefault(value.device, []).append(value.detach().sum().isfinite())
    if all(bool(torch.stack(found).all()) for found in flags.values()):  # one answer to wait for per device
        return True
    return all(map(finite, values))


def _with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    iterator = iter(items)
    try:
        item = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield item, False
        item = following
    yield item, True


def _vectors(factors: Factors) -> Iterator[tuple[str, Tensor]]:
    basis = factors.eigen()
    yield from (("Q_A", basis.Q_A), ("Q_S", basis.Q_S))


def model_of(graph: DependencyGraph | nn.Module) -> nn.Module:
    """Return the model of a graph, or the model that was given in its place.

    Raises:
        OptionError: it is neither.
    """
    return a_module("graph", graph.model if isinstance(graph, DependencyGraph) else graph)


def readable_again(batches: Batches | None) -> bool:
    """Return whether batches can be read more than once."""
    batches = batches.batches if isinstance(batches, Task) else batches
    return batches is not None and iter(batches) is not batches

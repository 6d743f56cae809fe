"""One pass: a model goes once over the batches, and every accumulator takes what it needs.

Flows in: a model, batches and accumulators.  Flows out: ``Statistics``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_map

from prunelab.batches import Batches, Loss, call, checked
from prunelab.curvature.accumulators import ACCUMULATORS, Accumulator, Setting
from prunelab.curvature.affine import AffineTaps
from prunelab.curvature.fisher import check_mean, columns
from prunelab.curvature.kronecker import Factors
from prunelab.curvature.layout import Layout, Routes, routes
from prunelab.curvature.pieces import finite
from prunelab.curvature.statistics import Statistics
from prunelab.curvature.taps import LayerCall
from prunelab.curvature.vectorized import floating
from prunelab.errors import BatchError
from prunelab.options import module as a_module
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
    model, seen = model_of(graph), 0
    accumulators: list[Accumulator] = []
    ways: Routes | None = None
    with evaluating(model):
        for number, (inputs, targets) in enumerate(checked(model, batches, "collect")):
            if len(targets) == 0:
                raise BatchError(f"Batch {number} is empty.")
            inputs = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, inputs)
            if number == 0:
                backward = any(ACCUMULATORS[name].kinds for name in what)
                ways = _routes(model, inputs) if backward else None
                setting = Setting(graph, model, ways, factor, basis)
                accumulators = [ACCUMULATORS[name](setting) for name in sorted(what)]
            tape = _Tape(model, accumulators, ways, len(targets))
            try:
                outputs = tape.forward(inputs)
                if number == 0:
                    check_mean(outputs, targets, loss)
                tape.backward(inputs, outputs, targets, loss, fisher, seed, first + seen)
            finally:
                tape.clear()
            sums = [value for accumulator in accumulators for value in accumulator.sums.values()]
            if not _all_finite([*sums, *floating(outputs)]):
                raise _not_finite(model, inputs, targets, loss, number)
            seen += len(targets)
    return Statistics(
        seen,
        fisher,
        {name: accumulator.sums for name, accumulator in zip(sorted(what), accumulators, strict=True)},
        {name: accumulator.meta for name, accumulator in zip(sorted(what), accumulators, strict=True)},
        {f"{part}:{name}": q for name, found in basis.items() for part, q in _vectors(found)}
        if "ekfac" in what
        else {},
        batches if readable_again(batches) else None,
    )


class _Tape:
    """One batch: what its calls leave behind for the way back.

    Gradients of outputs are taken as they pass and forgotten: kept until the end, they would take as much memory as all
    activations, and the time to get it.  They are taken by a hook on the output of every call.  A hook only fires where
    autograd has a reason to pass, so autograd is asked for the gradients of the first layers, wanted or not.
    """

    def __init__(self, model: nn.Module, accumulators: list[Accumulator], ways: Routes | None, samples: int) -> None:
        self.model, self.ways, self.samples = model, ways, samples
        self.accumulators = accumulators
        self.squaring = [accumulator for accumulator in accumulators if accumulator.kinds]
        self.sloping = [accumulator for accumulator in accumulators if accumulator.wants_slopes]
        self.count = 0
        self.calls: dict[int, tuple[LayerCall, Layout]] = {}
        self.ends: dict[int, GradientEdge] = {}
        self.passes: list[GradientEdge] = []
        self.listening, self.last = False, True

    def forward(self, inputs: Any) -> Any:
        with torch.enable_grad(), AffineTaps(self.model, after=self._ran, keep=False, cut=not self.sloping):
            return call(self.model, inputs)

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

    def backward(
        self, inputs: Any, outputs: Any, targets: Tensor, loss: Loss, fisher: str, seed: int, first: int
    ) -> None:
        """Send every column of the Fisher back once, and the slope of the loss if it is none of them."""
        parameters = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        leaves = floating(outputs)
        together = bool(self.sloping and self.squaring and fisher == "empirical")
        if self.sloping and not together:
            (slope,) = columns(outputs, targets, loss, "empirical", seed, first)
            self._slopes(parameters, _pull(leaves, slope, list(parameters.values()), bool(self.squaring)))
        rest = [] if self.ways is None else [parameters[name] for name in self.ways.rest]
        ways = [*self.passes, *rest] if self.ends or self.passes else list(parameters.values())
        ends = [*self.ends.values(), *(parameters.values() if together else ways)]
        if not self.squaring:
            return
        self.listening, sent = True, False
        for column, last in _with_last(columns(outputs, targets, loss, fisher, seed, first)):
            self.last, sent = last, True
            found = _pull(leaves, column, ends, not last)
            for place, gradient in zip(self.ends, found, strict=False):
                if gradient is not None:
                    self._arrived(place, gradient)
            if together:
                self._slopes(parameters, found[len(self.ends) :])
            with torch.no_grad():
                for accumulator in self.squaring:
                    accumulator.finish(inputs, column, self.samples)
        for missed, _ in self.calls.values() if sent else ():  # a loss without any curvature sends nothing back
            raise BatchError(
                f"No gradient arrived at the layer of `{missed.weight}`, though one did in a probe of some samples: "
                "its input requires the gradient of something that is no parameter of the model."
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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, with gradients for all parameters; then leave it exactly as it was."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.inference_mode(False):
            for parameter in flags:
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes.items():
            module.training = training
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _routes(model: nn.Module, inputs: Any) -> Routes:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise BatchError(
                f"`{name}` normalises over the batch (track_running_stats=False), so that no sample has a gradient of "
                'its own: only "grad" can be collected.'
            )
    return routes(model, inputs)


def _not_finite(model: nn.Module, inputs: Any, targets: Tensor, loss: Loss, number: int) -> BatchError:
    """Return the error that names the first layer with a number that is not finite: go through the batch once more."""
    with torch.enable_grad(), AffineTaps(model, cut=True) as taps:
        outputs = call(model, inputs)
    for seen in taps.calls:
        for value, what in ((seen.input, "input"), (seen.output, "output")):
            if value is not None and value.is_floating_point() and not bool(value.isfinite().all()):
                return BatchError(
                    f"The {what} of the layer of `{seen.weight}` is not finite in batch {number}: check the batch's "
                    "inputs and the weights up to there."
                )
    (slope,) = columns(outputs, targets, loss, "empirical", 0, 0)
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
    return batches is not None and iter(batches) is not batches

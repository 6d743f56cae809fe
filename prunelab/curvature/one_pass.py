"""One pass: a model goes once over the batches, and every accumulator takes what it needs.

Flows in: a model, batches and accumulators.  Flows out: ``Statistics``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunelab.batches import Batches, Loss, call, checked
from prunelab.curvature.accumulators import ACCUMULATORS, Accumulator, Setting, Step
from prunelab.curvature.affine import AffineTaps
from prunelab.curvature.fisher import check_mean, columns
from prunelab.curvature.kronecker import Factors
from prunelab.curvature.layout import Routes, routes
from prunelab.curvature.statistics import Statistics
from prunelab.curvature.vectorized import floating
from prunelab.errors import BatchError
from prunelab.trace import DependencyGraph

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
            if number == 0:
                backward = any(ACCUMULATORS[name].kinds for name in what)
                ways = _routes(model, inputs) if backward else None
                setting = Setting(graph, model, ways, factor, basis)
                accumulators = [ACCUMULATORS[name](setting) for name in sorted(what)]
            step, outputs = _forward(model, accumulators, number, inputs, len(targets))
            if ways is not None:
                ways.check(step.calls, step.samples, number)
            if number == 0:
                check_mean(outputs, targets, loss)
            _backward(model, accumulators, step, outputs, targets, loss, fisher, seed, first + seen)
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


def _forward(
    model: nn.Module, accumulators: list[Accumulator], number: int, inputs: Any, samples: int
) -> tuple[Step, Any]:
    cut = not any(accumulator.wants_slopes for accumulator in accumulators)
    with torch.enable_grad(), AffineTaps(model, cut=cut) as taps:
        outputs = call(model, inputs)
    step = Step(number, inputs, samples, taps.calls)
    if not all(bool(leaf.detach().isfinite().all()) for leaf in floating(outputs)):
        raise _not_finite(step, [])
    with torch.no_grad():
        for accumulator in accumulators:
            accumulator.forward(step)
    return step, outputs


def _backward(
    model: nn.Module,
    accumulators: list[Accumulator],
    step: Step,
    outputs: Any,
    targets: Tensor,
    loss: Loss,
    fisher: str,
    seed: int,
    first: int,
) -> None:
    """Send every column of the Fisher back once, and the slope of the loss if it is none of them."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    sloping = [accumulator for accumulator in accumulators if accumulator.wants_slopes]
    squaring = [accumulator for accumulator in accumulators if accumulator.kinds]
    kinds = {kind for accumulator in squaring for kind in accumulator.kinds}
    places = [place for place, seen in enumerate(step.calls) if seen.kind in kinds and seen.edge is not None]
    edges = [step.calls[place].edge for place in places]

    def pull(column: list[Tensor], ends: list[Any], keep: bool) -> list[Tensor | None]:
        pairs = [(leaf, back) for leaf, back in zip(floating(outputs), column, strict=True) if leaf.requires_grad]
        if not pairs or not ends:
            return [None] * len(ends)
        leaves, backs = zip(*pairs, strict=True)
        return list(torch.autograd.grad(leaves, ends, backs, retain_graph=keep, allow_unused=True))

    def add_slopes(found: list[Tensor | None]) -> None:
        slopes = {name: value for name, value in zip(parameters, found, strict=True) if value is not None}
        for accumulator in sloping:
            accumulator.slopes(step, slopes)

    together = sloping and squaring and fisher == "empirical"
    if sloping and not together:
        (slope,) = columns(outputs, targets, loss, "empirical", seed, first)
        add_slopes(pull(slope, list(parameters.values()), bool(squaring)))
    gradients: list[Tensor | None] = []
    for column, last in _with_last(columns(outputs, targets, loss, fisher, seed, first) if squaring else ()):
        found = pull(column, [*edges, *parameters.values()] if together else list(edges), not last)
        gradients = [None] * len(step.calls)
        for place, gradient in zip(places, found, strict=False):
            gradients[place] = gradient
        if together:
            add_slopes(found[len(edges) :])
        with torch.no_grad():
            for accumulator in squaring:
                accumulator.backward(step, gradients, column)
        if not all(bool(value.isfinite().all()) for value in column):
            raise _not_finite(step, gradients)
    for accumulator in accumulators:
        if not all(bool(value.isfinite().all()) for value in accumulator.sums.values()):
            raise _not_finite(step, gradients)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, with gradients for all parameters; then leave it exactly as it was."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
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


def _not_finite(step: Step, gradients: list[Tensor | None]) -> BatchError:
    """Return the error that names the first layer with a number that is not finite."""
    for seen in step.calls:
        for value, what in ((seen.input, "input"), (seen.output, "output")):
            if value is not None and value.is_floating_point() and not bool(value.isfinite().all()):
                return BatchError(
                    f"The {what} of the layer of `{seen.weight}` is not finite in batch {step.number}: check the "
                    "batch's inputs and the weights up to there."
                )
    for seen, gradient in reversed(list(zip(step.calls, gradients, strict=False))):
        if gradient is not None and not bool(gradient.isfinite().all()):
            return BatchError(
                f"The gradient at the output of the layer of `{seen.weight}` is not finite in batch {step.number}."
            )
    return BatchError(
        f"The outputs, the loss or the squares of its gradients are not finite in batch {step.number}: check its "
        "targets, and whether the model's precision holds them."
    )


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
    """Return the model of a graph, or the model that was given in its place."""
    return graph if isinstance(graph, nn.Module) else graph.model


def readable_again(batches: Batches | None) -> bool:
    """Return whether batches can be read more than once."""
    return batches is not None and iter(batches) is not batches

"""Layout: which rows of a layer's output belong to which sample.

One backward pass gives the gradients of all samples at once.  They come apart where every row of a layer's output feeds
one sample's loss only, as in [B, …], and in [windows · B, …] or [tokens, B, …] once we know so.  Nothing is assumed
about it: we send a few samples through, propagate a random gradient back from *one* of them, and see which rows it
reaches.

Flows in: a model and inputs.  Flows out: one ``Layout`` per layer call, and the parameters that need another way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.batches import Batch, batch_of
from prunelab.batches.trees import tree_leaves
from prunelab.curvature.watching.layer_calls import LayerCall
from prunelab.curvature.watching.parameter_calls import ParameterCalls
from prunelab.errors import BatchError

PROBES = 3


@dataclass(frozen=True)
class Layout:
    """Dimension ``dim`` counts ``before × samples × after`` rows: outermost is (1, k), innermost (k, 1)."""

    dim: int
    before: int
    after: int

    def by_sample(self, tensor: Tensor) -> Tensor:
        """Return ``[samples, …]``: the rows by sample; what else shared their dimension follows, merged into one.

        Dimension ``dim`` stays where it was, behind the new first one.
        """
        split = tensor.unflatten(self.dim, (self.before, -1, self.after)).movedim(self.dim + 1, 0)
        return split.flatten(self.dim + 1, self.dim + 2)

    def samples(self, tensor: Tensor) -> int:
        """Return how many samples a tensor has; 0 if its rows do not come out even."""
        rows, rest = divmod(tensor.shape[self.dim], self.before * self.after)
        return 0 if rest else rows


@dataclass(frozen=True)
class Routes:
    """How the gradients of single samples are found.

    Attributes:
        calls: what is called, in order: the weight, the bias and the kind.
        layouts: of every call; ``None`` where rows do not belong to single samples.
        rest: parameters that are used in any other way than by calls with a layout.
    """

    calls: tuple[tuple[str, str | None, str], ...]
    layouts: tuple[Layout | None, ...]
    rest: frozenset[str]

    @cached_property
    def uses(self) -> Counter[str]:
        """How many calls use a parameter."""
        return Counter(name for weight, bias, _ in self.calls for name in (weight, bias) if name is not None)

    def layout(self, place: int, call: LayerCall, samples: int) -> Layout | None:
        """Return the layout of a call by its place in the order, if it is what the probe saw there.

        Raises:
            BatchError: the probe saw another layer, or these rows do not fit.
        """
        if place >= len(self.calls) or self.calls[place] != _identity(call):
            raise BatchError(
                f"`{call.weight}` is called where a probe of {PROBES} samples went elsewhere: a model whose path "
                "depends on its data has no statistics here."
            )
        layout = self.layouts[place]
        if layout is not None and call.output is not None and layout.samples(call.output) != samples:
            raise BatchError(
                f"`{call.weight}` gave {list(call.output.shape)} for {samples} samples: dimension {layout.dim} is not "
                f"a multiple of {layout.before * layout.after}."
            )
        return layout


def leaves(outputs: Any, samples: int) -> list[Tensor]:
    """Return the tensors among a model's outputs that have one row per sample and a gradient.

    Raises:
        BatchError: there are none.
    """
    found = [
        leaf
        for leaf in tree_leaves(outputs)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() and len(leaf) == samples
    ]
    if not found:
        shapes = [list(leaf.shape) for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        raise BatchError(f"No output has one row for each of the {samples} samples; their shapes are {shapes}.")
    return found


def routes(model: nn.Module, batch: Any) -> Routes:
    """Send three samples through the model and tell where each sample's gradients are.

    The model is expected in eval mode with parameters that require gradients.  Cost: one forward and one backward pass
    over three samples, two where a weight that is zero hides something.

    Args:
        model: the network.
        batch: a batch, or the inputs of one.

    Raises:
        BatchError: the model cannot take the inputs.
    """
    batch = batch if isinstance(batch, Batch) else batch_of(batch)
    probe = batch.take([place % batch.size for place in range(PROBES)])
    calls, gradients, reached = _look(model, probe, ParameterCalls(model, cut=True))
    layouts = [_layout(call, gradient) for call, gradient in zip(calls, gradients, strict=True)]
    unclear = [
        place
        for place, gradient in enumerate(gradients)
        if gradient is not None and layouts[place] is None and not bool(gradient.any())
    ]
    if unclear:  # a weight that is zero stops every gradient before it
        others, shaken, _ = _look(model, probe, _Shaken(model, cut=True))
        if [_identity(call) for call in others] == [_identity(call) for call in calls]:
            for place in unclear:
                layouts[place] = _layout(others[place], shaken[place])
    rest = set(reached)
    for call, layout, gradient in zip(calls, layouts, gradients, strict=True):
        if layout is None and gradient is not None:
            rest |= {name for name in (call.weight, call.bias) if name is not None}
    return Routes(tuple(_identity(call) for call in calls), tuple(layouts), frozenset(rest))


class _Shaken(ParameterCalls):
    """LayerCalls that use other weights than the model's: its own with noise of the size of a fresh layer's."""

    def _run(self, call: LayerCall, func: Callable[..., Any], given: dict[str, Any]) -> Tensor:
        weight = given["weight"].detach()
        generator = torch.Generator().manual_seed(len(self.calls))
        noise = torch.randn(weight.shape, generator=generator) / math.sqrt(weight[0].numel() if weight.dim() else 1)
        return super()._run(call, func, {**given, "weight": weight + noise.to(weight)})


def _look(
    model: nn.Module, probe: Batch, taps: ParameterCalls
) -> tuple[list[LayerCall], list[Tensor | None], frozenset[str]]:
    """Return the calls, the gradients of their outputs from sample 1, and the parameters that these also reach."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    with torch.enable_grad(), taps:
        outputs = [leaf for leaf in leaves(probe.run(model, check=False), PROBES) if leaf.requires_grad]
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.zeros_like(output) for output in outputs]
    for seed in seeds:
        seed[1] = torch.randn(seed[1].shape, generator=generator).to(seed)
    edges = {place: call.edge for place, call in enumerate(taps.calls) if call.edge is not None}
    gradients: list[Tensor | None] = [None] * len(taps.calls)
    if not outputs:
        return taps.calls, gradients, frozenset()
    ends: list[Any] = [*edges.values(), *parameters.values()]
    found = torch.autograd.grad(outputs, ends, seeds, allow_unused=True)
    for place, gradient in zip(edges, found, strict=False):
        gradients[place] = gradient
    reached = zip(parameters, found[len(edges) :], strict=True)
    return taps.calls, gradients, frozenset(name for name, gradient in reached if gradient is not None)


def _identity(call: LayerCall) -> tuple[str, str | None, str]:
    return call.weight, call.bias, call.kind


def _layout(call: LayerCall, gradient: Tensor | None) -> Layout | None:
    """Return the one layout in which only the sample that was asked has a gradient; ``None`` if it is not one."""
    if gradient is None:
        return None
    fitting = []
    for layout in _candidates(call, gradient):
        others = [row for place, row in enumerate(layout.by_sample(gradient)) if place != 1]
        if not any(bool(row.any()) for row in others):
            fitting.append(layout)
    return fitting[0] if len(fitting) == 1 else None


def _candidates(call: LayerCall, output: Tensor) -> Iterator[Layout]:
    dims: Iterable[int] = range(1)
    if call.kind in ("linear", "embedding"):
        dims = range(output.dim() - 1)
    elif call.kind == "last_norm":
        dims = range(output.dim() - len(call.plain.keywords["normalized_shape"]))
    elif call.kind == "broadcast":
        missing = output.dim() - call.input.dim()
        dims = [dim for dim in range(output.dim()) if dim < missing or call.input.shape[dim - missing] == 1]
    for dim in dims:
        rows, rest = divmod(output.shape[dim], PROBES)
        if not rest:
            for before in (divisor for divisor in range(1, rows + 1) if rows % divisor == 0):
                yield Layout(dim, before, rows // before)

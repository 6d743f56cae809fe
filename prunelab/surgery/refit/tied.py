"""Tied weights: those that a model uses in two ways, where what suits one use need not suit the other.

Flows in: a model, inputs and what stays.  Flows out: the names of such weights among those that are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.batches import call, device_of
from prunelab.batches.trees import tree_leaves, tree_map
from prunelab.curvature.watching.layer_calls import LayerCalls
from prunelab.errors import BatchError
from prunelab.kept import Kept
from prunelab.tracing.trace import DependencyGraph


def tied_weights(model: nn.Module, inputs: Any, graph: DependencyGraph, kept: Kept) -> list[str]:
    """Return the weights of layers that are cut and used in another way too.

    The layers are given copies of their weights; where a gradient still arrives at a weight, something else uses it.
    Cost: one forward and one backward pass.

    Args:
        model: the network, with gradients for its parameters.
        inputs: of the model, best a single sample.
        graph: of the model.
        kept: which entries of the graph's axes stay.
    """
    with torch.enable_grad(), LayerCalls(model, cut=True) as taps:
        outputs = tree_leaves(call(model, inputs))
        values = [leaf.abs().sum() for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
    used, turned = {seen.weight for seen in taps.calls}, {seen.weight for seen in taps.calls if seen.other}
    parameters = {name: value for name, value in model.named_parameters() if name in used and value.requires_grad}
    found: Sequence[Tensor | None] = [None] * len(parameters)
    if values and parameters:
        found = torch.autograd.grad(values, list(parameters.values()), allow_unused=True)
    return [
        name
        for (name, _), gradient in zip(parameters.items(), found, strict=True)
        if (gradient is not None or name in turned) and any(kept.size(dim.axis) != dim.size for dim in graph.dims[name])
    ]


def tied_by_example(model: nn.Module, inputs: Any, graph: DependencyGraph, kept: Kept) -> list[str]:
    """Return the same, from inputs of which only the shapes are known; none where the model cannot take zeros."""
    device = device_of(model)
    zeros = tree_map(lambda v: torch.zeros_like(v, device=device) if isinstance(v, Tensor) else v, inputs)
    try:
        return tied_weights(model, zeros, graph, kept)
    except BatchError:
        return []

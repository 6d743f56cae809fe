"""Sizes that layers and the model's own code keep as integers, after a cut.

Flows in: the trace and what stays of every axis.  Flows out: attributes set in place.  PyTorch's own layers are read
off their new parameters; in other modules only those attributes change that a size in the code was seen to come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from prunelab.errors import PlanError
from prunelab.tracing.axes import Axis
from prunelab.tracing.integers import attributes_of, evaluate, has_axis, show
from prunelab.tracing.planting import put
from prunelab.tracing.trace import DependencyGraph


def resize(model: nn.Module, graph: DependencyGraph, kept_size: Callable[[Axis], int]) -> None:
    """Set every integer of ``model`` that follows from what stays.

    Args:
        model: cut already, but for its integers.
        graph: of the model before the cut.
        kept_size: how many entries of an axis stay.

    Raises:
        PlanError: one integer would have to become two.
    """
    for integer in graph.integers:
        value = integer.value(kept_size)
        if value != integer.value(lambda axis: axis.size):
            put(model, integer.attribute, value)
    _check(graph, kept_size)
    recorded: dict[str, dict[str, int]] = {}
    for owner, attribute, axis in graph.sizes:
        recorded.setdefault(owner, {})[attribute] = kept_size(axis)
    for name, module in model.named_modules():
        own = recorded.get(name, {})
        known = layer_sizes(module, own.get("groups"))
        known |= {attribute: size for attribute, size in own.items() if hasattr(module, attribute)}
        for attribute, value in known.items():
            setattr(module, attribute, value)


def _check(graph: DependencyGraph, kept_size: Callable[[Axis], int]) -> None:
    values = {integer.attribute: integer.value(kept_size) for integer in graph.integers}
    for source, axis in graph.described:
        if has_axis(source) or not all(attribute in values for attribute in attributes_of(source)):
            continue
        if evaluate(source, values, kept_size) != kept_size(axis):
            raise PlanError(
                f"Cutting {type(graph.model).__name__} would make `{show(source)}` two numbers, "
                f"{evaluate(source, values, kept_size)} and {kept_size(axis)}, so nothing was cut: plan with "
                "graph.bundles, whose groups lose equal numbers, or ignore that module."
            )


def layer_sizes(module: nn.Module, groups: int | None) -> dict[str, Any]:
    """Return the size attributes of one of PyTorch's own layers, read off its new parameters."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return {"in_channels": weight.shape[0], "out_channels": weight.shape[1] * (groups or 1)}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"out_channels": weight.shape[0], "in_channels": weight.shape[1] * (groups or 1)}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        first = weight if weight is not None else module.running_mean
        return {} if first is None else {"num_features": first.shape[0]}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        return {"normalized_shape": tuple(weight.shape)}
    if isinstance(module, nn.GroupNorm) and weight is not None:
        return {"num_channels": weight.shape[0]}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"embedding_dim": weight.shape[1]}
    if isinstance(module, nn.Bilinear):
        return {"out_features": weight.shape[0], "in1_features": weight.shape[1], "in2_features": weight.shape[2]}
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}
    if isinstance(module, nn.RNNBase):  # its state is frozen
        return {"input_size": module.weight_ih_l0.shape[1]}  # type: ignore[index]
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight.shape[0]}
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx"):  # that of transformers
        return {"nx": weight.shape[0], "nf": weight.shape[1]}
    return {}

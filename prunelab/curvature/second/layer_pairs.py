"""Dilation: how the curvature couples layers, in numbers in place of blocks.

Multiply parameter i by τ_i = 1.  Then ∂²L/∂τ_i∂τ_j is θ_iᵀ H_ij θ_j.  A layer that is linear in its parameters passes
τ on to its output, so these derivatives need the gradients of activations only.

Flows in: a model and batches.  Flows out: the matrix of all pairs.  Notebook 09_oba derives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.batches import Batch, Batches, Loss, call
from prunelab.curvature.second.double_backward import CONVOLUTIONS, Rewrite, twice_differentiable
from prunelab.curvature.second.vjp import (
    HessianPart,
    check_finite,
    check_part,
    differentiable,
    half_batches,
    output_gradients,
    vjp,
)
from prunelab.errors import PruneLabError
from prunelab.runtime.isolation import evaluating, replaced
from prunelab.runtime.switches import undisturbed

LINEAR_IN_PARAMETERS: dict[Callable[..., Any], int] = {F.linear: 1, F.batch_norm: 3, **dict.fromkeys(CONVOLUTIONS, 1)}
"""Function -> the position of its weight among its arguments; the bias follows it."""


@undisturbed()
def pair_matrix(
    model: nn.Module,
    batches: Batches | None,
    names: Sequence[str],
    loss: Loss = F.cross_entropy,
    *,
    part: HessianPart = "exact",
) -> Tensor:
    """Return ``[n, n]`` with ``θ_iᵀ H_ij θ_j`` for every pair of the named parameters, in eval mode.

    Cost: one forward and backward pass over the data, and about as much again for every name.

    Raises:
        PruneLabError: a name is not a parameter of the model.
        BatchError: the batches do not fit the model, the loss is not a mean, or a number is not finite.
        BudgetError: there is no such part.
    """
    check_part(part)
    named = dict(model.named_parameters())
    for name in names:
        if name not in named:
            raise PruneLabError(f"`{name}` is not a parameter of {type(model).__name__}.")
    like = named[names[0]] if names else torch.zeros(())
    total, seen = torch.zeros(len(names), len(names), dtype=torch.float64), 0.0
    with evaluating(model):
        for parameter in named.values():
            parameter.requires_grad_(False)
        for number, batch in half_batches(model, batches, "layer_pairs", loss, part):
            with torch.enable_grad():
                scales = [torch.ones((), dtype=like.dtype, device=like.device, requires_grad=True) for _ in names]
                outputs = _run(model, named, dict(zip(names, scales, strict=True)), batch)
                total += _pairs(outputs, batch, part, scales).cpu().double()
            seen += batch.total
            check_finite(names, list(total), number)
    return total / seen


def _pairs(outputs: Any, batch: Batch, part: str, scales: list[Tensor]) -> Tensor:
    tensors = differentiable(outputs)
    ends, found = output_gradients(outputs, batch)
    if part == "gauss_newton":
        dummies = [torch.zeros_like(leaf, requires_grad=True) for leaf in tensors]
        rows = [vjp([row], dummies, [torch.ones_like(row)]) for row in vjp(tensors, scales, dummies, create_graph=True)]
        bent = [vjp(found, ends, row) for row in rows]
        return _stacked(rows) @ _stacked(bent).T
    values, backs = tensors, [slope.detach() for slope in found]
    if part == "exact":
        values = [batch.value(outputs) * batch.total]
        backs = [torch.ones_like(values[0])]
    gradient = vjp(values, scales, backs, create_graph=True)
    return torch.stack([torch.stack(vjp([row], scales, [torch.ones_like(row)])) for row in gradient])


def _stacked(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat([value.flatten() for value in row]) for row in rows])


def _run(model: nn.Module, named: Mapping[str, Tensor], scales: Mapping[str, Tensor], batch: Batch) -> Any:
    """Return the outputs with every named parameter multiplied by its scale, which is one."""
    scaled = {name: named[name] * factor for name, factor in scales.items()}
    dilation = _Dilation({id(scaled[name]): (named[name], scales[name]) for name in scaled})
    with twice_differentiable(dilation), replaced(model, scaled):
        return batch.picked(call(model, batch.inputs))


class _Dilation(Rewrite):
    """``Rewrite``, and layers that are linear in their parameters scale their outputs instead of these.

    Args:
        plain: ``id`` of a scaled parameter -> the parameter and its scale; anything else that uses a scaled parameter
            uses the product.
    """

    def __init__(self, plain: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.plain = plain

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        place = LINEAR_IN_PARAMETERS.get(func)
        if place is not None and not kwargs.get("training"):
            values = {"weight": kwargs.get("weight"), "bias": kwargs.get("bias")}
            for offset, key in enumerate(values):
                if place + offset < len(args):
                    values[key] = args[place + offset]
            known = {key: self.plain.get(id(value)) for key, value in values.items() if value is not None}
            if func is F.batch_norm and len(args) > place + 2 and args[place + 2]:
                known = {}
            factors = {id(found[1]) for found in known.values() if found is not None}
            if known and len(factors) == 1 and all(found is not None for found in known.values()):
                new = list(args)
                for offset, (key, found) in enumerate((key, known.get(key)) for key in values):
                    if found is not None and place + offset < len(new):
                        new[place + offset] = found[0]
                    elif found is not None:
                        kwargs[key] = found[0]
                factor = next(found[1] for found in known.values() if found is not None)
                return super().__torch_function__(func, types, new, kwargs) * factor
        return super().__torch_function__(func, types, args, kwargs)

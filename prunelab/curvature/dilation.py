"""Dilation: the product of the curvature with the parameters themselves, cheaper than with any other vector.

Multiply every parameter by τ = 1.  Then ∂L/∂τ = θ·g, and its gradient is g + Hθ.  A layer that is linear in its
parameters passes τ on to its output, so ∂L/∂τ needs the gradients of activations only: two of the nine convolutions
that a general Hessian product takes are saved, and g comes along.  With one τ_i per parameter, ∂²L/∂τ_i∂τ_j is
θ_iᵀ H_ij θ_j, numbers in place of blocks.

Flows in: a model and batches.  Flows out: g and Hθ by name; the matrix of all pairs.  Notebook 09_oba derives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call

from prunelab.batches import Batches, Loss, call
from prunelab.curvature.hvp import check_finite, check_part, leaves, pieces, pulled, slopes
from prunelab.curvature.one_pass import evaluating
from prunelab.curvature.twice import CONVOLUTIONS, Rewrite, twice_differentiable
from prunelab.errors import BatchError, PruneLabError

LINEAR_IN_PARAMETERS: dict[Callable[..., Any], int] = {F.linear: 1, F.batch_norm: 3, **dict.fromkeys(CONVOLUTIONS, 1)}
"""Function -> where its weight stands among its arguments; the bias follows it."""


Scale = Callable[[Tensor, Tensor], Tensor]
"""Multiplies a layer's output by a number that is one."""


def self_product(
    model: nn.Module, batches: Batches | None, loss: Loss = F.cross_entropy, *, part: str = "exact"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return ``g`` and ``Hθ``, for all parameters of the model, in eval mode.

    Cost: about three forward and backward passes over the data; batches go through in halves.

    Args:
        model: the network; left as it was.
        batches: pairs ``(inputs, targets [B, …])``.
        loss: ``loss(outputs, targets)``, a mean over the samples.
        part: of the curvature: ``"exact"``, ``"functional"`` or ``"gauss_newton"``.

    Returns:
        The gradient of the mean loss and the product, each a tensor like every parameter by its name.

    Raises:
        BatchError: the batches do not fit the model, the loss is no mean, or a product is not finite.
        BudgetError: there is no such part.
    """
    check_part(part)
    seen, dilate = 0, _dilate
    with evaluating(model):
        named = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
        parameters: list[Tensor] = list(named.values())
        first, second = ([torch.zeros_like(value) for value in parameters] for _ in range(2))
        for number, inputs, targets in pieces(model, batches, "oba"):
            with torch.enable_grad():
                try:
                    found = _one_piece(model, named, inputs, targets, loss, part, dilate, check=not seen)
                except BatchError:
                    if dilate is _dilated_copy:
                        raise
                    dilate = _dilated_copy  # what a layer gave may have been changed in place
                    found = _one_piece(model, named, inputs, targets, loss, part, dilate, check=not seen)
            for total, values in zip((first, second), found, strict=True):
                for sums, value in zip(total, values, strict=True):
                    sums += value
            check_finite(named, first, number)
            check_finite(named, second, number)
            seen += len(targets)
    return tuple({name: value / seen for name, value in zip(named, total, strict=True)} for total in (first, second))  # type: ignore[return-value]


def _one_piece(
    model: nn.Module,
    named: Mapping[str, Tensor],
    inputs: Any,
    targets: Tensor,
    loss: Loss,
    part: str,
    dilate: Scale,
    *,
    check: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    parameters = list(named.values())
    tau = torch.ones((), dtype=parameters[0].dtype, device=parameters[0].device, requires_grad=True)
    outputs = _run(model, named, dict.fromkeys(named, tau), inputs, dilate)
    tensors = leaves(outputs)
    ends, found = slopes(outputs, targets, loss, check=check)
    backs = [slope.detach() for slope in found]
    if part == "gauss_newton":
        dummies = [torch.zeros_like(leaf, requires_grad=True) for leaf in tensors]
        (back,) = pulled(tensors, [tau], dummies, on=True)
        along = pulled([back], dummies, [torch.ones_like(tau)], last=True)  # frees the graph of Jᵀu alone
        gradient = pulled(tensors, parameters, backs)
        return gradient, pulled(tensors, parameters, pulled(found, ends, along), last=True)
    values = tensors
    if part == "exact":
        values = [loss(outputs, targets) * len(targets)]
        backs = [torch.ones_like(values[0])]
    slope, *gradient = pulled(values, [tau, *parameters], backs, on=True)
    gradient = [g.detach() for g in gradient]
    both = pulled([slope], parameters, [torch.ones_like(slope)], last=True)
    return gradient, [total - g for total, g in zip(both, gradient, strict=True)]


def pair_matrix(
    model: nn.Module,
    batches: Batches | None,
    names: Sequence[str],
    loss: Loss = F.cross_entropy,
    *,
    part: str = "exact",
) -> Tensor:
    """Return ``[n, n]`` with ``θ_iᵀ H_ij θ_j`` for every pair of the named parameters, in eval mode.

    Cost: one forward and backward pass over the data, and about as much again for every name.

    Raises:
        PruneLabError: a name is no parameter of the model.
        BatchError: as for ``self_product``.
        BudgetError: there is no such part.
    """
    check_part(part)
    named = dict(model.named_parameters())
    for name in names:
        if name not in named:
            raise PruneLabError(f"`{name}` is no parameter of {type(model).__name__}.")
    like = named[names[0]] if names else torch.zeros(())
    total, seen = torch.zeros(len(names), len(names), dtype=torch.float64), 0
    with evaluating(model):
        for parameter in named.values():
            parameter.requires_grad_(False)
        for number, inputs, targets in pieces(model, batches, "layer_pairs"):
            with torch.enable_grad():
                scales = [torch.ones((), dtype=like.dtype, device=like.device, requires_grad=True) for _ in names]
                outputs = _run(model, named, dict(zip(names, scales, strict=True)), inputs, torch.mul)
                total += _pairs(outputs, targets, loss, part, scales, check=not seen).double().cpu()
            seen += len(targets)
            check_finite(names, list(total), number)
    return total / seen


def _pairs(outputs: Any, targets: Tensor, loss: Loss, part: str, scales: list[Tensor], check: bool) -> Tensor:
    tensors = leaves(outputs)
    ends, found = slopes(outputs, targets, loss, check=check)
    if part == "gauss_newton":
        dummies = [torch.zeros_like(leaf, requires_grad=True) for leaf in tensors]
        rows = [pulled([row], dummies, [torch.ones_like(row)]) for row in pulled(tensors, scales, dummies, on=True)]
        bent = [pulled(found, ends, row) for row in rows]
        return _stacked(rows) @ _stacked(bent).T
    values, backs = tensors, [slope.detach() for slope in found]
    if part == "exact":
        values = [loss(outputs, targets) * len(targets)]
        backs = [torch.ones_like(values[0])]
    gradient = pulled(values, scales, backs, on=True)
    return torch.stack([torch.stack(pulled([row], scales, [torch.ones_like(row)])) for row in gradient])


def _stacked(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat([value.flatten() for value in row]) for row in rows])


def _run(
    model: nn.Module,
    named: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    inputs: Any,
    scale: Scale,
) -> Any:
    """Return the outputs with every named parameter multiplied by its scale, which is one."""
    scaled = {name: named[name] * factor for name, factor in scales.items()}
    mode = _Dilation({id(scaled[name]): (named[name], scales[name]) for name in scaled}, scale)
    with twice_differentiable(mode):
        return call(Replaced(model, scaled), inputs)


class _Dilation(Rewrite):
    """``Rewrite``, and layers that are linear in their parameters scale their outputs instead of these.

    Args:
        plain: ``id`` of a scaled parameter -> the parameter and its scale; anything else that uses a scaled parameter
            uses the product.
        scale: multiplies an output by its scale.
    """

    def __init__(self, plain: Mapping[int, tuple[Tensor, Tensor]], scale: Scale) -> None:
        super().__init__()
        self.plain, self.scale = plain, scale

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
                return self.scale(super().__torch_function__(func, types, new, kwargs), factor)
        return super().__torch_function__(func, types, args, kwargs)


class Replaced(nn.Module):
    """A model some of whose parameters are replaced while it is called."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.call = lambda *args, **kwargs: functional_call(model, tensors, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


class _Dilate(Function):
    """τ x at τ = 1: nothing to compute forward, and τ's gradient is g·x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tau: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x,) = ctx.saved_tensors
        return g, (g * x).sum() if ctx.needs_input_grad[1] and torch.is_grad_enabled() else None


def _dilate(x: Tensor, tau: Tensor) -> Tensor:
    return _Dilate.apply(x, tau)


def _dilated_copy(x: Tensor, tau: Tensor) -> Tensor:
    return _Dilate.apply(x, tau).clone()

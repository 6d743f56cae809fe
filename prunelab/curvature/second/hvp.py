"""Products of curvature matrices with vectors, exact and without the matrices.

The Hessian of the mean loss splits into two parts, by the chain rule through the outputs f:

    H = E[J_nᵀ Λ_n J_n] + Σ_k E[r_nk ∂²f_nk/∂θ²],   r = ∂ℓ/∂f,  Λ = ∂²ℓ/∂f²,  J = ∂f/∂θ,

the Gauss-Newton part (what the loss bends) and the functional part (what the network bends).  One direction goes
through on dual numbers, see `dual.py`.  Several share one double backward pass: a Hessian product is the derivative of
g·v; for a Gauss-Newton product, Jv is the derivative of (Jᵀu)·v in u.

Flows in: a model, batches and directions.  Flows out: products by parameter name.  Notebook 09_oba derives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.batches import Batch, Batches, Loss
from prunelab.curvature.second.double_backward import twice_differentiable
from prunelab.curvature.second.dual import along
from prunelab.curvature.second.vjp import (
    PARTS,
    HessianPart,
    check_finite,
    check_part,
    differentiable,
    half_batches,
    output_gradients,
    vjp,
)
from prunelab.curvature.watching.checkpoints import no_checkpoints
from prunelab.errors import PruneLabError
from prunelab.options import whole
from prunelab.runtime.devices import raise_out_of_memory
from prunelab.runtime.isolation import evaluating
from prunelab.runtime.switches import undisturbed

__all__ = ["PARTS", "functional_product", "ggn_product", "hessian_product", "product", "self_product"]

Vectors = Mapping[str, Tensor]
Multiply = Callable[[list[Tensor], bool], list[Tensor]]
"""A product with one direction, given as a tensor like each parameter; and whether it is the last one."""


def hessian_product(
    model: nn.Module, batches: Batches | None, vectors: Vectors, loss: Loss = F.cross_entropy, *, chunk: int = 1
) -> dict[str, Tensor]:
    """Return ``Hv``, H the Hessian of the mean loss over all samples, in eval mode.

    Cost: for one direction about three forward and backward passes over the data.  Several share one double backward
    pass, about 3.5 passes, and each takes two more; the same where an operator has no forward derivative.  Each batch
    goes through in halves, so that memory stays below twice that of training on it.

    Args:
        model: the network; unchanged afterwards.
        batches: pairs ``(inputs, targets [B, …])``.
        vectors: parameter name -> direction, a tensor like the parameter, or ``[K, *shape]`` for K directions at once.
            Parameters that are not named are held fixed: H is the block of the named ones.
        loss: ``loss(outputs, targets)``, a mean over the samples.
        chunk: with K directions, how many go through one vectorised backward pass.  More memory, fewer calls: for
            small networks, or a GPU.  Where vectorising fails they go one by one.

    Returns:
        The product, by the same names and in the same shapes as ``vectors``.

    Raises:
        PruneLabError: a name is not a parameter, or a vector does not have its shape.
        BatchError: the batches do not fit the model, the loss is not a mean, or a product is not finite.

    Source: Pearlmutter 1994, *Fast Exact Multiplication by the Hessian*, by double backward.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> batch = [(torch.eye(2), torch.zeros(2, 1))]
    >>> hessian_product(model, batch, {"weight": torch.tensor([[1.0, 2.0]])}, F.mse_loss)["weight"]
    tensor([[1., 2.]])
    """
    return product(model, batches, vectors, loss, part="exact", chunk=chunk)


def ggn_product(
    model: nn.Module, batches: Batches | None, vectors: Vectors, loss: Loss = F.cross_entropy, *, chunk: int = 1
) -> dict[str, Tensor]:
    """Return ``Gv``, G = E[J_nᵀ Λ_n J_n] the generalised Gauss-Newton matrix; see ``hessian_product``.

    Source: Schraudolph 2002, *Fast Curvature Matrix-Vector Products*, section 3.
    """
    return product(model, batches, vectors, loss, part="gauss_newton", chunk=chunk)


def functional_product(
    model: nn.Module, batches: Batches | None, vectors: Vectors, loss: Loss = F.cross_entropy, *, chunk: int = 1
) -> dict[str, Tensor]:
    """Return ``(H − G)v``, the curvature of the network weighted by the slope of the loss; see ``hessian_product``.

    It is computed as the Hessian of ``E[r_n · f_n(θ)]`` with the slopes r held fixed, so nothing cancels.
    """
    return product(model, batches, vectors, loss, part="functional", chunk=chunk)


@undisturbed()
def product(
    model: nn.Module,
    batches: Batches | None,
    vectors: Vectors,
    loss: Loss = F.cross_entropy,
    *,
    part: HessianPart = "exact",
    chunk: int = 1,
) -> dict[str, Tensor]:
    """Return the product with one of ``PARTS``; see ``hessian_product``.

    Raises:
        OptionError: there is no such part, or ``chunk`` is not a positive integer.
    """
    check_part(part)
    chunk = whole("chunk", chunk)
    directions, batched = _directions(model, vectors)
    total = [torch.zeros_like(value) for value in directions]
    seen, dual = 0.0, len(directions[0]) == 1
    with no_checkpoints(model, "a curvature product"), evaluating(model):
        named = dict(model.named_parameters())
        parameters: list[Tensor] = [named[name] for name in vectors]
        for parameter in named.values():
            parameter.requires_grad_(any(parameter is chosen for chosen in parameters))
        for number, batch in half_batches(model, batches, "a curvature product", loss, part):
            found: list[Tensor] | None = None
            if dual:
                moves = {name: value[0] for name, value in zip(vectors, directions, strict=True)}
                found = along(model, moves, batch, part)
                dual = found is not None
            if found is not None:
                for sums, value in zip(total, found, strict=True):
                    sums[0] += value
            else:
                _add(total, model, parameters, directions, batch, part, chunk)
            seen += batch.total
            check_finite(vectors, total, number)
    return {
        name: value.div_(seen) if batched else value[0].div_(seen) for name, value in zip(vectors, total, strict=True)
    }


def self_product(
    model: nn.Module, batches: Batches | None, loss: Loss = F.cross_entropy, *, part: HessianPart = "exact"
) -> dict[str, Tensor]:
    """Return ``Hθ``, for all parameters of the model; see ``hessian_product``.

    Cost: about two forward and backward passes for convolutions, three for attention.

    Args:
        model: the network; unchanged afterwards.
        batches: pairs ``(inputs, targets [B, …])``.
        loss: ``loss(outputs, targets)``, a mean over the samples.
        part: of the curvature: ``"exact"``, ``"functional"`` or ``"gauss_newton"``.
    """
    theta = {name: value.detach() for name, value in model.named_parameters() if value.is_floating_point()}
    return product(model, batches, theta, loss, part=part)


def _add(
    total: list[Tensor],
    model: nn.Module,
    parameters: list[Tensor],
    directions: list[Tensor],
    batch: Batch,
    part: str,
    chunk: int,
) -> None:
    """Add the products of one piece, by double backward."""
    with torch.enable_grad():
        with twice_differentiable():
            outputs = batch.run(model)
        multiply = _multiplier(outputs, batch, part, parameters)
        del outputs  # what the multiplier does not need goes
    for place, found in _each_direction(multiply, directions, chunk):
        for sums, value in zip(total, found, strict=True):
            sums[place] += value.detach()


def _multiplier(outputs: Any, batch: Batch, part: str, parameters: list[Tensor]) -> Multiply:
    """Return the product of one batch's summed curvature with directions."""
    tensors = differentiable(outputs)
    ends, found = output_gradients(outputs, batch)
    if part == "gauss_newton":
        dummies = [torch.zeros_like(leaf, requires_grad=True) for leaf in tensors]
        back = vjp(tensors, parameters, dummies, create_graph=True)

        def gauss_newton(v: list[Tensor], last: bool) -> list[Tensor]:
            along = vjp(back, dummies, v, free_graph=last)  # frees the graph of Jᵀu, not that of the outputs
            return vjp(tensors, parameters, vjp(found, ends, along), free_graph=last)

        return gauss_newton
    values, backs = tensors, [slope.detach() for slope in found]
    if part == "exact":
        values = [batch.value(outputs) * batch.total]
        backs = [torch.ones_like(values[0])]
    gradient = vjp(values, parameters, backs, create_graph=True)
    return lambda v, last: vjp(gradient, parameters, v, free_graph=last)


def _each_direction(
    multiply: Multiply, directions: list[Tensor], chunk: int
) -> Iterator[tuple[int | slice, list[Tensor]]]:
    """Yield the products with directions ``[K, …]``, a chunk at a time where that can be vectorised."""
    number, start = len(directions[0]), 0
    while chunk > 1 and start < number:
        some = slice(start, min(start + chunk, number))
        try:
            found = torch.func.vmap(lambda *v: tuple(multiply(list(v), False)))(*(value[some] for value in directions))
        except RuntimeError as error:  # vmap does not know an operator
            raise_out_of_memory(error, "give smaller batches, or a smaller chunk")
            break
        yield some, list(found)
        start = some.stop
    for place in range(start, number):
        yield place, multiply([value[place] for value in directions], place == number - 1)


def _directions(model: nn.Module, vectors: Vectors) -> tuple[list[Tensor], bool]:
    """Return the directions as ``[K, *shape of the parameter]``, and whether they came so."""
    parameters, numbers, out = dict(model.named_parameters()), set(), []
    for name, vector in vectors.items():
        if name not in parameters:
            raise PruneLabError(f"`{name}` is not a parameter of {type(model).__name__}, so it has no direction.")
        parameter = parameters[name]
        batched = vector.dim() == parameter.dim() + 1
        if tuple(vector.shape[batched:]) != tuple(parameter.shape):
            raise PruneLabError(
                f"The direction for `{name}` has shape {list(vector.shape)}, the parameter {list(parameter.shape)}; "
                "several directions are stacked in front."
            )
        numbers.add(len(vector) if batched else None)
        out.append((vector if batched else vector[None]).detach().to(parameter))
    if len(numbers) != 1 or numbers == {0}:
        raise PruneLabError(
            f"Every parameter needs the same number of directions, at least one; found {sorted(map(str, numbers))}."
        )
    return out, None not in numbers

"""Dual numbers: the model runs once on tensors that carry their derivatives along a direction, and once back.

Let every parameter move, θ̇ = v.  A forward pass with the derivatives of all activations gives L̇ = g·v; with v fixed,
its gradient is Hv, by one ordinary backward pass (Pearlmutter's R operator).  Nothing is differentiated twice, and what
is kept are activations and their derivatives.  For v = θ a linear layer has ẏ = W ẋ + y: that is six products both
ways, where training takes three.

PyTorch's forward derivatives do this for any operator that has one; `dual_mode.py` takes shorter ways for some.

Flows in: a model, a direction and a batch.  Flows out: the product.  Notebook 09_oba derives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from prunelab.batches import Batch, call
from prunelab.batches.trees import tree_map
from prunelab.curvature.second.dual_mode import Duals, pair
from prunelab.curvature.second.vjp import differentiable, finite, output_gradients, vjp
from prunelab.errors import BatchError
from prunelab.runtime.devices import raise_out_of_memory
from prunelab.runtime.isolation import replaced
from prunelab.runtime.switches import dual_numbers, ignoring, plain_attention


def along(
    model: nn.Module,
    directions: Mapping[str, Tensor],
    batch: Batch,
    part: str,
) -> list[Tensor] | None:
    """Return the curvature of the summed loss times one direction, over one piece of a batch.

    With r = ∂ℓ/∂f and ḟ the derivative of the outputs, L̇ = r·ḟ.  Its derivative in ḟ is r, and in f, by way of r, Λḟ:
    what comes back from r alone is the functional part, from Λḟ alone the Gauss-Newton part.

    Args:
        model: whose parameters require gradients if they are named, and else do not.
        directions: parameter name -> a tensor like it.
        batch: the piece.
        part: one of ``PARTS``.

    Returns:
        A tensor for each direction; ``None`` where this way is not open, since an operator has no forward derivative,
        or something is wrong, which any other way will say better.
    """
    named = dict(model.named_parameters())
    parameters = [named[name] for name in directions]
    try:
        with torch.enable_grad():
            outputs, moved = _pushed(model, named, directions, batch)
            if _has_more_than_outputs(outputs, batch):
                return None
            ends, found = output_gradients(outputs, batch)
            values, backs = [], []
            if part != "functional":
                values += differentiable(outputs)
                backs += vjp(found, ends, [value.detach() for value in moved])
            if part != "gauss_newton":
                values += moved
                backs += [slope.detach() for slope in found]
            product = vjp(values, parameters, backs, free_graph=True)
            return product if all(map(finite, product)) else None
    except (BatchError, RuntimeError, TypeError, ValueError, IndexError) as error:
        raise_out_of_memory(error)  # any other way takes more
        return None


def _pushed(
    model: nn.Module, named: Mapping[str, Tensor], directions: Mapping[str, Tensor], batch: Batch
) -> tuple[Any, list[Tensor]]:
    """Return the outputs, and the derivative of each that depends on the parameters."""
    _first_dual()
    with dual_numbers():
        duals = {name: forward_ad.make_dual(named[name], value) for name, value in directions.items()}
        known: dict[int, tuple[Tensor, Tensor | None]] = {id(value): (value, None) for value in named.values()}
        known |= {id(duals[name]): (named[name], value) for name, value in directions.items()}
        with plain_attention, Duals(known), replaced(model, duals):
            outputs = batch.picked(call(model, batch.inputs))
        plain = tree_map(lambda leaf: pair(leaf)[0] if isinstance(leaf, Tensor) else leaf, outputs)
        moved = [pair(leaf)[1] for leaf in differentiable(outputs)]
    if any(value is None for value in moved):
        raise BatchError("Outputs have gradients, but no derivative along the direction.")
    return plain, [value for value in moved if value is not None]


@cache
def _first_dual() -> None:
    """Make a dual number, since PyTorch warns with the first of its own use of ``torch.jit.script``."""
    with ignoring("`torch.jit.script`", FutureWarning), dual_numbers():
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def _has_more_than_outputs(outputs: Any, batch: Batch) -> bool:
    """Return whether the loss depends on the parameters in other ways than through the outputs."""
    fixed = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, outputs)
    return batch.value(fixed).requires_grad

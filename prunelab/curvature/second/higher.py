"""Higher: derivatives of any order along the weights themselves, one backward pass for each order.

Flows in: a model, batches and an order.  Flows out: one tensor like each parameter.  Notebook 09_oba uses it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.batches import Batches, Loss
from prunelab.curvature.second.double_backward import twice_differentiable
from prunelab.curvature.second.vjp import check_finite, half_batches, vjp
from prunelab.curvature.watching.checkpoints import no_checkpoints
from prunelab.options import whole
from prunelab.runtime.isolation import evaluating
from prunelab.runtime.switches import undisturbed


@undisturbed()
def self_derivative(
    model: nn.Module, batches: Batches | None, order: int, loss: Loss = F.cross_entropy
) -> dict[str, Tensor]:
    """Return ``D^k L[θ, …, θ, ·]``, the k-th derivative of the mean loss with all places but one filled by θ.

    Order 1 is the gradient g, order 2 is Hθ, and multiplying by θ once more gives each weight's share in the k-th
    Taylor term, up to the factor ``±1/k!``.  The vector θ is held fixed while the derivative is taken.

    Cost: every order keeps the graph of the one before, so that time and memory about double with each.

    Args:
        model: the network; unchanged afterwards.
        batches: pairs ``(inputs, targets [B, …])``.
        order: k, from 1.
        loss: ``loss(outputs, targets)``, a mean over the samples.

    Raises:
        OptionError: the order is not a positive integer.
        BatchError: the batches do not fit the model, the loss is not a mean, or a derivative is not finite.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 2.0)
    >>> cube = lambda outputs, targets: (outputs**3).mean()
    >>> [float(self_derivative(model, [(torch.ones(1, 1), torch.zeros(1))], k, cube)["weight"]) for k in (1, 2, 3)]
    [12.0, 24.0, 24.0]
    """
    order = whole("order", order)
    named = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    theta = [value.detach() for value in named.values()]
    total, seen = [torch.zeros_like(value) for value in theta], 0.0
    with no_checkpoints(model, "a derivative"), evaluating(model):
        parameters: list[Tensor] = list(named.values())
        for parameter in parameters:
            parameter.requires_grad_(True)
        for number, batch in half_batches(model, batches, "a derivative", loss):
            with torch.enable_grad():
                with twice_differentiable():
                    value = batch.value(batch.run(model)) * batch.total
                found = vjp([value], parameters, [torch.ones_like(value)], create_graph=order > 1, free_graph=True)
                for current in range(2, order + 1):
                    found = vjp(found, parameters, theta, create_graph=current < order, free_graph=True)
            for sums, part in zip(total, found, strict=True):
                sums += part.detach()
            seen += batch.total
            check_finite(named, total, number)
    return {name: sums / seen for name, sums in zip(named, total, strict=True)}


__all__ = ["self_derivative"]

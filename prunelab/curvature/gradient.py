"""The mean gradient of the loss, the first-order term of every criterion.

Flows in: a model and batches.  Flows out: ``E[∂ℓ/∂w]`` by parameter name.  Notebook 03_taylor derives its use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.batches import Batches, Loss, checked, mean_loss
from prunelab.curvature.watching.checkpoints import no_checkpoints
from prunelab.errors import BatchError
from prunelab.runtime.isolation import evaluating
from prunelab.runtime.switches import undisturbed


@undisturbed()
def mean_gradient(model: nn.Module, batches: Batches | None, loss: Loss = F.cross_entropy) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over all samples, ``g = E[∂ℓ/∂w]``, in eval mode.

    The model's own ``grad`` fields and mode do not change.  Cost: one forward and one backward pass over the data.

    Args:
        model: the network.
        batches: pairs ``(inputs, targets [B, …])``.
        loss: ``loss(outputs, targets)``, a mean over the samples.

    Returns:
        One tensor like each parameter; zeros for a parameter that the loss does not depend on.

    Raises:
        BatchError: the batches do not fit the model, or a gradient is not finite.
    """
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() or parameter.is_complex()
    }
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    seen = 0.0
    with evaluating(model):
        for number, batch in enumerate(checked(model, batches, "the gradient", loss)):
            with no_checkpoints(model, "the gradient"), torch.enable_grad():
                value = mean_loss(model, batch)
                if not value.requires_grad:
                    raise BatchError(
                        f"The loss of batch {number} has no gradient: it must be computed from the model's outputs by "
                        "differentiable operations, not from numbers or detached tensors."
                    )
                gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is None:
                    continue
                if not gradient.isfinite().all():
                    raise BatchError(f"The gradient of `{name}` is not finite in batch {number}: check its inputs.")
                total[name] += gradient * batch.total
            seen += batch.total
    return {name: value / seen for name, value in total.items()}

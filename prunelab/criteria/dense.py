"""A small network as a quadratic bowl: its weights as one vector, and the inverse of a dense curvature matrix.

Flows in: a network of some thousand weights and batches.  Flows out: the vector and the inverse (``bowl``), or the
network with its least costly weights removed by exact OBS steps (``prune_weights``).  Notebook 05_obs derives it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.batches import Batches, Loss
from prunelab.curvature import exact
from prunelab.curvature.fisher import Curvature
from prunelab.curvature.statistics.collect import Statistics
from prunelab.errors import BatchError, BudgetError, PlanError
from prunelab.options import real, whole
from prunelab.runtime.isolation import copied
from prunelab.runtime.switches import undisturbed
from prunelab.sparsity.masks import parameters_of, prunable, put_masks
from prunelab.sparsity.surgeon import damped_inverse, greedy


@undisturbed()
def prune_weights(
    model: nn.Module,
    batches: Batches | Statistics | None,
    density: float,
    *,
    fisher: Curvature = "ggn",
    damping: float = 1e-2,
    steps: int = 1,
    loss: Loss = F.cross_entropy,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> nn.Module:
    """Return a copy of a small ``model`` with the weights of least cost removed, one by one, and all others adapted.

    After every removal the remaining weights, biases and norms take their best values for ½ δᵀHδ, exactly, and H⁻¹ is
    downdated.  H itself is measured ``steps`` times, at equal numbers of removals.  What is removed carries masks as
    after ``sparsify``.

    Args:
        model: of at most 5000 weights.
        batches: pairs ``(inputs, targets)``.
        density: the share of the prunable weights that is kept, in (0, 1].
        fisher: ``"ggn"``, ``"hessian"``, ``"empirical"`` or ``"mc"``.
        damping: added to the matrix, as a share of its mean eigenvalue.  It also holds the others back where the matrix
            says that moving costs nothing: without any they leave the region in which the quadratic tells the truth.
        steps: how often the matrix is measured.
        loss: ``loss(outputs, targets)``, a mean over samples.
        seed: for ``fisher="mc"``.
        names: parameters that may lose weights; by default those that ``sparsify`` prunes.

    Raises:
        BudgetError: the density or ``steps`` is out of range, the model too large, or the matrix not positive definite.
        PlanError: the model has masks already, or lacks one of ``names``.
        BatchError: the batches do not fit the model.

    Cost: the dense matrix, one inverse, and n² multiplications per removed weight.

    Source: Hassibi & Stork 1992, *Optimal Brain Surgeon*, the procedure after equation 5.
    """
    density = real("density", density, above=0, most=1, why="outside that; it is the share of the weights to keep")
    steps = whole("steps", steps)
    parameters = weights_of(model)
    if parameters.keys() - parameters_of(model).keys():
        raise PlanError(f"{type(model).__name__} has masks or other parametrizations: bake it first.")
    chosen = [name for name in parameters if prunable(model, name)] if names is None else list(names)
    unknown = [name for name in chosen if name not in parameters]
    if unknown or not chosen:
        raise PlanError(f"{type(model).__name__} has no parameter `{(unknown or ['weight'])[0]}` that could be pruned.")
    among = torch.cat([torch.full((value.numel(),), name in chosen) for name, value in parameters.items()])
    total, kept, out = int(among.sum()), torch.ones(len(among), dtype=torch.bool), copied(model)
    goal = total - max(round(density * total), 1)
    for step in range(steps):
        weights, inverse = bowl(out, batches, fisher=fisher, damping=damping, loss=loss, seed=seed, kept=kept)
        gone = int((~kept).sum())
        removal = greedy(weights, inverse, goal * (step + 1) // steps - gone, among=among & kept)
        kept &= removal.kept.cpu()
        with torch.no_grad():
            for name, values in split(removal.weights, model).items():
                out.get_parameter(name).copy_(values)
    masks = split(kept, model)
    return put_masks(out, {name: masks[name] for name in chosen})


def bowl(
    model: nn.Module,
    batches: Batches | Statistics | None,
    *,
    fisher: Curvature = "ggn",
    damping: float = 1e-3,
    loss: Loss = F.cross_entropy,
    seed: int = 0,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return all weights of a small model ``[n]``, and ``(H + damping · mean eigenvalue · I)⁻¹`` ``[n, n]``.

    In float64, in the order of ``model.named_parameters()``.  With ``kept`` (bool ``[n]``) H is that of these weights
    alone, and the inverse is zero in all other rows and columns.

    Raises:
        BudgetError: there are more than 5000 weights, or the matrix is not positive definite.
        BatchError: batches are missing or do not fit the model.
    """
    parameters = weights_of(model)
    count = sum(value.numel() for value in parameters.values())
    if count > exact.LIMIT:
        raise BudgetError(
            f"{type(model).__name__} has {count} weights, and a dense matrix is made for at most {exact.LIMIT}: take "
            'curvature="kronecker".'
        )
    if isinstance(batches, Statistics):
        if batches.batches is None:
            raise BatchError(
                "A dense matrix is not part of `Statistics`, and its batches are gone: pass a data loader."
            )
        batches = batches.batches
    if fisher == "hessian":
        matrix = exact.hessian(model, batches, loss, list(parameters))
    elif fisher == "ggn":
        matrix = exact.ggn(model, batches, loss, list(parameters))
    else:
        matrix = exact.fisher(model, batches, loss, list(parameters), kind=fisher, seed=seed)
    place = torch.arange(count) if kept is None else kept.nonzero().flatten()
    place = place.to(matrix.device)
    small = damped_inverse(matrix[place][:, place], damping, f"The curvature of {type(model).__name__}")
    inverse, place = small.new_zeros(count, count), place.to(small.device)
    inverse[place[:, None], place] = small
    return torch.cat([value.detach().flatten() for value in parameters.values()]).to(inverse), inverse


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point parameters by name, tied ones once."""
    return {name: value for name, value in model.named_parameters() if value.is_floating_point()}


def split(values: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Return a vector over all weights as parameter name -> tensor like the parameter."""
    parameters = weights_of(model)
    parts = values.split([value.numel() for value in parameters.values()])
    return {name: part.view_as(value) for (name, value), part in zip(parameters.items(), parts, strict=True)}

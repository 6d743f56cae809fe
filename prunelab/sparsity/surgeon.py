"""The brain surgeon's algebra: which weights to remove from a quadratic bowl, and how the others make up for them.

Around a minimum the loss changes by ``½ δᵀHδ``.  Removing the weights S means δ_S = −w_S; the best the others can do is

    δ = −H⁻¹[:, S] ([H⁻¹]_SS)⁻¹ w_S,      at a cost of      ½ w_Sᵀ ([H⁻¹]_SS)⁻¹ w_S,

and for a single weight q, δ = −w_q/[H⁻¹]_qq · H⁻¹e_q at ½ w_q²/[H⁻¹]_qq.  What is removed leaves the matrix too: the
inverse of the rest of H is ``H⁻¹ − H⁻¹[:, S] ([H⁻¹]_SS)⁻¹ H⁻¹[S, :]``, so no second inverse is ever computed.

Flows in: weights as one vector and a dense matrix.  Flows out: costs, updates, and the weights that are left.  Notebook
05_obs derives it.  Source: Hassibi & Stork 1992, *Second Order Derivatives for Network Pruning: Optimal Brain Surgeon*,
equation 5; Frantar, Singh & Alistarh 2022, *Optimal Brain Compression*, equation 3 and lemma 1 (the downdate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunelab.errors import BudgetError
from prunelab.options import real
from prunelab.runtime.devices import exact


@dataclass(frozen=True, eq=False)
class Removal:
    """What a greedy surgeon did.

    Attributes:
        order: what was removed, in order: weights, or numbers of sets.
        costs: float64 ``[len(order)]``, by how much each removal raised ``½ δᵀHδ``; they add up to what all cost.
        weights: ``[n]``, the weights afterwards: zero where removed, elsewhere compensated.
        inverse: ``[n, n]``, the inverse of H over what is left; zero in the rows and columns of what is not.
        kept: bool ``[n]``.
    """

    order: tuple[int, ...]
    costs: Tensor
    weights: Tensor
    inverse: Tensor
    kept: Tensor


def damped(matrix: Tensor, damping: float = 0.0) -> Tensor:
    """Return ``H + damping · mean eigenvalue · I`` in float64, for symmetric matrices ``[…, n, n]``.

    Raises:
        OptionError: damping is negative.
    """
    damping = real("damping", damping, least=0)
    matrix = exact(matrix)
    matrix = (matrix + matrix.mT) / 2
    level = damping * matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)  # nothing at all costs nothing
    return matrix + torch.diag_embed(level[..., None].expand(matrix.shape[:-1]))


def damped_inverse(matrix: Tensor, damping: float = 0.0, what: str = "The curvature") -> Tensor:
    """Return ``(H + damping · mean eigenvalue · I)⁻¹`` in float64.

    Args:
        matrix: ``[…, n, n]``, symmetric up to rounding.
        damping: at least 0.
        what: the matrix is, for errors.

    Raises:
        BudgetError: damping is negative, or what is to be inverted is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(damped(matrix, damping))
    if failed.any() or not factor.isfinite().all():
        raise BudgetError(
            f"{what} with damping={damping} is not positive definite, so there is no best compensation: raise the "
            'damping, or take a curvature that is never negative (fisher="ggn").'
        )
    return torch.cholesky_inverse(factor)


def saliency(weights: Tensor, inverse: Tensor) -> Tensor:
    """Return ``½ w_q²/[H⁻¹]_qq`` for every weight ``[n]``; infinite for those that are gone from the inverse."""
    diagonal = inverse.diagonal()
    gone = diagonal <= 0
    return (weights.to(inverse).square() / 2 / diagonal.masked_fill(gone, 1)).masked_fill(gone, torch.inf)


def joint_saliency(weights: Tensor, inverse: Tensor, index: Tensor) -> Tensor:
    """Return ``½ w_Sᵀ([H⁻¹]_SS)⁻¹w_S``, what removing the weights S together costs; S as int64 ``[s]``."""
    removed = weights.to(inverse)[index]
    return removed @ torch.linalg.solve(inverse[index][:, index], removed) / 2


def joint_update(weights: Tensor, inverse: Tensor, index: Tensor) -> Tensor:
    """Return δ ``[n]``, the change of all weights that removes those of S (int64 ``[s]``) at the least cost."""
    removed = weights.to(inverse)[index]
    delta = -(inverse[:, index] @ torch.linalg.solve(inverse[index][:, index], removed))
    delta[index] = -removed
    return delta


def downdate(inverse: Tensor, index: Tensor) -> Tensor:
    """Return the inverse of H without the rows and columns S (int64 ``[s]``), ``[n, n]`` with zeros in their place.

    Cost: s n² multiplications instead of the n³ of a new inverse.
    """
    out = inverse - inverse[:, index] @ torch.linalg.solve(inverse[index][:, index], inverse[index])
    out[index], out[:, index] = 0, 0
    return (out + out.mT) / 2


def greedy(
    weights: Tensor,
    inverse: Tensor,
    count: int,
    *,
    sets: Sequence[Tensor] | None = None,
    among: Tensor | None = None,
) -> Removal:
    """Remove the weight of least saliency, compensate, downdate the inverse, and again, ``count`` times.

    Every step is exact for the quadratic, also after the steps before it; together they cost what removing all of them
    at once does.  The *choice* is greedy: the best set of k weights may be another one.

    Args:
        weights: ``[n]``.
        inverse: ``[n, n]``, as ``damped_inverse`` returns it; not changed.
        count: how many weights go, or sets.
        sets: instead of single weights remove whole sets of them, each int64 ``[s]``.
        among: bool ``[n]``: only these weights may go; the others compensate all the same.

    Raises:
        BudgetError: there are fewer weights or sets than should go.

    Cost: n² multiplications per weight; with sets s³ more for every set at every step.
    """
    left = weights.to(inverse).clone()
    inverse = inverse.clone()
    kept = torch.ones(len(left), dtype=torch.bool, device=left.device)
    allowed = kept.clone() if among is None else among.to(left.device)
    available = int(allowed.sum()) if sets is None else len(sets)
    if not 0 <= count <= available:
        raise BudgetError(f"{count} should go, but only {available} may.")
    order: list[int] = []
    costs: list[Tensor] = []
    for _ in range(count):
        if sets is None:
            choice = saliency(left, inverse).nan_to_num(posinf=torch.finfo(left.dtype).max)
            choice = choice.masked_fill(~(allowed & kept), torch.inf)
            best = int(choice.argmin())
            index = torch.tensor([best], device=left.device)
        else:
            remaining = [place for place in range(len(sets)) if place not in order]
            indices = {place: _alive(sets[place].to(left.device), kept) for place in remaining}
            prices = {place: joint_saliency(left, inverse, indices[place]) for place in remaining}
            best = min(remaining, key=lambda place: float(prices[place]))
            index = indices[best]
        costs.append(joint_saliency(left, inverse, index))
        left += joint_update(left, inverse, index)
        kept[index] = False
        left[~kept] = 0
        inverse = downdate(inverse, index)
        order.append(best)
    total = torch.stack(costs) if costs else left.new_zeros(0)
    return Removal(tuple(order), total, left, inverse, kept)


def _alive(index: Tensor, kept: Tensor) -> Tensor:
    return index[kept[index]].unique()

"""The Kronecker family: what a channel costs if the Fisher of a weight is S ⊗ A.

The slice of unit u is rows i of a weight W ``[out, in]``.  Under F ≈ S ⊗ A (⊗ I over kernel positions) the quadratic
model ½ δᵀFδ is small matrix algebra.  OBD leaves the other weights alone, OBS lets them adapt; either a whole channel
goes at once (``kron_*``), or the weights of a channel are charged one by one and added up (``c_*``):

    kron_obd  ½ S_ii · w_iᵀ A w_i             kron_obs  ½ w_iᵀ A w_i / [S⁻¹]_ii
    c_obd     ½ Σ_j w_ij² F_ij,ij             c_obs     ½ Σ_j w_ij² / ([S⁻¹]_ii [A⁻¹]_jj)

Flows in: a dependency graph and batches or ``Statistics``.  Flows out: ``Scores``.  Notebook 07_kfac derives them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from prunelab.criteria.base import sum_by_unit
from prunelab.criteria.blocks import Block, KroneckerCriterion
from prunelab.curvature.statistics.collect import Statistics
from prunelab.curvature.statistics.kronecker import Factors
from prunelab.options import one_of
from prunelab.sparsity.surgeon import damped_inverse
from prunelab.tracing.groups import Member

QuadraticForm = Literal["exact", "published"]
QUADRATIC_FORMS: tuple[QuadraticForm, ...] = get_args(QuadraticForm)
Diagonal = Literal["moments", "kronecker"]
DIAGONALS: tuple[Diagonal, ...] = get_args(Diagonal)


@dataclass
class KronOBD(KroneckerCriterion, name="kron_obd"):
    """Score a channel by ``½ S_ii · w_iᵀ A w_i``, its whole block of F ≈ S ⊗ A; the other weights stay.

    A unit with several rows: ``½ Σ_{i,i'} S_ii' w_iᵀ A w_i'``.

    In the quadratic model this keeps ``½ δᵀHδ`` with a block H ≈ S ⊗ A per layer, on producers alone.  Cost: one
    forward and one backward pass.

    Args:
        quadratic_form: ``"exact"``, or ``"published"`` for what the paper's code computes in place of w_iᵀ A w_i:
            ``Σ_j [(w_i ⊙ w_i) A]_j``, every entry of A charged against squares; the two agree where A is diagonal.
        fisher, loss, seed, group_reduction, normalizer: see ``KroneckerCriterion``.

    Source: Wang et al. 2019, *EigenDamage*, section 4.
    """

    quadratic_form: QuadraticForm = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_form(self.quadratic_form)

    def score(self, part: Block, size: int) -> Tensor:
        """Return ``[size]``."""
        if self.quadratic_form == "published":
            return 0.5 * part.sum_rows(part.S.diagonal(dim1=1, dim2=2) * _published(part), size)
        return 0.5 * part.together(part.S * part.gram(), size)


@dataclass
class KronOBS(KroneckerCriterion, name="kron_obs"):
    """Score a channel by ``½ w_iᵀ A w_i / [S⁻¹]_ii``: what is left of its cost when the other channels adapt.

    It is the minimum of ½ δᵀ(S ⊗ A)δ over all δ that take the channel away.  A unit with several rows R:
    ``½ tr(([S⁻¹]_RR)⁻¹ W_R A W_Rᵀ)``.

    In the quadratic model this keeps ``½ δᵀHδ`` with a block H ≈ S ⊗ A per layer, at its minimum over the other weights
    of that layer.  Cost: one forward and one backward pass, and an eigendecomposition per layer.

    Args:
        damping: added to S, as a share of its mean eigenvalue.
        quadratic_form: as in ``KronOBD``.
        fisher, loss, seed, group_reduction, normalizer: see ``KroneckerCriterion``.

    Source: Wang et al. 2019, *EigenDamage*, section 4.
    """

    damping: float = 1e-3
    quadratic_form: QuadraticForm = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_form(self.quadratic_form)

    def score(self, part: Block, size: int) -> Tensor:
        """Return ``[size]``."""
        inverse = _inverse(part.S, self.damping, part)
        if self.quadratic_form == "published":
            return 0.5 * part.sum_rows(_published(part) / inverse.diagonal(dim1=1, dim2=2), size)
        gram = part.gram()
        if torch.bincount(part.unit[part.unit >= 0], minlength=size).amax() <= 1:
            return 0.5 * part.sum_rows((gram / inverse).diagonal(dim1=1, dim2=2), size)
        scores = gram.new_zeros(size)
        for unit, place, rows in part.rows_of(size):
            inner = inverse[place][rows[:, None], rows]
            scores[unit] += 0.5 * torch.linalg.solve(inner, gram[place][rows[:, None], rows]).trace()
        return scores


@dataclass
class COBD(KroneckerCriterion, name="c_obd"):
    """Score a channel by ``½ Σ_j w_ij² F_ij,ij``: OBD of its weights, added up.

    In the quadratic model this keeps ``½ δᵀHδ`` with a diagonal H, on producers alone.  Cost: one forward and one
    backward pass with per-sample moments.

    Args:
        curvature: the diagonal of F: ``"moments"``, ``E[g_n²]`` of the samples' gradients, as in the paper; or
            ``"kronecker"``, ``S_ii A_jj``.
        fisher, loss, seed, group_reduction, normalizer: see ``KroneckerCriterion``.

    Source: Wang et al. 2019, *EigenDamage*, section 4; LeCun et al. 1989 for a single weight.
    """

    curvature: Diagonal = "moments"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("curvature", self.curvature, DIAGONALS)

    def needs(self) -> set[str]:
        """Return which statistics are used."""
        return {self.curvature}

    def by_weight(self, statistics: Statistics) -> dict[str, list[Any]]:
        """Return weight name -> its moments, or its factors."""
        if self.curvature == "kronecker":
            return super().by_weight(statistics)
        return {name: [moment] for name, moment in statistics.moments.items() if moment.dim() > 1}

    def member(self, factors: Factors | Tensor, member: Member, weight: Tensor, size: int) -> Tensor | None:
        """Return ``[size]``: what every unit costs on one layer."""
        if isinstance(factors, Tensor):
            return 0.5 * sum_by_unit(weight.detach() ** 2 * factors, member, size)
        return super().member(factors, member, weight, size)

    def score(self, part: Block, size: int) -> Tensor:
        """Return ``[size]``."""
        s, a = part.S.diagonal(dim1=1, dim2=2), part.A.diagonal(dim1=1, dim2=2)
        return 0.5 * part.sum_rows(s * torch.einsum("gnik,gi->gn", part.values**2, a), size)


@dataclass
class COBS(KroneckerCriterion, name="c_obs"):
    """Score a channel by ``½ Σ_j w_ij² / [F⁻¹]_ij,ij`` with ``F⁻¹ = S⁻¹ ⊗ A⁻¹``: OBS of its weights, added up.

    In the quadratic model this keeps ``½ δᵀHδ`` with H = S ⊗ A, at its minimum for every weight of the channel by
    itself.  Cost: one forward and one backward pass, and two eigendecompositions per layer.

    Args:
        damping: added to S and to A, as a share of the mean eigenvalue of each.
        fisher, loss, seed, group_reduction, normalizer: see ``KroneckerCriterion``.

    Source: Wang et al. 2019, *EigenDamage*, section 4; Hassibi & Stork 1992 for a single weight.
    """

    damping: float = 1e-3

    def score(self, part: Block, size: int) -> Tensor:
        """Return ``[size]``."""
        s, a = (_inverse(factor, self.damping, part).diagonal(dim1=1, dim2=2) for factor in (part.S, part.A))
        return 0.5 * part.sum_rows(torch.einsum("gnik,gi->gn", part.values**2, 1 / a) / s, size)


def _inverse(factor: Tensor, damping: float, part: Block) -> Tensor:
    return damped_inverse(factor, damping, f"A Kronecker factor of `{part.factors.weight}`").to(factor)


def _published(part: Block) -> Tensor:
    return torch.einsum("gnik,gij->gn", part.values**2, part.A)


def _check_form(form: str) -> None:
    one_of("quadratic_form", form, QUADRATIC_FORMS)

"""EigenDamage: charge removal where the Fisher is closest to diagonal, in its Kronecker-factored eigenbasis (KFE).

With A = Q_A diag(λ_A) Q_Aᵀ and S = Q_S diag(λ_S) Q_Sᵀ, the weight has the coordinates W* = Q_Sᵀ W Q_A, in which S ⊗ A
is diagonal: weights there do not interact, and OBD is exact for as much of the Fisher as S ⊗ A holds.  A row of W* is a
direction of the outputs, a column one of the inputs; taking some away leaves a bottleneck (``pl.factorize``).

Flows in: a dependency graph and batches or ``Statistics``.  Flows out: ``EigenScores``.  Notebook 08_eigendamage has
the derivation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from prunelab.batches import Batches
from prunelab.criteria.base import KINDS, Scores
from prunelab.criteria.blocks import Block, KroneckerCriterion
from prunelab.criteria.stored import Stored
from prunelab.curvature.statistics.collect import Statistics, statistics_for
from prunelab.curvature.statistics.kronecker import Factors
from prunelab.errors import PlanError
from prunelab.options import one_of
from prunelab.tracing.trace import DependencyGraph


@dataclass(frozen=True, eq=False)
class LayerScores:
    """The directions of one layer and what each costs; all tensors on the CPU, ``[groups, …]`` first with groups.

    Attributes:
        weight: qualified name of the weight.
        importance: ``½ W*² ⊙ Λ``, summed over kernel positions, ``[out, in]``.
        Q_S: columns are directions of the outputs, ``[out, out]``.
        Q_A: columns are directions of the inputs, ``[in, in]``.
    """

    weight: str
    importance: Tensor
    Q_S: Tensor
    Q_A: Tensor

    def __post_init__(self) -> None:
        if not all(part.isfinite().all() for part in (self.importance, self.Q_S, self.Q_A)):
            raise PlanError(f"EigenDamage gave no number for some directions of `{self.weight}`.")

    @property
    def rows(self) -> Tensor:
        """``[out]``: what each direction of the outputs costs, alone."""
        return self.importance.sum(-1)

    @property
    def columns(self) -> Tensor:
        """``[in]``: what each direction of the inputs costs, alone."""
        return self.importance.sum(-2)


@dataclass(frozen=True, eq=False)
class EigenScores(Scores):
    """Scores of the directions of every layer, for ``pl.factorize``; and of the units of every group, for ``pl.plan``.

    The score of a unit is what zeroing its rows costs under the same curvature, ½ Σ (Q_Sᵀ W_u Q_A)² ⊙ Λ.

    Attributes:
        layers: weight name -> its directions.
    """

    layers: Mapping[str, LayerScores] = field(default_factory=dict)

    def _layers(self) -> Iterable[str]:
        return self.layers

    def _tensors(self) -> dict[str, Tensor]:
        return super()._tensors() | {
            f"layers/{name}/{part}": getattr(layer, part) for name, layer in self.layers.items() for part in _PARTS
        }

    @classmethod
    def _made(cls, stored: Stored) -> EigenScores:
        units = Scores._made(stored)
        tensors = stored.tensors
        layers = {
            name: LayerScores(name, *(tensors[f"layers/{name}/{part}"] for part in _PARTS)) for name in stored.layers
        }
        return cls(units.graph, units.by_name, units.criterion, units.matrix, layers)


KINDS["EigenScores"] = EigenScores

Correction = Literal["none", "ekfac"]
CORRECTIONS: tuple[Correction, ...] = get_args(Correction)

_PARTS = ("importance", "Q_S", "Q_A")
"""What is stored of every layer."""


@dataclass
class EigenDamage(KroneckerCriterion, name="eigendamage"):
    """Score directions of the Kronecker-factored eigenbasis by ``½ W*² ⊙ Λ``, summed over rows and over columns.

    ``W* = Q_Sᵀ W Q_A``; Λ = λ_S λ_Aᵀ, or with ``correction="ekfac"`` the exact second moments of the samples' gradients
    in that basis, ``E[(Q_Sᵀ G_n Q_A)²]``.

    In the quadratic model this keeps ``½ δᵀHδ`` with H taken as diagonal in that basis, for directions instead of
    channels.  Cost: one forward and one backward pass (two with the correction), and two
    eigendecompositions per layer.

    Args:
        correction: ``"none"`` or ``"ekfac"``.
        fisher, loss, seed, group_reduction, normalizer: see ``KroneckerCriterion``; the last two are about units.

    Source: Wang et al. 2019, *EigenDamage*, section 4 and algorithm 1; the correction is that of George et al. 2018,
    *Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis*, equation 11.
    """

    correction: Correction = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("correction", self.correction, CORRECTIONS)

    def needs(self) -> set[str]:
        """Return which statistics are used."""
        return {"kronecker", "ekfac"} if self.correction == "ekfac" else {"kronecker"}

    def __call__(self, graph: DependencyGraph, batches: Batches | Statistics | None = None) -> EigenScores:
        """Return the scores of directions and units.

        Raises:
            BatchError: batches are missing or do not fit the model, or the statistics are of another kind.
        """
        found = statistics_for(graph, batches, self.needs(), fisher=self.fisher, loss=self.loss, seed=self.seed)
        parameters = dict(graph.model.named_parameters())
        layers = {name: self.layer(factors, parameters[factors.weight]) for name, factors in found.kronecker.items()}
        return EigenScores(graph, self.units(graph, found), str(self), layers=layers)

    def layer(self, factors: Factors, weight: Tensor) -> LayerScores:
        """Return the scores of the directions of one weight."""
        rotated = factors.rotate(factors.matrices(weight.detach().to(factors.A)))
        importance = 0.5 * rotated**2 * self.spectrum(factors, rotated)
        places = importance.dim() - (2 if factors.view.groups == 1 else 3)
        summed = importance.flatten(-places).sum(-1) if places else importance
        basis = factors.eigen()
        return LayerScores(factors.weight, summed.cpu(), basis.Q_S.cpu(), basis.Q_A.cpu())

    def spectrum(self, factors: Factors, like: Tensor) -> Tensor:
        """Return Λ, which broadcasts against a rotated weight."""
        if self.correction == "ekfac":
            assert factors.moments is not None
            return factors.moments.to(like)
        basis = factors.eigen()
        product = basis.lambda_S[..., :, None] * basis.lambda_A[..., None, :]
        return product.to(like).view(*product.shape, *(1,) * (like.dim() - product.dim()))

    def score(self, part: Block, size: int) -> Tensor:
        """Return ``[size]``: ½ Σ Λ ⊙ (Q_Sᵀ W_u Q_A)², W_u the rows of the unit alone."""
        if self.correction == "none":
            return 0.5 * part.together(part.S * part.gram(), size)
        basis, factors = part.factors.eigen(), part.factors
        left, right = (basis.Q_A, basis.Q_S) if part.flipped else (basis.Q_S, basis.Q_A)
        spectrum = self.spectrum(factors, part.values)
        if factors.view.groups == 1:
            left, right, spectrum = left[None], right[None], spectrum[None]
        spectrum = spectrum.reshape(*spectrum.shape[:3], -1)
        spectrum = spectrum.transpose(1, 2) if part.flipped else spectrum
        half = torch.einsum("gnik,gij->gnjk", part.values, right)
        scores = part.values.new_zeros(size)
        for unit, place, rows in part.rows_of(size):
            rotated = torch.einsum("na,njk->ajk", left[place][rows], half[place][rows])
            scores[unit] += 0.5 * (rotated**2 * spectrum[place]).sum()
        return scores

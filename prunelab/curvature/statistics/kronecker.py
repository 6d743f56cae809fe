"""Kronecker factors: the Fisher of a weight as the product of two small matrices, K-FAC.

The gradient of a sample's loss with respect to a weight is a sum over positions of (gradient of the output) ⊗ (input).
If the two are independent, and positions too, its second moment is a product,

    F ≈ S ⊗ A,     S = E[Σ_p g_p g_pᵀ]  [out, out],     A = E[mean_p a_p a_pᵀ]  [in, in],

for the weight flattened row by row, ``[out, in]``.  S sums over positions and A averages over them ("expand": every
position counts as an observation of its own).

A convolution's input at a position is a patch of in × K numbers.  Its *channel factor* is the one A ``[in, in]`` for
which F ≈ S ⊗ A ⊗ I_K: the mean over the K kernel positions too.  It needs no patches: with count_q how many of them
cover pixel q, A = Σ_q count_q x_q x_qᵀ / (positions · K).  A transposed convolution is the mirror image: A is the mean
over the pixels of its input, and S = Σ_q count_q g_q g_qᵀ / K over the pixels of its output.

Flows in: layer calls and the gradients of their outputs.  Flows out: one ``Factors`` per weight.  Notebook 07_kfac
derives them, 08_eigendamage their eigenbasis.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from prunelab.curvature.watching.weight_view import WeightView
from prunelab.runtime.devices import exact, raise_out_of_memory


class Eigenbasis(NamedTuple):
    """Eigenvectors (columns) and eigenvalues (ascending, not negative) of both: ``A = Q_A diag(λ_A) Q_Aᵀ``."""

    Q_A: Tensor
    lambda_A: Tensor
    Q_S: Tensor
    lambda_S: Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """The Kronecker factors of one weight, or of some rows of one.

    With several groups there are as many blocks, and every tensor begins with that dimension: A ``[groups, in / groups,
    in / groups]``, S ``[groups, out / groups, out / groups]``.  With one group there is no such dimension.

    Attributes:
        weight: qualified name of the parameter.
        rows: which rows (dimension 0) of it; all, unless the model uses it slice by slice.
        kind: ``"linear"``, ``"conv"`` or ``"conv_transpose"``.
        view: how the weight is laid out, with the kernel and the groups of a convolution.
        A: second moment of the inputs, ``[in, in]``; ``[in · K, in · K]`` with ``factor="full"``.
        S: second moment of the gradients of the outputs, ``[out, out]``.
        mean: ``[in]``, the mean input: the column of A that belongs to a bias, whose last entry is 1; of channel
            factors the mean over kernel positions.
        factor: ``"channel"`` or ``"full"``; for linear layers they are the same.
        bias: name of the bias, if there is one.
        bias_rows: which entries of it.
        samples: over how many samples.
        positions: over how many inputs (samples × positions × kernel positions) A is the mean.
        moments: EKFAC, the exact second moments of the samples' gradients in the eigenbasis, ``E[(Q_Sᵀ G_n Q_A)²]``,
            in the shape of ``matrices(weight)``: ``[out, in, *kernel]``, or ``[out, in · K]`` with ``factor="full"``;
            ``None`` unless asked for.  λ_S λ_Aᵀ approximates their mean over ``*kernel``.
        basis: the eigenvectors Q_A, Q_S that belong to ``moments``.

    Source: Martens & Grosse 2015, *Optimizing Neural Networks with Kronecker-factored Approximate Curvature*, section
    3; Grosse & Martens 2016, *A Kronecker-factored approximate Fisher matrix for convolution layers*, section 3;
    Eschenhagen et al. 2023, *Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures*
    (K-FAC-expand); channel factors as in Wang et al. 2019, *EigenDamage*; EKFAC: George et al. 2018, equation 6.
    """

    weight: str
    rows: slice
    kind: str
    view: WeightView
    A: Tensor
    S: Tensor
    mean: Tensor
    factor: str = "channel"
    bias: str | None = None
    bias_rows: slice = field(default_factory=lambda: slice(0, 0))
    samples: int = 0
    positions: float = 0
    moments: Tensor | None = None
    basis: tuple[Tensor, Tensor] | None = None

    def eigen(self) -> Eigenbasis:
        """Return the eigenbasis of both factors, the KFE; it is computed once and kept."""
        return self._eigen

    @cached_property
    def _eigen(self) -> Eigenbasis:
        if self.basis is not None:
            q_a, q_s = self.basis
            lambda_a, lambda_s = ((q * (m @ q)).sum(-2).clamp_min(0) for q, m in ((q_a, self.A), (q_s, self.S)))
            return Eigenbasis(q_a, lambda_a, q_s, lambda_s)
        (lambda_a, q_a), (lambda_s, q_s) = eigh(self.A), eigh(self.S)
        return Eigenbasis(q_a, lambda_a, q_s, lambda_s)

    def damped(self, damping: float) -> tuple[Tensor, Tensor]:
        """Return ``(A + damping · mean eigenvalue · I, S + …)``, each relative to its own mean eigenvalue."""
        return _damped(self.A, damping), _damped(self.S, damping)

    def matrices(self, values: Tensor) -> Tensor:
        """Return the rows that the factors are of, of a tensor like the weight, with its axes in the factors' order.

        Returns:
            ``[out, in, *kernel]``; ``[out, in · K]`` with ``factor="full"``; with groups ``[groups, out / groups, …]``.
        """
        return self.split(values[self.rows])

    def split(self, rows: Tensor) -> Tensor:
        """Return what ``matrices`` returns, from the rows alone."""
        split = self.view.as_matrix(rows)
        split = split.flatten(2) if self.factor == "full" else split
        return split[0] if self.view.groups == 1 else split

    def like_weight(self, matrices: Tensor) -> Tensor:
        """Return what ``matrices`` took apart, in the shape of those rows of the weight."""
        return self.view.from_matrix(matrices[None] if self.view.groups == 1 else matrices)

    def rotate(self, matrices: Tensor) -> Tensor:
        """Return ``Q_Sᵀ W Q_A``, the coordinates in the eigenbasis of a tensor as ``matrices`` gives it."""
        basis = self.eigen()
        return _both_sides(basis.Q_S.mT, matrices, basis.Q_A)

    def rotate_back(self, matrices: Tensor) -> Tensor:
        """Return ``Q_S W Q_Aᵀ``: undo ``rotate``."""
        basis = self.eigen()
        return _both_sides(basis.Q_S, matrices, basis.Q_A.mT)


def _both_sides(left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    pattern = "ab,bc...,cd->ad..." if left.dim() == 2 else "gab,gbc...,gcd->gad..."
    return torch.einsum(pattern, left.to(values), values, right.to(values))


def _damped(matrix: Tensor, damping: float) -> Tensor:
    level = damping * matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    return matrix + torch.diag_embed(level[..., None].expand(matrix.shape[:-1]))


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (ascending, clipped at zero) and eigenvectors of symmetric matrices ``[…, n, n]``.

    Where the device has no such routine, or it does not converge, they are computed in float64 on the CPU.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
        done = bool(values.isfinite().all())
    except RuntimeError as error:  # the device has no such routine, or it did not converge
        raise_out_of_memory(error)
        values, vectors, done = matrix, matrix, False
    if not done:
        values, vectors = (part.to(matrix) for part in torch.linalg.eigh(exact(matrix.cpu())))
    return values.clamp_min(0), vectors

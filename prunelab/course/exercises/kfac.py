"""Checkers for the exercises of ``07_kfac``: coverage of pixels, the two factors, the cost of a channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, compare


def coverage_of(function: Callable[[int, int, int, int], Tensor]) -> Verdict:
    """Check ``function(size, kernel, stride, padding)``: how many patches see each pixel, ``[size]``."""
    mistakes: dict[str, Callable[..., Any]] = {
        "pixels at the edge are seen by fewer patches than those in the middle": (
            lambda size, kernel, stride, padding: torch.full((size,), float(kernel))
        ),
        "it starts the first patch at the first pixel; it begins `padding` pixels before it": (
            lambda size, kernel, stride, padding: _coverage(size, kernel, stride, 0, shift=0, pad=padding)
        ),
        "it moves every patch on by one pixel; the next patch begins `stride` pixels later": (
            lambda size, kernel, stride, padding: _coverage(size, kernel, 1, padding)
        ),
        "these are the counts of the padded image; the padding is no pixel, so leave it out": (
            lambda size, kernel, stride, padding: _coverage(size + 2 * padding, kernel, stride, 0)
        ),
        "it says which pixels are seen, and not how often": (
            lambda size, kernel, stride, padding: _coverage(size, kernel, stride, padding).clamp_max(1)
        ),
    }
    return compare(
        function,
        [(6, 3, 1, 1), (7, 3, 2, 1), (6, 5, 1, 2), (8, 1, 2, 0)],
        _coverage,
        mistakes,
        praise="every position hands a one to each pixel that it sees; that is a transposed convolution of ones.",
        hint="Go through the positions, and add one to every pixel that each of them sees.",
    )


def _coverage(
    size: int, kernel: int, stride: int, padding: int, shift: int | None = None, pad: int | None = None
) -> Tensor:
    """Return the counts; ``shift`` is where the first patch begins, ``pad`` how much padding the number is made of."""
    count = torch.zeros(size)
    first = -padding if shift is None else shift
    positions = (size + 2 * (padding if pad is None else pad) - kernel) // stride + 1
    for position in range(positions):
        start = first + position * stride
        count[max(start, 0) : max(start + kernel, 0)] += 1
    return count


def kronecker_fisher(function: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """Check ``function(a, g)``: S ⊗ A of inputs ``[n, positions, in]`` and gradients ``[n, positions, out]``."""
    cases = [
        (
            torch.tensor([[[1.0, 2.0], [0.0, 1.0]], [[2.0, 1.0], [3.0, 0.0]], [[1.0, -1.0], [2.0, 2.0]]]),
            torch.tensor([[[1.0, -1.0], [2.0, 0.0]], [[0.0, 1.0], [1.0, 1.0]], [[-1.0, 2.0], [1.0, 0.0]]]),
        ),
        (
            torch.tensor([[[1.0], [2.0]], [[3.0], [1.0]]]),
            torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[2.0, 1.0], [0.0, -1.0]]]),
        ),
    ]

    def factors(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return torch.einsum("npo,npq->oq", g, g) / len(g), torch.einsum("npi,npj->ij", a, a) / (len(a) * a.shape[1])

    def right(a: Tensor, g: Tensor) -> Tensor:
        return torch.kron(*factors(a, g))

    def whole(a: Tensor, g: Tensor) -> Tensor:
        rows = torch.einsum("npo,npi->noi", g, a).flatten(1)
        return rows.mT @ rows / len(rows)

    def summed_first(a: Tensor, g: Tensor) -> Tensor:
        a, g = a.mean(1), g.sum(1)
        return torch.kron(g.mT @ g / len(g), a.mT @ a / len(a))

    def centred(a: Tensor, g: Tensor) -> Tensor:
        middle = a.mean((0, 1))
        return right(a - middle, g)

    mistakes: dict[str, Callable[..., Any]] = {
        "the factors are in the wrong order: with the weight written row by row, S comes first": (
            lambda a, g: torch.kron(factors(a, g)[1], factors(a, g)[0])
        ),
        "both factors sum over positions, so the product counts them twice: A is a mean over positions": (
            lambda a, g: right(a, g) * a.shape[1]
        ),
        "both factors average over positions, but the gradient of a sample is a sum over them: S sums": (
            lambda a, g: right(a, g) / a.shape[1]
        ),
        "it is summed over samples: divide both factors by their number": lambda a, g: right(a, g) * len(a) ** 2,
        "this is the true block, which we want to get by without: no product of a and g is needed": whole,
        "positions were added up before squaring; every position is an observation of its own": summed_first,
        "the mean of the inputs was subtracted; A is a second moment, and the mean belongs to it": centred,
    }
    return compare(
        function,
        cases,
        right,
        mistakes,
        praise="S sums over positions and A averages over them, and neither needs the other's data.",
        hint="S is the mean over samples of Σ_p g_p g_pᵀ, A the mean over samples and positions of a_p a_pᵀ.",
    )


def kron_obs_score(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Verdict:
    """Check ``function(W, A, S)``: ``½ w_iᵀ A w_i / [S⁻¹]_ii`` for every row of ``W [out, in]``."""
    cases = [
        (
            torch.tensor([[1.0, 2.0], [-1.0, 0.5]]),
            torch.tensor([[2.0, 1.0], [1.0, 3.0]]),
            torch.tensor([[2.0, 1.0], [1.0, 1.0]]),
        ),
        (
            torch.tensor([[1.0, -1.0], [0.0, 2.0], [0.5, 0.5]]),
            torch.tensor([[1.0, 0.5], [0.5, 2.0]]),
            torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]]),
        ),
    ]

    def gram(W: Tensor, A: Tensor) -> Tensor:
        return torch.einsum("oi,ij,oj->o", W, A, W)

    def right(W: Tensor, A: Tensor, S: Tensor) -> Tensor:
        return 0.5 * gram(W, A) / torch.linalg.inv(S).diagonal()

    mistakes: dict[str, Callable[..., Any]] = {
        "the factor ½ of the quadratic model is missing": lambda W, A, S: 2 * right(W, A, S),
        "that is kron_obd, S_ii in place of 1/[S⁻¹]_ii: it leaves the other channels where they are": (
            lambda W, A, S: 0.5 * S.diagonal() * gram(W, A)
        ),
        "the diagonal of S⁻¹ multiplies where it should divide": (
            lambda W, A, S: 0.5 * gram(W, A) * torch.linalg.inv(S).diagonal()
        ),
        "the weight is squared before it meets A, as in the published code: Σ (w²)A is not wᵀAw": (
            lambda W, A, S: 0.5 * (W**2 @ A).sum(1) / torch.linalg.inv(S).diagonal()
        ),
        "it uses the diagonal of A alone, as if a channel's weights did not interact": (
            lambda W, A, S: 0.5 * gram(W, torch.diag(A.diagonal())) / torch.linalg.inv(S).diagonal()
        ),
    }
    return compare(
        function,
        cases,
        right,
        mistakes,
        praise="the other channels take over what they can, and S⁻¹ knows how much that is.",
        hint="(W @ A * W).sum(1) is w_iᵀ A w_i for every row; divide by the diagonal of the inverse of S.",
    )


__all__ = ["coverage_of", "kron_obs_score", "kronecker_fisher"]

"""Checkers for the exercises of ``07_kfac``: the two factors, coverage of pixels, the cost of a channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, answer_of, compare, solved_by


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


@solved_by(_coverage)
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
        "these are the counts of the padded image; padding is not a pixel, so leave it out": (
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


def _factors(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return (s @ s.mT).mean(0), (a @ a.mT).mean(0) / a.shape[2]


@solved_by(_factors)
def kronecker_factors(function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Verdict:
    """Check ``function(a, s)``: S, A of inputs ``[n, in, positions]`` and gradients ``[n, out, positions]``."""
    cases = [
        (
            torch.tensor([[[1.0, 0.0], [2.0, 1.0]], [[2.0, 3.0], [1.0, 0.0]], [[1.0, 2.0], [-1.0, 2.0]]]),
            torch.tensor([[[1.0, 2.0], [-1.0, 0.0]], [[0.0, 1.0], [1.0, 1.0]], [[-1.0, 1.0], [2.0, 0.0]]]),
        ),
        (
            torch.tensor([[[1.0, 2.0]], [[3.0, 1.0]]]),
            torch.tensor([[[1.0, 1.0], [0.0, 1.0]], [[2.0, 0.0], [1.0, -1.0]]]),
        ),
    ]
    answer, verdict = answer_of(function, *cases[0])
    if verdict is not None:
        return verdict
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        return Verdict(False, f"{function.__name__} should return two matrices, (S, A).")

    def product(a: Tensor, s: Tensor) -> Tensor:
        return torch.kron(*function(a, s))

    def right(a: Tensor, s: Tensor) -> Tensor:
        return torch.kron(*_factors(a, s))

    def whole(a: Tensor, s: Tensor) -> Tensor:
        rows = (s @ a.mT).flatten(1)
        return rows.mT @ rows / len(rows)

    def summed_first(a: Tensor, s: Tensor) -> Tensor:
        return right(a.mean(2, keepdim=True), s.sum(2, keepdim=True))

    mistakes: dict[str, Callable[..., Any]] = {
        "the factors are in the wrong order: return S first": lambda a, s: torch.kron(*_factors(a, s)[::-1]),
        "both factors sum over positions, so the product counts them twice: A is a mean over positions": (
            lambda a, s: right(a, s) * a.shape[2]
        ),
        "both factors average over positions, but the gradient of an image is a sum over them: S sums": (
            lambda a, s: right(a, s) / a.shape[2]
        ),
        "it is summed over images: divide both factors by their number": lambda a, s: right(a, s) * len(a) ** 2,
        "positions were added up before squaring; every position is an observation of its own": summed_first,
        "the mean of the inputs was subtracted; A is a second moment, and the mean belongs to it": (
            lambda a, s: right(a - a.mean((0, 2))[:, None], s)
        ),
    }
    product.__name__ = f"{function.__name__}, as S ⊗ A,"
    verdict = compare(
        product,
        cases,
        right,
        mistakes,
        praise="S sums over positions and A averages over them, and neither needs the other's data.",
        hint="S is the mean over images of Σ_t s_t s_tᵀ, A the mean over images and positions of a_t a_tᵀ.",
    )
    for case in cases if verdict else ():
        if not torch.allclose(torch.as_tensor(function(*case)[1]).to(case[0]), _factors(*case)[1], rtol=1e-4):
            return Verdict(False, "S ⊗ A is right, but a factor moved from S to A: here S sums and A averages.")
    return verdict


def _block_price(z: Tensor, s: Tensor) -> Tensor:
    return (z * s).sum(2).square().mean(0) / 2


@solved_by(_block_price)
def block_price(function: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """Check ``function(z, s)``: ``½ E[(Σ_t s_t z_t)²]`` per channel; both ``[n, out, positions]``."""
    generator = torch.Generator().manual_seed(0)
    cases = [tuple(torch.randn(2, *shape, generator=generator)) for shape in ((3, 2, 4), (2, 3, 5))]
    mistakes: dict[str, Callable[..., Any]] = {
        "every position is squared by itself; an image's gradient is a sum over positions, so add up first": (
            lambda z, s: (z * s).square().sum(2).mean(0) / 2
        ),
        "the factor ½ of the quadratic model is missing": lambda z, s: 2 * _block_price(z, s),
        "it averages over positions, but the gradient of an image is a sum over them": (
            lambda z, s: _block_price(z, s) / z.shape[2] ** 2
        ),
        "it averages over images before it squares; that is the square of the mean gradient": (
            lambda z, s: (z * s).sum(2).mean(0).square() / 2
        ),
        "it is summed over images: take the mean": lambda z, s: _block_price(z, s) * len(z),
        "the two were squared apart, as if they were independent": (
            lambda z, s: s.square().sum(2).mean(0) * z.square().mean((0, 2)) / 2
        ),
    }
    return compare(
        function,
        cases,
        _block_price,
        mistakes,
        praise="w_iᵀ Σ_t s_t a_tᵀ is Σ_t s_t z_t: one number per image and channel, squared and averaged.",
        hint="For an image and a channel: add up s_t z_t over the positions. Square, take the mean over images, halve.",
    )


def _kron_obs(W: Tensor, A: Tensor, S: Tensor) -> Tensor:
    return 0.5 * torch.einsum("oi,ij,oj->o", W, A, W) / torch.linalg.inv(S).diagonal()


@solved_by(_kron_obs)
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

    mistakes: dict[str, Callable[..., Any]] = {
        "the factor ½ of the quadratic model is missing": lambda W, A, S: 2 * _kron_obs(W, A, S),
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
        _kron_obs,
        mistakes,
        praise="the other channels take over what they can, and S⁻¹ knows how much that is.",
        hint="(W @ A * W).sum(1) is w_iᵀ A w_i for every row; divide by the diagonal of the inverse of S.",
    )


__all__ = ["block_price", "coverage_of", "kron_obs_score", "kronecker_factors"]

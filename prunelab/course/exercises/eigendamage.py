"""Checkers for the exercises of ``08_eigendamage``: scores in the eigenbasis, damage of a cut, where it pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, compare


def kfe_scores(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Verdict:
    """Check ``function(W, A, S)``: ``½ (Q_Sᵀ W Q_A)² ⊙ λ_S λ_Aᵀ``, ``[out, in]``, eigenvalues ascending."""
    cases = [
        (
            torch.tensor([[1.0, 2.0], [-1.0, 0.5]]),
            torch.tensor([[2.0, 1.0], [1.0, 3.0]]),
            torch.tensor([[2.0, 0.5], [0.5, 1.0]]),
        ),
        (
            torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, 1.0]]),
            torch.tensor([[1.0, 0.5, 0.0], [0.5, 2.0, 0.3], [0.0, 0.3, 4.0]]),
            torch.tensor([[3.0, 1.0], [1.0, 2.0]]),
        ),
    ]

    def scores(W: Tensor, A: Tensor, S: Tensor, *, back: bool = False, power: float = 1.0) -> Tensor:
        (a, q_a), (s, q_s) = torch.linalg.eigh(A), torch.linalg.eigh(S)
        rotated = q_s @ W @ q_a.mT if back else q_s.mT @ W @ q_a
        return 0.5 * rotated**2 * torch.outer(s, a) ** power

    mistakes: dict[str, Callable[..., Any]] = {
        "the factor ½ of the quadratic model is missing": lambda W, A, S: 2 * scores(W, A, S),
        "it rotates the other way: eigenvectors are the columns of Q, so W* = Q_Sᵀ W Q_A": (
            lambda W, A, S: scores(W, A, S, back=True)
        ),
        "these are squares of the rotated weight; each counts as much as the curvature along its direction": (
            lambda W, A, S: scores(W, A, S, power=0)
        ),
        "these are the scores in the plain basis; rotate the weight and use the eigenvalues": (
            lambda W, A, S: 0.5 * W**2 * torch.outer(S.diagonal(), A.diagonal())
        ),
        "the eigenvalues are those of a rotated Fisher, and the weight has to be rotated too": (
            lambda W, A, S: 0.5 * W**2 * torch.outer(torch.linalg.eigvalsh(S), torch.linalg.eigvalsh(A))
        ),
        "a square is missing: ½ w² h": (
            lambda W, A, S: 0.5 * (2 * scores(W, A, S, power=0)).sqrt() * scores(W, A, S) / scores(W, A, S, power=0)
        ),
    }
    return compare(
        function,
        cases,
        scores,
        mistakes,
        praise="two small eigendecompositions, and every coordinate has a score that adds up with the others.",
        hint="torch.linalg.eigh gives eigenvalues (ascending) and eigenvectors (columns) of A and of S.",
    )


def damage_of(function: Callable[[Tensor, list[int], list[int]], float]) -> Verdict:
    """Check ``function(scores, rows, columns)``: the sum of all scores outside the rows and columns that are kept."""
    table = torch.tensor([[4.0, 1.0, 0.5], [2.0, 0.25, 0.125], [1.0, 0.5, 0.0625]])
    cases = [(table, [0, 1], [0]), (table, [0], [0, 2]), (table[:2], [1], [1, 2])]

    def kept(scores: Tensor, rows: list[int], columns: list[int]) -> Tensor:
        return scores[rows][:, columns].sum()

    def others(chosen: list[int], size: int) -> list[int]:
        return [place for place in range(size) if place not in chosen]

    mistakes: dict[str, Callable[..., Any]] = {
        "that is what stays; the damage is the rest": kept,
        "entries outside both the rows and the columns are counted twice": (
            lambda scores, rows, columns: (
                scores[others(rows, len(scores))].sum() + scores[:, others(columns, scores.shape[1])].sum()
            )
        ),
        "entries that lose one of their two ends are gone too: it counts only those that lose both": (
            lambda scores, rows, columns: kept(scores, others(rows, len(scores)), others(columns, scores.shape[1]))
        ),
        "the rows alone are counted; columns go as well": (
            lambda scores, rows, columns: scores[others(rows, len(scores))].sum()
        ),
    }
    return compare(
        function,
        cases,
        lambda scores, rows, columns: float(scores.sum() - kept(scores, rows, columns)),
        mistakes,
        praise="in the eigenbasis scores add up, so the damage of a cut is a sum, each entry once.",
        hint="Sum all scores, and subtract those that stay.",
    )


def largest_rank(function: Callable[[int, int], int]) -> Verdict:
    """Check ``function(channels, K)``: the largest rank at which a bottleneck takes fewer multiply-adds."""

    def largest(channels: int, K: int, fewer: Callable[[int], bool]) -> int:
        return max((rank for rank in range(1, channels + 1) if fewer(rank)), default=0)

    def right(channels: int, K: int) -> int:
        return largest(channels, K, lambda r: 2 * channels * r + r * r * K < channels**2 * K)

    mistakes: dict[str, Callable[..., Any]] = {
        "it leaves the rotations out, which cost channels × rank each": lambda channels, K: channels - 1,
        "it counts one rotation; there is one on each side": (
            lambda channels, K: largest(channels, K, lambda r: channels * r + r * r * K < channels**2 * K)
        ),
        "the rotations are 1×1 convolutions: they do not have the K entries of the kernel": (
            lambda channels, K: largest(channels, K, lambda r: (2 * channels * r + r * r) * K < channels**2 * K)
        ),
    }
    return compare(
        function,
        [(16, 9), (32, 9), (64, 9), (24, 1), (10, 15), (8, 9)],
        right,
        mistakes,
        praise="a 3 × 3 convolution loses little of its range to the rotations, a 1 × 1 convolution most of it.",
        hint="Compare 2 · channels · r + r² · K with channels² · K, for every r.",
    )


__all__ = ["damage_of", "kfe_scores", "largest_rank"]

"""Checkers for the exercises of ``08_eigendamage``: scores in the eigenbasis, ranks at one price."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, compare, solved_by


def _scores(W: Tensor, A: Tensor, S: Tensor) -> Tensor:
    (a, q_a), (s, q_s) = torch.linalg.eigh(A), torch.linalg.eigh(S)
    return 0.5 * (q_s.mT @ W @ q_a) ** 2 * torch.outer(s, a)


@solved_by(_scores)
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


def _ranks(
    importance: Tensor, K: int, price: float, *, sides: bool = True, core: int = 0, worst: bool = False
) -> tuple[int, int]:
    rows, columns = (importance.sum(dim).argsort(descending=not worst) for dim in (1, 0))
    kept = importance[rows][:, columns].cumsum(0).cumsum(1)
    n_out, n_in = importance.shape
    r_out = torch.arange(1, n_out + 1, device=kept.device)[:, None]
    r_in = torch.arange(1, n_in + 1, device=kept.device)
    macs = r_in * r_out * (core or K) + (n_in * r_in + r_out * n_out if sides else 0)
    best = int((importance.sum() - kept + price * macs).argmin())
    return best // n_in + 1, best % n_in + 1


def _ranks_at(importance: Tensor, K: int, price: float) -> tuple[int, int]:
    return _ranks(importance, K, price)


@solved_by(_ranks_at)
def ranks_at(function: Callable[[Tensor, int, float], tuple[int, int]]) -> Verdict:
    """Check ``function(importance, K, price)``: ``(r_out, r_in)`` of least damage + price · multiply-adds."""
    table = torch.tensor([[9.0, 2.0, 0.5, 0.1], [1.0, 4.0, 0.2, 0.1], [0.5, 0.3, 0.1, 0.0]])
    cases = [(table, 9, price) for price in (0.001, 0.01, 0.04, 0.1)] + [(table.mT.flip(0), 1, 0.1), (table, 1, 0.02)]

    def as_tensor(found: Any) -> Any:
        return torch.tensor(found) if isinstance(found, (tuple, list)) else found

    def pair(importance: Tensor, K: int, price: float) -> Any:
        return as_tensor(function(importance, K, price))

    pair.__name__ = function.__name__
    mistakes: dict[str, Callable[..., Any]] = {
        "it leaves out the rotations, in · r_in + out · r_out": (lambda *case: as_tensor(_ranks(*case, sides=False))),
        "these are the ranks the other way round; the rows, r_out, come first": (
            lambda *case: as_tensor(_ranks(*case)[::-1])
        ),
        "the core has K entries for each row and column that stay": lambda *case: as_tensor(_ranks(*case, core=1)),
        "it keeps the rows and columns with the smallest sums": lambda *case: as_tensor(_ranks(*case, worst=True)),
    }
    return compare(
        pair,
        cases,
        lambda *case: as_tensor(_ranks(*case)),
        mistakes,
        praise="one price for all layers, and each finds its own ranks.",
        hint="Go through all pairs of ranks; the damage is the sum of all scores less what the pair keeps.",
    )


__all__ = ["kfe_scores", "ranks_at"]

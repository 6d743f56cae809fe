"""Checkers for the exercises of ``05_obs``: saliency, move, the inverse sample by sample, its downdate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, compare, solved_by


def _bowls(count: int = 3, n: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Return weights ``[n]`` and inverses ``[n, n]`` of bowls with correlations."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(count, n, n, generator=generator)
    inverse = torch.linalg.inv(root @ root.mT + torch.eye(n))
    return [(torch.randn(n, generator=generator), one) for one in inverse]


def _saliency(w: Tensor, v: Tensor) -> Tensor:
    return w**2 / v.diagonal() / 2


def _update(w: Tensor, v: Tensor, q: int) -> Tensor:
    return -w[q] / v[q, q] * v[:, q]


def _downdate(v: Tensor, q: int) -> Tensor:
    return v - v[:, q, None] * v[q] / v[q, q]


def _add_sample(v: Tensor, x: Tensor, number: int) -> Tensor:
    u = v @ x
    return v - torch.outer(u, u) / (number + x @ u)


@solved_by(_saliency)
def obs_saliency(function: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """Check ``function(weights, inverse)``: ``½ w_q²/[H⁻¹]_qq`` for weights ``[n]`` and H⁻¹ ``[n, n]``."""
    mistakes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "the square of the weight got lost; then a negative weight has a negative price": (
            lambda w, v: w / v.diagonal() / 2
        ),
        "the factor ½ is missing": lambda w, v: w**2 / v.diagonal(),
        "it multiplies by the inverse's diagonal; a large entry means that the others can make up for the weight, so "
        "divide": lambda w, v: w**2 * v.diagonal() / 2,
        "it inverts once more and takes the diagonal of H, which is OBD: nothing adapts": (
            lambda w, v: torch.linalg.inv(v).diagonal() * w**2 / 2
        ),
        "the diagonal of the inverse enters once, not squared": lambda w, v: w**2 / v.diagonal() ** 2 / 2,
    }
    return compare(
        function,
        _bowls(),
        _saliency,
        mistakes,
        praise="the price is w²/2 over the variance that the weight has when all others are free.",
        hint="Put the best δ into ½ δᵀHδ; most of it cancels.",
    )


@solved_by(_update)
def obs_update(function: Callable[[Tensor, Tensor, int], Tensor]) -> Verdict:
    """Check ``function(weights, inverse, q)``: the change δ ``[n]`` of all weights that removes weight q."""

    def alone(w: Tensor, v: Tensor, q: int) -> Tensor:
        return torch.zeros_like(w).index_fill(0, torch.tensor([q]), float(-w[q]))

    mistakes: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
        "its sign is wrong: weight q grows instead of going to zero": lambda w, v, q: -_update(w, v, q),
        "only weight q moves; the others should make up for it": alone,
        "these are the weights afterwards; their change δ is asked for": lambda w, v, q: w + _update(w, v, q),
        "it does not divide by [H⁻¹]_qq, so weight q does not reach zero": lambda w, v, q: -w[q] * v[:, q],
        "it takes a column of H where a column of H⁻¹ is meant": lambda w, v, q: (
            -w[q] / torch.linalg.inv(v)[q, q] * torch.linalg.inv(v)[:, q]
        ),
        "weight q itself does not move; its own entry of δ is −w_q": lambda w, v, q: _update(w, v, q) - alone(w, v, q),
    }
    return compare(
        function,
        [(w, v, q) for (w, v), q in zip(_bowls(), (0, 2, 3), strict=True)],
        _update,
        mistakes,
        praise="a column of H⁻¹, scaled so that weight q lands on zero.",
        hint="δ is a multiple of column q of H⁻¹; which multiple makes δ_q = −w_q?",
    )


@solved_by(_add_sample)
def add_sample(function: Callable[[Tensor, Tensor, int], Tensor]) -> Verdict:
    """Check ``function(inverse, x, number)``: the inverse of ``inverse⁻¹ + x xᵀ/number``, ``[n, n]``."""
    mistakes: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
        "it adds where it should subtract: a sample makes H larger, and its inverse smaller": (
            lambda v, x, n: 2 * v - _add_sample(v, x, n)
        ),
        "the sample enters with weight 1 instead of 1/N: put N in the denominator in place of 1": (
            lambda v, x, n: _add_sample(v, x, 1)
        ),
        "it leaves xᵀVx out of the denominator; that is right for a tiny sample only": (
            lambda v, x, n: v - torch.outer(v @ x, v @ x) / n
        ),
        "it subtracts from the inverse what was added to H: x xᵀ/N; the inverse changes along V x": (
            lambda v, x, n: v - torch.outer(x, x) / n
        ),
        "this is H with the sample, not its inverse": lambda v, x, n: torch.linalg.inv(v) + torch.outer(x, x) / n,
    }
    generator = torch.Generator().manual_seed(1)
    samples = [(torch.randn(4, generator=generator), number) for number in (3, 1, 10)]
    return compare(
        function,
        [(v, *sample) for (_, v), sample in zip(_bowls(), samples, strict=True)],
        _add_sample,
        mistakes,
        praise="n² multiplications for a sample, and never an inversion; start it at I/λ.",
        hint="With u = V x, subtract u uᵀ/(N + xᵀu).",
    )


@solved_by(_downdate)
def downdate(function: Callable[[Tensor, int], Tensor]) -> Verdict:
    """Check ``function(inverse, q)``: H⁻¹ without weight q, ``[n, n]`` with zeros in its row and column."""

    def blank(v: Tensor, q: int) -> Tensor:
        out = v.clone()
        out[q], out[:, q] = 0, 0
        return out

    mistakes: dict[str, Callable[[Tensor, int], Tensor]] = {
        "it only blanks row and column q; the entries that stay change as well, since the weight that is gone can no "
        "longer adapt": blank,
        "it adds where it should subtract: with fewer free weights every variance falls": lambda v, q: (
            v + v[:, q, None] * v[q] / v[q, q]
        ),
        "it does not divide by [H⁻¹]_qq": lambda v, q: v - v[:, q, None] * v[q],
        "it returns a smaller matrix; keep the size and leave zeros": lambda v, q: torch.stack(
            [
                torch.cat([row[:q], row[q + 1 :]])
                for place, row in enumerate(v - v[:, q, None] * v[q] / v[q, q])
                if place != q
            ]
        ),
        "it blanks row and column of H before it inverts, which takes over n² steps and gives no inverse": (
            lambda v, q: torch.linalg.pinv(blank(v, q))
        ),
    }
    return compare(
        function,
        [(v, q) for (_, v), q in zip(_bowls(), (1, 0, 3), strict=True)],
        _downdate,
        mistakes,
        praise="one step of Gaussian elimination, n² multiplications, and exact.",
        hint="Subtract a multiple of (column q)(row q), such that row and column q become zero.",
    )


__all__ = ["add_sample", "downdate", "obs_saliency", "obs_update"]

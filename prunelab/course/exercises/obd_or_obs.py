"""Checkers for the exercises of ``06_obd_or_obs``: two factorial Gaussians, a pair's true cost, where ranks flip."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, compare, solved_by


def _variances(hessian: Tensor, direction: str) -> Tensor:
    return 1 / hessian.diagonal() if direction == "reverse" else torch.linalg.inv(hessian).diagonal()


def _pair_cost(w: Tensor, h: Tensor, i: int, j: int) -> Tensor:
    return (w[i] ** 2 * h[i, i] + w[j] ** 2 * h[j, j]) / 2 + w[i] * w[j] * h[i, j]


def _flip(loose: float) -> float:
    return float((1 - loose) ** 0.5)


@solved_by(_variances)
def factorial_variances(function: Callable[[Tensor, str], Tensor]) -> Verdict:
    """Check ``function(hessian, direction)``: variances ``[n]`` of the factorial Gaussian closest to N(w, H⁻¹).

    ``direction`` is ``"reverse"``, KL(p̃‖p), or ``"forward"``, KL(p‖p̃).
    """

    def narrow(h: Tensor) -> Tensor:
        return 1 / h.diagonal()

    def wide(h: Tensor) -> Tensor:
        return torch.linalg.inv(h).diagonal()

    mistakes: dict[str, Callable[[Tensor, str], Tensor]] = {
        "the two directions are swapped: the reverse KL avoids places where the posterior is small, so it is narrow": (
            lambda h, d: narrow(h) if d == "forward" else wide(h)
        ),
        "these are precisions; variances are one over them": lambda h, d: (
            1 / wide(h) if d == "forward" else h.diagonal()
        ),
        "both directions give the conditional variance 1/h; the forward KL matches the marginals": (
            lambda h, d: narrow(h)
        ),
        "both directions give the marginal variance; the reverse KL holds the other weights fixed": lambda h, d: wide(
            h
        ),
        "these are standard deviations; variances are asked for": lambda h, d: (
            wide(h) if d == "forward" else narrow(h)
        ).sqrt(),
    }
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 4, 4, generator=generator)
    cases = [(one @ one.T + torch.eye(4), direction) for one in root for direction in ("reverse", "forward")]
    return compare(
        function,
        cases,
        _variances,
        mistakes,
        praise="reverse: the variance with all others held fixed, OBD; forward: with all others free, OBS.",
        hint="Set the derivative of the KL divergence in log σ_i² to zero.",
    )


@solved_by(_pair_cost)
def pair_cost(function: Callable[[Tensor, Tensor, int, int], Tensor]) -> Verdict:
    """Check ``function(weights, hessian, i, j)``: ``½ δᵀHδ`` of removing two weights while all others stay."""
    mistakes: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
        "it leaves out the pair's own term: that sum is what OBD says, and it cannot see signs": (
            lambda w, h, i, j: (w[i] ** 2 * h[i, i] + w[j] ** 2 * h[j, j]) / 2
        ),
        "h_ij is in H twice, as h_ij and as h_ji, so its ½ cancels": lambda w, h, i, j: (
            (w[i] ** 2 * h[i, i] + w[j] ** 2 * h[j, j] + w[i] * w[j] * h[i, j]) / 2
        ),
        "it takes absolute values of the weights; the sign of w_i w_j is what decides": lambda w, h, i, j: (
            (w[i] ** 2 * h[i, i] + w[j] ** 2 * h[j, j]) / 2 + (w[i] * w[j]).abs() * h[i, j]
        ),
        "the sign of the pair's term is wrong: both steps are −w, and their product is +w_i w_j": lambda w, h, i, j: (
            (w[i] ** 2 * h[i, i] + w[j] ** 2 * h[j, j]) / 2 - w[i] * w[j] * h[i, j]
        ),
        "the factor ½ is missing": lambda w, h, i, j: (
            w[i] ** 2 * h[i, i] + w[j] ** 2 * h[j, j] + 2 * w[i] * w[j] * h[i, j]
        ),
    }
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(3, 4, 4, generator=generator)
    cases = [
        (torch.randn(4, generator=generator), one @ one.T, i, j)
        for one, (i, j) in zip(root, ((0, 1), (2, 3), (1, 3)), strict=True)
    ]
    return compare(
        function,
        cases,
        _pair_cost,
        mistakes,
        praise="two prices and a term whose sign no score of a single weight can know.",
        hint="Write out ½ δᵀHδ for a δ with two entries.",
    )


@solved_by(_flip)
def flipping_correlation(function: Callable[[float], float]) -> Verdict:
    """Check ``function(loose)``: from which correlation on OBS removes the correlated weights first.

    Two weights of size 1 have curvature 1 and correlation ρ in H; another one, also of size 1, is alone, with
    curvature ``loose`` below 1.
    """
    mistakes: dict[str, Callable[[float], float]] = {
        "that is ρ²; take its root": lambda loose: 1 - loose,
        "1/[H⁻¹]_11 is 1 − ρ² and not ρ²": lambda loose: loose**0.5,
        "1/[H⁻¹]_11 is 1 − ρ² and not 1 − ρ": lambda loose: loose,
        "the lone weight's own price is ½ · loose, with the same ½ on both sides": lambda loose: (1 - loose / 2) ** 0.5,
        "OBS's price of the lone weight is ½ · loose, and not ½ · loose²": lambda loose: (1 - loose**2) ** 0.5,
    }
    return compare(
        function,
        [(0.3,), (0.5,), (0.8,)],
        _flip,
        mistakes,
        praise="½ (1 − ρ²) falls below ½ · loose; OBD's ranking has not moved at all.",
        hint="Invert [[1, ρ], [ρ, 1]] by hand. When is ½/[H⁻¹]_11 equal to ½ · loose?",
    )


__all__ = ["factorial_variances", "flipping_correlation", "pair_cost"]

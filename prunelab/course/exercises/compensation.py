"""Checkers for the exercises of ``11_compensation``: the refit, the bias alone, and what cannot come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, compare, solved_by


def _case(seed: int, outs: int, ins: int, gone: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(40, ins, generator=generator, dtype=torch.double)
    inputs = (inputs @ torch.randn(ins, ins, generator=generator, dtype=torch.double)).relu()
    kept = torch.ones(ins, dtype=torch.bool)
    kept[gone] = False
    return torch.randn(outs, ins, generator=generator, dtype=torch.double), inputs.T @ inputs / 40, kept


CASES = [_case(0, 2, 3, [1]), _case(1, 3, 5, [0, 3])]


def _update(W: Tensor, C: Tensor, kept: Tensor) -> Tensor:
    return W[:, ~kept] @ C[~kept][:, kept] @ torch.linalg.inv(C[kept][:, kept])


def _summed(W: Tensor, C: Tensor, kept: Tensor) -> Tensor:
    inverse = torch.linalg.inv(C)
    total = W.clone()
    for gone in (~kept).nonzero().flatten().tolist():
        total -= W[:, gone : gone + 1] * inverse[gone] / inverse[gone, gone]
    return total[:, kept]


def _refit(W: Tensor, C: Tensor, kept: Tensor) -> Tensor:
    among, across = C[kept][:, kept], C[~kept][:, kept]
    return W[:, kept] + torch.linalg.solve(among, (W[:, ~kept] @ across).T).T


@solved_by(_refit)
def refit(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Verdict:
    """Check ``function(W, C, kept)``: the weights of the inputs that stay, after the least-squares refit."""
    mistakes: dict[str, Callable[..., Any]] = {
        "these are the old weights; add what the refit changes": lambda W, C, kept: W[:, kept],
        "this is the change alone; add it to the weights that stay": _update,
        "the change has the wrong sign: what was lost has to be added": lambda W, C, kept: (
            W[:, kept] - _update(W, C, kept)
        ),
        "C_RK has to be multiplied by the inverse of C_KK: kept inputs that say the same would both be paid": (
            lambda W, C, kept: W[:, kept] + W[:, ~kept] @ C[~kept][:, kept]
        ),
        "only the diagonal of C_KK was inverted, as if the inputs that stay were uncorrelated": lambda W, C, kept: (
            W[:, kept] + W[:, ~kept] @ C[~kept][:, kept] / C.diagonal()[kept]
        ),
        "this takes the block of the inverse, and the inverse of the block is needed": lambda W, C, kept: (
            W[:, kept] + W[:, ~kept] @ C[~kept][:, kept] @ torch.linalg.inv(C)[kept][:, kept]
        ),
        "single updates were summed up, each from the whole layer; remove all columns together": _summed,
    }
    return compare(
        function,
        CASES,
        lambda W, C, kept: W[:, kept] + _update(W, C, kept),
        mistakes,
        praise="the kept inputs predict the removed ones, and their weights take over.",
        hint="W_K + W_R C_RK C_KK⁻¹, with W[:, kept] for W_K and C[~kept][:, kept] for C_RK.",
    )


def _new_bias(W: Tensor, bias: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
    return bias + W[:, ~kept] @ mean[~kept]


@solved_by(_new_bias)
def new_bias(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Verdict:
    """Check ``function(W, bias, mean, kept)``: the bias that best makes up for removed inputs, all else fixed."""
    cases = [
        (
            torch.tensor([[1.0, 2.0, 3.0]]),
            torch.tensor([0.5]),
            torch.tensor([0.2, 0.4, 1.0]),
            torch.tensor([True] * 2 + [False]),
        ),
        (
            torch.tensor([[1.0, -2.0], [0.5, 4.0]]),
            torch.tensor([0.1, -0.3]),
            torch.tensor([2.0, 0.7]),
            torch.tensor([False, True]),
        ),
    ]
    mistakes: dict[str, Callable[..., Any]] = {
        "this is what was lost on the average; add it to the old bias": lambda W, b, m, kept: W[:, ~kept] @ m[~kept],
        "the sign is wrong: what was lost has to be added": lambda W, b, m, kept: b - W[:, ~kept] @ m[~kept],
        "this adds what the kept inputs give, which the layer still computes; add what the removed ones gave": (
            lambda W, b, m, kept: b + W[:, kept] @ m[kept]
        ),
        "this adds the mean output of the whole layer; only the part of the removed inputs is missing": (
            lambda W, b, m, kept: b + W @ m
        ),
        "the old bias does not make up for anything; add the mean of what was lost": lambda W, b, m, kept: b,
    }
    return compare(
        function,
        cases,
        lambda W, b, m, kept: b + W[:, ~kept] @ m[~kept],
        mistakes,
        praise="the bias takes over the mean of what was lost.",
        hint="The best constant for W_R u_R is its mean.",
    )


def _unrestored(W: Tensor, C: Tensor, kept: Tensor) -> Tensor:
    known = C[~kept][:, kept] @ torch.linalg.solve(C[kept][:, kept], C[kept][:, ~kept])
    schur = C[~kept][:, ~kept] - known
    return (W[:, ~kept] @ schur * W[:, ~kept]).sum()


@solved_by(_unrestored)
def unrestored(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Verdict:
    """Check ``function(W, C, kept)``: the mean squared error that is left after the best refit."""

    def error(W: Tensor, C: Tensor, kept: Tensor) -> Tensor:
        lost = W[:, ~kept]
        return (lost @ C[~kept][:, ~kept] * lost).sum() - (_update(W, C, kept) @ C[kept][:, ~kept] * lost).sum()

    mistakes: dict[str, Callable[..., Any]] = {
        "this is the error without a refit; subtract what the kept inputs can predict": lambda W, C, kept: (
            W[:, ~kept] @ C[~kept][:, ~kept] * W[:, ~kept]
        ).sum(),
        "this is what the refit brings back; what is left was asked for": lambda W, C, kept: (
            _update(W, C, kept) @ C[kept][:, ~kept] * W[:, ~kept]
        ).sum(),
        "a loss of ½ was assumed; the squared error itself was asked for": lambda W, C, kept: error(W, C, kept) / 2,
        "it is the mean over the outputs; sum over them": lambda W, C, kept: error(W, C, kept) / len(W),
    }
    return compare(
        function,
        CASES,
        error,
        mistakes,
        praise="the Schur complement: the part of the removed inputs that no kept input knows.",
        hint="tr(W_R (C_RR − C_RK C_KK⁻¹ C_KR) W_Rᵀ).",
    )


__all__ = ["new_bias", "refit", "unrestored"]

"""Checkers for the exercises of ``02_magnitude``: norms of units, and LAMP."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, compare, solved_by


def _weight(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).round(decimals=1)


def _units(weight: Tensor, dim: int, p: float) -> Tensor:
    return (weight.abs() ** p).movedim(dim, 0).flatten(1).sum(1)


@solved_by(_units)
def unit_scores(function: Callable[[Tensor, int, float], Tensor]) -> Verdict:
    """Check ``function(weight, dim, p)``: ``Σ |w|^p`` over everything that a unit owns along ``dim``."""
    mistakes: dict[str, Callable[[Tensor, int, float], Tensor]] = {
        "it sums over dim instead of over everything else": lambda weight, dim, p: (weight.abs() ** p).sum(dim),
        "it takes the rows whatever dim is; a consumer has its units in its columns": (
            lambda weight, dim, p: (weight.abs() ** p).reshape(len(weight), -1).sum(1)
        ),
        "the sum is right, but the p-th root was not asked for": (
            lambda weight, dim, p: _units(weight, dim, p) ** (1 / p)
        ),
        "it leaves the absolute value out, so that weights of different sign cancel": (
            lambda weight, dim, p: (weight**p).movedim(dim, 0).reshape(weight.shape[dim], -1).sum(1)
        ),
        "it is the mean over a unit's weights, and the sum was asked for": (
            lambda weight, dim, p: (weight.abs() ** p).movedim(dim, 0).reshape(weight.shape[dim], -1).mean(1)
        ),
    }
    return compare(
        function,
        [(_weight(0, 3, 2), 0, 2.0), (_weight(1, 2, 3), 1, 1.0), (_weight(2, 3, 3, 2), 1, 3.0)],
        _units,
        mistakes,
        praise="one number per unit, from rows, from columns, and from kernels of any size.",
        hint="Bring dim to the front, flatten the rest, and sum |w|^p over it.",
    )


def _lamp(squares: Tensor) -> Tensor:
    return squares / torch.stack([squares[squares >= square].sum() for square in squares])


@solved_by(_lamp)
def lamp(function: Callable[[Tensor], Tensor]) -> Verdict:
    """Check ``function(squares)``: each square over the sum of all that are not smaller, in the order given."""

    def ordered(squares: Tensor) -> Tensor:
        return _lamp(squares.sort().values)

    mistakes: dict[str, Callable[[Tensor], Tensor]] = {
        "it divides by the sum of all squares; but when a unit's turn comes, all smaller ones are gone": (
            lambda squares: squares / squares.sum()
        ),
        "it divides by the sum of those that are not larger; the ones that are still there are not smaller": (
            lambda squares: squares / torch.stack([squares[squares <= square].sum() for square in squares])
        ),
        "the scores are right, but in ascending order; return them in the order of the units": ordered,
        "it leaves the unit itself out of the sum; it is still there when its turn comes": (
            lambda squares: (
                squares / torch.stack([squares[squares > square].sum().clamp_min(1e-12) for square in squares])
            )
        ),
    }
    return compare(
        function,
        [(torch.tensor([4.0, 1.0, 3.0]),), (torch.tensor([0.5, 2.0, 0.1, 0.4]),), (torch.tensor([7.0]),)],
        _lamp,
        mistakes,
        praise="the largest unit of every group gets 1, whatever its size.",
        hint="Sort in descending order, divide by the running sum, and put the result back in its place.",
    )


__all__ = ["lamp", "unit_scores"]

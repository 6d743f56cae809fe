"""Checkers for the exercises of ``03_taylor``: the first-order change, a slope measured, squares of gates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, compare, solved_by


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).round(decimals=1)


def _change(weight: Tensor, gradient: Tensor) -> Tensor:
    return -(weight * gradient).flatten(1).sum(1)


@solved_by(_change)
def predicted_change(function: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """Check ``function(weight, gradient)``: the first-order change of the loss when each row goes, ``−Σ w g``."""

    def products(weight: Tensor, gradient: Tensor) -> Tensor:
        return (weight * gradient).flatten(1)

    mistakes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "the sign is turned around; the step is δ = −w, so the change is −Σ w g": (
            lambda weight, gradient: products(weight, gradient).sum(1)
        ),
        "it takes absolute values first; the change itself has a sign, and terms may cancel": (
            lambda weight, gradient: products(weight, gradient).abs().sum(1)
        ),
        "it takes the absolute value of the sum; the change itself has a sign": (
            lambda weight, gradient: products(weight, gradient).sum(1).abs()
        ),
        "it is the gradient alone; the step is as long as the weights are": (
            lambda weight, gradient: -gradient.flatten(1).sum(1)
        ),
        "it is the mean over the weights of a unit; all of them go": (
            lambda weight, gradient: -products(weight, gradient).mean(1)
        ),
    }
    return compare(
        function,
        [
            (torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[1.0, -1.0], [1.0, 1.0]])),
            (_draw(2, 3, 2, 2), _draw(3, 3, 2, 2)),
        ],
        _change,
        mistakes,
        praise="gᵀδ with δ = −w on the row, a number with a sign.",
        hint="What is gᵀδ if δ is −w on one row and zero elsewhere?",
    )


def _squared(products: Tensor) -> Tensor:
    return products.sum(2).square().mean(0)


@solved_by(_squared)
def squared_gates(function: Callable[[Tensor], Tensor]) -> Verdict:
    """Check ``function(products)``: w·g by minibatch ``[B, units, weights]`` to the mean of squared sums."""
    mistakes: dict[str, Callable[[Tensor], Tensor]] = {
        "it squares before it sums over the weights of a unit, whose products may cancel within a minibatch": (
            lambda products: products.square().sum(2).mean(0)
        ),
        "it averages over minibatches before it squares, so that they cancel; what is left is the mean gradient": (
            lambda products: products.mean(0).sum(1).square()
        ),
        "it adds the minibatches up; their mean is asked for": lambda products: products.sum(2).square().sum(0),
        "it takes absolute values where squares are meant": lambda products: products.sum(2).abs().mean(0),
        "it sums over the units; sum over the weights of each": (lambda products: products.sum(1).square().mean(0)),
        "that is the mean of the sums, whose signs cancel; square first": lambda products: products.sum(2).mean(0),
    }
    return compare(
        function,
        [(torch.tensor([[[1.0, -1.0], [2.0, 1.0]], [[0.5, 1.0], [-3.0, 1.0]]]),), (_draw(4, 3, 2, 4),)],
        _squared,
        mistakes,
        praise="within a minibatch signs may cancel, between minibatches they may not.",
        hint="Sum over the last dimension, square, average over the first.",
    )


class _Loss:
    """A loss of one tensor that a reader can evaluate anywhere."""

    def __init__(self, words: str, formula: Callable[[Tensor], Tensor]) -> None:
        self.words, self.formula = words, formula

    def __call__(self, w: Tensor) -> Tensor:
        return self.formula(w)

    def __repr__(self) -> str:
        return self.words


def _slope(loss: Callable[[Tensor], Tensor], w: Tensor, eps: float) -> Tensor:
    return (loss((1 - eps) * w) - loss((1 + eps) * w)) / (2 * eps)


@solved_by(_slope)
def slope(function: Callable[[Callable[[Tensor], Tensor], Tensor, float], Tensor]) -> Verdict:
    """Check ``function(loss, w, eps)``: the slope of ``loss((1 − t) w)`` at t = 0, by central differences."""
    mistakes: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, float], Tensor]] = {
        "the sign is turned around: t takes the weights away": lambda loss, w, eps: -_slope(loss, w, eps),
        "this is a difference to one side, whose error is of first order in eps; take one step to each side": (
            lambda loss, w, eps: (loss((1 - eps) * w) - loss(w)) / eps
        ),
        "it divides by eps, but the two points are 2 eps apart": lambda loss, w, eps: 2 * _slope(loss, w, eps),
        "it adds eps to all weights; scale them, by 1 − eps and 1 + eps": (
            lambda loss, w, eps: (loss(w - eps) - loss(w + eps)) / (2 * eps)
        ),
    }
    square = _Loss("loss", lambda w: (w**3).sum() + w.sum())
    other = _Loss("loss", lambda w: torch.exp(w).sum())
    return compare(
        function,
        [(square, torch.tensor([1.0, 2.0]).double(), 0.1), (other, torch.tensor([0.5, -1.0]).double(), 0.2)],
        _slope,
        mistakes,
        praise="two evaluations of the loss, no gradient: this is what every gradient can be checked with.",
        hint="Evaluate the loss at (1 − eps) w and at (1 + eps) w.",
    )


__all__ = ["predicted_change", "slope", "squared_gates"]

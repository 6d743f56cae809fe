"""Checkers for ``10_oracle``: the score of a gate, greedy selection."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, compare, solved_by


def _gate_score(gradient: Tensor, curvature: Tensor) -> Tensor:
    return -gradient + curvature / 2


@solved_by(_gate_score)
def gate_score(function: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """Check ``function(gradient, curvature)``: the predicted loss change when each gate goes from one to zero."""
    cases = [
        (torch.tensor([0.2, -0.4, 0.0]), torch.tensor([1.0, 0.5, 2.0])),
        (torch.tensor([-1.0, 3.0]), torch.tensor([0.1, 0.3])),
    ]
    mistakes: dict[str, Callable[..., Any]] = {
        "the gate goes from one to zero, a step of −1: the gradient counts with a minus": lambda g, h: g + h / 2,
        "the second term of a Taylor series has a factor ½": lambda g, h: h - g,
        "the first term is missing; it is what makes the gate so good for single units": lambda g, h: h / 2,
        "a step of −1 squared is +1: the curvature counts with a plus": lambda g, h: -g - h / 2,
        "with an absolute value, a unit whose removal lowers the loss looks as costly as one that raises it": (
            lambda g, h: g.abs() + h / 2
        ),
    }
    return compare(
        function,
        cases,
        lambda g, h: h / 2 - g,
        mistakes,
        praise="a step of −1 in each gate, put into the Taylor series.",
        hint="Put δ = −1 into g δ + ½ h δ².",
    )


def _greedy_order(scores: Tensor, matrix: Tensor, number: int) -> Tensor:
    return _greedy(scores, matrix, number)


@solved_by(_greedy_order)
def greedy_order(function: Callable[[Tensor, Tensor, int], Tensor]) -> Verdict:
    """Check ``function(scores, matrix, number)``: the units that greedy selection removes, in that order.

    Every step removes the unit that adds least to the cost of all that is gone: its score, plus its entries of the
    matrix with all units that went before.
    """
    cases = [
        (torch.tensor([0.10, 0.11, 0.30]), torch.tensor([[0.2, 0.5, 0.0], [0.5, 0.2, 0.0], [0.0, 0.0, 0.6]]), 2),
        (
            torch.tensor([0.1, 0.2, 0.3, 0.4]),
            torch.tensor([[0.2, 0.15, 0.0, 0.39], [0.15, 0.4, 0.0, 0.0], [0.0, 0.0, 0.6, 0.0], [0.39, 0.0, 0.0, 0.8]]),
            2,
        ),
        (
            torch.tensor([0.5, 0.2, 0.4, 0.3]),
            torch.tensor(
                [[1.0, -0.45, 0.0, 0.05], [-0.45, 0.4, 0.1, 0.25], [0.0, 0.1, 0.8, 0.0], [0.05, 0.25, 0.0, 0.6]]
            ),
            3,
        ),
    ]
    mistakes: dict[str, Callable[..., Any]] = {
        "these are the lowest scores, as if each unit went alone; add what it costs on top of those that are gone": (
            lambda scores, matrix, number: scores.argsort()[:number]
        ),
        "each step looks at the last unit that went and forgets those before": _forgetful,
        "entries of the matrix were subtracted: a positive entry means that two units cost more together": (
            lambda scores, matrix, number: _greedy(scores, -matrix, number)
        ),
        "these are the units that cost most": lambda scores, matrix, number: _greedy(-scores, -matrix, number),
        "these are the right units, but sorted: the order in which they go was asked for": (
            lambda scores, matrix, number: _greedy(scores, matrix, number).sort().values
        ),
    }

    @wraps(function)
    def as_tensor(*given: Any) -> object:
        answer: object = function(*given)
        return torch.tensor(answer) if isinstance(answer, list) and answer else answer

    return compare(
        as_tensor,
        cases,
        _greedy,
        mistakes,
        praise="each step sees what is gone already.",
        hint="Keep a vector of costs; when a unit goes, add its row of the matrix to it, and set its own cost to inf.",
    )


def _greedy(scores: Tensor, matrix: Tensor, number: int) -> Tensor:
    cost, gone = scores.clone(), []
    for _ in range(number):
        gone.append(int(cost.argmin()))
        cost += matrix[gone[-1]]
        cost[gone[-1]] = torch.inf
    return torch.tensor(gone)


def _forgetful(scores: Tensor, matrix: Tensor, number: int) -> Tensor:
    cost, gone = scores.clone(), list[int]()
    for _ in range(number):
        cost[gone] = torch.inf
        gone.append(int(cost.argmin()))
        cost = scores + matrix[gone[-1]]
    return torch.tensor(gone)


__all__ = ["gate_score", "greedy_order"]

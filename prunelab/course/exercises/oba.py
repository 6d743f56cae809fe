"""Checkers for ``09_oba``: θ ⊙ (Hθ), a unit alone, derivatives carried forward, paths through a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, answer_of, compare, solved_by

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Named:
    """A function that a verdict can write down."""

    formula: str
    function: Loss

    def __call__(self, theta: Tensor) -> Tensor:
        return self.function(theta)

    def __repr__(self) -> str:
        return self.formula


def _theta_h_theta(loss: Loss, theta: Tensor) -> Tensor:
    theta = theta.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(theta), theta, create_graph=True)
    (product,) = torch.autograd.grad((g * theta.detach()).sum(), theta)
    return theta.detach() * product


@solved_by(_theta_h_theta)
def theta_h_theta(function: Callable[[Loss, Tensor], Tensor]) -> Verdict:
    """Check ``function(loss, theta)``: ``θ ⊙ (Hθ)``, H the Hessian of ``loss`` at ``theta [n]``."""
    bowl = _Named("θ₀² + 3θ₀θ₁ + θ₁ − 2θ₁²", lambda t: t[0] ** 2 + 3 * t[0] * t[1] + t[1] - 2 * t[1] ** 2)
    product = _Named("θ₀θ₁θ₂ + θ₀ + θ₁ + θ₂", lambda t: t[0] * t[1] * t[2] + t.sum())

    def hessian(loss: Loss, theta: Tensor) -> Tensor:
        return torch.autograd.functional.hessian(loss, theta)

    def slope(loss: Loss, theta: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(loss, theta)

    def right(loss: Loss, theta: Tensor) -> Tensor:
        return theta * (hessian(loss, theta) @ theta)

    mistakes: dict[str, Callable[..., Any]] = {
        "that is Hθ; multiply by θ once more, entry by entry": lambda loss, theta: hessian(loss, theta) @ theta,
        "θ was not held fixed in gᵀθ: its derivative then has the gradient in it, g + Hθ (detach one of the two)": (
            lambda loss, theta: theta * (slope(loss, theta) + hessian(loss, theta) @ theta)
        ),
        "that is the first-order term, θ ⊙ g; differentiate once more": lambda loss, theta: theta * slope(loss, theta),
        "that is θ² times the diagonal of H; the interactions between weights are missing": (
            lambda loss, theta: theta**2 * hessian(loss, theta).diagonal()
        ),
        "that is θᵀHθ, one number; a score for every weight is asked for": lambda loss, theta: right(loss, theta).sum(),
    }
    return compare(
        function,
        [(bowl, torch.tensor([1.0, -2.0])), (product, torch.tensor([0.5, 2.0, -3.0]))],
        right,
        mistakes,
        praise="two backward passes and no Hessian.",
        hint="Take g of theta.clone().requires_grad_() with create_graph=True, then the gradient of gᵀθ, θ detached.",
    )


def _unit_alone(H: Tensor, g: Tensor, theta: Tensor, unit: list[int]) -> Tensor:
    delta = torch.zeros_like(theta)
    delta[unit] = -theta[unit]
    return g @ delta + 0.5 * delta @ H @ delta


@solved_by(_unit_alone)
def unit_alone(function: Callable[[Tensor, Tensor, Tensor, list[int]], Any]) -> Verdict:
    """Check ``function(H, g, theta, unit)``: ``gᵀδ + ½ δᵀHδ`` with δ = −θ on the unit and zero elsewhere."""
    H = torch.tensor([[2.0, 1.0, 0.5], [1.0, 3.0, -1.0], [0.5, -1.0, 1.0]])
    g, theta = torch.tensor([0.25, -0.5, 1.0]), torch.tensor([1.0, -2.0, 3.0])

    def terms(H: Tensor, g: Tensor, theta: Tensor, unit: list[int]) -> tuple[float, float]:
        delta = torch.zeros_like(theta)
        delta[unit] = -theta[unit]
        return float(g @ delta), float(delta @ H @ delta)

    def right(H: Tensor, g: Tensor, theta: Tensor, unit: list[int]) -> float:
        first, second = terms(H, g, theta, unit)
        return first + second / 2

    def row(H: Tensor, g: Tensor, theta: Tensor, unit: list[int]) -> float:
        return float((theta * (H @ theta))[unit].sum())

    mistakes: dict[str, Callable[..., Any]] = {
        "the factor ½ is missing": lambda *given: sum(terms(*given)),
        "δ is −θ, so the first-order term counts with a minus": lambda *given: right(*given) - 2 * terms(*given)[0],
        "the first-order term is missing": lambda *given: terms(*given)[1] / 2,
        "that is the unit's row in θᵀHθ: it charges interactions with weights that stay": row,
        "the other weights stay: H θ needs θ to be zero outside the unit": (
            lambda *given: terms(*given)[0] + row(*given) / 2
        ),
        "weights of one unit go together: their interactions count, not the diagonal of H alone": (
            lambda H, g, theta, unit: right(torch.diag(H.diagonal()), g, theta, unit)
        ),
    }
    return compare(
        function,
        [(H, g, theta, [1]), (H, g, theta, [0, 2]), (H, g, theta, [0, 1])],
        right,
        mistakes,
        praise="both sides of H are restricted to the unit, since nothing else moves.",
        hint="Make δ, a vector of zeros with −θ on the unit, and put it into gᵀδ + ½ δᵀHδ.",
    )


Pairs = list[tuple[Tensor, Tensor]]


def _carried(weights: list[Tensor], x: Tensor) -> Pairs:
    return _forward(weights, x)


@solved_by(_carried)
def carried(function: Callable[[list[Tensor], Tensor], Pairs]) -> Verdict:
    """Check ``function(weights, x)``: what enters each layer, and how it moves as all weights move along themselves.

    The answer is a list of pairs ``(x, ẋ)``, one for each layer and one for the outputs; a ReLU is between layers.
    """
    generator = torch.Generator().manual_seed(0)
    small = [torch.tensor([[2.0]]), torch.tensor([[3.0]])], torch.tensor([[1.0]])
    wide = [torch.randn(out, into, generator=generator) for into, out in ((3, 5), (5, 4), (4, 2))]
    mistakes: dict[str, Callable[..., Any]] = {
        "the layer's own motion is missing: ẏ = Wẋ + Wx, since Ẇ = W": (
            lambda weights, x: _flat(_forward(weights, x, own=False))
        ),
        "what the layers before have moved is lost: ẏ = Wẋ + Wx": (
            lambda weights, x: _flat(_forward(weights, x, before=False))
        ),
        "a ReLU that is closed lets no motion through either: set ẏ to zero where y is negative": (
            lambda weights, x: _flat(_forward(weights, x, closed=False))
        ),
        "there is no ReLU behind the last layer": lambda weights, x: _flat(_forward(weights, x, last=True)),
        "the input itself does not move: its ẋ is zero": (lambda weights, x: _flat(_forward(weights, x, start=x))),
    }

    @wraps(function)
    def as_tensor(weights: list[Tensor], x: Tensor) -> object:
        answer: object = function(weights, x)
        return _flat(answer) if isinstance(answer, list) and answer else answer

    return compare(
        as_tensor,
        [small, (wide, torch.randn(6, 3, generator=generator))],
        lambda weights, x: _flat(_forward(weights, x)),
        mistakes,
        praise="a forward pass that knows where everything is going.",
        hint="It should be a list of pairs (x, ẋ), first what enters, last the outputs; ẏ = Wẋ + Wx.",
    )


def _flat(pairs: Any) -> Tensor:
    return torch.cat([part.flatten() for pair in pairs for part in pair])


def _forward(
    weights: list[Tensor],
    x: Tensor,
    *,
    own: bool = True,
    before: bool = True,
    closed: bool = True,
    last: bool = False,
    start: Tensor | None = None,
) -> Pairs:
    pairs = [(x, torch.zeros_like(x) if start is None else start)]
    for number, W in enumerate(weights):
        x, moved = pairs[-1]
        y = x @ W.T
        along = before * (moved @ W.T) + own * y
        if last or number < len(weights) - 1:
            along = along * (y > 0) if closed else along
            y = y.relu()
        pairs.append((y, along))
    return pairs


Paths = Sequence[Sequence[str]]


def _functional_is_zero(paths: Paths, first: str, second: str) -> bool:
    return _zero(paths, first, second)


@solved_by(_functional_is_zero)
def functional_is_zero(function: Callable[[Paths, str, str], bool]) -> Verdict:
    """Check ``function(paths, first, second)``: whether no path holds both layers, or they are the same one."""
    paths = [["stem", "conv1", "conv2", "head"], ["stem", "shortcut", "head"]]
    pairs = [("conv1", "conv2"), ("shortcut", "conv2"), ("stem", "head"), ("conv1", "conv1"), ("head", "shortcut")]
    answers = []
    for first, second in pairs:
        answer, verdict = answer_of(function, [list(path) for path in paths], first, second)
        if verdict is not None:
            return verdict
        if not isinstance(answer, bool):
            return Verdict(False, f"it should return True or False, not {answer!r}.")
        answers.append(answer)
    right = [_zero(paths, first, second) for first, second in pairs]
    if answers == right:
        return Verdict(True, "a product of weights bends along two layers only if both are factors of it.")
    for words, mistake in MISTAKES.items():
        if answers == [mistake(paths, first, second) for first, second in pairs]:
            return Verdict(False, f"{words}.")
    wrong = next(number for number, answer in enumerate(answers) if answer != right[number])
    return Verdict(
        False, f"for {pairs[wrong]} it says {answers[wrong]}. Look for a path that holds both, as different factors."
    )


def _zero(paths: Paths, first: str, second: str) -> bool:
    return first == second or not any(first in path and second in path for path in paths)


MISTAKES: dict[str, Callable[[Paths, str, str], bool]] = {
    "it is reversed: the part is zero if there is no path through both": (
        lambda paths, first, second: not _zero(paths, first, second)
    ),
    "a path holds a layer once, as one factor: the second derivative in the same layer is zero": (
        lambda paths, first, second: not any(first in path and second in path for path in paths)
    ),
    "layers in series need not be neighbours; anything between them is one more factor": (
        lambda paths, first, second: first == second or not any(_neighbours(path, first, second) for path in paths)
    ),
    "one path through both is enough; they need not share all paths": (
        lambda paths, first, second: first == second or not all(first in path and second in path for path in paths)
    ),
    "the order of the two makes no difference": (
        lambda paths, first, second: first == second or not any(_in_order(path, first, second) for path in paths)
    ),
}


def _neighbours(path: Sequence[str], first: str, second: str) -> bool:
    return first in path and second in path and abs(list(path).index(first) - list(path).index(second)) == 1


def _in_order(path: Sequence[str], first: str, second: str) -> bool:
    return first in path and second in path and list(path).index(first) < list(path).index(second)


__all__ = ["carried", "functional_is_zero", "theta_h_theta", "unit_alone"]

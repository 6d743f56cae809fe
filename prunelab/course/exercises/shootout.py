"""Checkers for the exercises of ``15_shootout``: the error of a difference, mean ranks, who is not beaten."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, compare, solved_by


def _paired_error(first: Tensor, second: Tensor) -> float:
    difference = first.double() - second.double()
    variance = (difference**2).mean() - difference.mean() ** 2
    return float((variance / len(difference)) ** 0.5)


@solved_by(_paired_error)
def paired_error(function: Callable[[Tensor, Tensor], float]) -> Verdict:
    """Check ``function(first, second)``: the standard error of the difference of two accuracies on the same images.

    ``first`` and ``second`` are bool, one per image: whether the network was right.  With the difference d_n of the two
    as numbers, it is the standard deviation of d_n (of the n images, not n − 1) divided by √n.
    """

    def error(first: Tensor, second: Tensor) -> float:
        difference = first.double() - second.double()
        return float(difference.std(unbiased=False) / len(difference) ** 0.5)

    def alone(right: Tensor) -> float:
        share = float(right.double().mean())
        return share * (1 - share) / len(right)

    mistakes: dict[str, Callable[[Tensor, Tensor], float]] = {
        "it adds the errors of two independent sets of images; here both networks saw the same ones, and an image that "
        "both get right adds nothing": lambda first, second: (alone(first) + alone(second)) ** 0.5,
        "that is the standard deviation of one image; divide by √n for the mean of n": (
            lambda first, second: error(first, second) * len(first) ** 0.5
        ),
        "it divides by n; the error of a mean falls with √n": (
            lambda first, second: error(first, second) / len(first) ** 0.5
        ),
        "that is the variance; take its root": lambda first, second: error(first, second) ** 2,
        "that is the difference itself; its error was asked for": lambda first, second: float(
            first.double().mean() - second.double().mean()
        ),
        "it is the error of the first accuracy alone": lambda first, second: alone(first) ** 0.5,
        "it counts the images on which they differ, without taking off the square of the mean difference": (
            lambda first, second: float((first != second).double().mean() / len(first)) ** 0.5
        ),
        "it divides by n − 1; take all n images": lambda first, second: float(
            (first.double() - second.double()).std() / len(first) ** 0.5
        ),
    }
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.rand(11, generator=generator) < share for share in (0.8, 0.5))
    few = torch.tensor([True, True, False, True, True]), torch.tensor([True, False, False, True, False])
    return compare(
        function,
        [few, (one, two), (two, one)],
        error,
        mistakes,
        praise="images that both networks get right, or both wrong, do not blur the difference.",
        hint="Take the difference image by image, −1, 0 or 1, then the standard error of its mean.",
    )


def _mean_ranks(values: Tensor) -> Tensor:
    better = (values[:, None, :] > values[:, :, None]).sum(2)
    equal = (values[:, None, :] == values[:, :, None]).sum(2)
    return (better + (equal + 1) / 2).mean(0)


@solved_by(_mean_ranks)
def mean_ranks(function: Callable[[Tensor], Tensor]) -> Verdict:
    """Check ``function(values)``: the mean rank of each method over blocks, for ``values [blocks, methods]``.

    In a block, a case with one seed, the highest value has rank 1; equal values share the mean of their ranks.
    """

    def ranks(values: Tensor, sign: int = 1, shared: bool = True) -> Tensor:
        values = sign * values.double()
        better = (values[:, None, :] > values[:, :, None]).sum(2)
        equal = (values[:, None, :] == values[:, :, None]).sum(2)
        return better + (equal + 1) / 2 if shared else better + 1.0

    mistakes: dict[str, Callable[[Tensor], Tensor]] = {
        "the lowest value has rank 1; accuracy is better when it is high": lambda values: ranks(values, -1).mean(0),
        "it counts from 0; the best has rank 1": lambda values: ranks(values).mean(0) - 1,
        "equal values get the best of their ranks; they share the mean": lambda values: ranks(values, 1, False).mean(0),
        "it ranks the means of the columns; rank within every block, then take the mean": (
            lambda values: ranks(values.double().mean(0, keepdim=True))[0]
        ),
        "it takes the mean of every block; take it of every method": lambda values: ranks(values).mean(1),
        "that is the order of the methods, as argsort gives it, and not their ranks; sort twice": (
            lambda values: values.argsort(1, descending=True).double().mean(0) + 1
        ),
        "equal values get different ranks, in the order of the list; they share the mean": (
            lambda values: values.argsort(dim=1, descending=True, stable=True).argsort(1).double().mean(0) + 1
        ),
    }
    return compare(
        function,
        [
            (torch.tensor([[0.9, 0.8, 0.7], [0.5, 0.6, 0.4]]),),
            (torch.tensor([[0.9, 0.8, 0.8], [0.1, 0.9, 0.3], [0.7, 0.9, 0.1], [0.99, 0.1, 0.2]]),),
        ],
        lambda values: ranks(values).mean(0),
        mistakes,
        praise="a rank does not care how far ahead the winner is, nor how hard the case was.",
        hint="The rank is 1 plus the number of better methods, plus half the number of other methods that are equal.",
    )


def _pareto_front(costs: Tensor, values: Tensor) -> Tensor:
    no_worse = (costs[None, :] <= costs[:, None]) & (values[None, :] >= values[:, None])
    better = (costs[None, :] < costs[:, None]) | (values[None, :] > values[:, None])
    return ~(no_worse & better).any(1)


@solved_by(_pareto_front)
def pareto_front(function: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """Check ``function(costs, values)``: which points no other one beats, as bool ``[points]``.

    Another point beats it if it costs no more and is worth no less, and is better in one of the two.
    """

    def front(costs: Tensor, values: Tensor) -> Tensor:
        no_worse = (costs[None] <= costs[:, None]) & (values[None] >= values[:, None])
        strictly = (costs[None] < costs[:, None]) | (values[None] > values[:, None])
        return ~(no_worse & strictly).any(1)

    mistakes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "those are the points that are beaten": lambda costs, values: ~front(costs, values),
        "it keeps the point of the highest value alone; a cheaper one may be worth having too": (
            lambda costs, values: values == values.max()
        ),
        "high costs count as good": lambda costs, values: front(-costs, values),
        "low values count as good": lambda costs, values: front(costs, -values),
        "another one must be better in both to beat it here; the same cost and a higher value is enough": (
            lambda costs, values: ~((costs[None] < costs[:, None]) & (values[None] > values[:, None])).any(1)
        ),
        "every point is as good as itself, and so none is left; ask for better in one of the two": (
            lambda costs, values: ~((costs[None] <= costs[:, None]) & (values[None] >= values[:, None])).any(1)
        ),
    }
    return compare(
        function,
        [
            (torch.tensor([0.3, 0.5, 0.5, 0.7]), torch.tensor([0.8, 0.9, 0.7, 0.85])),
            (torch.tensor([0.2, 0.4, 0.4, 0.9, 0.1]), torch.tensor([0.3, 0.6, 0.6, 0.7, 0.3])),
        ],
        front,
        mistakes,
        praise="what is not beaten is a choice; which of them, depends on what one can pay.",
        hint="Compare every point with every other one: is there one with no higher cost and no lower value?",
    )


__all__ = ["mean_ranks", "paired_error", "pareto_front"]

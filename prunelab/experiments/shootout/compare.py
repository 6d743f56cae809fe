"""Comparing what many runs have found: ranks, their confidence, and who is beaten by nobody.

Flows in: numbers by method and case.  Flows out: ranks, intervals, masks.  ``sweeping.report`` uses it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray


def mean_ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Return the mean rank of each method, 1 being the best: highest value first, equal ones share the mean of theirs.

    Args:
        values: ``[blocks, methods]``; a block is one case and seed, in which all methods were measured.

    >>> mean_ranks([[0.9, 0.8, 0.8], [0.7, 0.9, 0.1]])
    array([1.5 , 1.75, 2.75])
    """
    return pd.DataFrame(np.atleast_2d(values)).rank(axis=1, ascending=False).mean().to_numpy()


def pareto_front(costs: ArrayLike, values: ArrayLike) -> NDArray[np.bool_]:
    """Return which points no other one beats: none costs at most as much and is worth more, or costs less for the same.

    >>> pareto_front([0.3, 0.5, 0.5, 0.7], [0.8, 0.9, 0.7, 0.85]).tolist()
    [True, True, False, False]
    """
    cost, value = (np.asarray(given, dtype=np.float64) for given in (costs, values))
    no_worse = (cost[None, :] <= cost[:, None]) & (value[None, :] >= value[:, None])
    strictly = (cost[None, :] < cost[:, None]) | (value[None, :] > value[:, None])
    return np.logical_not((no_worse & strictly).any(1))


def bootstrap(
    numbers: ArrayLike, cases: Sequence[Hashable], *, draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the bounds of confidence intervals for the means of columns, over cases and over seeds within them.

    Cases are drawn with replacement, and then as many blocks (seeds) of each as it has; the bounds are percentiles of
    the means of such draws.  With one case only its seeds are drawn.

    Args:
        numbers: ``[blocks, columns]``.
        cases: of each block.
        draws: how many.
        seed: of the draws.
        level: share of the draws between the bounds.

    Source: Efron & Tibshirani 1993, *An Introduction to the Bootstrap*, chapter 13; in two stages as in Davison &
    Hinkley 1997, *Bootstrap Methods and their Application*, section 3.8.
    """
    table = np.asarray(numbers, dtype=np.float64)
    places = [np.array([i for i, case in enumerate(cases) if case == one]) for one in dict.fromkeys(cases)]
    random = np.random.default_rng(seed)
    total, count = np.zeros((draws, table.shape[1])), np.zeros((draws, 1))
    chosen = random.integers(len(places), size=(draws, len(places))) if len(places) > 1 else np.zeros((draws, 1), int)
    for slot in range(chosen.shape[1]):
        for case, blocks in enumerate(places):
            here = chosen[:, slot] == case
            rows = random.choice(blocks, size=(int(here.sum()), len(blocks)))
            total[here] += table[rows].sum(1)
            count[here] += len(blocks)
    means = total / count
    outside = 100 * (1 - level) / 2
    low, high = np.percentile(means, [outside, 100 - outside], axis=0)
    return low, high

"""The order in which units go: by their scores, or greedily where scores say what units cost together.

Flows in: ``Scores``, with or without an interaction matrix, and pools of bundles in which units compete.  Flows out: an
``Order``: which bundle gives up a unit at every step, and which of its units goes first, second, …  ``plan`` cuts the
order off where the budget is met, so one order serves every budget.  Notebook 10_oracle shows why it matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunelab.criteria.base import Scores
from prunelab.tracing.groups import Group

Bundle = tuple[Group, ...]
"""Groups that must lose equal numbers of units: they lose them together, the lowest of each at a time."""


@dataclass(frozen=True)
class Order:
    """What goes when.

    Attributes:
        queues: per pool, the name of the bundle's first group that gives up a unit, step by step.
        units: group name -> its units, the one that goes first at the front.
    """

    queues: list[list[str]]
    units: dict[str, list[int]]


def removal_order(
    scores: Scores,
    pools: Sequence[Sequence[Bundle]],
    limits: Mapping[str, int],
    prices: Mapping[str, float] | None = None,
    fixed: Mapping[str, int] | None = None,
) -> Order:
    """Return in which order units go, cheapest first.

    Without a matrix each group gives up its units by ascending score.  With one, every step removes the unit that adds
    least to the cost of all that is gone, ``score_u + Σ_{v gone} M_uv``; taking it updates the costs of the others by
    one column of ``M``, so a step costs O(U) and the order O(U²) for U units.  Greedy is not optimal: two units that
    are only cheap together (removing one makes up for the other) are found only if one of them goes by itself.

    Args:
        scores: one number per unit, and perhaps a matrix.
        pools: bundles that compete.  Pools take turns, so that each has always lost about the same share.
        limits: name of a bundle's first group -> how many units each of its groups may lose.
        prices: name of a bundle's first group -> what one unit of it saves; costs are divided by it.
        fixed: group name -> how many units go from it whatever the ranking says; they go before all others.
    """
    prices = prices or {}
    if scores.matrix is None:
        units = {group.name: scores[group].argsort(stable=True).tolist() for group in scores}
        return Order([_ascending(scores, pool, limits, prices) for pool in pools], units)
    state = _State(scores)
    for name, number in (fixed or {}).items():
        for _ in range(number):
            state.take(name)
    queues: list[list[str]] = [[] for _ in pools]
    lengths = [sum(limits[bundle[0].name] for bundle in pool) for pool in pools]
    turns = sorted((step / length, pool) for pool, length in enumerate(lengths) for step in range(1, length + 1))
    races = [_Race(state, pool, limits, prices) for pool in pools]
    for _, pool in turns:
        queues[pool].append(races[pool].step())
    return Order(queues, state.gone)


def priced(cost: Tensor, price: Tensor | float) -> Tensor:
    """Return what a unit costs per unit of what it saves; a gain is worth more, not less, where more is saved."""
    return torch.where(cost > 0, cost / price, cost * price)


def _ascending(
    scores: Scores, pool: Sequence[Bundle], limits: Mapping[str, int], prices: Mapping[str, float]
) -> list[str]:
    waiting = []
    for bundle in pool:
        name = bundle[0].name
        together = torch.stack([scores[group].double().sort(stable=True).values for group in bundle]).sum(0)
        ascending = priced(together, prices.get(name, 1.0))[: limits[name]].tolist()
        waiting += [(cost, name) for cost in ascending]
    return [name for _, name in sorted(waiting, key=lambda unit: unit[0])]


class _State:
    """What every unit would cost now, given all that is gone."""

    def __init__(self, scores: Scores) -> None:
        assert scores.matrix is not None
        self.matrix, self.offsets = scores.matrix, scores.offsets
        self.sizes = {group.name: group.size for group in scores}
        self.cost = torch.cat([scores[group] for group in scores]).double()
        self.gone: dict[str, list[int]] = {name: [] for name in self.sizes}

    def slice(self, name: str) -> slice:
        return slice(self.offsets[name], self.offsets[name] + self.sizes[name])

    def lowest(self, name: str) -> int:
        """Return the place of the cheapest unit of a group among all units."""
        return self.offsets[name] + int(self.cost[self.slice(name)].argmin())

    def take(self, name: str) -> None:
        """Remove the cheapest unit of a group."""
        unit = self.lowest(name)
        self.gone[name].append(unit - self.offsets[name])
        self.cost += self.matrix[unit]
        self.cost[unit] = torch.inf


class _Race:
    """The bundles of one pool, which compete for who gives up a unit next."""

    def __init__(
        self, state: _State, pool: Sequence[Bundle], limits: Mapping[str, int], prices: Mapping[str, float]
    ) -> None:
        self.state, self.pool = state, pool
        self.left = torch.tensor([limits[bundle[0].name] for bundle in pool])
        self.price = torch.tensor([prices.get(bundle[0].name, 1.0) for bundle in pool], dtype=torch.float64)
        self.tied = [(place, bundle) for place, bundle in enumerate(pool) if len(bundle) > 1]
        groups = [(place, group) for place, bundle in enumerate(pool) for group in bundle]
        self.bundle_of = torch.tensor([place for place, _ in groups])
        # The places of the pool's units among all units, and which of the pool's groups each belongs to.
        self.units = torch.cat([torch.arange(state.slice(g.name).start, state.slice(g.name).stop) for _, g in groups])
        self.owner = torch.repeat_interleave(torch.tensor([group.size for _, group in groups]))

    def step(self) -> str:
        """Remove a unit from the bundle where that costs least, and return the bundle's name."""
        state = self.state
        low = torch.full((len(self.bundle_of),), torch.inf, dtype=torch.float64)
        low.scatter_reduce_(0, self.owner, state.cost[self.units], "amin")
        cost = low.new_zeros(len(self.pool)).index_add_(0, self.bundle_of, low)
        for place, bundle in self.tied:
            if self.left[place]:
                cost[place] += self._together([state.lowest(group.name) for group in bundle])
        cost = priced(cost, self.price).masked_fill(self.left == 0, torch.inf)
        best = int(cost.argmin())
        self.left[best] -= 1
        for group in self.pool[best]:
            state.take(group.name)
        return self.pool[best][0].name

    def _together(self, units: list[int]) -> float:
        """Return what units of several groups cost together beyond each by itself."""
        return float(self.state.matrix[units][:, units].triu(1).sum())

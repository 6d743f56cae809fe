"""Ranks: how far each layer is narrowed in its eigenbasis, so that a budget is met at the least damage.

With rows R and columns C of the rotated weight kept, the quadratic model charges what is left out,

    damage(R, C) = Σ_all I − Σ_{R × C} I,     I = ½ W*² ⊙ Λ   (never counted twice),

and a layer costs what its bottleneck costs: one side rotated, both, or none, whichever is cheapest.  A price λ per FLOP
or parameter makes every layer choose on its own, argmin damage + λ · cost; the budget is met by bisection on λ.

Flows in: the importance I of every layer and how often it is used.  Flows out: two ranks per layer.  Notebook
08_eigendamage derives it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from prunelab.errors import BudgetError


class Choice(NamedTuple):
    """Ranks of a layer's core: ``None`` leaves a side unchanged; and what that costs (a share) and damages."""

    inward: int | None
    outward: int | None
    cost: float
    damage: float


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that may be narrowed, all sizes per group.

    Attributes:
        name: of its weight.
        importance: I, float64 ``[groups, out, in]``, summed over kernel positions.
        kernel: number of kernel positions.
        around: ``(in, out)`` sizes at the far ends of the rotations that the layer has already, ``None`` where it has
            none.
        price: what one multiply-add of the inward, core and outward layer costs, as a share of the whole model.
        trade: the same in what damage is weighed against, where that is not the budget's kind.
    """

    name: str
    importance: Tensor
    kernel: int
    around: tuple[int | None, int | None]
    price: tuple[float, float, float]
    trade: tuple[float, float, float] | None = None

    @cached_property
    def rows(self) -> Tensor:
        """``[out]``: importance of the best row of every group together, of the second best, and so on."""
        return self.importance.sum(2).sort(1, descending=True).values.sum(0)

    @cached_property
    def columns(self) -> Tensor:
        """``[in]``: the same for columns."""
        return self.importance.sum(1).sort(1, descending=True).values.sum(0)

    def cost(self, inward: Tensor, outward: Tensor, sides: tuple[bool, bool]) -> Tensor:
        """Return the cost of ranks with or without a layer on each side, ``[…, 2]``: for the budget, for the trade."""
        groups, full_out, full_in = self.importance.shape
        macs = torch.zeros(*torch.broadcast_shapes(inward.shape, outward.shape), 3, dtype=torch.float64)
        macs[..., 0] = inward * (self.around[0] or full_in) * sides[0]
        macs[..., 1] = inward * outward * self.kernel
        macs[..., 2] = outward * (self.around[1] or full_out) * sides[1]
        return groups * macs @ torch.tensor([self.price, self.trade or self.price], dtype=torch.float64).mT

    @cached_property
    def options(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every way to narrow the layer: costs ``[n, 2]``, damage ``[n]`` and two ranks ``[n, 2]`` (0: left alone)."""
        full_out, full_in = self.importance.shape[1:]
        total = self.importance.sum()
        whole = torch.ones(1, dtype=torch.float64)
        some_in, some_out = torch.arange(1.0, full_in).double(), torch.arange(1.0, full_out).double()
        has = self.around[0] is not None, self.around[1] is not None
        found = [(self.cost(whole * full_in, whole * full_out, has), total[None] * 0, whole * 0, whole * 0)]
        damage = total - self.columns.cumsum(0)[:-1]
        found.append((self.cost(some_in, whole * full_out, (True, has[1])), damage, some_in, some_in * 0))
        damage = total - self.rows.cumsum(0)[:-1]
        found.append((self.cost(whole * full_in, some_out, (has[0], True)), damage, some_out * 0, some_out))
        # Without a kernel between them the second rotation only costs: U C V is cheaper with C merged into one of them.
        if self.kernel > 1 or any(has):
            best_rows = self.importance.sum(2).argsort(1, descending=True)
            best_columns = self.importance.sum(1).argsort(1, descending=True)
            ordered = self.importance.gather(1, best_rows[:, :, None].expand_as(self.importance))
            ordered = ordered.gather(2, best_columns[:, None, :].expand_as(self.importance)).sum(0)
            kept = ordered.cumsum(0).cumsum(1)[:-1, :-1]
            cost = self.cost(some_in[None, :], some_out[:, None], (True, True))
            columns, rows = some_in[None, :].expand_as(kept), some_out[:, None].expand_as(kept)
            found.append((cost, total - kept, columns, rows))
        costs = torch.cat([cost.flatten(0, -2) for cost, *_ in found])
        damages, inward, outward = (torch.cat([part[place].flatten() for part in found]) for place in (1, 2, 3))
        return costs, damages.clamp_min(0), torch.stack([inward, outward], 1).long()

    def pick(self, index: int) -> Choice:
        """Return one of the options."""
        cost, damage, ranks = (part[index] for part in self.options)
        inward, outward = (rank or None for rank in ranks.tolist())
        return Choice(inward, outward, float(cost[0]), float(damage))

    @cached_property
    def front(self) -> tuple[Tensor, Tensor, Tensor]:
        """The options that no other beats in both, by rising cost and falling damage: cost, damage and their index."""
        costs, damage, _ = self.options
        order = costs[:, 0].argsort(stable=True)
        lowest = damage[order].cummin(0).values
        better = torch.cat([torch.ones(1, dtype=torch.bool), lowest[1:] < lowest[:-1]])
        best = order[better]
        return costs[best, 0], damage[best], best

    def at_price(self, price: float) -> Choice:
        """Return the option of least damage + price · cost."""
        if self.trade is None:
            costs, damage, index = self.front
            return self.pick(int(index[(damage + price * costs).argmin()]))
        costs, damage, _ = self.options
        return self.pick(int((damage + price * costs[:, 1]).argmin()))

    def above(self, threshold: float) -> Choice:
        """Keep rows and columns whose importance is above a threshold; where it is cheaper, one side or all of it."""
        costs, _, ranks = self.options
        limits = [max(int((scores > threshold).sum()), 1) for scores in (self.columns, self.rows)]
        full = [self.importance.shape[2], self.importance.shape[1]]
        kept = torch.where(ranks == 0, torch.tensor(full), ranks)
        fits = (kept >= torch.tensor(limits)).all(1)
        return self.pick(int(costs[:, 0].masked_fill(~fits, torch.inf).argmin()))

    def within(self, cost: float) -> Choice:
        """Return the option of least damage among those that cost no more; the cheapest if all do."""
        costs, _, index = self.front
        return self.pick(int(index[max(int((costs <= cost).sum()) - 1, 0)]))


def choose(layers: Sequence[Layer], target: float, *, by_price: bool, slack: float, asked: str) -> dict[str, Choice]:
    """Choose the ranks of all layers so that they cost at most ``target`` together, and as little less as possible.

    Args:
        layers: the layers that may be narrowed.
        target: their budget, as a share of the whole model.
        by_price: a price per cost, or else one threshold for the importance of all rows and columns.
        slack: how far below the target is near enough; a warning where ranks are too large steps for that.
        asked: the budget in the user's words, for messages.

    Raises:
        BudgetError: rank one everywhere still costs more.
    """
    cheapest = {layer.name: layer.within(0) for layer in layers}
    least = _spent(cheapest)
    if least > target:
        raise BudgetError(
            f"{asked} cannot be met: the layers that can be factorised have {target:.3f} of the whole left to them and "
            f"cost {least:.3f} at rank one. Raise the budget or ignore less."
        )
    damage = sum(float(layer.importance.sum()) for layer in layers) or 1.0

    def at(level: float) -> dict[str, Choice]:
        price = damage * math.exp(level)
        return {layer.name: layer.at_price(price) if by_price else layer.above(price) for layer in layers}

    low, high = -80.0, 80.0 if by_price else 1.0
    best = at(high)
    if _spent(best) > target:  # a threshold above everything leaves rank one on both sides, which may not be cheapest
        best = cheapest
    for _ in range(60):
        middle = (low + high) / 2
        found = at(middle)
        if _spent(found) <= target:
            best, high = found, middle
        else:
            low = middle
    best = _spend_the_rest(layers, best, target, slack / 10)
    if _spent(best) < target - slack:
        warnings.warn(
            f"{asked}: the layers end at {_spent(best):.3f} of the {target:.3f} of the whole that is left to them; "
            "no ranks that use more of it do less damage.",
            stacklevel=4,
        )
    return best


def _spent(choices: dict[str, Choice]) -> float:
    return sum(choice.cost for choice in choices.values())


def _spend_the_rest(
    layers: Sequence[Layer], choices: dict[str, Choice], target: float, enough: float
) -> dict[str, Choice]:
    """Lessen the damage with what is left of the budget: change one layer, or where that is not enough two, at best."""
    for changed, times in ((_one_layer, 20 * len(layers)), (_two_layers, 20)):
        for _ in range(times):
            left = target - _spent(choices)
            found = changed(layers, choices, left) if left > enough else {}
            if not found:
                break
            choices = choices | found
    return choices


def _one_layer(layers: Sequence[Layer], choices: dict[str, Choice], left: float) -> dict[str, Choice]:
    trials = [(layer.name, layer.within(choices[layer.name].cost + left)) for layer in layers]
    name, choice = max(trials, key=lambda trial: choices[trial[0]].damage - trial[1].damage)
    return {name: choice} if choice.damage < choices[name].damage else {}


def _two_layers(layers: Sequence[Layer], choices: dict[str, Choice], left: float) -> dict[str, Choice]:
    best, found = 0.0, {}
    for first, second in combinations(layers, 2):
        now = choices[first.name], choices[second.name]
        limit = now[0].cost + now[1].cost + left
        costs, damage, index = first.front
        place = torch.searchsorted(second.front[0], limit - costs, right=True) - 1
        total = damage + second.front[1][place.clamp_min(0)]
        total = total.masked_fill(place < 0, torch.inf)
        lowest = int(total.argmin())
        gain = now[0].damage + now[1].damage - float(total[lowest])
        if gain > best * (1 + 1e-9) + 1e-12 * now[0].damage:
            other = second.pick(int(second.front[2][place[lowest]]))
            best, found = gain, {first.name: first.pick(int(index[lowest])), second.name: other}
    return found

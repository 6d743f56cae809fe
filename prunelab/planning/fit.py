"""How many units go from each group, so that what is left ends just below a budget.

The ranking says in which order units go; cutting it off at one place is all that a budget needs, as long as units are
small.  Where one unit, or a block of ``round_to``, is more than 1 % of the budget, the last steps pass over blocks that
overshoot, and at the very end a few blocks change places.

Flows in: queues of names, one entry per unit.  Flows out: how many units go, by the name of a bundle's first group.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from prunelab.errors import BudgetError

TOLERANCE = 0.01
"""How far below its budget a plan may end, as a share of the budget."""
MOST_COMBINATIONS = 4096
"""Up to so many ways to choose numbers are all looked at, if nothing else comes close enough."""
MOST_TRIALS = 400
"""So many exchanges of blocks are tried at most."""
FARTHEST = 3
"""So many blocks a bundle gives or takes at most when blocks change places."""

Gone = dict[str, int]
"""Name of a bundle's first group -> how many units go from each of its groups."""


@dataclass(frozen=True)
class Supply:
    """What may go, and in which order.

    Attributes:
        queues: per pool, the name of the bundle that gives up a unit, step by step.
        levels: name of a bundle -> the numbers of units that may go from it, ascending from 0.
    """

    queues: Sequence[Sequence[str]]
    levels: Mapping[str, Sequence[int]]

    def at(self, share: float) -> Gone:
        """Return what is gone when every pool has lost this share of what it may lose, in single units."""
        gone: Gone = defaultdict(int)
        for queue in self.queues:
            for name in queue[: int(share * len(queue) + 1e-9)]:
                gone[name] += 1
        return gone

    def settled(self, gone: Mapping[str, int]) -> Gone:
        """Return the next lower numbers that may go."""
        return {name: levels[bisect_right(levels, gone.get(name, 0)) - 1] for name, levels in self.levels.items()}

    def moved(self, gone: Mapping[str, int], name: str, blocks: int) -> Gone | None:
        """Return the same with so many blocks more gone from a bundle, ``None`` where there are not as many."""
        levels = self.levels[name]
        place = bisect_right(levels, gone.get(name, 0)) - 1 + blocks
        return {**gone, name: levels[place]} if 0 <= place < len(levels) else None


def fit(supply: Supply, spent: Callable[[Gone], float], target: float, failure: str, held: str = "") -> Gone:
    """Return what goes, so that what is spent ends at or just below the target.

    Args:
        supply: what may go.
        spent: share that is left when so much is gone; falls as more goes.
        target: share that may be left.
        failure: says what cannot be met, for the error.
        held: says what loses nothing and why, for the error.

    Raises:
        BudgetError: more is left when all that may go is gone.
    """
    known: dict[tuple[int, ...], float] = {}

    def left(gone: Mapping[str, int]) -> float:
        settled = supply.settled(gone)
        key = tuple(settled.values())
        if key not in known:
            known[key] = spent(settled)
        return known[key]

    def close(gone: Mapping[str, int]) -> bool:
        return target * (1 - TOLERANCE) <= left(gone) <= target

    if left({}) <= target:
        return supply.settled({})
    least = left(supply.at(1.0))
    if least > target:
        raise BudgetError(
            f"{failure} cannot be met: without all that may go {least:.3f} is left. Raise the budget or max_ratio, "
            f"ignore less, or round to less.{held}"
        )
    # Places at which some queue gives up one unit more, in order.
    places = sorted({(place + 1) / len(queue) for queue in supply.queues for place in range(len(queue))})
    low, high = -1, len(places) - 1  # low: too much is left; high: the target is met
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if left(supply.at(places[middle])) <= target else (middle, high)
    best = supply.at(places[high])
    if not close(best):
        start = places[low] if low >= 0 else 0.0
        best = _top_up(supply, left, close, target, start, best)
    if not close(best):
        best = next(_exchanges(supply, left, close, target, supply.settled(best)), best)
    return supply.settled(best)


def _top_up(
    supply: Supply,
    left: Callable[[Gone], float],
    close: Callable[[Gone], bool],
    target: float,
    start: float,
    best: Gone,
) -> Gone:
    """Go on from just above the target, passing over units that would overshoot it by more than the tolerance."""
    gone = supply.at(start)
    waiting = sorted(
        ((place + 1) / len(queue), pool, name)
        for pool, queue in enumerate(supply.queues)
        for place, name in enumerate(queue)
        if place >= int(start * len(queue) + 1e-9)
    )
    full: set[str] = set()
    for _, _, name in waiting:
        if name in full:
            continue
        trial = {**gone, name: gone.get(name, 0) + 1}
        if close(trial):
            return trial
        if left(trial) > target:
            gone = trial
        else:
            full.add(name)  # later units of this group cost no less
            best = max(best, trial, key=left)
    return best


def _exchanges(
    supply: Supply, left: Callable[[Gone], float], close: Callable[[Gone], bool], target: float, best: Gone
) -> Iterator[Gone]:
    """Yield what comes close enough, by exchanging a few blocks between groups, the fewest first."""
    if math.prod(len(levels) for levels in supply.levels.values()) <= MOST_COMBINATIONS:
        every = (dict(zip(supply.levels, numbers, strict=True)) for numbers in product(*supply.levels.values()))
        found = [gone for gone in every if close(gone)]
        yield from sorted(found, key=lambda gone: sum(abs(gone[name] - best[name]) for name in gone))[:1]
        return
    base, moves = left(best), []
    for blocks in (*range(-FARTHEST, 0), *range(1, FARTHEST + 1)):
        for name in supply.levels:
            moved = supply.moved(best, name, blocks)
            if moved is not None:
                if close(moved):
                    yield moved
                moves.append((left(moved) - base, abs(blocks), name, blocks))
    promising = []
    for one, two in combinations(moves, 2):
        guess = base + one[0] + two[0]  # exact but for what the two groups share
        if one[2] != two[2] and target * (1 - 2 * TOLERANCE) <= guess <= target * (1 + TOLERANCE):
            promising.append((one[1] + two[1], abs(guess - target * (1 - TOLERANCE / 2)), one, two))
    for _, _, one, two in sorted(promising)[:MOST_TRIALS]:
        first = supply.moved(best, one[2], one[3])
        both = None if first is None else supply.moved(first, two[2], two[3])
        if both is not None and close(both):
            yield both


def smallest_gift(supply: Supply, spent: Callable[[Gone], float], gone: Gone) -> tuple[str, int, float] | None:
    """Return the block whose return costs least: its bundle, how many units it has, and what is then left."""
    found = []
    for name, number in gone.items():
        back = supply.moved(gone, name, -1)
        if back is not None:
            found.append((spent(back), name, number - back[name]))
    return next(((name, units, share) for share, name, units in sorted(found)), None)

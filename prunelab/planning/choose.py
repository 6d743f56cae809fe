"""From scores to a plan: which units go, so that a budget is met.

Flows in: ``Scores`` and a budget.  Flows out: a ``Plan``, plain data that names parameters and units, nothing more.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from prunelab.cost import CostModel
from prunelab.criteria.base import Scores
from prunelab.criteria.greedy import Bundle, removal_order
from prunelab.errors import BudgetError, PlanError
from prunelab.planning.plan import Cut, Plan
from prunelab.tracing.groups import Group

TOLERANCE = 0.01
"""How far below its budget a plan may end before a better fit is looked for."""


def plan(
    scores: Scores,
    *,
    flops: float | None = None,
    params: float | None = None,
    ratio: float | None = None,
    scope: Literal["global", "layer", "isomorphic"] = "global",
    max_ratio: float = 0.9,
    round_to: int | None = None,
    ignore: Iterable[str | nn.Module] = (),
    overrides: Mapping[str, float] | None = None,
    per: Literal["unit", "flops", "params"] = "unit",
) -> Plan:
    """Choose the units to remove: those of lowest score, until a budget is met.

    Scores that carry a matrix are ranked greedily: the unit goes next that adds least to the cost of all that is gone.

    Args:
        scores: from a criterion.
        flops: share of the FLOPs that is kept, in (0, 1); or
        params: share of the parameters that is kept; or
        ratio: share of the units that is removed, those that ``ignore`` and ``overrides`` name left out of account.
            Exactly one of the three.
        scope: rank ``"global"``-ly over all groups; remove the same share of every ``"layer"``; or rank within groups
            of the same topology (``"isomorphic"``) and remove the same share of each class.
        max_ratio: the largest share that any group may lose; one unit always stays.
        round_to: keep a multiple of this many units in every group.
        ignore: names or modules whose parameters stay whole.
        overrides: group name -> share removed from that group, instead of what the ranking says.
        per: compare scores as they are (``"unit"``), or per ``"flops"`` or ``"params"`` that a unit saves in the whole
            network: several units that save little then stand against one that saves much.

    Returns:
        A plan whose FLOPs or parameters are at most the budget, within 1 % of it where units allow.

    Raises:
        BudgetError: an option is out of its range, no or several budgets are given, or the budget cannot be met.
        PlanError: ``ignore`` or ``overrides`` names something that the model does not have.

    Source: the isomorphic scope is that of Fang et al. 2024, *Isomorphic Pruning for Vision Models*.
    """
    kind, share = _budget(flops=flops, params=params, ratio=ratio)
    _check_share("max_ratio", max_ratio, above=False)
    if round_to is not None and (not isinstance(round_to, int) or round_to < 1):
        raise BudgetError(f"round_to={round_to!r} is no positive whole number.")
    graph = scores.graph
    fixed = _overrides(graph.groups, overrides or {})
    skipped = _ignored(graph, ignore)
    fixed |= {
        g.name: fixed[name] for bundle in graph.bundles for name in fixed for g in bundle if name in _names(bundle)
    }
    free = [bundle for bundle in graph.bundles if not (skipped | fixed.keys()) & _names(bundle)]
    pools = _pools(free, scope)
    cost = CostModel(graph)
    whole = cost({})
    limits = {b[0].name: min(int(max_ratio * b[0].size + 1e-9), b[0].size - 1) for b in free}
    order = removal_order(scores, pools, limits, _prices(free, cost, per), fixed)
    queues = order.queues

    def kept(counts: Mapping[str, int]) -> dict[str, int]:
        left = {group.name: group.size - counts.get(bundle[0].name, 0) for bundle in free for group in bundle}
        if round_to:
            left = {name: min(_size(graph.groups, name), -(-n // round_to) * round_to) for name, n in left.items()}
        return left | {name: _size(graph.groups, name) - number for name, number in fixed.items()}

    if kind == "ratio":
        counts = _share_of_pools(pools, queues, share, max_ratio)
    else:
        counts = _fit(
            queues, lambda counts: cost(kept(counts))[kind] / whole[kind], share, f"{kind}={share}", max_ratio
        )
    left = kept(counts)
    cuts = []
    for group in graph.groups:
        number = group.size - left.get(group.name, group.size)
        if number:
            lowest = order.units[group.name][:number]
            members = tuple((member.name, member.dim) for member in group.members)
            cuts.append(Cut(group.name, group.size, tuple(sorted(lowest)), members))
    final = cost(left)
    budget = {
        "asked": {kind: share},
        "kept": {key: final[key] / whole[key] for key in ("flops", "params")},
        "criterion": scores.criterion,
        "scope": scope,
        "per": per,
    }
    return Plan(tuple(cuts), graph.inputs, budget)


def _budget(**given: float | None) -> tuple[str, float]:
    asked = {name: value for name, value in given.items() if value is not None}
    if len(asked) != 1:
        what = "none" if not asked else ", ".join(asked)
        raise BudgetError(f"Give exactly one budget, flops, params or ratio; given: {what}.")
    name, value = next(iter(asked.items()))
    _check_share(name, value)
    return name, value


def _check_share(name: str, value: float, *, above: bool = True) -> None:
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    if not whole or not (value < 1 if above else value <= 1):
        raise BudgetError(f"{name}={value!r} is outside (0, 1{')' if above else ']'}.")


def _size(groups: Sequence[Group], name: str) -> int:
    return next(group.size for group in groups if group.name == name)


def _overrides(groups: Sequence[Group], overrides: Mapping[str, float]) -> dict[str, int]:
    fixed = {}
    for name, share in overrides.items():
        group = next((group for group in groups if group.name == name), None)
        if group is None:
            raise PlanError(f"overrides names `{name}`, which is no group; print the graph to see their names.")
        if not 0 <= share < 1:
            raise BudgetError(f"overrides[{name!r}]={share!r} is outside [0, 1).")
        fixed[name] = min(int(share * group.size + 0.5), group.size - 1)
    return fixed


def _ignored(graph: Any, ignore: Iterable[str | nn.Module]) -> set[str]:
    modules = {id(module): name for name, module in graph.model.named_modules()}
    skipped: set[str] = set()
    for item in [ignore] if isinstance(ignore, (str, nn.Module)) else ignore:
        name = modules.get(id(item)) if isinstance(item, nn.Module) else item
        if name is None:
            raise PlanError(f"ignore holds a {type(item).__name__} that is not part of the traced model.")
        inside = [
            group.name
            for group in graph.groups
            if group.name == name or any(f"{member.name}.".startswith(f"{name}.") for member in group.members)
        ]
        known = name in modules.values() or any(parameter == name for parameter in graph.dims)
        if not inside and not known:
            raise PlanError(f"ignore names `{name}`, which is no group, module or parameter of the model.")
        skipped.update(inside)
    return skipped


def _names(bundle: Bundle) -> set[str]:
    return {group.name for group in bundle}


def _pools(bundles: Sequence[Bundle], scope: str) -> list[list[Bundle]]:
    """Split bundles into pools; units compete within a pool, and every pool loses the same share."""
    keys: dict[str, Callable[[Bundle], Any]] = {
        "global": lambda bundle: 0,
        "layer": lambda bundle: bundle[0].name,
        "isomorphic": lambda bundle: tuple((g.size, *sorted((m.dim, m.role) for m in g.members)) for g in bundle),
    }
    if scope not in keys:
        raise BudgetError(f"scope={scope!r} is not one of {', '.join(keys)}.")
    pools: dict[Any, list[Bundle]] = defaultdict(list)
    for bundle in bundles:
        pools[keys[scope](bundle)].append(bundle)
    return list(pools.values())


def _prices(bundles: Sequence[Bundle], cost: CostModel, per: str) -> dict[str, float]:
    """Return what the first unit to go from each bundle saves, as a share of the whole."""
    if per not in ("unit", "flops", "params"):
        raise BudgetError(f"per={per!r} is not one of unit, flops, params.")
    if per == "unit":
        return {}
    whole = cost({})[per]
    return {b[0].name: max(1 - cost({g.name: g.size - 1 for g in b})[per] / whole, 1e-12) for b in bundles}


def _counts(queues: Sequence[Sequence[str]], share: float) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for queue in queues:
        for name in queue[: int(share * len(queue) + 1e-9)]:
            counts[name] += 1
    return counts


def _share_of_pools(
    pools: Sequence[Sequence[Bundle]], queues: Sequence[Sequence[str]], share: float, max_ratio: float
) -> dict[str, int]:
    """Take the same share of the units of every pool."""
    counts: dict[str, int] = defaultdict(int)
    for pool, queue in zip(pools, queues, strict=True):
        number = round(share * sum(bundle[0].size for bundle in pool))
        if number > len(queue):
            raise BudgetError(
                f"ratio={share} cannot be met: max_ratio={max_ratio} lets {len(queue)} units go from "
                f"{', '.join(bundle[0].name for bundle in pool[:3])}, and {number} were asked for."
            )
        for name in queue[:number]:
            counts[name] += 1
    return counts


def _fit(queues: list[list[str]], spent: Any, target: float, asked: str, max_ratio: float) -> dict[str, int]:
    """Find how many units of each group go, so that what is spent ends at or just below the target."""
    least = spent(_counts(queues, 1.0))
    if least > target:
        raise BudgetError(
            f"{asked} cannot be met: removing all that max_ratio={max_ratio} allows still leaves {least:.3f}. "
            "Raise the budget or max_ratio, or ignore less."
        )
    # Steps at which some queue gives up one unit more, in order.
    steps = sorted({(place + 1) / len(queue) for queue in queues for place in range(len(queue))})
    low, high = -1, len(steps) - 1  # low: too much is left; high: the target is met
    if spent({}) <= target:
        return {}
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if spent(_counts(queues, steps[middle])) <= target else (middle, high)
    best = _counts(queues, steps[high])
    if spent(best) >= target * (1 - TOLERANCE):
        return best
    counts = _counts(queues, steps[low] if low >= 0 else 0.0)
    waiting = [name for queue in queues for name in queue[int((steps[low] if low >= 0 else 0) * len(queue) + 1e-9) :]]
    best = _top_up(counts, waiting, spent, target, best)
    if spent(best) < target * (1 - TOLERANCE):
        warnings.warn(
            f"{asked}: the plan ends at {spent(best):.3f}; single units are too large to come closer.", stacklevel=4
        )
    return best


def _top_up(
    counts: dict[str, int], waiting: Sequence[str], spent: Any, target: float, best: dict[str, int]
) -> dict[str, int]:
    """Go on from just above the target, passing over units that would overshoot it by more than the tolerance."""
    full: set[str] = set()
    for name in waiting:
        if name in full:
            continue
        trial = dict(counts)
        trial[name] = trial.get(name, 0) + 1
        reached = spent(trial)
        if reached > target:
            counts = trial
        elif reached >= target * (1 - TOLERANCE):
            return trial
        else:
            full.add(name)  # later units of this group cost no less
            best = max(best, trial, key=spent)
    return best

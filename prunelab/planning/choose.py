"""From scores to a plan: which units go, so that a budget is met.

Flows in: ``Scores`` and a budget.  Flows out: a ``Plan``, plain data that names parameters and units, nothing more.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from prunelab.cost import CostModel
from prunelab.criteria.base import Scores
from prunelab.criteria.greedy import Bundle, Order, removal_order
from prunelab.errors import BudgetError, PlanError
from prunelab.planning import pools
from prunelab.planning.fit import TOLERANCE, Gone, Supply, fit, levels_of, smallest_gift
from prunelab.planning.plan import Cut, Plan
from prunelab.planning.timing import Timing, fit_latency
from prunelab.switches import undisturbed
from prunelab.tracing.trace import DependencyGraph

COSTS = ("flops", "params", "bytes")


@dataclass(frozen=True)
class Options:
    """What ``plan`` takes besides scores and a budget; see there.

    Attributes:
        since: group name -> units before earlier cuts, of which ``max_ratio``, ``overrides`` and a budget in units are
            shares; by default those of the model as it is.

    Raises:
        BudgetError: ``max_ratio`` or ``round_to`` is out of range.
    """

    scope: str = "global"
    max_ratio: float | Mapping[str, float] = pools.MAX_RATIO
    round_to: int | None = None
    ignore: Iterable[str | nn.Module] = ()
    overrides: Mapping[str, float] = field(default_factory=dict)
    per: str = "unit"
    timing: Timing = field(default_factory=Timing)
    since: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.round_to is not None and (type(self.round_to) is not int or self.round_to < 1):
            raise BudgetError(f"round_to={self.round_to!r} is no positive whole number.")
        if not isinstance(self.max_ratio, Mapping):
            pools.check_ratio("max_ratio", self.max_ratio)


@undisturbed()
def plan(
    scores: Scores,
    *,
    flops: float | None = None,
    params: float | None = None,
    bytes: float | None = None,
    latency: float | None = None,
    ratio: float | None = None,
    scope: Literal["global", "layer", "isomorphic"] = "global",
    max_ratio: float | Mapping[str, float] = pools.MAX_RATIO,
    round_to: int | None = None,
    ignore: Iterable[str | nn.Module] = (),
    overrides: Mapping[str, float] | None = None,
    per: Literal["unit", "flops", "params", "bytes"] = "unit",
    timing: Timing | None = None,
) -> Plan:
    """Choose the units to remove: those of lowest score, until a budget is met.

    Scores that carry a matrix are ranked greedily: the unit goes next that adds least to the cost of all that is gone.

    Exactly one budget is given.  All are shares of what the model has: for a limit in numbers divide, as in
    ``bytes=1e6 / pl.count(model, inputs).bytes`` or ``latency=0.002 / pl.latency(model, inputs).median``.

    Args:
        scores: from a criterion.
        flops: share of the FLOPs that is kept, in (0, 1); or
        params: share of the parameters that is kept; or
        bytes: share of the memory of parameters and buffers that is kept; or
        latency: share of the time of one forward pass that is kept, measured as ``timing`` says; or
        ratio: share of the units that is removed, those that ``ignore`` and ``overrides`` name left out of account.
        scope: rank ``"global"``-ly over all groups; remove the same share of every ``"layer"``; or rank within groups
            of the same topology, whatever their sizes, and remove the same share of each class (``"isomorphic"``).
        max_ratio: the largest share that any group may lose, or name -> share (0.9 for groups that no name means); one
            unit always stays.
        round_to: keep a multiple of this many units in every group that loses any.
        ignore: names or modules whose parameters stay whole.
        overrides: name -> share removed, instead of what the ranking says.  Here and in ``max_ratio`` a name is that of
            a group, or of a module or parameter that produces some; the longest counts.
        per: compare scores as they are (``"unit"``), or per ``"flops"``, ``"params"`` or ``"bytes"`` that a unit saves
            in the whole network: several units that save little then stand against one that saves much.
        timing: how latency is measured.

    Returns:
        A plan whose FLOPs, parameters or bytes are at most the budget, and within 1 % of it where units allow; else a
        warning says by how much it misses and why, and so do ``print(plan)`` and ``plan.budget``.

    Raises:
        BudgetError: an option is out of its range, no or several budgets are given, or the budget cannot be met.
        PlanError: ``ignore``, ``overrides`` or ``max_ratio`` names something that the model does not have, or nothing
            in the model can be removed.

    Source: the isomorphic scope is that of Fang et al. 2024, *Isomorphic Pruning for Vision Models*.
    """
    check_groups(scores.graph)
    kind, share = only_budget(flops=flops, params=params, bytes=bytes, latency=latency, ratio=ratio)
    if not share < 1:
        raise BudgetError(f"{kind}={share!r} is outside (0, 1).")
    options = Options(scope, max_ratio, round_to, ignore, overrides or {}, per, timing or Timing())
    made = choose(scores, kind, share, options)
    if "why" in made.budget and kind != "ratio":
        warnings.warn(made.budget["why"], stacklevel=3)
    return made


def only_budget(**given: float | None) -> tuple[str, float]:
    """Return the one budget that is given, and its share.

    Raises:
        BudgetError: none or several are given, or it is no number above 0.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if len(asked) != 1:
        what = ", ".join(asked) or "none"
        raise BudgetError(f"Give exactly one budget: flops, params, bytes, latency or ratio; given: {what}.")
    name, value = next(iter(asked.items()))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise BudgetError(f"{name}={value!r} is outside (0, 1).")
    return name, value


def check_groups(graph: DependencyGraph) -> None:
    """Check that there is something to remove.

    Raises:
        PlanError: there is no group; the message gives the reasons that are most frequent.
    """
    if graph.groups:
        return
    reasons = Counter(graph.frozen.values()).most_common(3)
    why = "; ".join(f"{number} dimensions: {reason}" for reason, number in reasons) or "it has no parameters"
    raise PlanError(
        f"{type(graph.model).__name__} has no units to remove, since all its parameters must stay whole ({why}). "
        "graph.frozen has the reason for every dimension."
    )


def choose(scores: Scores, kind: str, share: float, options: Options) -> Plan:
    """Return the plan for a budget, and in ``plan.budget`` what came of it; a share of 1 or more is met by all.

    Args:
        scores: from a criterion.
        kind: ``"flops"``, ``"params"``, ``"bytes"``, ``"latency"`` or ``"ratio"``.
        share: as in ``plan``.
        options: the rest.

    Raises:
        BudgetError, PlanError: as in ``plan``.
    """
    graph = scores.graph
    skipped = pools.ignored_groups(graph, options.ignore)
    fixed = pools.overridden(graph, options.overrides, skipped, options.since)
    free = [bundle for bundle in graph.bundles if not (skipped | fixed.keys()) & pools.names(bundle)]
    competing = pools.pools(graph, free, options.scope)
    limits = pools.most(graph, free, options.max_ratio, options.since)
    cost = CostModel(graph)
    whole = cost({})
    order = removal_order(scores, competing, limits, _prices(free, cost, options.per), fixed)
    levels = {b[0].name: levels_of(b[0].size, limits[b[0].name], options.round_to) for b in free}
    supply = Supply(order.queues, levels)
    sizes = {group.name: group.size for group in graph.groups}

    def left(gone: Mapping[str, int]) -> dict[str, int]:
        after = {group.name: group.size - gone.get(bundle[0].name, 0) for bundle in free for group in bundle}
        return after | {name: sizes[name] - number for name, number in fixed.items()}

    def spent(gone: Mapping[str, int]) -> float:
        return cost(left(gone))[kind] / whole[kind]

    def plan_for(gone: Gone, budget: Mapping[str, Any] | None = None) -> Plan:
        return _plan(graph, order, left(gone), dict(budget or {}))

    budget: dict[str, Any] = {"asked": {kind: share}, "kept": {}, "criterion": scores.criterion}
    budget |= {"scope": options.scope, "per": options.per}
    why = ""
    if kind == "ratio":
        gone = _ratio(competing, supply, share, options)
    elif kind == "latency":
        gone, facts = fit_latency(graph.model, graph.inputs, supply, plan_for, share, options.timing)
        budget["measured"] = facts
        budget["kept"]["latency"] = facts["kept"]
        why = (
            f"it is known at places {facts['resolution']:.3g} of the removal order apart, and the place before keeps "
            f"{facts['before']:.4f}"
        )
    else:
        hint = (
            f"{kind}={share:.4g} with max_ratio={options.max_ratio}, what is ignored and what is overridden left whole"
        )
        gone = fit(supply, spent, share, hint)
    after = cost(left(gone))
    budget["kept"] = {key: after[key] / whole[key] for key in COSTS} | budget["kept"]
    if kind == "ratio":
        budget |= _miss_of_ratio(share, competing, gone, options.since)
    else:
        budget |= _miss(kind, share, budget["kept"][kind], supply, spent, gone, why)
    return plan_for(gone, budget)


def _plan(graph: DependencyGraph, order: Order, left: Mapping[str, int], budget: dict[str, Any]) -> Plan:
    cuts = []
    for group in graph.groups:
        number = group.size - left.get(group.name, group.size)
        if number:
            lowest = order.units[group.name][:number]
            members = tuple((member.name, member.dim) for member in group.members)
            cuts.append(Cut(group.name, group.size, tuple(sorted(lowest)), members))
    return Plan(tuple(cuts), graph.inputs, budget)


def _prices(bundles: Sequence[Bundle], cost: CostModel, per: str) -> dict[str, float]:
    """Return what the first unit to go from each bundle saves, as a share of the whole."""
    if per not in ("unit", *COSTS):
        raise BudgetError(f"per={per!r} is not one of unit, {', '.join(COSTS)}.")
    if per == "unit":
        return {}
    whole = cost({})[per]
    return {b[0].name: max(1 - cost({g.name: g.size - 1 for g in b})[per] / whole, 1e-12) for b in bundles}


def _ratio(competing: Sequence[Sequence[Bundle]], supply: Supply, share: float, options: Options) -> Gone:
    """Return what goes when every pool loses the same share of its units."""
    gone: Gone = {}
    for pool, queue in zip(competing, supply.queues, strict=True):
        named = ", ".join(bundle[0].name for bundle in pool[:3])
        total = sum(bundle[0].size for bundle in pool)
        first = sum(options.since.get(bundle[0].name, bundle[0].size) for bundle in pool)
        number = max(round(share * first) - (first - total), 0)
        if number > len(queue):
            raise BudgetError(
                f"ratio={share} cannot be met: max_ratio={options.max_ratio} lets {len(queue)} units go from {named}, "
                f"and {number} were asked for."
            )
        levels = {bundle[0].name: supply.levels[bundle[0].name] for bundle in pool}
        if options.round_to:  # come as close as blocks allow
            mine, kept = Supply([queue], levels), _units_left(total)
            gone |= fit(mine, kept, max(1 - number / total, kept(mine.settled(mine.at(1.0)))), f"ratio={share}")
        else:
            gone |= Supply([queue[:number]], levels).at(1.0)
    return gone


def _miss_of_ratio(
    share: float, competing: Sequence[Sequence[Bundle]], gone: Gone, since: Mapping[str, int]
) -> dict[str, Any]:
    total = sum(since.get(bundle[0].name, bundle[0].size) for pool in competing for bundle in pool)
    left = sum(bundle[0].size for pool in competing for bundle in pool) - sum(gone.values())
    got = 1 - left / max(total, 1)
    if abs(got - share) <= max(TOLERANCE * share, len(competing) / 2 / max(total, 1)) + 1e-9:
        return {}
    why = "groups lose blocks, so that multiples of round_to are left"
    return {"missed": got / share - 1, "why": f"ratio={share:.4g}: {got:.4f} of the units go; {why}."}


def _units_left(total: int) -> Callable[[Gone], float]:
    return lambda gone: 1 - sum(gone.values()) / total


def _miss(
    kind: str, share: float, got: float, supply: Supply, spent: Callable[[Gone], float], gone: Gone, why: str
) -> dict[str, Any]:
    """Return by how much a plan misses its budget and why, for ``plan.budget``; nothing if it does not."""
    if share >= 1 or got >= share * (1 - TOLERANCE):
        return {}
    missed = got / share - 1
    if not why:
        gift = smallest_gift(supply, spent, gone)
        why = "what is overridden alone removes that much"
        if gift is not None:
            name, units, kept = gift
            why = (
                "units are too large to come closer: putting back the smallest block, "
                f"{units} unit{'s' if units > 1 else ''} of `{name}`, would keep {kept:.4f}"
            )
    return {
        "missed": missed,
        "why": f"{kind}={share:.4g}: the plan keeps {got:.4f} and ends {-missed:.1%} below the budget; {why}.",
    }

"""From scores to a plan: which units go, so that a budget is met.

Flows in: ``Scores`` and a budget.  Flows out: a ``Plan``, plain data that names parameters and units, nothing more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from prunelab.cost import CostModel
from prunelab.criteria.base import Scores
from prunelab.errors import BudgetError, PlanError
from prunelab.planning import pools, widths
from prunelab.planning.fit import TOLERANCE, Gone, Supply, fit, smallest_gift
from prunelab.planning.options import COSTS, Options, Per, check_cuttable, only_budget
from prunelab.planning.order import Bundle, Order, removal_order
from prunelab.planning.timing import Timing, fit_latency
from prunelab.plans import Cut, Plan
from prunelab.runtime.switches import undisturbed
from prunelab.tracing.trace import DependencyGraph


@undisturbed()
def plan(
    scores: Scores,
    *,
    flops: float | None = None,
    params: float | None = None,
    bytes: float | None = None,
    latency: float | None = None,
    ratio: float | None = None,
    scope: pools.Scope = "global",
    max_ratio: float | Mapping[str | nn.Module, float] = pools.MAX_RATIO,
    round_to: int | None = None,
    ignore: Iterable[str | nn.Module] = (),
    overrides: Mapping[str | nn.Module, float] | None = None,
    per: Per = "unit",
    timing: Timing | None = None,
) -> Plan:
    """Choose the units to remove: those of lowest score, until a budget is met.

    Scores that carry a matrix are ranked greedily: the unit goes next that adds least to the cost of all that is gone.

    Exactly one budget is given.  All are shares of what the model has: for a limit in numbers divide, as in
    ``bytes=1e6 / pl.count(model, inputs).bytes`` or ``latency=0.002 / pl.latency(model, inputs).median``.

    Args:
        scores: from a criterion.
        flops: share of the FLOPs to keep, in (0, 1], of which 1 removes nothing; or
        params: share of the parameters to keep; or
        bytes: share of the memory of parameters and buffers to keep; or
        latency: share of the time of one forward pass to keep, measured as ``timing`` says; or
        ratio: share of the units to remove, in [0, 1).  Units that ``ignore`` and ``overrides`` name do not count.
        scope: rank ``"global"``-ly over all groups; remove the same share of every ``"layer"``; or rank within groups
            of the same topology, whatever their sizes, and remove the same share of each class (``"isomorphic"``).
        max_ratio: the largest share to remove from any group, in (0, 1], or name -> share (0.9 for groups that no name
            means); one unit always stays.
        round_to: the width of every layer that loses any is a multiple of this: the channels of a convolution, all
            groups of them together, or heads × head width of attention.  Where the budget can be met so, each of these
            factors is one by itself.
        ignore: names or modules whose parameters stay whole.
        overrides: name -> share to remove, instead of what the ranking says.  Here and in ``max_ratio`` a name is that
            of a group, or of a module or parameter that produces some, or the module itself; the longest name counts.
        per: compare scores as they are (``"unit"``), or per ``"flops"``, ``"params"`` or ``"bytes"`` that a unit saves
            in the whole network: several units that save little then compete with one that saves much.
        timing: how latency is measured.

    Returns:
        A plan whose FLOPs, parameters or bytes are at most the budget, and within 1 % of it where units allow; else a
        warning says by how much it misses and why, and so do ``print(plan)`` and ``plan.budget``.

    Raises:
        OptionError: an option is out of its range or of another type.
        BudgetError: no or several budgets are given, or the budget cannot be met.
        PlanError: ``scores`` are not scores; or ``ignore``, ``overrides`` or ``max_ratio`` names something that the
            model does not have.

    Source: the isomorphic scope is that of Fang et al. 2024, *Isomorphic Pruning for Vision Models*.

    >>> import torch, prunelab as pl
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> scores = pl.Scores(pl.trace(model, torch.ones(1, 4)), {"0": torch.arange(8.0)}, "by hand")
    >>> pl.plan(scores, flops=0.5).removed  # half is kept
    {'0': (0, 1, 2, 3)}
    >>> pl.plan(scores, ratio=0.25).removed  # a quarter is removed
    {'0': (0, 1)}
    """
    if not isinstance(scores, Scores):
        raise PlanError(
            "`scores` must be what a criterion returns, as in pl.criteria.get('magnitude')(graph), got a "
            f"{type(scores).__name__}."
        )
    kind, share = only_budget(flops=flops, params=params, bytes=bytes, latency=latency, ratio=ratio)
    options = Options(
        scope,
        max_ratio,
        round_to,
        ignore,
        {} if overrides is None else overrides,
        per,
        Timing() if timing is None else timing,
    )
    made = choose(scores, kind, share, options)
    if "why" in made.budget and kind != "ratio":
        warnings.warn(made.budget["why"], stacklevel=3)
    return made


def choose(scores: Scores, kind: str, share: float, options: Options) -> Plan:
    """Return the plan for a budget, and in ``plan.budget`` what it keeps; a share of 1 or more is met by all.

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
    sizes = {group.name: group.size for group in graph.groups}
    others = {name: sizes[name] - number for name, number in fixed.items()}
    check_cuttable(graph, kind, share, whole, options)
    order = removal_order(scores, competing, limits, _prices(free, cost, options.per), fixed)

    def left(gone: Mapping[str, int]) -> dict[str, int]:
        return {group.name: group.size - gone.get(bundle[0].name, 0) for bundle in free for group in bundle} | others

    def spent(gone: Mapping[str, int]) -> float:
        return cost(left(gone))[kind] / whole[kind] if whole[kind] else 1.0

    def plan_for(gone: Gone, budget: Mapping[str, Any] | None = None) -> Plan:
        return _plan(graph, order, left(gone), dict(budget or {}))

    ways = widths.tables(graph, free, limits, options.round_to, others)
    held = widths.held(ways, limits, options.round_to)

    def solved(table: widths.Table) -> tuple[Supply, Gone, dict[str, Any]]:
        supply = Supply(order.queues, table)
        if kind == "ratio":
            return supply, _ratio(competing, supply, share, options, held), {}
        if kind == "latency":
            return supply, *fit_latency(graph.model, graph.inputs, supply, plan_for, share, options.timing)
        unit = f"max_ratio={options.max_ratio}, what is ignored and what is overridden left whole"
        return supply, fit(supply, spent, share, f"{kind}={share:.4g} with {unit}", held), {}

    if kind == "latency":  # measuring all of them would take too long
        ways = [max(ways, key=widths.choices)]

    def missed(gone: Gone) -> float:
        if kind == "ratio":
            return abs(float(_miss_of_ratio(share, competing, gone, options.since).get("missed", 0.0)))
        return max(1 - TOLERANCE - spent(gone) / share, 0.0) if kind in COSTS else 0.0

    found: list[tuple[Supply, Gone, dict[str, Any]]] = []
    failures: list[tuple[float, BudgetError]] = []
    for table in ways:
        try:
            found.append(solved(table))
        except BudgetError as failure:
            least = Supply(order.queues, table)
            failures.append((spent(least.settled(least.at(1.0))) if kind in COSTS else 0.0, failure))
            continue
        if table is ways[0] and not missed(found[0][1]):
            break
    if not found:
        raise min(failures, key=lambda failure: failure[0])[1]

    def regret(way: tuple[Supply, Gone, dict[str, Any]]) -> tuple[float, float]:
        return missed(way[1]), scores.together(plan_for(way[1]).removed)

    supply, gone, facts = found[0] if len(found) == 1 else min(found, key=regret)
    budget: dict[str, Any] = {"asked": {kind: share}, "kept": {}, "criterion": scores.criterion}
    budget |= {"scope": options.scope, "per": options.per}
    why = ""
    if kind == "latency":
        budget["kept"]["latency"] = facts.get("kept", 1.0)
    if facts:
        budget["measured"] = facts
        why = (
            f"it is known at places {facts['resolution']:.3g} of the removal order apart, and the place before keeps "
            f"{facts['before']:.4f}"
        )
    after = cost(left(gone))
    budget["kept"] = {key: after[key] / whole[key] if whole[key] else 1.0 for key in COSTS} | budget["kept"]
    if kind == "ratio":
        budget |= _miss_of_ratio(share, competing, gone, options.since)
    else:
        budget |= _miss(kind, share, budget["kept"][kind], supply, spent, gone, why)
    if "why" in budget:
        budget["why"] += held
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
    if per == "unit":
        return {}
    whole = max(cost({})[per], 1)
    return {b[0].name: max(1 - cost({g.name: g.size - 1 for g in b})[per] / whole, 1e-12) for b in bundles}


def _ratio(competing: Sequence[Sequence[Bundle]], supply: Supply, share: float, options: Options, held: str) -> Gone:
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
                f"and {number} were asked for.{held}"
            )
        levels = {bundle[0].name: supply.levels[bundle[0].name] for bundle in pool}
        if options.round_to:  # come as close as blocks allow
            mine, kept = Supply([queue], levels), _units_left(total)
            gone |= fit(mine, kept, max(1 - number / total, kept(mine.settled(mine.at(1.0)))), f"ratio={share}", held)
        else:
            gone |= Supply([queue[:number]], levels).at(1.0)
    return gone


def _miss_of_ratio(
    share: float, competing: Sequence[Sequence[Bundle]], gone: Gone, since: Mapping[str, int]
) -> dict[str, Any]:
    total = sum(since.get(bundle[0].name, bundle[0].size) for pool in competing for bundle in pool)
    left = sum(bundle[0].size for pool in competing for bundle in pool) - sum(gone.values())
    got = 1 - left / total if total else share
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

"""What ``plan`` takes besides scores: the one budget, and the options, checked.

Flows in: what the user gave.  Flows out: a budget's kind and share, and ``Options``; or an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypedDict, get_args

from torch import nn

from prunelab.errors import BudgetError, OptionError, PlanError
from prunelab.options import one_of, parts, real, shown, whole
from prunelab.planning import pools
from prunelab.planning.timing import Timing
from prunelab.tracing.trace import DependencyGraph

CostKind = Literal["flops", "params", "bytes"]
COSTS: tuple[CostKind, ...] = get_args(CostKind)
Per = Literal["unit", CostKind]
PERS: tuple[Per, ...] = get_args(Per)


class PlanOptions(TypedDict, total=False):
    """The keywords of ``plan``, besides its budget, that ``prune`` passes on; see there."""

    scope: pools.Scope
    max_ratio: float | Mapping[str | nn.Module, float] | None
    round_to: int | None
    ignore: str | nn.Module | Iterable[str | nn.Module] | None
    overrides: Mapping[str | nn.Module, float] | None
    per: Per
    timing: Timing | None


@dataclass(frozen=True)
class Options:
    """What ``plan`` takes besides scores and a budget; see there.

    Attributes:
        since: group name -> units before earlier cuts, of which ``max_ratio``, ``overrides`` and a budget in units are
            shares; by default those of the model as it is.

    Raises:
        OptionError: one of them is out of its range or of another type.
    """

    scope: pools.Scope = "global"
    max_ratio: float | Mapping[Any, float] = pools.MAX_RATIO
    round_to: int | None = None
    ignore: Iterable[str | nn.Module] = ()
    overrides: Mapping[Any, float] = field(default_factory=dict)
    per: Per = "unit"
    timing: Timing = field(default_factory=Timing)
    since: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_option = partial(object.__setattr__, self)  # the dataclass is frozen
        one_of("scope", self.scope, pools.SCOPES)
        one_of("per", self.per, PERS)
        if self.round_to is not None:
            set_option("round_to", whole("round_to", self.round_to))
        if not isinstance(self.max_ratio, Mapping):
            set_option("max_ratio", real("max_ratio", self.max_ratio, above=0, most=1))
        if not isinstance(self.timing, Timing):
            raise OptionError(f"`timing` must be a pl.Timing, got {shown(self.timing)}.")
        set_option("ignore", parts("ignore", self.ignore))


def only_budget(**given: float | None) -> tuple[str, float]:
    """Return the one budget that is given, and its share.

    Raises:
        BudgetError: none or several are given.
        OptionError: it is not a share in its range.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if len(asked) != 1:
        what = ", ".join(asked) or "none"
        raise BudgetError(f"Give exactly one budget: flops, params, bytes, latency or ratio; given: {what}.")
    name, value = next(iter(asked.items()))
    if name == "ratio":
        return name, real(name, value, least=0, below=1, why="the share of the units to remove; 0 removes nothing")
    return name, real(name, value, above=0, most=1, why=f"the share of the {name} to keep; 1 removes nothing")


def check_cuttable(graph: DependencyGraph, kind: str, share: float, costs: Mapping[str, int], options: Options) -> None:
    """Refuse a budget where there is nothing that it could be a share of.

    Raises:
        PlanError: something should go, and the graph has no groups.
        BudgetError: the model has nothing of that kind.
    """
    name = type(graph.model).__name__
    if share == 0 if kind == "ratio" else share >= 1:
        return
    if not options.since:
        check_groups(graph)
    for cost in COSTS:
        if cost in (kind, options.per) and not costs[cost]:
            option = "budget" if cost == kind else "`per`"
            raise BudgetError(f"{name} has no {cost} to take a share of: give another {option}.")


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

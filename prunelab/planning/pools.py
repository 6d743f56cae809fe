"""Who competes with whom, and who does not take part: scopes, ignored parts, shares by name.

Flows in: a graph and what the user named.  Flows out: pools of bundles, and group names with numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from prunelab.criteria.greedy import Bundle
from prunelab.errors import BudgetError, PlanError
from prunelab.tracing.groups import Group
from prunelab.tracing.named import Items, covered
from prunelab.tracing.trace import DependencyGraph

SCOPES = ("global", "layer", "isomorphic")
MAX_RATIO = 0.9
"""The share that a group may lose at most where nothing else is said."""


def names(bundle: Bundle) -> set[str]:
    """Return the names of a bundle's groups."""
    return {group.name for group in bundle}


def pools(graph: DependencyGraph, bundles: Sequence[Bundle], scope: str) -> list[list[Bundle]]:
    """Split bundles into pools; units compete within a pool, and every pool loses the same share.

    Two groups are isomorphic if they run through parameters of the same kinds of modules, in the same dimensions and
    roles, whatever their sizes.

    Raises:
        BudgetError: there is no such scope.
    """

    def kind(group: Group) -> Any:
        members = []
        for member in group.members:
            module, _, parameter = member.name.rpartition(".")
            members.append((type(graph.model.get_submodule(module)).__qualname__, parameter, member.dim, member.role))
        return tuple(sorted(members))

    keys: dict[str, Callable[[Bundle], Any]] = {
        "global": lambda bundle: 0,
        "layer": lambda bundle: bundle[0].name,
        "isomorphic": lambda bundle: tuple(kind(group) for group in bundle),
    }
    if scope not in keys:
        raise BudgetError(f"scope={scope!r} is not one of {', '.join(SCOPES)}.")
    found: dict[Any, list[Bundle]] = defaultdict(list)
    for bundle in bundles:
        found[keys[scope](bundle)].append(bundle)
    return list(found.values())


def ignored_groups(graph: DependencyGraph, ignore: Items) -> set[str]:
    """Return the groups that are named themselves, or run through a parameter that is; with all that are tied to them.

    Raises:
        PlanError: ``ignore`` names something that the model does not have.
    """
    items = [ignore] if isinstance(ignore, (str, nn.Module)) else list(ignore)
    inside = covered(graph.model, items, groups=[group.name for group in graph.groups])
    return {
        name
        for bundle in graph.bundles
        if any(group.name in items or any(member.name in inside for member in group.members) for group in bundle)
        for name in names(bundle)
    }


def by_name(graph: DependencyGraph, given: Mapping[str, Any], option: str) -> dict[str, Any]:
    """Return group name -> value, for groups named themselves or by a module or parameter that produces their units.

    Where several names mean a group its own counts, else the longest.

    Raises:
        PlanError: a name means no group.
    """
    found: dict[str, Any] = {}
    known = {group.name for group in graph.groups}
    for name in sorted(given, key=lambda name: (name in known, len(name))):
        meant = [name] if name in known else [g.name for g in graph.groups if _produced_in(g, name)]
        if not meant:
            raise PlanError(
                f"{option} names `{name}`, which is no group, and no module or parameter that produces one; print the "
                "graph to see their names."
            )
        found |= dict.fromkeys(meant, given[name])
    return found


def _produced_in(group: Group, name: str) -> bool:
    makers = [member.name for member in group.members if member.role == "produces"]
    return any(f"{maker}.".startswith(f"{name}.") for maker in makers or [m.name for m in group.members])


def overridden(
    graph: DependencyGraph, overrides: Mapping[str, float], skipped: set[str], since: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return how many units go from each group that ``overrides`` means; tied groups lose the same.

    Args:
        graph: of the model as it is.
        overrides: name -> share.
        skipped: names of groups that stay whole.
        since: group name -> units of which the shares are; by default those of the graph.

    Raises:
        PlanError: a name means no group, or only ignored ones.
        BudgetError: a share is out of range.
    """
    for name, share in overrides.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise BudgetError(f"overrides[{name!r}]={share!r} is outside [0, 1).")
        if by_name(graph, {name: share}, "overrides").keys() <= skipped:
            raise PlanError(f"overrides names `{name}`, and ignore leaves it whole: drop it from one of them.")
    sizes = {group.name: group.size for group in graph.groups}
    shares = by_name(graph, overrides, "overrides")
    fixed = {}
    for name in shares.keys() - skipped:
        first = (since or {}).get(name, sizes[name])
        fixed[name] = min(max(int(shares[name] * first + 0.5) - (first - sizes[name]), 0), sizes[name] - 1)
    for bundle in graph.bundles:
        number = next((fixed[group.name] for group in bundle if group.name in fixed), None)
        if number is not None:
            fixed |= dict.fromkeys(names(bundle), number)
    return fixed


def most(
    graph: DependencyGraph,
    bundles: Sequence[Bundle],
    max_ratio: float | Mapping[str, float],
    since: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Return how many units each bundle may lose, by the name of its first group; one always stays.

    Args:
        graph: of the model as it is.
        bundles: those that are asked about.
        max_ratio: share for all, or name -> share.
        since: group name -> units of which the shares are; by default those of the graph.

    Raises:
        BudgetError: a share is out of range.
        PlanError: a name means no group.
    """
    if isinstance(max_ratio, Mapping):
        for name, share in max_ratio.items():
            check_ratio(f"max_ratio[{name!r}]", share, zero=True)
        shares = by_name(graph, max_ratio, "max_ratio")
    else:
        check_ratio("max_ratio", max_ratio)
        shares = {group.name: max_ratio for group in graph.groups}

    def limit(group: Group) -> int:
        first = (since or {}).get(group.name, group.size)
        return max(min(int(shares.get(group.name, MAX_RATIO) * first + 1e-9) - (first - group.size), group.size - 1), 0)

    return {bundle[0].name: min(limit(group) for group in bundle) for bundle in bundles}


def check_ratio(name: str, value: Any, *, zero: bool = False) -> None:
    """Refuse what is no share in (0, 1], or in [0, 1].

    Raises:
        BudgetError: it is none.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 <= value <= 1) or (value == 0 and not zero):
        raise BudgetError(f"{name}={value!r} is outside {'[' if zero else '('}0, 1].")

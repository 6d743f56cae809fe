"""Who competes with whom, and who does not take part: scopes, ignored parts, shares by name.

Flows in: a graph and what the user named.  Flows out: pools of bundles, and group names with numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import nn

from prunelab.errors import OptionError, PlanError
from prunelab.options import one_of, parts, real, shown
from prunelab.planning.order import Bundle
from prunelab.tracing.groups import Group
from prunelab.tracing.named import Items, covered
from prunelab.tracing.trace import DependencyGraph

Scope = Literal["global", "layer", "isomorphic"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
MAX_RATIO = 0.9
"""The share that a group may lose at most where nothing else is said."""


def names(bundle: Bundle) -> set[str]:
    """Return the names of a bundle's groups."""
    return {group.name for group in bundle}


def pools(graph: DependencyGraph, bundles: Sequence[Bundle], scope: Scope) -> list[list[Bundle]]:
    """Split bundles into pools; units compete within a pool, and every pool loses the same share.

    Two groups are isomorphic if they run through parameters of the same kinds of modules, in the same dimensions and
    roles, whatever their sizes.

    Raises:
        OptionError: there is no such scope.
    """

    def kind(group: Group) -> Any:
        members = []
        for member in group.members:
            module, _, parameter = member.name.rpartition(".")
            members.append((type(graph.model.get_submodule(module)).__qualname__, parameter, member.dim, member.role))
        return tuple(sorted(members))

    keys: dict[Scope, Callable[[Bundle], Any]] = {
        "global": lambda bundle: 0,
        "layer": lambda bundle: bundle[0].name,
        "isomorphic": lambda bundle: tuple(kind(group) for group in bundle),
    }
    one_of("scope", scope, SCOPES)
    found: dict[Any, list[Bundle]] = defaultdict(list)
    for bundle in bundles:
        found[keys[scope](bundle)].append(bundle)
    return list(found.values())


def ignored_groups(graph: DependencyGraph, ignore: Items) -> set[str]:
    """Return the groups that are named themselves, or run through a parameter that is; with all that are tied to them.

    Raises:
        PlanError: ``ignore`` names something that the model does not have.
    """
    items = parts("ignore", ignore)
    inside = covered(graph.model, items, groups=[group.name for group in graph.groups])
    named = {item for item in items if isinstance(item, str)}
    return {
        name
        for bundle in graph.bundles
        if any(group.name in named or any(member.name in inside for member in group.members) for group in bundle)
        for name in names(bundle)
    }


def spelled(graph: DependencyGraph, given: Any, option: str) -> dict[str, Any]:
    """Return name -> value, given names or modules -> value.

    Raises:
        OptionError: it is not a mapping, or a key is neither a name nor a module.
        PlanError: a module is not part of the model.
    """
    if not isinstance(given, Mapping):
        raise OptionError(
            f"`{option}` must map names or modules to shares, as in {{'layer1': 0.5}}, got {shown(given)}."
        )
    places = {id(module): name for name, module in graph.model.named_modules()}
    found = {}
    for key, value in given.items():
        if not isinstance(key, (str, nn.Module)):
            raise OptionError(f"`{option}` takes names and modules as keys; {shown(key)} is neither.")
        if isinstance(key, nn.Module) and id(key) not in places:
            raise PlanError(
                f"`{option}` names a {type(key).__name__} that is not part of the model {type(graph.model).__name__}."
            )
        found[places[id(key)] if isinstance(key, nn.Module) else key] = value
    return found


def by_name(graph: DependencyGraph, given: Mapping[Any, Any], option: str) -> dict[str, Any]:
    """Return group name -> value, for groups named themselves or by a module or parameter that produces their units.

    Where several names mean a group its own counts, else the longest.

    Raises:
        OptionError: it is not a mapping, or a key is neither a name nor a module.
        PlanError: a name means no group.
    """
    found: dict[str, Any] = {}
    known = {group.name for group in graph.groups}
    given = spelled(graph, given, option)
    for name in sorted(given, key=lambda name: (name in known, len(name), name)):
        meant = [name] if name in known else [g.name for g in graph.groups if _produced_in(g, name)]
        if not meant:
            raise PlanError(
                f"{option} names `{name}`, which is not a group, nor a module or parameter that produces one; print "
                "the graph to see their names."
            )
        found |= dict.fromkeys(meant, given[name])
    return found


def _produced_in(group: Group, name: str) -> bool:
    makers = [member.name for member in group.members if member.role == "produces"]
    return any(not name or f"{maker}.".startswith(f"{name}.") for maker in makers or [m.name for m in group.members])


def checked_shares(graph: DependencyGraph, overrides: Any) -> dict[str, float]:
    """Return ``overrides`` by name, as numbers.

    Raises:
        OptionError: a share is out of range, or ``overrides`` is not a mapping of names and modules.
        PlanError: a module is not part of the model.
    """
    given = spelled(graph, overrides, "overrides")
    why = "the share to remove"
    return {name: real(f"overrides[{name!r}]", share, least=0, below=1, why=why) for name, share in given.items()}


def overridden(
    graph: DependencyGraph, overrides: Mapping[Any, float], skipped: set[str], since: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return how many units go from each group that ``overrides`` means, in forward order; tied groups lose the same.

    Args:
        graph: of the model as it is.
        overrides: name or module -> share.
        skipped: names of groups that stay whole.
        since: group name -> units of which the shares are; by default those of the graph.

    Raises:
        PlanError: a name means no group, or only ignored ones.
        OptionError: a share is out of range, or ``overrides`` is not a mapping of names and modules.
    """
    overrides = checked_shares(graph, overrides)
    for name, share in overrides.items():
        if by_name(graph, {name: share}, "overrides").keys() <= skipped:
            raise PlanError(f"overrides names `{name}`, and ignore leaves it whole: drop it from one of them.")
    sizes = {group.name: group.size for group in graph.groups}
    shares = by_name(graph, overrides, "overrides")
    fixed = {}
    for name in [name for name in sizes if name in shares and name not in skipped]:
        first = (since or {}).get(name, sizes[name])
        fixed[name] = min(max(int(shares[name] * first + 0.5) - (first - sizes[name]), 0), sizes[name] - 1)
    for bundle in graph.bundles:
        number = next((fixed[group.name] for group in bundle if group.name in fixed), None)
        if number is not None:
            fixed |= dict.fromkeys(names(bundle), number)
    return {name: fixed[name] for name in sizes if name in fixed}


def most(
    graph: DependencyGraph,
    bundles: Sequence[Bundle],
    max_ratio: float | Mapping[Any, float],
    since: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Return how many units each bundle may lose, by the name of its first group; one always stays.

    Args:
        graph: of the model as it is.
        bundles: those that are asked about.
        max_ratio: share for all, or name or module -> share.
        since: group name -> units of which the shares are; by default those of the graph.

    Raises:
        OptionError: a share is out of range.
        PlanError: a name means no group.
    """
    if isinstance(max_ratio, Mapping):
        named = spelled(graph, max_ratio, "max_ratio")
        named = {name: real(f"max_ratio[{name!r}]", share, least=0, most=1) for name, share in named.items()}
        shares = by_name(graph, named, "max_ratio")
    else:
        shares = dict.fromkeys((group.name for group in graph.groups), real("max_ratio", max_ratio, above=0, most=1))

    def limit(group: Group) -> int:
        first = (since or {}).get(group.name, group.size)
        return max(min(int(shares.get(group.name, MAX_RATIO) * first + 1e-9) - (first - group.size), group.size - 1), 0)

    return {bundle[0].name: min(limit(group) for group in bundle) for bundle in bundles}

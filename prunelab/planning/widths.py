"""Numbers of units that may stay so that layers have widths that are multiples of ``round_to``.

The width of a layer is the size of a dimension of its weight.  It may be the product of several groups: groups ×
channels in a group for a grouped convolution, heads × head width for attention.  Then neither factor has to be a
multiple by itself, and there are several ways to share the multiple out between them.

Flows in: a graph, the bundles that compete and how many units each may lose.  Flows out: tables, name of a bundle → the
numbers of units that may go; within a table every choice goes with every other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from prunelab.planning.order import Bundle
from prunelab.tracing.axes import Axis, fold
from prunelab.tracing.groups import Member
from prunelab.tracing.trace import DependencyGraph

Table = dict[str, list[int]]
"""Name of a bundle's first group -> the numbers of units that may go from each of its groups, ascending from 0."""


@dataclass(frozen=True)
class Width:
    """A width as a product of numbers of units.

    Attributes:
        names: of the bundles, the outermost factor first, each once per factor.
        rest: product of the factors that are not up for choice.
    """

    names: tuple[str, ...]
    rest: int


def tables(
    graph: DependencyGraph,
    free: Sequence[Bundle],
    most: Mapping[str, int],
    round_to: int | None,
    others: Mapping[str, int],
) -> list[Table]:
    """Return what may go from each bundle, in one or several ways.

    In the first way every factor of a width is a multiple by itself, which suits kernels that work head by head.

    Args:
        graph: of the model.
        free: bundles that compete.
        most: name of a bundle -> how many units each of its groups may lose.
        round_to: widths are multiples of this, or what they were.
        others: group name -> units that stay, of groups that do not compete.
    """
    sizes = {bundle[0].name: bundle[0].size for bundle in free}
    if not round_to or round_to == 1:
        return [{name: list(range(most[name] + 1)) for name in sizes}]
    widths = _widths(graph, free, others)
    inner = {width.names[-1] for width in widths if len(width.names) > 1}
    outer = {name for width in widths if len(width.names) > 1 for name in width.names} - inner
    found = [
        {
            name: [0, *(gone for gone in range(1, most[name] + 1) if not (size - gone) % round_to)]
            for name, size in sizes.items()
        }
    ]
    for step in (step for step in range(1, round_to + 1) if round_to % step == 0):
        table = {
            name: [0, *(gone for gone in range(1, most[name] + 1) if name not in outer or (size - gone) % step == 0)]
            for name, size in sizes.items()
        }
        # The inner factors take what the outer ones leave to them; then the outer ones are held to that.
        for name in sorted(sizes, key=lambda name: name in outer):
            known = [_known(name, width, table, sizes) for width in widths if name in width.names]
            table[name] = [
                gone
                for gone in table[name]
                if not gone or not any(rest * (sizes[name] - gone) ** times % round_to for rest, times in known)
            ]
        if table not in found:
            found.append(table)
    return found


def choices(table: Table) -> int:
    """Return how many numbers a table leaves to choose from."""
    return sum(len(levels) for levels in table.values())


def _known(name: str, width: Width, table: Table, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Return what divides the rest of a width whatever goes from other bundles, and how often this one is a factor."""
    times, rest = Counter(width.names), width.rest
    for factor in times.keys() - {name}:
        rest *= math.gcd(*(sizes[factor] - gone for gone in table[factor])) ** times[factor]
    return rest, times[name]


def _widths(graph: DependencyGraph, free: Sequence[Bundle], others: Mapping[str, int]) -> list[Width]:
    """Return every width that a bundle has a part in, once."""
    bundle_of = {id(group.axis): bundle[0].name for bundle in free for group in bundle}
    left = {id(group.axis): others[group.name] for group in graph.groups if group.name in others}
    found: dict[Width, None] = {}
    for bundle in free:
        for group in bundle:
            made = [member for member in group.members if member.role != "carries"] or group.members
            for member in made:
                if not _is_part_of_width(graph, member):
                    found |= dict.fromkeys(_products(member.axis, bundle_of, left))
    return list(found)


def _products(axis: Axis, bundle_of: Mapping[int, str], left: Mapping[int, int]) -> Iterator[Width]:
    """Yield every segment of a dimension as a product."""

    def times(parts: list[list[list[Axis]]]) -> list[list[Axis]]:
        out: list[list[Axis]] = [[]]
        for part in parts:
            out = [[*before, *segment] for before in out for segment in part]
        return out

    for segment in fold(axis, lambda part: [[part]], times, lambda parts: [row for part in parts for row in part]):
        names = tuple(bundle_of[id(part)] for part in segment if id(part) in bundle_of)
        if names:
            yield Width(
                names, math.prod(left.get(id(part), part.size) for part in segment if id(part) not in bundle_of)
            )


def _is_part_of_width(graph: DependencyGraph, member: Member) -> bool:
    """Tell whether a dimension holds the channels of one group of a grouped convolution, not those of the layer."""
    module, _, parameter = member.name.rpartition(".")
    groups = getattr(graph.model.get_submodule(module), "groups", 1)
    return member.dim == 1 and parameter == "weight" and isinstance(groups, int) and groups > 1


def held(ways: Sequence[Table], limits: Mapping[str, int], round_to: int | None) -> str:
    """Return in words which groups lose nothing in any table, because of ``round_to``."""
    names = [f"`{name}`" for name, most in limits.items() if most and all(len(table[name]) == 1 for table in ways)]
    if not names or not round_to:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f" round_to={round_to} keeps {', '.join(names[:5])}{more} whole: no smaller width is a multiple of it."

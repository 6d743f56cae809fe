"""What 01_tracing shows: which entries of a dimension belong to which unit, and a group with all its members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from prunelab.drawing.style import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, SKY, VERMILLION, picture

if TYPE_CHECKING:
    from prunelab.tracing.groups import Group, Member
    from prunelab.tracing.trace import DependencyGraph

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)
MOST = 12
"""So many members of a group are shown; the caption tells how many there are."""
WORDS = {"produces": "that produce it", "carries": "that carry it", "consumes": "that consume it"}
SIGNS = {"produces": "▸", "carries": "·", "consumes": "◂"}


def ownership(strips: Mapping[str, Tensor | Sequence[int]], *, xlabel: str) -> Figure:
    """Draw one strip per entry: which unit each position of a dimension belongs to, a colour and a number per unit.

    Args:
        strips: what the units are -> for every position the unit that owns it, -1 where none does.
        xlabel: what the positions are.
    """
    rows = {label: np.asarray(owners) for label, owners in strips.items()}
    figure = picture(9, 0.9 + 0.75 * len(rows))
    for place, (label, owners) in enumerate(rows.items(), 1):
        axes = figure.add_subplot(len(rows), 1, place)
        _strip(axes, owners)
        axes.set_ylabel(label, fontsize=11, rotation=0, ha="right", va="center")
        edges = np.flatnonzero(np.diff(owners)) + 0.5
        ends = [-0.5, *edges, len(owners) - 0.5]
        for low, high in pairwise(ends):
            unit = owners[round((low + high) / 2)]
            if unit >= 0 and high - low >= len(owners) / 60:
                axes.text((low + high) / 2, 0, str(unit), ha="center", va="center", fontsize=10, color=INK)
        if place == len(rows):
            axes.set_xlabel(xlabel, fontsize=11)
        else:
            axes.tick_params(labelbottom=False)
    return figure


def _strip(axes: Axes, owners: np.ndarray) -> None:
    shades = [PALE, *(COLOURS[number % len(COLOURS)] for number in range(max(int(owners.max()) + 1, 1)))]
    axes.imshow(
        owners[None, :] + 1, cmap=ListedColormap(shades), vmin=0, vmax=len(shades) - 1, aspect="auto", alpha=0.75
    )
    axes.set_yticks([])
    axes.tick_params(labelsize=10)


def group_view(graph: DependencyGraph, group: Group, unit: int = 0) -> Figure:
    """Draw the network with one group in colour, and beside it where one of its units sits in every member.

    Args:
        graph: from ``trace``.
        group: one of its groups.
        unit: number of one of its units.
    """
    from prunelab.drawing.network import draw_into, network, place

    nodes = network(graph, [group])
    place(nodes)
    rows = max(node.row for node in nodes) + 1
    figure = picture(11.5, max(4.5, 0.6 + 0.25 * rows))
    figure.set_layout_engine(None)  # places that are known need not be searched for at every move of a slider
    left, right = figure.subplots(1, 2, width_ratios=[5, 6])
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.4 / figure.get_figheight(), 0.02)
    draw_into(left, graph, nodes, [group])
    left.set_title(f"group `{group.name}`", fontsize=12, loc="left", y=1)
    _members(right, some_members(group), unit)
    right.set_title(f"unit {unit} of {group.size}, in {_many(group)}", fontsize=12, loc="left", y=1)
    return figure


def in_words(group: Group, unit: int) -> str:
    """Return what goes with a unit of a group, as a sentence in HTML."""
    roles = [member.role for member in group.members]
    counts = ", ".join(f"{roles.count(role)} {words}" for role, words in WORDS.items() if role in roles)
    entries = sum(len(member.positions(unit)) for member in group.members)
    return (
        f"<b>{group.name}</b>, unit {unit} of {group.size}: it has entries at {entries} places along the dimensions of "
        f"{len(roles)} parameters and buffers ({counts}). They can only be removed together."
    )


def explained(graph: DependencyGraph, group: Group, unit: int) -> tuple[Figure, str]:
    """Return the view of a group and the words for it; a unit that the group does not have means its last."""
    unit = min(unit, group.size - 1)
    return group_view(graph, group, unit), in_words(group, unit)


def some_members(group: Group) -> list[Member]:
    """Return the members to show: parameters of two and more dimensions first, in the order of their roles."""
    order = {role: number for number, role in enumerate(SIGNS)}
    shown = sorted(group.members, key=lambda member: (order[member.role], "running" in member.name))
    weights = [member for member in shown if member.role != "carries"][:MOST]
    rest = [member for member in shown if member.role == "carries"][: max(2, MOST - len(weights))]
    return [member for member in shown if member in weights[: MOST - len(rest)] or member in rest]


def _many(group: Group) -> str:
    shown, number = len(some_members(group)), len(group.members)
    return f"its {number} members" if shown == number else f"{shown} of its {number} members"


def _members(axes: Axes, members: Sequence[Member], unit: int) -> None:
    bars: dict[str, list[tuple[float, float, int]]] = {PALE: [], GREY: [], BLUE: []}
    for row, member in enumerate(members):
        owners = member.unit.numpy()
        size = len(owners)
        bars[PALE].append((0, 1, row))
        for colour, chosen in ((GREY, owners < 0), (BLUE, owners == unit)):
            bars[colour] += [(low / size, max((high - low) / size, 0.006), row) for low, high in _runs(chosen)]
        label = f"{SIGNS[member.role]} {member.name}, dim {member.dim}"
        axes.text(0, row - 0.32, label, fontsize=10, va="bottom", color=INK)
        axes.text(1.01, row, str(size), fontsize=10, va="center", color=INK)
    for colour, found in bars.items():  # a collection for each colour: drawn in a third of the time of as many bars
        alpha = 0.35 if colour == GREY else 1
        corners = [[(x, y - 0.275), (x + w, y - 0.275), (x + w, y + 0.275), (x, y + 0.275)] for x, w, y in found]
        axes.add_collection(PolyCollection(corners, facecolors=colour, alpha=alpha, linewidths=0), autolim=False)
    axes.set_ylim(max(len(members), MOST) - 0.4, -1)
    axes.set_xlim(0, 1.08)
    axes.set_axis_off()


def _runs(chosen: np.ndarray) -> list[tuple[int, int]]:
    """Return where each run of chosen entries begins, and where it ends."""
    steps = np.diff(np.concatenate([[0], chosen.astype(int), [0]]))
    return list(zip(np.flatnonzero(steps == 1), np.flatnonzero(steps == -1), strict=True))


__all__ = ["explained", "group_view", "in_words", "ownership", "some_members"]

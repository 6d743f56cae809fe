"""The network, drawn with one colour and number per group: what goes together looks alike.

Flows in: a dependency graph.  Flows out: a figure; boxes are layers and joins, lines are what flows between them.
Notebook 01_tracing shows it.
"""

from __future__ import annotations

import colorsys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.path import Path
from torch import Tensor

from prunelab.drawing.style import GREY, INK, PALE, picture
from prunelab.errors import PlanError
from prunelab.tracing.axes import fold, leaves
from prunelab.tracing.recorder import Op

if TYPE_CHECKING:
    from prunelab.tracing.groups import Group
    from prunelab.tracing.trace import DependencyGraph

LAYERS = ("convolution", "mm", "addmm", "bmm", "baddbmm", "mv", "dot", "embedding")
JOINS = {"cat": "joined", "add": "+", "mul": "×", "sub": "−", "div": "÷", "mm": "@", "bmm": "@", "baddbmm": "@"}
WIDTH, HEIGHT, STEP, LANE = 0.62, 0.5, 1.0, 3.0
MOST = 400


@dataclass
class Node:
    """A box: a layer, a join of several lines, the input or the output.

    Attributes:
        label: what is written next to it.
        parts: ``(share, group or None)``: the colours of what it gives on, side by side.
        sources: the boxes that its lines come from.
    """

    label: str
    parts: list[tuple[float, Group | None]]
    sources: list[Node] = field(default_factory=list)
    row: int = 0
    lane: int = 0


def draw(graph: DependencyGraph, groups: Iterable[Group | str] | None = None) -> Figure:
    """Draw the network from its input, at the top, to its output; a colour is a group, grey is frozen.

    A box shows what a layer, or a join of several lines, gives on: one colour, or several side by side where channels
    of several groups lie next to each other.  The number in it is the place of the group among ``graph.groups``,
    counted from 1, for eyes and printers that cannot tell so many colours apart.  Norms and activations, which only
    pass channels on, are left out.

    Args:
        graph: from ``trace``.
        groups: groups, or names of groups, to colour; all by default, the others are then pale.

    Returns:
        A figure as high as the network is deep.

    Raises:
        PlanError: ``groups`` names one that there is not, or the network has more layers than a figure can hold.
    """
    groups = None if groups is None else list(groups)
    nodes = network(graph, groups)
    if len(nodes) > MOST:
        raise PlanError(f"{type(graph.model).__name__} has {len(nodes)} layers and joins; a figure holds {MOST}.")
    place(nodes)
    rows, lanes = max(node.row for node in nodes) + 1, max(node.lane for node in nodes) + 1
    figure = picture(min(2.6 + 2.2 * lanes, 14), 0.6 + 0.27 * rows)
    draw_into(figure.add_subplot(111), graph, nodes, groups)
    return figure


def draw_into(
    axes: Axes, graph: DependencyGraph, nodes: list[Node], groups: Iterable[Group | str] | None = None
) -> None:
    """Draw a network whose boxes have their places into axes that are there already; see ``draw``."""
    colours = _colours(graph, groups)
    numbers = {group.name: str(place) for place, group in enumerate(graph.groups, 1)}
    axes.set_axis_off()
    axes.set_xlim(-0.8, (max(node.lane for node in nodes) + 1) * LANE)
    axes.set_ylim(-(max(node.row for node in nodes) + 1) * STEP + 0.2, 0.8)
    _lines(axes, nodes, colours)
    _boxes(axes, nodes, colours, numbers)
    title = f"{type(graph.model).__name__}\none colour and number per group, grey is frozen"
    axes.set_title(title, fontsize=11, loc="left")


def network(graph: DependencyGraph, groups: Iterable[Group | str] | None = None) -> list[Node]:
    """Return the boxes of the network in the order in which the model runs them.

    Args:
        graph: from ``trace``.
        groups: groups, or their names, that a box shows where several are multiplied, as heads × head width; the
            outermost by default.
    """
    shown = {item if isinstance(item, str) else item.name for item in groups or ()}
    start = Node("input", [(1.0, None)])
    nodes = [start]
    given: dict[int, Node | None] = {}
    parameters = set(dict(graph.model.named_parameters(remove_duplicate=False)))
    last = start
    for op in graph.tape:
        if op.training:
            continue
        computed = [tensor for tensor in op.tensors if not graph.origins_of(tensor)]
        sources = list({id(n): n for n in (given.get(id(t), start) for t in computed) if n is not None}.values())
        weights = {name for tensor in op.tensors for name, _ in graph.origins_of(tensor)} & parameters
        made: Node | None = sources[0] if sources else None
        if not computed:
            made = None  # made of parameters alone: part of the layer that uses it
        elif (op.name in LAYERS and weights) or len(sources) > 1:
            made = Node(_label(op, weights, graph), parts_of(graph, op.outputs[0], shown), sources)
            nodes.append(made)
        for tensor in op.outputs:
            given.setdefault(id(tensor), made)
            if op.func._schema.is_mutable:
                given[id(tensor)] = made
        last = made or last
    return [*nodes, Node("output", [(1.0, None)], [last])]


def parts_of(graph: DependencyGraph, tensor: Tensor, shown: Collection[str] = ()) -> list[tuple[float, Group | None]]:
    """Return the groups that lie side by side in a tensor's first dimension that has any, each with its share."""
    by_leaf = {id(group.axis): group for group in graph.groups}
    for axis in graph.axes_of(tensor):
        if any(id(part) in by_leaf for part in leaves(axis)):
            one = partial(_product, shown=shown)
            segments = fold(axis, lambda part: [(part.size, by_leaf.get(id(part)))], one, _joined)
            total = sum(size for size, _ in segments)
            return [(size / total, group) for size, group in segments]
    return [(1.0, None)]


Segments = list[tuple[int, "Group | None"]]


def _product(factors: list[Segments], shown: Collection[str]) -> Segments:
    """One colour for a product: the factor that is asked for, else the first that has a group, as heads."""
    size = 1
    for factor in factors:
        size *= sum(width for width, _ in factor)
    free = [factor for factor in factors if any(group for _, group in factor)]
    asked = [factor for factor in free if any(group and group.name in shown for _, group in factor)]
    chosen = (asked or free or factors)[0]
    inside = sum(width for width, _ in chosen)
    return [(width * size // inside, group) for width, group in chosen]


def _joined(parts: list[Segments]) -> Segments:
    return [segment for part in parts for segment in part]


def _label(op: Op, weights: set[str], graph: DependencyGraph) -> str:
    if op.name in LAYERS and weights:
        module = op.module or sorted(weights)[0].rpartition(".")[0]
        return module or op.name
    if "attention" in op.name:
        return f"{op.module} attention"
    return JOINS.get(op.name.rstrip("_"), op.name)


def place(nodes: list[Node]) -> None:
    """Give every box a row, one below all its sources, and a lane that no other box of the row has."""
    taken: dict[int, int] = {}
    for node in nodes:
        node.row = max((source.row + 1 for source in node.sources), default=0)
        node.lane = taken.get(node.row, 0)
        taken[node.row] = node.lane + 1
    nodes[-1].row = max(node.row for node in nodes[:-1]) + 1


def _colours(graph: DependencyGraph, groups: Iterable[Group | str] | None) -> Mapping[str, str]:
    """Return a colour by group name; hues a golden angle apart, so that neighbours differ."""
    names = [group.name for group in graph.groups]
    chosen = names if groups is None else [item if isinstance(item, str) else item.name for item in groups]
    for name in chosen:
        if name not in names:
            raise PlanError(f"There is no group `{name}` to draw; print the graph to see their names.")
    colours = {}
    for number, name in enumerate(names):
        red, green, blue = colorsys.hls_to_rgb(number * 0.618034 % 1, (0.45, 0.62)[number % 2], 0.75)
        colours[name] = f"#{int(255 * red):02x}{int(255 * green):02x}{int(255 * blue):02x}" if name in chosen else PALE
    return colours


def _colour(part: Group | None, colours: Mapping[str, str]) -> str:
    return GREY if part is None else colours[part.name]


def _centre(node: Node) -> tuple[float, float]:
    return node.lane * LANE, -node.row * STEP


def _boxes(axes: Axes, nodes: Sequence[Node], colours: Mapping[str, str], numbers: Mapping[str, str]) -> None:
    corners, fills = [], []
    behind = None  # where lines run side by side they may pass words, and do not cross them
    if any(node.lane for node in nodes):
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for node in nodes:
        x, y = _centre(node)
        left, low, high = x - WIDTH / 2, y - HEIGHT / 2, y + HEIGHT / 2
        for share, group in node.parts:
            right = left + share * WIDTH
            corners.append([(left, low), (right, low), (right, high), (left, high)])
            fills.append(_colour(group, colours))
            if group is not None and share > 0.25:
                ink, middle = "white" if _luminance(fills[-1]) < 0.45 else INK, (left + right) / 2
                number = numbers[group.name]
                axes.text(middle, y, number, fontsize=9, color=ink, ha="center", va="center", zorder=4, gid="number")
            left = right
        axes.text(x + WIDTH / 2 + 0.06, y, node.label, fontsize=10, va="center", color=INK, zorder=4, bbox=behind)
    axes.add_collection(PolyCollection(corners, facecolors=fills, linewidths=0, zorder=3), autolim=False)


def _luminance(colour: str) -> float:
    red, green, blue = to_rgb(colour)
    return 0.3 * red + 0.59 * green + 0.11 * blue


def _lines(axes: Axes, nodes: Sequence[Node], colours: Mapping[str, str]) -> None:
    ends = [(source, node) for node in nodes for source in node.sources]
    largest = [max(source.parts, key=lambda part: part[0])[1] for source, _ in ends]
    lines = PathCollection(
        [_path(source, node) for source, node in ends],
        facecolors="none",
        edgecolors=[_colour(group, colours) for group in largest],
        linewidths=1.6,
        zorder=2,
    )
    lines.set_transform(axes.transData)
    axes.add_collection(lines, autolim=False)


def _path(source: Node, node: Node) -> Path:
    """A straight line from box to box; around those between, where it passes some of its own lane."""
    (x0, y0), (x1, y1) = _centre(source), _centre(node)
    rows = node.row - source.row
    if rows < 2 or source.lane != node.lane:
        return Path([(x0, y0 - HEIGHT / 2), (x1, y1 + HEIGHT / 2)])
    side = x0 - WIDTH / 2
    around = (side - 0.09 * rows**0.3, (y0 + y1) / 2)
    return Path([(side, y0), around, (side, y1)], [Path.MOVETO, Path.CURVE3, Path.CURVE3])

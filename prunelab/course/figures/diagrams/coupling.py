"""What hangs together: the slices of a group, axes that meet, the gate of a unit, layers on one path or on several."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np

from prunelab.course.figures.diagrams.sheet import Diagram, number, tint
from prunelab.drawing.style import BLUE, GREEN, GREY, INK, ORANGE, PALE, SKY, VERMILLION
from prunelab.tracing import axes as algebra

CHANNELS, UNIT = 16, 5
"""Of the block that notebook 01 cuts by hand."""
PLAIN, SHADES = "#F1F1F1", (tint(SKY, 0.35), tint(ORANGE, 0.5), tint(GREEN, 0.75))
"""Of pieces before they meet, and of what they become: told apart in grey as well."""


def group_slices() -> Diagram:
    """Draw the slices that go with one channel: inside a residual block, and where a shortcut ties two layers.

    Above: row 5 of the convolution that makes the channel, entry 5 of the four tensors of its batch norm, column 5
    of the convolution that reads it.  Below: a sum makes one axis of the rows of two layers.
    """
    sheet, cell = Diagram(7.6, 5.75), 0.075
    side = CHANNELS * cell
    middle = (UNIT + 0.5) * cell

    def weight(x: float, y: float, name: str, *, row: bool) -> None:
        marked = np.full((CHANNELS, CHANNELS), PALE, dtype=object)
        marked[(UNIT, slice(None)) if row else (slice(None), UNIT)] = VERMILLION
        sheet.cells(x, y, marked, cell)
        sheet.words(x + side / 2, y - 0.14, name)
        if row:
            sheet.words(x - 0.08, y + middle, f"row {UNIT}", ha="right", color=VERMILLION, weight="bold")
        else:
            sheet.words(x + middle, y + side + 0.13, f"column {UNIT}", color=VERMILLION, weight="bold")

    sheet.words(0.15, 0.2, "Inside a block: made, scaled, read", ha="left", fontsize=12, weight="bold")
    top = 0.75
    weight(0.85, top, "conv1.weight", row=True)
    names = ("weight", "bias", "running\nmean", "running\nvar")
    for place, name in enumerate(names):
        x = 2.85 + 0.62 * place
        vector = [[VERMILLION if unit == UNIT else PALE] for unit in range(CHANNELS)]
        sheet.cells(x, top, vector, (2 * cell, cell))
        sheet.words(x + cell, top + side + 0.08, name, fontsize=9.5, va="top")
    sheet.words(2.85 + 0.93 + cell, top - 0.14, f"bn1: entry {UNIT} of each")
    weight(6.0, top, "conv2.weight", row=False)
    sheet.arrow((2.2, top + middle), (2.72, top + middle), color=VERMILLION)
    sheet.arrow((5.12, top + middle), (5.88, top + middle), color=VERMILLION)

    sheet.words(0.15, 2.6, "A shortcut ties two layers", ha="left", fontsize=12, weight="bold")
    upper, lower = 3.1, 4.55
    cell, side, middle = 0.065, CHANNELS * 0.065, (UNIT + 0.5) * 0.065
    weight(0.85, upper, "a layer that makes $x$", row=True)
    weight(0.85, lower, "a layer that makes $y$", row=True)
    weight(5.2, (upper + lower) / 2 - 0.05, "every layer that reads $z$", row=False)
    joint = (upper + lower) / 2 + middle - 0.05
    sheet.disc(3.35, joint, "+")
    for y in (upper, lower):
        sheet.arrow((0.85 + side + 0.08, y + middle), (3.35, y + middle), (3.35, joint + np.sign(y - joint) * 0.16))
    sheet.arrow((3.51, joint), (5.08, joint), color=VERMILLION)
    sheet.words(4.3, joint - 0.15, "$z_5 = x_5 + y_5$")
    sheet.words(4.3, joint + 0.3, "one channel of $z$:\nboth rows, or neither", fontsize=10)
    tensors = 1 + len(names) + 1
    sheet.alt = (
        f"Matrices with the slices of channel {UNIT} in colour. Inside a block {tensors} tensors lose a slice: "
        f"row {UNIT} of conv1, entry {UNIT} of weight, bias, running mean and running variance of bn1, column {UNIT} "
        f"of conv2. Below, a sum z = x + y ties row {UNIT} of the two layers that make x and y, and column {UNIT} of "
        f"every layer that reads z."
    )
    return sheet


def _pieces(axis: algebra.Axis) -> list[int]:
    """Return the runs of entries that an axis is seen to be made of, from left to right."""
    axis = algebra.find(axis)
    if axis.kind == "sum":
        return [piece for part in axis.parts for piece in _pieces(part)]
    if axis.kind == "product":
        *_, inner = algebra.factors_of(axis)
        return _pieces(inner) * (axis.size // inner.size)
    return [axis.size]


def axes_meet() -> Diagram:
    """Draw what ``unify`` does: two sums, two products, and a sum that meets a product, each with what both become.

    The axes are the library's, and so is what they become.
    """
    leaf, product, total = algebra.leaf, algebra.product, algebra.concatenation
    sheet, left, width = Diagram(7.6, 6.2), 1.55, 5.85
    parts = leaf(12), leaf(12), leaf(12)
    cases = [
        ("Two sums", total([leaf(6), leaf(4)]), total([leaf(2), leaf(8)])),
        ("Two products", product([leaf(6), leaf(4)]), product([leaf(2), leaf(12)])),
        ("A sum meets a product", total(parts), product([leaf(3), leaf(3), leaf(4)])),
    ]
    found = []
    for place, (title, first, second) in enumerate(cases):
        top, unit = (0.5, 2.3, 4.45)[place], width / first.size
        before = [(algebra.show(axis), _pieces(axis)) for axis in (first, second)]
        algebra.unify(first, second, "here")
        after = algebra.show(first)
        found.append(f"{before[0][0]} meets {before[1][0]} and becomes {after}")
        sheet.words(0.15, top - 0.25, title, ha="left", fontsize=12, weight="bold")
        rows = [*before, (after, _pieces(first))]
        for row, (name, pieces) in enumerate(rows):
            y = top + (0, 0.38, 0.95)[row]
            result = row == 2
            sheet.words(left - 0.12, y + 0.15, name, ha="right", weight="bold" if result else "normal", fontsize=10)
            for count, (end, size) in enumerate(zip(accumulate(pieces), pieces, strict=True)):
                fill = SHADES[count % 3] if result else PLAIN
                x = left + (end - size) * unit
                sheet.cells(x, y, [[fill]], (size * unit, 0.3))
                sheet.words(x + size * unit / 2, y + 0.15, str(size))
        for end in sorted({*accumulate(rows[0][1]), *accumulate(rows[1][1])})[:-1]:
            x = left + end * unit
            sheet.page.plot([x, x], [top + 0.7, top + 0.94], color=GREY, linewidth=1, linestyle=":")
        if place == 1:
            outer, *inner = algebra.factors_of(first)
            for run in range(outer.size):
                long = width / outer.size
                sheet.brace(left + run * long, top + 1.3, long, algebra.show(product(inner)))
        elif place == 2:
            for run, name in enumerate(("queries", "keys", "values")):
                sheet.brace(left + run * width / 3, top + 1.3, width / 3, name)
    sheet.alt = (
        "Bars cut into pieces, in three cases. "
        + "; ".join(found)
        + ". Wherever one of the two bars has an end, the common refinement has one. In the last case queries, keys "
        "and values are cut in the same way, so a head owns one run of entries in each of them."
    )
    return sheet


def gate(target: float = 1.0, weight: float = 2.0) -> Diagram:
    """Draw a gate: a unit times z where it is consumed, and the loss of the chapter's one unit as z goes from 1 to 0.

    Args:
        target: what the output should be.
        weight: the output is ``z * weight``, the loss half its squared distance from the target.
    """
    sheet = Diagram(7.8, 3.5)
    sheet.words(0.15, 0.2, "A factor where the unit is consumed", ha="left", fontsize=12, weight="bold")
    gates = (1.0, 0.0, 1.0)
    sheet.box(0.15, 0.85, 0.95, 2.05, "the layer\nthat makes\nthe units", fontsize=10)
    sheet.box(3.55, 0.85, 0.95, 2.05, "the layer\nthat reads\nthem", fontsize=10)
    for unit, value in enumerate(gates, 1):
        y, on = 0.43 + 0.72 * unit, value > 0
        color = INK if on else VERMILLION
        sheet.arrow((1.1, y), (1.55, y))
        sheet.disc(1.72, y, f"$u_{unit}$", fill=tint(SKY, 0.5))
        sheet.arrow((1.88, y), (2.27, y))
        sheet.disc(2.43, y, "×", fill="white" if on else tint(VERMILLION, 0.5))
        sheet.arrow((2.59, y), (3.53, y), color=color, line="-" if on else ":")
        sheet.words(2.43, y - 0.29, f"$z_{unit} = {value:.0f}$", color=color, fontsize=10)
        sheet.words(3.02, y - 0.14, f"$z_{unit}u_{unit}$" if on else "0", color=color, fontsize=10)
    sheet.words(2.3, 3.2, "unit 2 is gone; no weight has changed", fontsize=10, color=VERMILLION)

    def loss(z: Any) -> Any:
        return 0.5 * (z * weight - target) ** 2

    slope, bend = weight * (weight - target), weight**2
    z = np.linspace(-0.08, 1.12, 100)
    axes = sheet.plot(5.3, 0.75, 2.3, 2.05, xlabel="gate $z$", ylabel="loss")
    axes.plot(z, loss(z), color=BLUE, linewidth=2.2)
    line = np.linspace(0.55, 1.1, 2)
    axes.plot(line, loss(1.0) + slope * (line - 1), color=GREY, linewidth=1.6, linestyle="--")
    for place, color, marker in ((1.0, INK, "o"), (0.0, VERMILLION, "X")):
        axes.plot(place, loss(place), marker, color=color, markersize=9, zorder=3)
    axes.set(xlim=(1.22, -0.22), ylim=(-0.08, 1.0), xticks=[1, 0.5, 0], yticks=[0, 0.5])
    axes.text(0.93, loss(1.0) + 0.05, "whole", fontsize=10, ha="left", va="center")
    axes.text(0.07, loss(0.0) + 0.05, "removed", fontsize=10, ha="right", va="center", color=VERMILLION)
    first, second = -slope, bend / 2
    sheet.words(6.45, 0.2, "The loss along it", fontsize=12, weight="bold")
    price = f"$-g + \\frac{{1}}{{2}}h = {first:.0f} + {second:.0f} = {first + second:.0f}$"
    sheet.words(6.45, 0.5, price, fontsize=11)
    sheet.alt = (
        "Three units go from the layer that makes them to the layer that reads them, each through a multiplication "
        "by a gate z. Two gates are 1; the second is 0, so nothing of its unit arrives. Beside it the loss of one unit "
        f"as a parabola in z: at z = 1 it is {number(loss(1.0))}, its slope {number(slope)} and its curvature "
        f"{number(bend)}; at z = 0 it is {number(loss(0.0))}, as the series says, {first:.0f} + {second:.0f} = "
        f"{first + second:.0f}."
    )
    return sheet


def mixed(function: Callable[[float, float], float]) -> float:
    """Return the mixed second difference at two factors of one, which is exact where each factor occurs once."""
    return function(2, 2) - function(2, 1) - function(1, 2) + function(1, 1)


WAYS: dict[str, Callable[[float, float], float]] = {
    "in series": lambda a, b: b * a,
    "in parallel, multiplied": lambda a, b: a * b,
    "in parallel, added": lambda a, b: a + b,
}
"""How two layers, scaled by a and by b, may make the output."""


def two_layers() -> Diagram:
    """Draw two layers in series, multiplied and added, each with the functional part of the Hessian in their scales.

    Its entries are the second differences of f in the two scales, where each layer alone would make a one.
    """
    sheet = Diagram(7.6, 3.75)
    found = {}
    for place, (title, function) in enumerate(WAYS.items()):
        x = 0.2 + 2.5 * place
        sheet.words(x + 1.1, 0.22, title, fontsize=12, weight="bold")
        if place == 0:
            for step in (0, 1):
                sheet.box(x + 0.45 + 0.75 * step, 0.95, 0.42, 0.4, ("a", "b")[step], fill=tint(SKY, 0.45))
                sheet.arrow((x + 0.87 + 0.75 * step, 1.15), (x + 1.2 + 0.63 * step, 1.15))
            sheet.arrow((x + 0.18, 1.15), (x + 0.45, 1.15))
            sheet.words(x + 0.09, 1.15, "$x$")
            sheet.words(x + 1.96, 1.15, "$f$")
        else:
            sheet.words(x + 0.09, 1.15, "$x$")
            for y, name in ((0.68, "a"), (1.22, "b")):
                sheet.box(x + 0.62, y, 0.42, 0.4, name, fill=tint(SKY, 0.45))
                sheet.arrow((x + 0.2, 1.15), (x + 0.35, y + 0.2), (x + 0.62, y + 0.2))
                sheet.arrow((x + 1.04, y + 0.2), (x + 1.38, 1.15 + (0.1 if name == "b" else -0.1)))
            sheet.disc(x + 1.5, 1.15, "×" if place == 1 else "+")
            sheet.arrow((x + 1.65, 1.15), (x + 1.87, 1.15))
            sheet.words(x + 1.96, 1.15, "$f$")
        formula = (r"$f = \tau_b\,\tau_a$", r"$f = \tau_a\,\tau_b$", r"$f = \tau_a + \tau_b$")[place]
        sheet.words(x + 1.1, 1.9, formula, fontsize=11.5)
        bends = np.array([[0.0, mixed(function)], [mixed(function), 0.0]])
        for own in (0, 1):
            ends = [function(*((t, 1.0) if own == 0 else (1.0, t))) for t in (0.0, 1.0, 2.0)]
            bends[own, own] = ends[0] - 2 * ends[1] + ends[2]
        fills = [[tint(BLUE, 0.55) if value else "white" for value in row] for row in bends]
        sheet.numbers(x + 0.7, 2.42, bends, 0.42, fills=fills)
        for own, name in enumerate("ab"):
            sheet.words(x + 0.91 + 0.42 * own, 2.3, name)
            sheet.words(x + 0.58, 2.63 + 0.42 * own, name)
        verdict = "they interact" if bends[0, 1] else "a block of zeros"
        sheet.words(x + 1.1, 3.5, verdict, color=BLUE if bends[0, 1] else VERMILLION, fontsize=10.5)
        found[title] = bends[0, 1]
    sheet.alt = (
        "Two layers a and b make an output f from x in three ways. The functional part of the Hessian in their two "
        "scales has zeros on its diagonal, and off it "
        + ", ".join(f"{number(value)} {title}" for title, value in found.items())
        + "."
    )
    return sheet

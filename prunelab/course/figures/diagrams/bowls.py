"""The quadratic model from above: what its diagonal leaves out, and the move that OBS adds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from prunelab.course.figures.diagrams.sheet import Diagram, tint
from prunelab.drawing.style import BLUE, GREEN, GREY, INK, PURPLE, VERMILLION

Pair = Sequence[float] | np.ndarray


def cost(matrix: np.ndarray, step: Pair) -> float:
    """Return ½ δᵀHδ."""
    delta = np.asarray(step, dtype=float)
    return float(delta @ matrix @ delta / 2)


def _from_above(axes: Axes, matrix: np.ndarray, weights: np.ndarray, levels: Sequence[float]) -> None:
    """Shade the cost around the trained weights, and draw the lines on which it has the given levels."""
    (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    first, second = np.meshgrid(np.linspace(low, high, 121), np.linspace(bottom, top, 121))
    delta = np.stack([first - weights[0], second - weights[1]])
    height = np.einsum("ixy,ij,jxy->xy", delta, matrix, delta) / 2
    steps = sorted({round(level, 9) for level in levels})
    shades = [tint(BLUE, share) for share in np.linspace(0.03, 0.32, len(steps) + 1)]
    axes.contourf(first, second, height, levels=[-1, *steps, height.max() + 1], colors=shades)
    axes.contour(first, second, height, levels=steps, colors=[BLUE], linewidths=1.1)
    axes.plot(*weights, "o", color=INK, markersize=8, zorder=4)


def _step(axes: Axes, start: Pair, end: Pair, color: str, marker: str, line: str = "-") -> None:
    look = {"arrowstyle": "-|>", "color": color, "linewidth": 2, "linestyle": line, "shrinkA": 5, "shrinkB": 5}
    axes.annotate("", tuple(end), tuple(start), arrowprops=look)
    axes.plot(*end, marker, color=color, markersize=9, zorder=4)


def _label(axes: Axes, place: tuple[float, float], text: str, color: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
    axes.text(*place, text, fontsize=10.5, color=color, ha="center", va="center", bbox=box, zorder=5)


def bowl(inputs: Pair = (1.0, 4.0), weights: Pair = (0.40, 0.15)) -> Diagram:
    """Draw the loss of two weights from above, beside the bowl that the diagonal of its Hessian describes.

    The loss is ½ (w · inputs − 1)²; its Hessian is the outer product of the inputs.  One weight at a time, both
    bowls have the same cost; both together cost something else.

    Args:
        inputs: what the two weights are multiplied with.
        weights: the trained values, at which the loss is zero.
    """
    w, H = np.asarray(weights, dtype=float), np.outer(inputs, inputs)
    sheet = Diagram(7.8, 4.05)
    ends = {"first": (0.0, w[1]), "second": (w[0], 0.0), "both": (0.0, 0.0)}
    said = {}
    titles = {"The loss itself": H, "What the diagonal of $H$ says": np.diag(np.diag(H))}
    for place, (title, matrix) in enumerate(titles.items()):
        prices = {name: cost(matrix, np.subtract(end, w)) for name, end in ends.items()}
        said[title] = prices
        label = "$w_2$" if place == 0 else ""
        axes = sheet.plot(0.75 + 3.6 * place, 0.75, 3.2, 2.75, xlabel="$w_1$", ylabel=label)
        axes.set(xlim=(-0.13, 0.67), ylim=(-0.06, 0.26), xticks=[0, 0.2, 0.4, 0.6], yticks=[0, 0.1, 0.2])
        if place:
            axes.set_yticklabels([])
        axes.axvline(0, color=GREY, linewidth=1)
        axes.axhline(0, color=GREY, linewidth=1)
        _from_above(axes, matrix, w, list(prices.values()))
        _step(axes, w, ends["first"], GREEN, "D")
        _step(axes, w, ends["second"], GREEN, "D")
        _step(axes, w, ends["both"], VERMILLION, "X", "--")
        _label(axes, (0.2, w[1] + 0.02), f"{prices['first']:.2f}", GREEN)
        _label(axes, (w[0] + 0.062, 0.07), f"{prices['second']:.2f}", GREEN)
        _label(axes, (0.265, 0.05), f"{prices['both']:.2f}", VERMILLION)
        _label(axes, (w[0] + 0.09, w[1] + 0.022), "trained", INK)
        sheet.words(0.75 + 1.6 + 3.6 * place, 0.22, title, fontsize=12, weight="bold")
        total = prices["first"] + prices["second"]
        sign = "=" if np.isclose(total, prices["both"]) else "≠"
        line = f"both cost {prices['both']:.2f} {sign} {prices['first']:.2f} + {prices['second']:.2f}"
        sheet.words(0.75 + 1.6 + 3.6 * place, 0.5, line, color=VERMILLION)
    true, guess = said.values()
    sheet.alt = (
        "Lines of equal cost of two weights, seen from above, with arrows from the trained weights. Left, the loss "
        "itself: a slanted valley with straight sides. Right, what the diagonal of its Hessian describes: an ellipse "
        f"along the axes. Removing one weight costs the same in both, {true['first']:.2f} or {true['second']:.2f}. "
        f"Removing both costs {true['both']:.2f} on the left and {guess['both']:.2f} on the right, the sum of the two."
    )
    return sheet


def surgeon(hessian: Sequence[Sequence[float]] = ((1.0, 0.8), (0.8, 1.0)), weights: Pair = (1.0, 1.0)) -> Diagram:
    """Draw what OBS adds to OBD: the first weight goes to zero, and the second slides to the lowest point there.

    Left: the bowl from above; right: the cut through it along the line on which the first weight is zero.

    Args:
        hessian: of the two weights, positive definite.
        weights: their trained values.
    """
    w, H = np.asarray(weights, dtype=float), np.asarray(hessian, dtype=float)
    inverse = np.linalg.inv(H)
    move = -w[0] / inverse[0, 0] * inverse[:, 0]
    obd, obs = np.array([0.0, w[1]]), w + move
    prices = cost(H, obd - w), cost(H, move)
    sheet = Diagram(7.8, 4.2)
    axes = sheet.plot(0.7, 0.6, 3.1, 2.95, xlabel="$w_1$", ylabel="$w_2$")
    axes.set(xlim=(-0.75, 1.95), ylim=(-0.1, 2.47), xticks=[0, 1], yticks=[0, 1, 2])
    _from_above(axes, H, w, [0.06, *prices])
    axes.axvline(0, color=INK, linewidth=2)
    _step(axes, w, obd, GREEN, "D")
    _step(axes, obd, obs, PURPLE, "v")
    _label(axes, (-0.37, w[1]), f"{prices[0]:.2f}", INK)
    _label(axes, (-0.37, obs[1]), f"{prices[1]:.2f}", INK)
    _label(axes, (0.5, w[1] - 0.2), "zero it", INK)
    _label(axes, (0.27, (w[1] + obs[1]) / 2 + 0.02), "slide", INK)
    _label(axes, (w[0] + 0.45, w[1] - 0.12), "trained", INK)
    axes.text(0.08, 2.36, "$w_1 = 0$", fontsize=10.5, ha="left", va="center")
    sheet.words(2.25, 0.25, "The bowl from above", fontsize=12, weight="bold")

    d = np.linspace(-0.35, 1.85, 100)
    along = [cost(H, (-w[0], step)) for step in d]
    cut = sheet.plot(4.75, 0.6, 2.8, 2.95, xlabel="how far $w_2$ moves, $d$", ylabel="cost")
    cut.plot(d, along, color=BLUE, linewidth=2.2)
    cut.set(xlim=(-0.45, 1.95), ylim=(0, 0.92), xticks=[0, round(move[1], 3)], yticks=[0, prices[1], prices[0]])
    cut.set_yticklabels(["0", f"{prices[1]:.2f}", f"{prices[0]:.2f}"])
    cut.set_xticklabels(["0", f"{move[1]:.1f}"])
    for place, price, color, marker in ((0, prices[0], GREEN, "D"), (move[1], prices[1], PURPLE, "v")):
        cut.plot([-0.45, place, place], [price, price, 0], color=color, linewidth=1, linestyle=":")
        cut.plot(place, price, marker, color=color, markersize=9)
    cut.text(0.12, prices[0] + 0.02, "OBD stays", fontsize=10.5, va="center")
    cut.text(move[1], prices[1] + 0.13, "OBS moves", fontsize=10.5, ha="center", va="center")
    sheet.words(6.15, 0.25, "The cut along $w_1 = 0$", fontsize=12, weight="bold")
    sheet.alt = (
        "Left, lines of equal cost of two weights, tilted ellipses around the trained weights. An arrow goes straight "
        f"to the line on which the first weight is zero, at a cost of {prices[0]:.2f}; a second arrow slides up "
        f"along that line to where a smaller ellipse touches it, at a cost of {prices[1]:.2f}. Right, the cost "
        f"along that line: a parabola, {prices[0]:.2f} where the second weight stays, and lowest, "
        f"{prices[1]:.2f}, where it moves by {move[1]:.1f}."
    )
    return sheet

"""Figures of ``04_obd``: diagonals of the curvature, one weight among others."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prunelab.drawing.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, VERMILLION, axes_of, picture

WAYS = {"empirical": (VERMILLION, "^"), "mc": (ORANGE, "s"), "ggn": (BLUE, "o"), "hutchinson": (PURPLE, "v")}
"""Ways to the diagonal -> colour and marker."""


def four_ways(scores: Mapping[str, np.ndarray], reference: str = "ggn") -> Figure:
    """Draw the scores of the same units by several diagonals against one of them; both axes logarithmic.

    Args:
        scores: name of the diagonal -> a score for every unit ``[n]``; units of a score ≤ 0 are counted, not drawn.
        reference: the one on the horizontal axis.
    """
    others = [name for name in scores if name != reference]
    figure = picture(10.4, 3.9)
    right = np.asarray(scores[reference])
    shown = np.concatenate([np.asarray(values)[np.asarray(values) > 0] for values in scores.values()])
    low, high = 0.7 * np.quantile(shown, 0.002), 1.4 * shown.max()
    for place, name in enumerate(others):
        values = np.asarray(scores[name])
        positive = (values > 0) & (right > 0)
        ylabel = "½ Σ h w² (nats)" if place == 0 else ""
        axes = axes_of(
            figure, xlabel=f"{reference} (nats)", ylabel=ylabel, title=name, place=100 + 10 * len(others) + place + 1
        )
        axes.plot([low, high], [low, high], color=GREY, linewidth=1.5)
        color, marker = WAYS.get(name, (GREEN, "o"))
        axes.loglog(right[positive], values[positive], marker, color=color, markersize=5, alpha=0.5)
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        rank = pd.Series(right).rank().corr(pd.Series(values).rank())
        words = f"rank corr. {rank:.2f}"
        if not positive.all():
            words += f"\n{(~positive).sum()} of {len(values)} are ≤ 0"
        axes.text(0.97, 0.04, words, fontsize=10.5, ha="right", transform=axes.transAxes)
    return figure


def weight_and_curvature(
    weights: np.ndarray, curvatures: np.ndarray, weight: float, curvature: float
) -> tuple[Figure, str]:
    """Draw one weight's parabola, and its place among the weights of a real layer; with a caption in words.

    Args:
        weights: of the layer ``[n]``.
        curvatures: their h ``[n]``.
        weight: the value of the weight to look at.
        curvature: its h, in nats.
    """
    figure = picture(10.4, 4.2)
    cost = curvature * weight**2 / 2
    axes = axes_of(figure, xlabel="value of the weight", ylabel="rise of the loss (nats)", place=121)
    reach = 1.25 * max(abs(weight), 1e-3)
    values = np.linspace(-0.25 * reach, 2 * reach, 101) * (1 if weight >= 0 else -1)
    axes.plot(values, curvature * (values - weight) ** 2 / 2, color=BLUE, linewidth=2)
    axes.plot([weight], [0], "o", color=INK, markersize=9, label="trained")
    axes.plot([0], [cost], "X", color=VERMILLION, markersize=11, label="removed")
    axes.plot([0, 0], [0, cost], color=VERMILLION, linewidth=1.5)
    axes.legend(frameon=False, fontsize=11, loc="upper center")
    cloud = axes_of(figure, xlabel="|weight|", ylabel="h (nats)", place=122)
    used = (np.abs(weights) > 0) & (curvatures > 0)
    cloud.loglog(np.abs(weights[used]), curvatures[used], ".", color=GREY, markersize=4)
    _equal_cost_lines(cloud, weights[used] ** 2 * curvatures[used] / 2, cost)
    cloud.plot([abs(weight)], [curvature], "o", color=INK, markersize=9)
    cheaper = np.mean(weights**2 * curvatures / 2 < cost)
    smaller = np.mean(np.abs(weights) < abs(weight))
    caption = (
        f"½ · {curvature:.3g} · {weight:.3g}² = <b>{cost:.3g} nats</b>. Of this layer's weights {cheaper:.0%} go "
        f"before it by OBD, and {smaller:.0%} by magnitude."
    )
    return figure, caption


def _equal_cost_lines(axes: Axes, costs: np.ndarray, cost: float) -> None:
    """Add lines along which ½ h w² is the same: one through the weight, others at deciles of the layer."""
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    x = np.geomspace(left, right, 2)
    for value in np.quantile(costs, [0.1, 0.5, 0.9]):
        axes.plot(x, 2 * value / x**2, color=BLUE, linewidth=1, alpha=0.6)
    axes.plot(x, 2 * cost / x**2, color=VERMILLION, linewidth=1.8)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


LINES = {
    "random": (GREY, "s", ":"),
    "magnitude": (BLUE, "o", "--"),
    "OBD": (GREEN, "D", "-"),
    "OBD per FLOP": (VERMILLION, "^", "-"),
}
"""Ways to cut -> colour, marker, line."""

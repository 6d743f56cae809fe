"""Figures of ``04_obd``: a real bowl of the loss and its axis-aligned guess, predictions against what was measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from prunelab.drawing.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, VERMILLION, axes_of, picture

WAYS = {"empirical": (VERMILLION, "^"), "mc": (ORANGE, "s"), "ggn": (BLUE, "o"), "hessian": (PURPLE, "v")}
"""Ways to the diagonal -> colour and marker."""


def bowl(
    first: np.ndarray,
    second: np.ndarray,
    rise: np.ndarray,
    guess: np.ndarray,
    trained: tuple[float, float],
    names: tuple[str, str],
) -> Figure:
    """Draw how the loss rises along two weights, and on top of it the lines of a guess at the same heights.

    Args:
        first: values of the weight on the horizontal axis, ``[n]``.
        second: values of the weight on the vertical axis, ``[m]``.
        rise: change of the loss at every pair of values, ``[m, n]``, in nats.
        guess: what was guessed for it, ``[m, n]``.
        trained: the values of both weights after training.
        names: of the two weights.
    """
    figure = picture(8.2, 5.2)
    axes = axes_of(figure, xlabel=f"value of {names[0]}", ylabel=f"value of {names[1]}")
    levels = np.concatenate([[min(float(rise.min()), 0) - 1e-9], np.linspace(0, 1, 9)[1:] ** 2 * float(rise.max())])
    filled = axes.contourf(first, second, rise, levels=levels, cmap="Blues")
    axes.contour(first, second, rise, levels=levels[1:-1], colors=[BLUE], linewidths=1.2)
    axes.contour(first, second, guess, levels=levels[1:-1], colors=[VERMILLION], linewidths=1.6, linestyles="dashed")
    axes.axhline(0, color=INK, linewidth=1)
    axes.axvline(0, color=INK, linewidth=1)
    axes.plot(*trained, "o", color=INK, markersize=9)
    for place in ((0.0, trained[1]), (trained[0], 0.0), (0.0, 0.0)):
        axes.plot(*place, "X", color=INK, markeredgecolor="white", markersize=11)
    axes.grid(False)
    bar = figure.colorbar(filled, ax=axes, format="%.2g")
    bar.set_label("rise of the loss (nats)", fontsize=12)
    bar.ax.tick_params(labelsize=10.5)
    handles = [
        Line2D([], [], color=BLUE, label="measured"),
        Line2D([], [], color=VERMILLION, linestyle="--", label="guess, same heights"),
        Line2D([], [], color=INK, marker="o", linestyle="", markersize=9, label="trained"),
        Line2D([], [], color=INK, marker="X", linestyle="", markersize=10, label="one or both removed"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=11)
    return figure


def against_measured(measured: np.ndarray, predictions: Mapping[str, np.ndarray], *, together: bool = True) -> Figure:
    """Draw several predictions of ΔL against what was measured, one panel each, with the diagonal where both agree.

    Args:
        measured: change of the loss ``[n]``, in nats.
        predictions: title of the panel -> prediction ``[n]``, in nats.
        together: whether all panels share their vertical scale.
    """
    figure = picture(3.4 * len(predictions) + 0.6, 3.9)
    first: Axes | None = None
    for place, (title, values) in enumerate(predictions.items()):
        ylabel = "predicted ΔL (nats)" if place == 0 else ""
        rank = pd.Series(np.asarray(measured)).rank().corr(pd.Series(np.asarray(values)).rank())
        title, spot = f"{title}\nrank correlation {rank:.2f}", 100 + 10 * len(predictions) + place + 1
        axes = axes_of(figure, xlabel="measured ΔL (nats)", ylabel=ylabel, title=title, place=spot)
        if first is not None and together:
            axes.sharey(first)
        first = first or axes
        axes.axline((0, 0), slope=1, color=GREY, linewidth=1.5)
        axes.plot(measured, values, "o", color=BLUE, markersize=5, alpha=0.6)
        axes.locator_params(axis="x", nbins=4)
    return figure


def sum_and_truth(table: pd.DataFrame) -> Figure:
    """Draw what removing more and more weights costs: the sum of the saliencies, the whole quadratic, the truth.

    Args:
        table: columns ``share`` (of the weights removed), ``sum``, ``quadratic`` and ``measured``, in nats.
    """
    figure = picture(7.5, 4.2)
    axes = axes_of(figure, xlabel="weights removed (% of the layer)", ylabel="rise of the loss (nats)")
    looks = {
        "measured": ("measured", INK, "o", "-"),
        "quadratic": ("½ δᵀHδ, all pairs", BLUE, "s", "--"),
        "sum": ("sum of ½ h w², no pairs", VERMILLION, "^", "--"),
    }
    for column, (label, color, marker, line) in looks.items():
        axes.plot(100 * table["share"], table[column], line, marker=marker, color=color, linewidth=2, label=label)
    axes.legend(frameon=False, fontsize=11)
    return figure


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
    """Draw one weight's parabola, and where it stands among the weights of a real layer; with a caption in words.

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


def budgets(table: pd.DataFrame, *, whole: float, chance: float) -> Figure:
    """Draw accuracy against the share of FLOPs kept, one line per way to cut; a band where one was drawn repeatedly.

    Args:
        table: columns ``way`` (see ``LINES``), ``budget``, ``flops_kept`` and ``accuracy`` (shares).
        whole: accuracy of the network before any cut, a point at 100 %.
        chance: accuracy of guessing, a thin line.
    """
    figure = picture()
    axes = axes_of(figure, xlabel="FLOPs kept (%)", ylabel="accuracy on test images (%)")
    for way in [known for known in LINES if known in set(table["way"])]:
        color, marker, line = LINES[way]
        points = table[table["way"] == way].groupby("budget")
        x, mean = 100 * points["flops_kept"].mean(), 100 * points["accuracy"].mean()
        if (repeats := points.size().max()) > 1:
            worst, best = 100 * points["accuracy"].min(), 100 * points["accuracy"].max()
            axes.fill_between(x, worst, best, color=color, alpha=0.18, linewidth=0)
            way = f"{way}: mean and range of {repeats}"
        axes.plot([*x, 100], [*mean, 100 * whole], line, marker=marker, color=color, linewidth=2, label=way)
    axes.axhline(100 * chance, color=GREY, linewidth=1)
    axes.text(100, 100 * chance + 1, "guessing", fontsize=10, color=GREY, ha="right")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, fontsize=11, loc="lower center", ncols=2, bbox_to_anchor=(0.5, 0.12))
    return figure

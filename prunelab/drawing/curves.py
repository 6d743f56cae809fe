"""Curves of what was measured: accuracy or loss against what is left of a network."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prunelab.drawing.style import BLUE, GREEN, GREY, INK, PALE, STAGES, VERMILLION, axes_of, picture, styles


def trajectory(table: pd.DataFrame, metric: str = "accuracy") -> Figure:
    """Draw a metric against the share of FLOPs kept, one point per stage, joined in the order in which they happened.

    Args:
        table: ``Report.table()``: columns ``step``, ``stage``, ``flops_kept`` (share) and the metric.
        metric: name of a column; one called accuracy is a share and shown in percent.
    """
    rows = table[table[metric].notna()]
    values, label = _in_units(rows[metric], metric)
    figure = picture()
    axes = axes_of(figure, xlabel="FLOPs kept (%)", ylabel=label)
    axes.plot(100 * rows["flops_kept"], values, color=PALE, linewidth=2, zorder=1)
    for number, stage in enumerate(dict.fromkeys(rows["stage"])):
        chosen = rows["stage"] == stage
        color, marker = (INK, BLUE, VERMILLION, GREEN)[number % 4], STAGES.get(stage, "D")
        axes.plot(100 * rows["flops_kept"][chosen], values[chosen], marker, color=color, markersize=9, label=stage)
    axes.margins(0.08)
    axes.legend(frameon=False, fontsize=11)
    return figure


def accuracy_against_flops(
    table: pd.DataFrame,
    *,
    whole: float | None = None,
    chance: float | None = None,
    mark: tuple[float, float] | None = None,
) -> Figure:
    """Draw one line per criterion: accuracy against the share of FLOPs kept.

    Args:
        table: columns ``criterion``, ``flops_kept`` (share) and ``accuracy`` (share). With a ``budget`` column too, a
            line is the mean of the rows of each budget, and a band reaches from the worst to the best of them.
        whole: accuracy of the network before any cut, a point at 100 %.
        chance: accuracy of guessing, a thin line.
        mark: ``(flops_kept, accuracy)`` of a point to circle.
    """
    figure = picture()
    axes = axes_of(figure, xlabel="FLOPs kept (%)", ylabel="accuracy on test images (%)")
    accuracy_lines(axes, table, whole, chance, mark)
    return figure


def accuracy_lines(
    axes: Axes,
    table: pd.DataFrame,
    whole: float | None,
    chance: float | None,
    mark: tuple[float, float] | None,
) -> None:
    """Draw the lines of ``accuracy_against_flops`` into axes that are there already."""
    for name, color, marker, line in styles(table["criterion"]):
        rows = table[table["criterion"] == name]
        points = rows.groupby(rows["budget"] if "budget" in rows else rows["flops_kept"])
        x, mean = 100 * points["flops_kept"].mean(), 100 * points["accuracy"].mean()
        label, repeats = name, points.size().max()
        if repeats > 1:
            worst, best = 100 * points["accuracy"].min(), 100 * points["accuracy"].max()
            axes.fill_between(x, worst, best, color=color, alpha=0.18, linewidth=0)
            label = f"{name}: mean and range of {repeats}"
        if whole is not None:
            x, mean = pd.concat([x, pd.Series([100.0])]), pd.concat([mean, pd.Series([100 * whole])])
        axes.plot(x, mean, line, marker=marker, color=color, linewidth=2, markersize=6, label=label)
    if chance is not None:
        axes.axhline(100 * chance, color=GREY, linewidth=1)
        beside = axes.get_yaxis_transform()
        axes.text(1, 100 * chance - 1, "guessing", transform=beside, fontsize=10, color=GREY, ha="right", va="top")
    if mark is not None:
        x, y = (100 * share for share in mark)
        axes.plot(x, y, "o", markersize=17, markerfacecolor="none", color=INK, markeredgewidth=1.8)
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, fontsize=11, loc="upper left")


def _in_units(values: pd.Series, metric: str) -> tuple[pd.Series, str]:
    if "accuracy" in metric:
        return 100 * values, f"{metric} (%)"
    return values, f"{metric} (nats)" if metric == "loss" else metric

"""What 03_taylor shows: tangents of the loss, predicted and measured changes, how much of a gradient is noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from prunelab.drawing.style import BLUE, GREEN, GREY, PURPLE, VERMILLION, axes_of, picture

LINES = ((BLUE, "o", "-"), (VERMILLION, "^", "--"), (GREEN, "s", "-."), (PURPLE, "D", ":"))


def tangents(curves: Mapping[str, tuple[Sequence[float], Sequence[float], float]]) -> Figure:
    """Draw how the loss changes while a unit fades, and the tangent at the start; one panel per unit.

    Args:
        curves: name of the unit -> ``(t, change of the loss at t in nats, slope at 0)``, t from 0 (whole) to 1 (gone).
    """
    figure = picture(3.6 * len(curves), 3.6)
    grid = figure.add_gridspec(1, len(curves))
    for place, (name, (t, change, slope)) in enumerate(curves.items()):
        label = "change of the loss (nats)" if place == 0 else ""
        axes = axes_of(figure, xlabel="share t that is taken away", ylabel=label, place=grid[place])
        axes.plot(t, change, "-", color=BLUE, linewidth=2.5, label="measured")
        axes.plot([0, 1], [0, slope], "--", color=VERMILLION, linewidth=2, label="first order")
        axes.plot(t[-1], change[-1], "o", color=BLUE, markersize=8)
        axes.plot(1, slope, "^", color=VERMILLION, markersize=8)
        axes.set_title(name, fontsize=11, loc="left")
        axes.axhline(0, color=GREY, linewidth=0.8)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper right", ncols=2, fontsize=11, frameon=False)
    return figure


def predictions(table: pd.DataFrame, forms: Sequence[str], *, highlight: str | None = None) -> Figure:
    """Draw predicted against measured changes of the loss, a panel for every form of the prediction.

    Args:
        table: columns ``group``, ``measured`` (nats) and one for every form (nats), one row per unit.
        forms: names of columns.
        highlight: a group whose units to point out.
    """
    figure = picture(3.9 * len(forms), 4.1)
    grid = figure.add_gridspec(1, len(forms))
    for place, form in enumerate(forms):
        ylabel = "measured change of the loss (nats)" if place == 0 else ""
        axes = axes_of(figure, xlabel=f"{form} (nats)", ylabel=ylabel, place=grid[place])
        _cloud(axes, table, form, highlight)
        rho = table[form].rank().corr(table["measured"].rank())  # Spearman's, without SciPy
        axes.set_title(f"Spearman {rho:.2f}", fontsize=12, loc="left")
    return figure


def _cloud(axes: Axes, table: pd.DataFrame, form: str, highlight: str | None) -> None:
    low = min(table[form].min(), table["measured"].min(), 0)
    high = max(table[form].max(), table["measured"].max())
    chosen = table["group"] == highlight
    line = np.concatenate([-np.geomspace(1e-6, -low, 50)[::-1] if low < 0 else [], [0], np.geomspace(1e-6, high, 50)])
    axes.plot(line, line, color=GREY, linewidth=1.3, zorder=1)
    axes.plot(table[form][~chosen], table["measured"][~chosen], "o", color=BLUE, markersize=5.5, alpha=0.65)
    axes.plot(table[form][chosen], table["measured"][chosen], "^", color=VERMILLION, markersize=8.5)
    # Changes lie over three decades and on both sides of zero.
    axes.set_yscale("symlog", linthresh=3e-3, linscale=0.6)
    ticks = [-0.1, -0.01, 0, 0.01, 0.1, 1]
    if table[form].min() > 0:
        axes.set_xscale("log")
        axes.set_xlim(table[form].min() / 1.5, table[form].max() * 1.5)
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
    else:
        axes.set_xscale("symlog", linthresh=3e-3, linscale=0.6)
        axes.set_xticks([tick for tick in ticks if low * 1.5 <= tick <= high * 1.5])
    axes.set_yticks([tick for tick in ticks if low * 1.5 <= tick <= high * 1.5])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()


def gradient_noise(table: pd.DataFrame) -> Figure:
    """Draw the length of a mean gradient against the number of images that it is a mean of.

    Args:
        table: columns ``network``, ``images`` and ``norm``.
    """
    figure = picture(7.5, 4.2)
    axes = axes_of(figure, xlabel="images in the mean", ylabel="length of the mean gradient, ‖g‖")
    for (name, rows), (color, marker, line) in zip(table.groupby("network", sort=False), LINES, strict=False):
        axes.plot(rows["images"], rows["norm"], line, marker=marker, color=color, linewidth=2, label=name)
        start = rows.iloc[0]
        noise = start["norm"] * (start["images"] / rows["images"]) ** 0.5
        axes.plot(rows["images"], noise, color=GREY, linewidth=1.2, zorder=1)
    axes.plot([], [], color=GREY, linewidth=1.2, label="noise alone: 1/√images")
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted(set(table["images"]))
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=11)
    return figure


def cancellation(products: Mapping[str, np.ndarray]) -> Figure:
    """Draw the running sum of w·g over the weights of a unit, from the largest product to the smallest, and its size.

    Args:
        products: name of a slice -> its products w·g, in any order.
    """
    figure = picture(3.6 * len(products), 3.6)
    grid = figure.add_gridspec(1, len(products))
    for place, (name, row) in enumerate(products.items()):
        ordered = np.asarray(row)[np.argsort(-np.abs(row))]
        ylabel = "sum so far (nats)" if place == 0 else ""
        axes = axes_of(figure, xlabel="weights, the largest product first", ylabel=ylabel, place=grid[place])
        number = np.arange(1, len(ordered) + 1)
        axes.plot(number, np.abs(ordered).cumsum(), "--", color=VERMILLION, linewidth=2, label="Σ |w g|")
        axes.plot(number, ordered.cumsum(), "-", color=BLUE, linewidth=2, label="Σ w g")
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_title(name, fontsize=11, loc="left")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=11, frameon=False
    )
    return figure


__all__ = ["cancellation", "gradient_noise", "predictions", "tangents"]

"""Figures of ``11_compensation``: outputs before and after a refit, accuracy with and without, and where it ends."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from prunelab.drawing.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILLION, axes_of, picture

WAYS = {
    "as cut": (GREY, "s", ":"),
    "new statistics": (ORANGE, "v", "-."),
    "at once": (BLUE, "o", "--"),
    "in order": (VERMILLION, "^", "-"),
}
"""Way to make up for a cut -> colour, marker and line."""
SHADES = [(SKY, "s", ":"), (GREEN, "D", "-."), (BLUE, "o", "--"), (VERMILLION, "^", "-"), (PURPLE, "v", "-")]


def outputs_against_whole(whole: Tensor, others: Mapping[str, Tensor]) -> Figure:
    """Draw one output of a layer, image by image, after the cut against before it; a panel for each way.

    Args:
        whole: ``[N]``, the output of the whole layer.
        others: way -> ``[N]``, what the cut layer gives.
    """
    figure = picture(3.6 * len(others) + 0.4, 3.9)
    grid = figure.add_gridspec(1, len(others))
    low, high = float(whole.min()), float(whole.max())
    for place, (way, values) in enumerate(others.items()):
        ylabel = "output of the cut layer" if place == 0 else ""
        where = grid[0, place]
        axes = axes_of(figure, xlabel="output of the whole layer", ylabel=ylabel, title=way, place=where)
        axes.plot([low, high], [low, high], color=GREY, linewidth=1.5, zorder=1)
        axes.plot(whole.numpy(), values.numpy(), "o", color=BLUE, markersize=4, alpha=0.45)
        axes.set_ylim(
            *_padded(min(float(v.min()) for v in others.values()), max(float(v.max()) for v in others.values()))
        )
    return figure


def _padded(low: float, high: float) -> tuple[float, float]:
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def with_and_without(table: pd.DataFrame, whole: float) -> Figure:
    """Draw accuracy against FLOPs, a panel for each criterion and a line for each way to make up for the cut.

    Args:
        table: columns ``criterion``, ``way`` (one of ``WAYS``), ``flops_kept`` and ``accuracy`` (shares).
        whole: accuracy of the network before any cut.
    """
    names = list(dict.fromkeys(table["criterion"]))
    figure = picture(3.3 * len(names) + 0.5, 4.1)
    grid = figure.add_gridspec(1, len(names))
    handles: dict[str, Artist] = {}
    for place, name in enumerate(names):
        ylabel = "accuracy on test images (%)" if place == 0 else ""
        axes = axes_of(figure, xlabel="FLOPs kept (%)", ylabel=ylabel, title=name, place=grid[0, place])
        for way, (color, marker, line) in WAYS.items():
            rows = table[(table["criterion"] == name) & (table["way"] == way)].sort_values("flops_kept")
            x, y = [*(100 * rows["flops_kept"]), 100], [*(100 * rows["accuracy"]), 100 * whole]
            handles[way] = axes.plot(x, y, line, marker=marker, color=color, linewidth=2, markersize=6)[0]
        axes.set_ylim(0, 100)
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False, fontsize=11
    )
    return figure


def left_over(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw, for every layer that lost inputs, which share of what it lost the refit cannot restore.

    Args:
        shares: on which images -> weight -> mean squared error after the refit, as a share of that before.
    """
    names = list(next(iter(shares.values())))
    figure = picture(8, 1.5 + 0.27 * len(names))
    axes = axes_of(figure, xlabel="squared error after the refit (% of that without)", ylabel="")
    rows = np.arange(len(names))
    for (images, found), (color, marker) in zip(shares.items(), [(BLUE, "o"), (VERMILLION, "^")], strict=False):
        values = [100 * found[name] for name in names]
        axes.plot(values, rows, marker, color=color, markersize=7, label=images)
    axes.axvline(100, color=GREY, linewidth=1)
    axes.set_yticks(rows, [name.removesuffix(".weight") for name in names])
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=11)
    return figure


def damping_and_images(
    table: pd.DataFrame, *, cut: float, whole: float, mark: tuple[float, int] | None = None
) -> Figure:
    """Draw accuracy against damping, one line per number of images that the refit has seen.

    Args:
        table: columns ``damping``, ``images`` and ``accuracy`` (share).
        cut: accuracy without a refit, a thin line.
        whole: accuracy before the cut, a thin line.
        mark: damping and images of a point to circle.
    """
    figure = picture(8.2, 4.3)
    axes = axes_of(figure, xlabel="damping (share of an input's second moment)", ylabel="accuracy on test images (%)")
    for number, (color, marker, line) in zip(sorted(set(table["images"])), SHADES, strict=False):
        rows = table[table["images"] == number].sort_values("damping")
        label = f"{number:,} images"
        axes.plot(
            rows["damping"],
            100 * rows["accuracy"],
            line,
            marker=marker,
            color=color,
            linewidth=2,
            markersize=6,
            label=label,
        )
    for value, label in ((whole, "whole network"), (cut, "cut, no refit")):
        axes.axhline(100 * value, color=GREY, linewidth=1)
        beside = axes.get_yaxis_transform()
        axes.text(1.01, 100 * value, label, transform=beside, ha="left", va="center", fontsize=10.5, color=GREY)
    if mark is not None:
        here = table[(table["damping"] == mark[0]) & (table["images"] == mark[1])]
        axes.plot(
            *(mark[0], 100 * float(here["accuracy"].iloc[0])), "o", markersize=17, markerfacecolor="none", color=INK
        )
    axes.set_xscale("log")
    axes.set_ylim(0, 105)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=11)
    return figure


__all__ = ["damping_and_images", "left_over", "outputs_against_whole", "with_and_without"]

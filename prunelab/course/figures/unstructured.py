"""Figures of ``14_unstructured``: which weights stay, and how long a network with zeros in it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from prunelab.drawing.style import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, VERMILLION, axes_of, picture

MARKS = [(BLUE, "o", "-"), (VERMILLION, "^", "--"), (GREEN, "D", "-."), (PURPLE, "v", ":"), (ORANGE, "s", "-")]
"""Colour, marker and line for what is not a criterion, in order of appearance."""
SIGNED = LinearSegmentedColormap.from_list("signed", [VERMILLION, "white", BLUE])


def layer_densities(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw what every layer keeps: one row per weight tensor from the input down, one mark per way to choose.

    Args:
        shares: way -> parameter name -> share of its weights that stay; the first way names the rows.
    """
    names = list(next(iter(shares.values())))
    figure = picture(height=1.5 + 0.25 * len(names))
    axes = axes_of(figure, xlabel="weights kept (%)", ylabel="")
    rows = np.arange(len(names))
    for (way, found), (color, marker, _) in zip(shares.items(), MARKS, strict=False):
        axes.plot([100 * found[name] for name in names], rows, marker, color=color, markersize=7, label=way)
    axes.set_yticks(rows, [name.removesuffix(".weight") for name in names])
    axes.set_xlim(0, 102)
    axes.set_ylim(len(names) - 0.4, -0.6)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(shares), frameon=False)
    return figure


def mask_patterns(masks: Mapping[str, Tensor]) -> Figure:
    """Draw masks of the same matrix side by side: dark stays, pale goes.

    Args:
        masks: title -> bool ``[rows, columns]``.
    """
    figure = picture(3.6 * len(masks), 4.2)
    shades = LinearSegmentedColormap.from_list("kept", [PALE, BLUE])
    for number, (title, mask) in enumerate(masks.items(), 1):
        axes = figure.add_subplot(1, len(masks), number)
        axes.pcolormesh(mask.numpy(), cmap=shades, vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_title(f"{title}: {mask.double().mean():.0%} stay", fontsize=12, loc="left")
        axes.set_xlabel("input channel", fontsize=12)
        axes.set_xticks([])
        axes.set_yticks([])
        if number == 1:
            axes.set_ylabel("output channel", fontsize=12)
    return figure


def product_times(table: pd.DataFrame) -> Figure:
    """Draw how long a matrix product takes against the share of non-zero weights, both logarithmic.

    Args:
        table: columns ``density`` (share), ``kind`` and ``milliseconds``; a kind with one row is a horizontal line.
    """
    figure = picture(height=3.8)
    axes = axes_of(figure, xlabel="weights that are not zero (%, logarithmic)", ylabel="time (ms, logarithmic)")
    for (kind, rows), (color, marker, line) in zip(table.groupby("kind", sort=False), MARKS, strict=False):
        if len(rows) == 1:
            axes.axhline(rows["milliseconds"].iloc[0], color=INK, linewidth=1.8, linestyle="--", label=kind)
            continue
        x = 100 * rows["density"]
        axes.plot(x, rows["milliseconds"], line, marker=marker, color=color, linewidth=2, markersize=7, label=kind)
    _plain_logarithmic(axes)
    _logarithmic(axes, table["density"])
    axes.legend(frameon=False, fontsize=11, loc="upper left")
    return figure


def sparsity_and_latency(table: pd.DataFrame, levels: Mapping[str, float], whole: float) -> Figure:
    """Draw what zeros save and what they cost: latency on the left, accuracy on the right, against sparsity.

    Args:
        table: columns ``network`` (what was done to it), ``sparsity`` (share of the parameters that are gone or zero),
            ``milliseconds`` per image and ``accuracy`` (share, may be missing).
        levels: name -> milliseconds per image of networks without any zeros, thin lines.
        whole: accuracy of the dense network, a thin line.
    """
    figure = picture(10.5, 4.6)
    left = axes_of(figure, xlabel="sparsity (%)", ylabel="time per image (ms, logarithmic)", place=121)
    right = axes_of(figure, xlabel="sparsity (%)", ylabel="accuracy on test images (%)", place=122)
    for (name, rows), (color, marker, line) in zip(table.groupby("network", sort=False), MARKS, strict=False):
        rows = rows.sort_values("sparsity")
        style: dict[str, Any] = {"marker": marker, "color": color, "linewidth": 2, "markersize": 7, "linestyle": line}
        left.plot(100 * rows["sparsity"], rows["milliseconds"], label=name, **style)
        known = rows[rows["accuracy"].notna()]
        if len(known):
            right.plot(100 * known["sparsity"], 100 * known["accuracy"], **style)
    for (name, height), line in zip(levels.items(), ("--", ":"), strict=False):
        left.axhline(height, color=INK, linewidth=1.3, linestyle=line, label=name, zorder=1)
    _plain_logarithmic(left)
    right.axhline(100 * whole, color=INK, linewidth=1.3, linestyle="--", zorder=1)
    right.set_ylim(0, 105)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False, fontsize=10.5)
    return figure


def threshold_view(values: Tensor, weight: Tensor, threshold: float, curve: pd.DataFrame) -> Figure:
    """Draw a threshold: the histogram of all weights, the filters of one layer, and accuracy at this threshold.

    Args:
        values: ``[N]``, weights of the whole network.
        weight: ``[out, in, h, w]``, filters to show.
        threshold: weights closer to zero than that go.
        curve: columns ``threshold`` and ``accuracy`` (share); the row of ``threshold`` is circled.
    """
    figure = picture(11.5, 4.2)
    axes = axes_of(figure, xlabel="weight", ylabel="number of weights (logarithmic)", place=131)
    wide = float(values.abs().quantile(0.999))
    edges = np.linspace(-wide, wide, 81)
    every, gone = values.numpy(), values[values.abs() <= threshold].numpy()
    # outlines, the lower one in front: as stacked bars each of them would be 80 patches, and slow in a widget
    for part, color, label in ((every, BLUE, "stay"), (gone, GREY, "go")):
        axes.stairs(np.histogram(part, edges)[0], edges, fill=True, baseline=0.1, color=color, label=label)
    axes.set_yscale("log")
    axes.set_ylim(1, axes.get_ylim()[1] * 3)
    axes.legend(frameon=False, fontsize=11, loc="upper right", ncols=2)
    axes = figure.add_subplot(132)
    _filters(axes, weight, threshold)
    axes = axes_of(figure, xlabel="threshold", ylabel="accuracy (%)", place=133)
    axes.plot(curve["threshold"], 100 * curve["accuracy"], "-o", color=BLUE, linewidth=2, markersize=6)
    here = curve[np.isclose(curve["threshold"], threshold)]
    axes.plot(here["threshold"], 100 * here["accuracy"], "o", markersize=16, mfc="none", color=INK, mew=1.8)
    axes.set_ylim(0, 105)
    axes.locator_params(axis="x", nbins=5)
    return figure


def _filters(axes: Axes, weight: Tensor, threshold: float) -> None:
    """Draw every kernel of a convolution, filters from top to bottom; what is below the threshold is grey."""
    out, inward, height, width = weight.shape
    frame = np.pad(weight.numpy(), ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    mosaic = frame.transpose(0, 2, 1, 3).reshape(out * (height + 1), inward * (width + 1))[:-1, :-1]
    gone = np.abs(mosaic) <= threshold
    limit = float(weight.abs().quantile(0.99))
    axes.imshow(np.where(gone, np.nan, mosaic), cmap=SIGNED, vmin=-limit, vmax=limit, interpolation="nearest")
    shade = np.zeros((*mosaic.shape, 4))
    shade[gone] = (0.72, 0.72, 0.72, 1)
    axes.imshow(shade, interpolation="nearest")
    axes.set_xlabel("input channel", fontsize=12)
    axes.set_ylabel("filter", fontsize=12)
    axes.set_xticks([])
    axes.set_yticks([])


def _logarithmic(axes: Axes, densities: Sequence[float] | pd.Series) -> None:
    """Count densities in percent on a logarithmic axis, with the values that were measured as ticks."""
    ticks = sorted({100 * float(density) for density in densities if density == density})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _plain_logarithmic(axes: Axes) -> None:
    """Count on a logarithmic axis upwards, in plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())

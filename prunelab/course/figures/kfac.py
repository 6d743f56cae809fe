"""Figures of ``07_kfac``: blocks of the Fisher beside their Kronecker products, and what comes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from prunelab.drawing.style import BLUE, GREEN, GREY, INK, PURPLE, VERMILLION, axes_of, picture

SIGNED = LinearSegmentedColormap.from_list("signed", [VERMILLION, "white", BLUE], N=41)
"""Few colours, so that maps make small files."""
MARKS = [(BLUE, "o"), (VERMILLION, "^"), (GREEN, "D"), (PURPLE, "v")]
CLIPPED = 0.995
"""Share of a block's entries that the colours resolve; the rest is beyond the ends of the scale."""


def label_draws(errors: Sequence[float], empirical: float) -> Figure:
    """Draw the error of the sampled Fisher against the number of draws, with that of the empirical one as a line.

    Args:
        errors: relative error of the mean over 1, 2, … draws.
        empirical: relative error of the empirical Fisher.
    """
    figure = picture(height=3.8)
    axes = axes_of(figure, xlabel="draws of labels", ylabel="‖F − exact‖ / ‖exact‖ (%)")
    number = np.arange(1, len(errors) + 1)
    axes.loglog(number, 100 * np.asarray(errors), "o", color=BLUE, markersize=5, label="sampled labels")
    axes.loglog(number, 100 * errors[0] / np.sqrt(number), "--", color=GREY, label="first draw / √draws")
    axes.axhline(100 * empirical, color=VERMILLION, linewidth=2, label="empirical: the labels of the data")
    for axis, ticks in ((axes.xaxis, (1, 2, 4, 8, 16, 32, 64)), (axes.yaxis, (2, 5, 10, 20, 50, 100, 200))):
        low, high = axis.get_view_interval()
        axis.set_ticks([tick for tick in ticks if low <= tick <= high])
        axis.set_ticks([], minor=True)
        axis.set_major_formatter("{x:.0f}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=11)
    return figure


def block_beside(block: Tensor, product: Tensor, names: Sequence[str], *, title: str = "") -> Figure:
    """Draw a block of the Fisher, its product, the product with the block's trace, and what is missing then.

    Args:
        block: ``[n, n]``.
        product: ``[n, n]``.
        names: of the output channels; lines are drawn between their blocks.
        title: of the figure.
    """
    figure = picture(13, 4.1)
    limit = float(np.quantile(block.abs().numpy(), CLIPPED)) or 1.0
    times = float(block.trace() / product.trace().clamp_min(1e-30))
    scaled = times * product
    panels = {"true block": block, "S ⊗ A": product, f"{times:.2g} · S ⊗ A": scaled, "true − scaled": block - scaled}
    each = len(block) / len(names)
    image = None
    for place, (name, values) in enumerate(panels.items()):
        axes = axes_of(figure, xlabel="", ylabel="", title=name, place=141 + place)
        image = axes.imshow(values.numpy(), cmap=SIGNED, vmin=-limit, vmax=limit, interpolation="nearest")
        edges = np.arange(1, len(names)) * each - 0.5
        axes.hlines(edges, -0.5, len(block) - 0.5, color=INK, linewidth=0.8)
        axes.vlines(edges, -0.5, len(block) - 0.5, color=INK, linewidth=0.8)
        middles = (np.arange(len(names)) + 0.5) * each - 0.5
        axes.set_xticks(middles, names)
        axes.set_yticks(middles, names if not place else [""] * len(names), rotation=90, va="center")
        axes.tick_params(length=0)
        axes.grid(False)
    assert image is not None
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.8, extend="both")
    bar.set_label("curvature (nats per squared weight)", fontsize=10.5)
    figure.suptitle(title, fontsize=12)
    return figure


def coverage_maps(counts: Mapping[str, Tensor]) -> Figure:
    """Draw how many patches see each pixel, as numbers on a map, one panel per convolution.

    Args:
        counts: title -> counts ``[height, width]``.
    """
    figure = picture(4.2 * len(counts), 4.2)
    most = max(float(count.max()) for count in counts.values())
    for place, (name, count) in enumerate(counts.items(), 1):
        axes = axes_of(figure, xlabel="pixel", ylabel="pixel", title=name, place=100 + 10 * len(counts) + place)
        axes.imshow(count.numpy(), cmap="Blues", vmin=0, vmax=1.6 * most)
        for (row, column), value in np.ndenumerate(count.numpy()):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center_baseline", fontsize=11, color=INK)
        axes.grid(False)
    return figure


def ladder(table: pd.DataFrame) -> Figure:
    """Draw, for each network, how prices order channels and how large they are, one assumption after the other.

    Args:
        table: columns ``network``, ``draw``, ``layer``, ``assumed``, ``order`` (rank correlation with prices on other
            images) and ``size`` (relative to the block on the same images).
    """
    names, steps = table["network"].unique(), list(table["assumed"].unique())
    figure = picture(11.5, 7.6)
    grid = figure.add_gridspec(2, len(names))
    for column, name in enumerate(names):
        part = table[table["network"] == name]
        color, marker = MARKS[column % len(MARKS)]
        for row, (value, label) in enumerate({"order": "rank correlation", "size": "size, of the block's"}.items()):
            place = grid[row, column]
            axes = axes_of(figure, xlabel="", ylabel="" if column else label, title="" if row else name, place=place)
            layers = part.groupby(["assumed", "layer"])[value].mean()
            draws = part.groupby(["assumed", "draw"])[value].agg("median" if row else "mean").groupby("assumed")
            for number, step in enumerate(steps):
                small = layers[step].to_numpy()
                axes.plot(np.full(len(small), number), small, marker, color=color, markersize=4.5, alpha=0.35)
            mean, deviation = draws.mean()[steps], None if row else draws.std()[steps].fillna(0)
            axes.errorbar(range(len(steps)), mean, deviation, fmt=marker, color=color, markersize=10, capsize=4)
            if row:
                axes.set_yscale("log")
            else:
                axes.set_ylim(-0.75, 1.05)
            axes.axhline(row, color=GREY, linewidth=1)
            axes.set_xticks(range(len(steps)), steps if row else [""] * len(steps), rotation=35, ha="right")
    return figure


def measured_block(block: Tensor, product: Tensor, layer: str, images: int) -> tuple[Figure, str]:
    """Draw the block of a layer over some images beside its product: what the widget shows, with a caption in words.

    Args:
        block: ``[n, n]``, of three outputs.
        product: S ⊗ A of the same rows and columns.
        layer: its name.
        images: how many the two were measured on.
    """
    error = float((block - product).norm() / block.norm().clamp_min(1e-30))
    cosine = float((block * product).sum() / (block.norm() * product.norm()).clamp_min(1e-30))
    size = float(product.trace() / block.trace().clamp_min(1e-30))
    words = (
        f"<b>{layer}</b>, {images} images: relative error {error:.2f}, cosine {cosine:.2f}; the trace of S ⊗ A is "
        f"{size:.2f} times the true one. Rank of the true block: {_rank(block)} of {len(block)}; of the product: "
        f"{_rank(product)}."
    )
    figure = block_beside(block, product, ["1st output", "2nd", "3rd"], title=f"{layer}, {images} images")
    return figure, words


def _rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix.double(), hermitian=True, rtol=1e-6))


__all__ = ["block_beside", "coverage_maps", "label_draws", "ladder", "measured_block"]

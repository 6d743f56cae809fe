"""Figures of ``13_transformers``: where heads are in a fused projection, what each is worth, what goes first."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from prunelab.drawing.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILLION, axes_of, picture, styles

SIGNED = LinearSegmentedColormap.from_list("signed", [VERMILLION, "white", BLUE])
HEADS = [BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, GREY, INK]
KINDS = [(BLUE, "o", "-"), (ORANGE, "s", "-."), (GREEN, "D", "--"), (INK, "*", "-")]


def fused_rows(
    head_of_row: Tensor, cut: Collection[int], parts: Sequence[str] = ("queries", "keys", "values")
) -> Figure:
    """Draw the rows of a fused projection, coloured by the head that each belongs to.

    Args:
        head_of_row: ``[rows]``, the head of every row.
        cut: rows to mark as those of one head, or of one place in every head.
        parts: what the equal parts of the rows are called.
    """
    rows = len(head_of_row)
    figure = picture(8.6, 2.3)
    axes = axes_of(figure, xlabel="row of the fused weight", ylabel="")
    axes.imshow(
        head_of_row[None].numpy(), cmap=ListedColormap(HEADS[: int(head_of_row.max()) + 1]), aspect="auto", alpha=0.75
    )
    chosen = sorted(cut)
    axes.plot(chosen, [0.62] * len(chosen), "|", color=INK, markersize=9, markeredgewidth=1.6, clip_on=False)
    for place, name in enumerate(parts):
        axes.text((place + 0.5) * rows / len(parts), -0.62, name, ha="center", va="bottom", fontsize=11, color=INK)
        if place:
            axes.axvline(place * rows / len(parts) - 0.5, color=INK, linewidth=2)
    axes.set_yticks([])
    axes.set_ylim(0.78, -0.5)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def head_map(values: Tensor, removed: Collection[tuple[int, int]] = ()) -> Figure:
    """Draw what silencing each head alone costs, a row for each block and a column for each head.

    Args:
        values: ``[blocks, heads]``, measured loss changes in nats.
        removed: pairs of block and head to cross out.
    """
    figure = picture(2.6 + 1.15 * values.shape[1], 1.5 + 0.52 * values.shape[0])
    axes = axes_of(figure, xlabel="head", ylabel="block")
    top = float(values.abs().max())
    image = axes.imshow(values.numpy(), cmap=SIGNED, vmin=-top, vmax=top, aspect="auto")
    for (block, head), value in np.ndenumerate(values.numpy()):
        color = "white" if abs(value) > 0.6 * top else INK
        axes.text(head, block, f"{value:+.3f}", ha="center", va="center", fontsize=11, color=color)
    for block, head in removed:
        for x in ((-0.5, 0.5), (0.5, -0.5)):
            axes.plot([head + x[0], head + x[1]], [block - 0.5, block + 0.5], color=INK, linewidth=1.6)
    _squares(axes, values)
    figure.colorbar(image, ax=axes, shrink=0.9).set_label("ΔL of silencing it alone (nats)", fontsize=11)
    return figure


def _squares(axes: Axes, values: Tensor) -> None:
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(values.shape[0]))
    axes.set_xlim(-0.5, values.shape[1] - 0.5)
    axes.set_ylim(values.shape[0] - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def heads_removed(table: pd.DataFrame, whole: float) -> Figure:
    """Draw accuracy against the number of heads that are gone, one line for each order.

    Args:
        table: columns ``criterion``, ``heads`` (removed) and ``accuracy`` (share); rows that repeat are averaged, and a
            band reaches from the worst to the best.
        whole: accuracy with all heads.
    """
    figure = picture(8.4, 4.3)
    axes = axes_of(figure, xlabel="heads removed", ylabel="accuracy on test images (%)")
    for name, color, marker, line in styles(table["criterion"]):
        points = table[table["criterion"] == name].groupby("heads")["accuracy"]
        x, y = [0, *points.mean().index], [100 * whole, *(100 * points.mean())]
        repeats = int(points.size().max())
        label = f"{name}: mean and\nrange of {repeats}" if repeats > 1 else name
        if repeats > 1:
            axes.fill_between(x[1:], 100 * points.min(), 100 * points.max(), color=color, alpha=0.18, linewidth=0)
        axes.plot(x, y, line, marker=marker, color=color, linewidth=2, markersize=7, label=label)
    axes.set_xticks([0, *sorted(set(table["heads"]))])
    axes.set_ylim(0, 100)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=11)
    return figure


def kinds_at_equal_flops(table: pd.DataFrame, whole: float) -> Figure:
    """Draw accuracy against FLOPs, one line for each kind of unit that may go; a panel as cut, another refitted.

    Args:
        table: columns ``kind``, ``way``, ``flops_kept`` and ``accuracy`` (shares).
        whole: accuracy of the network before any cut.
    """
    ways = list(dict.fromkeys(table["way"]))
    figure = picture(4.2 * len(ways) + 0.6, 4.2)
    grid = figure.add_gridspec(1, len(ways))
    low = 100 * float(table["accuracy"].min())
    handles: dict[str, Artist] = {}
    for place, way in enumerate(ways):
        ylabel = "accuracy on test images (%)" if place == 0 else ""
        axes = axes_of(figure, xlabel="FLOPs kept (%)", ylabel=ylabel, title=way, place=grid[0, place])
        for kind, (color, marker, line) in zip(dict.fromkeys(table["kind"]), KINDS, strict=False):
            rows = table[(table["way"] == way) & (table["kind"] == kind)].sort_values("flops_kept")
            x, y = [*(100 * rows["flops_kept"]), 100], [*(100 * rows["accuracy"]), 100 * whole]
            handles[kind] = axes.plot(x, y, line, marker=marker, color=color, linewidth=2, markersize=7)[0]
        axes.set_ylim(max(0, low - 5), min(100, 100 * whole + 5))
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False, fontsize=11
    )
    return figure


__all__ = ["fused_rows", "head_map", "heads_removed", "kinds_at_equal_flops"]

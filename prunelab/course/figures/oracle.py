"""Figures of ``10_oracle``: the measured cost of every unit, what criteria make of it, and of many units together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from prunelab.drawing.style import BLUE, GREEN, GREY, INK, PALE, VERMILLION, axes_of, picture, styles

SIGNED = LinearSegmentedColormap.from_list("signed", [VERMILLION, "white", BLUE])
NETWORKS = [(BLUE, "o"), (VERMILLION, "^"), (GREEN, "D")]
LINEAR = 1e-3
"""Loss changes below this, in nats, are drawn on a linear scale, larger ones on a logarithmic one."""


def sorted_changes(truth: Mapping[str, Tensor]) -> Figure:
    """Draw the measured loss changes of each network's units from the cheapest to the costliest.

    Args:
        truth: name of a network -> loss changes of some of its units, in nats.
    """
    figure = picture()
    axes = axes_of(figure, xlabel="units, from the cheapest to the costliest (%)", ylabel="measured ΔL (nats)")
    for (name, values), (color, marker) in zip(truth.items(), NETWORKS, strict=False):
        share = 100 * (np.arange(len(values)) + 0.5) / len(values)
        axes.plot(share, np.sort(values.numpy()), marker, color=color, markersize=5, label=name)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_yscale("symlog", linthresh=LINEAR)
    axes.margins(y=0.08)
    axes.legend(frameon=False, fontsize=11, loc="upper left")
    return figure


def loss_along(scales: Sequence[float], paths: Mapping[str, tuple[Sequence[float], float, float]]) -> Figure:
    """Draw how the loss changes as a unit fades out, along several paths, with the parabola of each at one.

    Args:
        scales: from 0, the unit is gone, to 1, nothing has changed.
        paths: label -> measured loss change at every scale (nats), and its first and second derivative at 1.
    """
    figure = picture()
    axes = axes_of(figure, xlabel="what the unit is multiplied by", ylabel="change of the loss (nats)")
    s = np.asarray(scales)
    for (label, (measured, slope, curvature)), (color, marker) in zip(paths.items(), NETWORKS, strict=False):
        axes.plot(s, measured, marker=marker, color=color, linewidth=2, markersize=6, label=f"{label}: measured")
        parabola = slope * (s - 1) + curvature * (s - 1) ** 2 / 2
        axes.plot(s, parabola, "--", color=color, linewidth=2, label=f"{label}: parabola at 1")
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_xlim(1.03, -0.03)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=11)
    return figure


def correlation_map(table: pd.DataFrame) -> Figure:
    """Draw rank correlations as a map: a row for each criterion, a column for each way to compare.

    Args:
        table: criteria as index, values in [-1, 1]; "|" in a column's name starts a new line of its heading.
    """
    values = table.to_numpy(dtype=float)
    figure = picture(2.6 + 1.3 * values.shape[1], 1.5 + 0.36 * len(values))
    axes = axes_of(figure, xlabel="", ylabel="")
    image = axes.imshow(values, cmap=SIGNED, vmin=-1, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = "–" if np.isnan(value) else f"{value:.2f}"
        color = "white" if abs(value) > 0.65 else INK
        axes.text(column, row, text, ha="center", va="center", fontsize=11, color=color)
    axes.set_xticks(range(values.shape[1]), [str(name).replace("|", "\n") for name in table], fontsize=11)
    axes.set_yticks(range(len(values)), list(table.index), fontsize=11)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.8).set_label("Spearman correlation", fontsize=11)
    return figure


def score_against_truth(score: Tensor, truth: Tensor, chosen: Sequence[bool], *, name: str, layer: str) -> Figure:
    """Draw the rank of every unit by a criterion against its rank by the oracle; the units of a layer stand out.

    Args:
        score: of the sampled units.
        truth: their measured loss changes.
        chosen: which of them belong to the layer.
        name: of the criterion.
        layer: name of the layer.
    """
    ranks = [100 * pd.Series(values.numpy()).rank().to_numpy() / len(values) for values in (truth, score)]
    inside = np.asarray(chosen, dtype=bool)
    figure = picture(6.4, 5.4)
    axes = axes_of(figure, xlabel="rank by measured ΔL (%)", ylabel=f"rank by {name} (%)")
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1.5, zorder=1)
    axes.plot(ranks[0][~inside], ranks[1][~inside], "o", color=BLUE, markersize=6, alpha=0.45, label="a unit")
    if inside.any():
        label = f"a unit of `{layer}`"
        axes.plot(ranks[0][inside], ranks[1][inside], "^", color=VERMILLION, markersize=9, label=label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=11)
    axes.set_aspect("equal")
    return figure


def order_curves(table: pd.DataFrame, whole: float) -> Figure:
    """Draw one line per order of removal: accuracy against the share of units that are gone.

    Args:
        table: columns ``criterion``, ``removed`` and ``accuracy`` (shares).
        whole: accuracy before any unit goes.
    """
    figure = picture(8.2, 4.4)
    axes = axes_of(figure, xlabel="units removed (% of those considered)", ylabel="accuracy on test images (%)")
    for name, color, marker, line in styles(table["criterion"]):
        rows = table[table["criterion"] == name].sort_values("removed")
        x, y = [0, *(100 * rows["removed"])], [100 * whole, *(100 * rows["accuracy"])]
        axes.plot(x, y, line, marker=marker, color=color, linewidth=2, markersize=7, label=name)
    axes.set_ylim(0, 100)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=11)
    return figure


def promised_and_measured(table: pd.DataFrame) -> Figure:
    """Draw, for every order of removal, what its scores say that the set costs, and what it did cost.

    Args:
        table: columns ``criterion``, ``removed`` (share), ``promised`` and ``measured`` (nats).
    """
    names = list(dict.fromkeys(table["criterion"]))
    figure = picture(3.2 * len(names) + 0.8, 3.9)
    grid = figure.add_gridspec(1, len(names))
    first = None
    for place, name in enumerate(names):
        rows = table[table["criterion"] == name].sort_values("removed")
        label = "change of the loss (nats)" if first is None else ""
        axes = axes_of(figure, xlabel="units removed (%)", ylabel=label, title=name, place=grid[0, place])
        first = first or axes
        axes.sharey(first)
        x = 100 * rows["removed"]
        axes.plot(x, rows["measured"], "o-", color=BLUE, linewidth=2, markersize=6, label="measured")
        axes.plot(x, rows["promised"], "^--", color=VERMILLION, linewidth=2, markersize=7, label="as scored")
        axes.axhline(0, color=PALE, linewidth=1)
    assert first is not None
    first.set_yscale("symlog", linthresh=0.1)
    first.margins(y=0.08)
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=11)
    return figure


__all__ = [
    "correlation_map",
    "loss_along",
    "order_curves",
    "promised_and_measured",
    "score_against_truth",
    "sorted_changes",
]

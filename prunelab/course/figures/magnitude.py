"""What 02_magnitude shows: how variants of one criterion rank units, where they cut, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from prunelab.criteria import Scores
from prunelab.drawing.style import BLUE, GREY, INK, PALE, VERMILLION, axes_of, picture
from prunelab.plans import Plan
from prunelab.tracing.groups import Group


def removed_by_group(table: pd.DataFrame) -> Figure:
    """Draw which share of each group's units is removed.

    Args:
        table: one row per variant, one column per group, shares in [0, 1].
    """
    figure = picture(9.6, 1.9 + 0.42 * len(table))
    axes = figure.add_subplot()
    _heat(axes, 100 * table, low=0, high=100)
    axes.set_title("units removed (%)", fontsize=12, loc="left")
    return figure


def _heat(axes: Axes, table: pd.DataFrame, *, low: float, high: float) -> AxesImage:
    values = table.to_numpy(dtype=float)
    image = axes.imshow(values, cmap="Blues", vmin=low, vmax=high, aspect="auto")
    for row, column in np.ndindex(values.shape):
        if np.isfinite(values[row, column]):
            ink = "white" if values[row, column] > low + 0.6 * (high - low) else INK
            text = f"{values[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=10, color=ink)
    axes.set_xticks(range(len(table.columns)), list(table.columns), rotation=40, ha="right", fontsize=10)
    axes.set_yticks(range(len(table.index)), list(table.index), fontsize=10)
    axes.spines[:].set_visible(False)
    return image


def accuracy_of_variants(table: pd.DataFrame, *, whole: float, draws: Iterable[float] = ()) -> Figure:
    """Draw one point per variant: accuracy after a cut, with a bar to both sides.

    Args:
        table: columns ``variant``, ``accuracy`` and ``error`` (shares), drawn from the best to the worst.
        whole: accuracy of the network before the cut.
        draws: accuracies of random cuts, a band from the worst to the best.
    """
    rows = table.sort_values("accuracy", ascending=False)
    figure = picture(8.4, 1.2 + 0.32 * len(rows))
    axes = axes_of(figure, xlabel="accuracy on test images after the cut (%)", ylabel="")
    draws = [100 * draw for draw in draws]
    if draws:
        axes.axvspan(min(draws), max(draws), color=PALE, zorder=0, label=f"{len(draws)} random cuts")
    axes.axvline(100 * whole, color=GREY, linewidth=1.5, label="before the cut")
    axes.errorbar(
        100 * rows["accuracy"], range(len(rows)), xerr=100 * rows["error"], fmt="o", color=BLUE, capsize=3, markersize=7
    )
    axes.set_yticks(range(len(rows)), list(rows["variant"]), fontsize=11)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=11, loc="outside upper center", ncols=2, frameon=False)
    return figure


def scores_view(scores: Scores, plan: Plan) -> Figure:
    """Draw every unit's score, a row per group; what the plan removes is open, what it keeps is filled.

    Args:
        scores: of all groups.
        plan: made from them.
    """
    groups: list[Group] = list(scores)
    figure = picture(9.6, 1.4 + 0.34 * len(groups))
    axes = axes_of(figure, xlabel="score of a unit", ylabel="")
    for row, group in enumerate(groups):
        values = scores[group].numpy()
        gone = np.isin(np.arange(group.size), list(plan.removed.get(group.name, ())))
        axes.plot(values[~gone], np.full((~gone).sum(), row), "o", color=BLUE, markersize=6, alpha=0.55)
        axes.plot(values[gone], np.full(gone.sum(), row), "o", color=VERMILLION, markersize=6, markerfacecolor="none")
        axes.text(1.01, row, f"{(~gone).sum()}/{group.size}", transform=axes.get_yaxis_transform(), fontsize=10)
    every = np.concatenate([scores[group].numpy() for group in groups])
    if every.min() > 0 and every.max() > 50 * every.min():
        axes.set_xscale("log")
    axes.set_yticks(range(len(groups)), [group.name for group in groups], fontsize=10)
    axes.invert_yaxis()
    axes.set_title("blue: kept; open, orange: removed; at the right: units kept", fontsize=12, loc="left")
    return figure


__all__ = ["accuracy_of_variants", "removed_by_group", "scores_view"]

"""What a plan or a criterion says of the units of a network: bars of what stays, ranks against ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prunelab.criteria import Scores
from prunelab.drawing.curves import accuracy_lines
from prunelab.drawing.style import BLUE, GREY, INK, PALE, VERMILLION, axes_of, picture
from prunelab.plans import Plan
from prunelab.tracing.groups import Group


def kept_units(plan: Plan, groups: Iterable[Group]) -> Figure:
    """Draw one bar per group: which share of its units stays, with the numbers beside it.

    Args:
        plan: what goes.
        groups: all groups of the graph that the plan was made for, in the order to show.
    """
    groups = list(groups)
    figure = picture(height=0.9 + 0.3 * len(groups))
    _kept_bars(axes_of(figure, xlabel="units kept (%)", ylabel=""), plan, groups)
    return figure


def _kept_bars(axes: Axes, plan: Plan, groups: Sequence[Group]) -> None:
    left = [group.size - len(plan.removed.get(group.name, ())) for group in groups]
    share = [100 * number / group.size for number, group in zip(left, groups, strict=True)]
    names = [group.name for group in groups]
    axes.barh(names, 100, color=PALE)
    axes.barh(names, share, color=BLUE)
    for row, (number, group) in enumerate(zip(left, groups, strict=True)):
        axes.text(101.5, row, f"{number} of {group.size}", va="center_baseline", fontsize=10.5, color=INK)
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.grid(False)
    axes.tick_params(axis="y", length=0)


def budget_view(
    plan: Plan,
    groups: Iterable[Group],
    table: pd.DataFrame,
    *,
    whole: float | None = None,
    mark: tuple[float, float] | None = None,
) -> Figure:
    """Draw the kept units of a plan beside the accuracy curves, its own point circled: what the budget slider shows.

    Args:
        plan: what goes.
        groups: as for ``kept_units``.
        table: as for ``accuracy_against_flops``.
        whole: as for ``accuracy_against_flops``.
        mark: as for ``accuracy_against_flops``.
    """
    groups = list(groups)
    figure = picture(width=10.5, height=max(3.6, 0.9 + 0.3 * len(groups)))
    _kept_bars(axes_of(figure, xlabel="units kept (%)", ylabel="", place=121), plan, groups)
    axes = axes_of(figure, xlabel="FLOPs kept (%)", ylabel="accuracy on test images (%)", place=122)
    accuracy_lines(axes, table, whole, None, mark)
    return figure


def rank_comparison(first: Scores, second: Scores, group: Group | None = None) -> Figure:
    """Draw the rank of every unit by one criterion against its rank by another; rank 0 % is what goes first.

    Args:
        first: scores on the horizontal axis.
        second: scores of the same graph, on the vertical axis.
        group: whose units to point out.
    """
    ranks = [_ranks(scores) for scores in (first, second)]
    correlation = np.corrcoef(ranks[0], ranks[1])[0, 1]
    labels = [f"rank by {scores.criterion} (% of all units)" for scores in (first, second)]
    figure = picture(5.6, 5.2)
    axes = axes_of(figure, xlabel=labels[0], ylabel=labels[1], title=f"Spearman correlation {correlation:.2f}")
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1.5, zorder=1)
    owners = np.concatenate([[g.name] * g.size for g in first.graph.groups])
    chosen = owners == (group.name if group else None)
    axes.plot(ranks[0][~chosen], ranks[1][~chosen], "o", color=BLUE, markersize=4.5, alpha=0.6, label="a unit")
    if group is not None:
        label = f"a unit of `{group.name}`"
        axes.plot(ranks[0][chosen], ranks[1][chosen], "^", color=VERMILLION, markersize=8, label=label)
        axes.legend(fontsize=10.5, loc="upper left", framealpha=0.9)
    axes.set_aspect("equal")
    return figure


def _ranks(scores: Scores) -> np.ndarray:
    values = np.concatenate([scores[group].numpy() for group in scores.graph.groups])
    return 100 * pd.Series(values).rank().to_numpy() / len(values)

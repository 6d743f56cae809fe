"""Figures of ``12_iterative``: how fast a network shrinks, and the way that its accuracy goes meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prunelab.drawing.style import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, VERMILLION, axes_of, picture

LINES = [(BLUE, "o", "-"), (VERMILLION, "^", "--"), (GREEN, "D", "-."), (PURPLE, "v", ":"), (ORANGE, "s", "-")]
"""Colour, marker and line of the runs, in the order in which they come."""


def schedules(shares: Mapping[str, Sequence[float]]) -> Figure:
    """Draw what is left of the FLOPs after every step, one line per schedule.

    Args:
        shares: name -> share left after step 0, 1, …
    """
    figure = picture(height=4.0)
    axes = axes_of(figure, xlabel="step", ylabel="FLOPs kept (%)")
    for (name, left), (color, marker, line) in zip(shares.items(), LINES, strict=False):
        values = [100 * share for share in left]
        axes.plot(range(len(left)), values, line, marker=marker, color=color, linewidth=2, markersize=7, label=name)
    axes.set_xticks(range(max(len(left) for left in shares.values())))
    axes.set_ylim(0, 105)
    axes.legend(frameon=False, fontsize=11, loc="lower left")
    return figure


def trajectories(runs: Mapping[str, Mapping[str, pd.DataFrame]]) -> Figure:
    """Draw the way of every run, a panel per network: accuracy against FLOPs kept, stage after stage.

    Args:
        runs: network -> run -> ``Report.table()`` with ``stage``, ``flops_kept`` and ``accuracy`` (shares).
    """
    figure = picture(10.5, 5.0)
    names = list(dict.fromkeys(name for found in runs.values() for name in found))
    looks = dict(zip(names, LINES * 9, strict=False))
    panels: dict[str, Artist] = {}
    for number, (network, found) in enumerate(runs.items(), 1):
        axes = axes_of(
            figure,
            xlabel="FLOPs kept (%), cut from left to right",
            ylabel="accuracy on test images (%)" if number == 1 else "",
            title=network,
            place=100 + 10 * len(runs) + number,
        )
        for name, table in found.items():
            _way(axes, table, *looks[name], label=name)
        axes.invert_xaxis()
        axes.set_ylim(0, 100)
        handles, labels = axes.get_legend_handles_labels()
        panels |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(panels.values()), list(panels), loc="outside upper center", ncols=4, frameon=False, fontsize=10.5
    )
    return figure


def schedule_view(shares: Sequence[float], table: pd.DataFrame | None) -> Figure:
    """Draw one schedule: what each step takes and leaves, and beside it the run that was measured with it.

    Args:
        shares: what is left after step 0, 1, …
        table: ``Report.table()`` of that run, or ``None`` where there was none.
    """
    figure = picture(10.5, 4.0)
    axes = axes_of(figure, xlabel="after step", ylabel="FLOPs (%)", place=121)
    steps = range(len(shares))
    axes.bar(steps, [100 * share for share in shares], color=BLUE, width=0.7, label="kept")
    for step in steps[1:]:
        before, after = 100 * shares[step - 1], 100 * shares[step]
        axes.bar(
            step, before - after, bottom=after, color=PALE, width=0.7, label="cut in this step" if step == 1 else None
        )
        axes.text(step, before + 1, f"−{before - after:.0f}", ha="center", fontsize=10.5, color=INK)
    axes.set_xticks(list(steps))
    axes.set_ylim(0, 128)
    axes.legend(frameon=False, fontsize=11, loc="upper right", ncols=2)
    axes = axes_of(figure, xlabel="FLOPs kept (%), cut from left to right", ylabel="accuracy (%)", place=122)
    if table is None:
        axes.text(0.5, 0.5, "not run: only the schedule is shown", transform=axes.transAxes, ha="center", fontsize=12)
    else:
        _way(axes, table, *LINES[0], label="")
    axes.set_xlim(103, 0)
    axes.set_ylim(0, 100)
    return figure


def _way(axes: Axes, table: pd.DataFrame, color: str, marker: str, line: str, label: str) -> None:
    """Join the stages in their order; open marks for what was just cut, full ones for what may be used."""
    x, y = 100 * table["flops_kept"], 100 * table["accuracy"]
    axes.plot(x, y, line, color=color, linewidth=1.6, alpha=0.6, zorder=1)
    cut = table["stage"] == "cut"
    axes.plot(x[cut], y[cut], marker, mfc="white", mec=color, mew=1.6, markersize=7)
    tuned = table["stage"] == "fine-tuned"
    axes.plot(x[tuned], y[tuned], marker, color=color, markersize=8, linestyle=line, linewidth=0, label=label)
    start = table["stage"] == "before"
    axes.plot(x[start], y[start], "*", color=GREY, markersize=13, zorder=3)

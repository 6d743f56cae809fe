"""Figures of sweeps: accuracy against what is left of a network, one line per method; ranks with their confidence."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from prunelab.drawing.style import GREY, INK, SKY, axes_of, picture, styles
from prunelab.experiments.figures.shootout import NAMES
from prunelab.experiments.shootout.compare import pareto_front


def pareto(points: pd.DataFrame, x: str, y: str, *, title: str = "", mark: tuple[float, float] | None = None) -> Figure:
    """Draw a metric against what is left, one line per method: the mean over seeds, in a band from worst to best.

    Circles are drawn around the means that no other beats: none has less left and is better.

    Args:
        points: one row per run: ``method``, ``setting`` (runs of one method and setting differ by their seed), ``x``
            and ``y``.
        x: column of a share, as in ``NAMES``, or of any number.
        y: column of the metric; a share if its name has accuracy in it.
        title: of the figure.
        mark: ``(x, y)`` of a run to point out.
    """
    names = list(dict.fromkeys(points["method"]))
    figure = picture(9.2, 4.6 if len(names) <= 12 else 4.6 + 0.25 * (len(names) - 12))
    wide, high = (100.0 if _share(name) else 1.0 for name in (x, y))
    axes = axes_of(figure, xlabel=_label(x), ylabel=_label(y), title=title)
    shown = points.assign(left=wide * points[x], value=high * points[y])
    runs = shown.groupby(["method", "setting"], sort=False).agg(
        left=("left", "mean"),
        mean=("value", "mean"),
        low=("value", "min"),
        high=("value", "max"),
        seeds=("value", "size"),
    )
    by_method = dict(iter(runs.sort_values("left").groupby("method")))
    for name, color, marker, line, filled in looks(names):
        own = by_method[name]
        if own["seeds"].max() > 1:
            axes.fill_between(own["left"], own["low"], own["high"], color=color, alpha=0.15, linewidth=0)
        face = color if filled else "white"
        axes.plot(own["left"], own["mean"], marker + line, color=color, mfc=face, lw=1.8, ms=7, label=name)
    best = runs[pareto_front(runs["left"], runs["mean"])]
    axes.plot(best["left"], best["mean"], "o", ms=15, mfc="none", color=GREY, mew=1.4, zorder=1, label="not beaten")
    if mark is not None:
        axes.plot(wide * mark[0], high * mark[1], "*", color=INK, markersize=20, mfc="none", mew=1.8, label="this run")
    axes.legend(frameon=False, fontsize=10.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def looks(names: Sequence[str]) -> list[tuple[str, str, str, str, bool]]:
    """Return name, colour, marker, line and whether marks are filled, of each method.

    The part before a comma is its criterion, whose colour and marker it has; the shortest name of a criterion has
    filled marks, the others open ones and lines of their own.
    """
    criteria = {name: name.split(",")[0] for name in names}
    by_criterion = {name: rest for name, *rest in styles(criteria.values())}
    found = []
    for name, criterion in criteria.items():
        color, marker, line = by_criterion[criterion]
        others = sorted(
            (other for other in criteria if criteria[other] == criterion), key=lambda word: (len(word), word)
        )
        number = others.index(name)
        lines = [line, *(other for other in ("-", "--", "-.", ":") if other != line)]
        found.append((name, color, marker, lines[number % 4], number == 0))
    return found


def ranking(table: pd.DataFrame) -> Figure:
    """Draw mean ranks with their confidence intervals, the best on top.

    Args:
        table: columns ``method``, ``mean_rank``, ``low`` and ``high``.
    """
    rows = table.sort_values("mean_rank").reset_index(drop=True)
    figure = picture(7.5, 1.4 + 0.36 * len(rows))
    axes = axes_of(figure, xlabel="mean rank (1 is best), with its 95 % interval", ylabel="")
    for place, (_, color, marker, _, filled) in enumerate(looks(list(rows["method"]))):
        row = rows.loc[place]
        axes.plot([row["low"], row["high"]], [place, place], color=color, linewidth=2.2)
        face = color if filled else "white"
        axes.plot(row["mean_rank"], place, marker, color=color, mfc=face, markersize=9)
    axes.set_yticks(range(len(rows)), list(rows["method"]), fontsize=11)
    axes.set_xlim(left=min(0.8, axes.get_xlim()[0]))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    return figure


def timeline(runs: dict[str, list[tuple[float, float]]]) -> Figure:
    """Draw when which jobs of a sweep ran, a panel for each way to run it, one row per worker.

    Args:
        runs: way -> beginning and end of each job, in seconds from the start of the sweep.
    """
    rows = {way: lanes(jobs) for way, jobs in runs.items()}
    figure = picture(9.0, 1.0 + sum(0.5 + 0.4 * len(found) for found in rows.values()))
    grid = figure.add_gridspec(len(rows), 1, height_ratios=[0.6 + len(found) for found in rows.values()])
    end = max(stop for jobs in runs.values() for _, stop in jobs)
    for number, (way, found) in enumerate(rows.items()):
        last = number == len(rows) - 1
        axes = axes_of(figure, xlabel="seconds" if last else "", ylabel="worker", title=way, place=grid[number, 0])
        for worker, jobs in enumerate(found, 1):
            spans = [(start, stop - start) for start, stop in jobs]
            axes.broken_barh(spans, (worker - 0.36, 0.72), facecolor=SKY, edgecolor="white", linewidth=1.5)
        axes.set_yticks(range(1, len(found) + 1))
        axes.set_xlim(0, end * 1.02)
        axes.grid(axis="y", visible=False)
    return figure


def lanes(jobs: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Return jobs by worker: each goes to the first that is free, give or take a second.

    >>> lanes([(0, 5), (0, 3), (3, 6)])
    [[(0, 5)], [(0, 3), (3, 6)]]
    """
    found: list[list[tuple[float, float]]] = []
    for job in sorted(jobs, key=lambda span: span[0]):
        free = next((lane for lane in found if lane[-1][1] <= job[0] + 1), None)
        if free is None:
            found.append([job])
        else:
            free.append(job)
    return found


def _share(name: str) -> bool:
    return name.endswith("_kept") or "accuracy" in name or name == "share"


def _label(name: str) -> str:
    if name in NAMES:
        return f"{NAMES[name]} kept (%)"
    if name == "accuracy":
        return "accuracy on test images (%)"
    return name.replace("_", " ") + (" (%)" if _share(name) else "")

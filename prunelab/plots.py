"""Figures: what a notebook shows, as functions from plain data to a matplotlib ``Figure``.

Flows in: tables, scores, plans, images.  Flows out: figures that stand on their own; no pyplot, no global settings.
Every notebook uses them, and ``widgets`` redraws them at a slider's move.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from prunelab.criteria import Scores
from prunelab.groups import Group
from prunelab.plan import Plan

# Okabe & Ito 2008, Color Universal Design: told apart with every common kind of colour vision.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY, PALE, INK = "#767676", "#E3E3E3", "#222222"
STYLES: dict[str, tuple[str, str, str]] = {
    "random": (GREY, "s", ":"),
    "magnitude": (BLUE, "o", "--"),
    "taylor": (VERMILLION, "^", "-"),
}
"""Criterion -> colour, marker and line style; other criteria take theirs from ``SPARE`` in order."""
SPARE = [(GREEN, "D", "-"), (PURPLE, "v", "--"), (ORANGE, "P", "-."), (SKY, "X", "-"), (INK, "h", ":")]
STAGES = {"before": "o", "cut": "v", "fine-tuned": "^"}


class Picture(Figure):
    """A figure that notebooks show by itself, whether or not pyplot was ever imported."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def picture(width: float = 7.5, height: float = 4.2) -> Picture:
    """Return an empty figure of the house's look; sizes in inches at 100 dots per inch."""
    engine = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09)
    return Picture(figsize=(width, height), dpi=100, layout=engine, facecolor="white")


def axes_of(figure: Figure, *, xlabel: str, ylabel: str, title: str = "", place: Any = 111) -> Axes:
    """Add axes with labels, a light grid and no frame above and on the right."""
    axes = figure.add_subplot(place)
    axes.set_xlabel(xlabel, fontsize=12)
    axes.set_ylabel(ylabel, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, fontsize=12, loc="left")
    return axes


def trajectory(table: pd.DataFrame, metric: str = "accuracy") -> Figure:
    """Draw a metric against the share of FLOPs kept, one point per stage, joined in the order in which they happened.

    Args:
        table: ``Report.table()``: columns ``step``, ``stage``, ``flops_kept`` (share) and the metric.
        metric: name of a column; one called accuracy is a share and shown in percent.
    """
    rows = table[table[metric].notna()]
    values, label = _in_units(rows[metric], metric)
    figure = picture()
    axes = axes_of(figure, xlabel="FLOPs kept (%)", ylabel=label)
    axes.plot(100 * rows["flops_kept"], values, color=PALE, linewidth=2, zorder=1)
    for number, stage in enumerate(dict.fromkeys(rows["stage"])):
        chosen = rows["stage"] == stage
        color, marker = (INK, BLUE, VERMILLION, GREEN)[number % 4], STAGES.get(stage, "D")
        axes.plot(100 * rows["flops_kept"][chosen], values[chosen], marker, color=color, markersize=9, label=stage)
    axes.margins(0.08)
    axes.legend(frameon=False, fontsize=11)
    return figure


def accuracy_against_flops(
    table: pd.DataFrame,
    *,
    whole: float | None = None,
    chance: float | None = None,
    mark: tuple[float, float] | None = None,
) -> Figure:
    """Draw one line per criterion: accuracy against the share of FLOPs kept.

    Args:
        table: columns ``criterion``, ``flops_kept`` (share) and ``accuracy`` (share). With a ``budget`` column too, a
            line is the mean of the rows of each budget, and a band reaches from the worst to the best of them.
        whole: accuracy of the network before any cut, a point at 100 %.
        chance: accuracy of guessing, a thin line.
        mark: ``(flops_kept, accuracy)`` of a point to circle.
    """
    figure = picture()
    axes = axes_of(figure, xlabel="FLOPs kept (%)", ylabel="accuracy on test images (%)")
    _accuracy_lines(axes, table, whole, chance, mark)
    return figure


def _accuracy_lines(
    axes: Axes,
    table: pd.DataFrame,
    whole: float | None,
    chance: float | None,
    mark: tuple[float, float] | None,
) -> None:
    for name, color, marker, line in _styles(table["criterion"]):
        rows = table[table["criterion"] == name]
        points = rows.groupby(rows["budget"] if "budget" in rows else rows["flops_kept"])
        x, mean = 100 * points["flops_kept"].mean(), 100 * points["accuracy"].mean()
        label, repeats = name, points.size().max()
        if repeats > 1:
            worst, best = 100 * points["accuracy"].min(), 100 * points["accuracy"].max()
            axes.fill_between(x, worst, best, color=color, alpha=0.18, linewidth=0)
            label = f"{name}: mean and range of {repeats}"
        if whole is not None:
            x, mean = pd.concat([x, pd.Series([100.0])]), pd.concat([mean, pd.Series([100 * whole])])
        axes.plot(x, mean, line, marker=marker, color=color, linewidth=2, markersize=6, label=label)
    if chance is not None:
        axes.axhline(100 * chance, color=GREY, linewidth=1)
        beside = axes.get_yaxis_transform()
        axes.text(1, 100 * chance - 1, "guessing", transform=beside, fontsize=10, color=GREY, ha="right", va="top")
    if mark is not None:
        x, y = (100 * share for share in mark)
        axes.plot(x, y, "o", markersize=17, markerfacecolor="none", color=INK, markeredgewidth=1.8)
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, fontsize=11, loc="upper left")


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
    _accuracy_lines(axes, table, whole, None, mark)
    return figure


def image_grid(
    images: Tensor | np.ndarray, labels: Sequence[str], predictions: Sequence[str] | None = None, *, columns: int = 8
) -> Figure:
    """Show images with their labels; with predictions, what the network says, and the truth where it errs.

    Args:
        images: ``[N, 3, H, W]``, bytes or floats in [0, 1].
        labels: N class names.
        predictions: N class names.
        columns: images per row.
    """
    rows = -(-len(labels) // columns)
    figure = picture(1.2 * columns, 1.5 * rows)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(np.moveaxis(np.asarray(image), 0, -1), interpolation="nearest")
        axes.set_axis_off()
        guess = label if predictions is None else predictions[number]
        title, color = (guess, INK) if guess == label else (f"{guess}\n✗ it is: {label}", VERMILLION)
        axes.set_title(title, fontsize=10, color=color, pad=3)
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


def _styles(names: Iterable[str]) -> list[tuple[str, str, str, str]]:
    spare = iter(SPARE * 9)
    return [(name, *(STYLES[name] if name in STYLES else next(spare))) for name in dict.fromkeys(names)]


def _in_units(values: pd.Series, metric: str) -> tuple[pd.Series, str]:
    if "accuracy" in metric:
        return 100 * values, f"{metric} (%)"
    return values, f"{metric} (nats)" if metric == "loss" else metric


__all__ = [
    "Picture",
    "accuracy_against_flops",
    "budget_view",
    "image_grid",
    "kept_units",
    "picture",
    "png",
    "rank_comparison",
    "trajectory",
]

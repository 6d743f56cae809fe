"""Figures of ``15_shootout``: the stages of one run, and what of a network is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prunelab.drawing.style import BLUE, GREY, INK, ORANGE, PALE, SKY, VERMILLION, axes_of, picture

NAMES = {
    "flops_kept": "FLOPs",
    "params_kept": "parameters",
    "weights_kept": "weights ≠ 0",
    "bytes_kept": "bytes",
    "latency_kept": "time of a forward pass",
}
"""Columns of what is left, and what they are called in figures."""


def luck(numbers: Sequence[int], expected: Sequence[float], simulated: Sequence[float]) -> Figure:
    """Draw by how many standard deviations the best of several equal measurements exceeds their mean.

    Args:
        numbers: of measurements.
        expected: of the best of so many, from the integral.
        simulated: the same from random draws.
    """
    figure = picture(height=3.6)
    axes = axes_of(figure, xlabel="number of epochs, of which the best is taken", ylabel="excess (standard deviations)")
    axes.plot(numbers, expected, color=BLUE, linewidth=2, label="integral")
    axes.plot(numbers, simulated, "o", color=VERMILLION, markersize=6, label="simulation")
    axes.set_xscale("log")
    axes.set_xticks(list(numbers), [str(number) for number in numbers])
    axes.minorticks_off()
    axes.set_ylim(0)
    axes.legend(frameon=False, fontsize=11)
    return figure


def stages(history: pd.DataFrame, kept: Mapping[str, float], test_images: int) -> Figure:
    """Draw one run: its accuracy from stage to stage, and what is left of the network at the end.

    Args:
        history: columns ``stage``, ``accuracy`` (on test images) and ``scoring_accuracy`` (shares), in order.
        kept: column of what is left, as in ``NAMES`` -> share.
        test_images: behind every accuracy; a bar reaches one standard error up and down.
    """
    figure = picture(10.5, 4.2)
    axes = axes_of(figure, xlabel="stage", ylabel="accuracy (%)", place=121)
    _accuracies(axes, history, test_images)
    axes = axes_of(figure, xlabel="kept (%)", ylabel="", place=122)
    names = [name for name in NAMES if name in kept]
    places = range(len(names))
    values = [100 * kept[name] for name in names]
    axes.barh(places, [100] * len(names), color=PALE, height=0.62)
    axes.barh(places, values, color=SKY, height=0.62)
    for place, value in zip(places, values, strict=True):
        axes.text(2, place, f"{value:.0f}", va="center", fontsize=11, color=INK)
    axes.set_yticks(places, [NAMES[name] for name in names], fontsize=11)
    axes.set_xlim(0, max(100, *values) * 1.02)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure


def _accuracies(axes: Axes, history: pd.DataFrame, test_images: int) -> None:
    rows = history[history["accuracy"].notna()].reset_index(drop=True)
    places = range(len(rows))
    test = rows["accuracy"].astype(float)
    error = 100 * (test * (1 - test) / test_images) ** 0.5
    seen = 100 * rows["scoring_accuracy"]
    axes.plot(places, seen, "--", marker="s", color=ORANGE, linewidth=1.6, markersize=7, label="images for scoring")
    look: dict[str, Any] = {"fmt": "-o", "color": BLUE, "linewidth": 2, "markersize": 8, "capsize": 4}
    axes.errorbar(places, 100 * test, error.tolist(), label="test images", **look)
    axes.set_xticks(places, [_named(row) for row in rows.to_dict("records")], fontsize=11)
    if len(rows) > 6:
        axes.tick_params(axis="x", labelrotation=60)
    axes.set_ylim(0, 104)
    axes.set_xlim(-0.4, len(rows) - 0.6)
    axes.axhline(100 * float(test.iloc[0]), color=GREY, linewidth=1, linestyle=":")
    axes.legend(frameon=False, fontsize=11, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def _named(row: Mapping[str, Any]) -> str:
    step = int(row["step"])
    return str(row["stage"]) if step <= 1 else f"{row['stage']}, {step}"

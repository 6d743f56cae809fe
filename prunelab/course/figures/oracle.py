"""Figures of ``10_oracle``: the measured cost of every unit, its parabolas, and a score's ranks against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from prunelab.drawing.style import BLUE, GREEN, GREY, VERMILLION, axes_of, picture

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
        label = f"a unit of {layer}"
        axes.plot(ranks[0][inside], ranks[1][inside], "^", color=VERMILLION, markersize=9, label=label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=11)
    axes.set_aspect("equal")
    return figure


__all__ = ["loss_along", "score_against_truth", "sorted_changes"]

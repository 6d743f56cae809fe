"""Figures of ``06_obd_or_obs``: two factorial Gaussians on one ellipse, rankings that flip, who wins where."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from prunelab.drawing.style import BLUE, GREEN, GREY, INK, PALE, PURPLE, axes_of, picture

RANKINGS = {
    "obd": ("OBD", GREEN, "D"),
    "obs": ("OBS", PURPLE, "v"),
    "magnitude": ("magnitude", BLUE, "o"),
}
"""Ranking -> label, colour, marker."""


def two_gaussians(matrix: np.ndarray, samples: np.ndarray, weights: Sequence[float]) -> Figure:
    """Draw a Gaussian posterior of two weights, and the two factorial Gaussians that the two KL divergences choose.

    Args:
        matrix: the precision H, ``[2, 2]``.
        samples: of the posterior, ``[n, 2]``.
        weights: its mean.
    """
    figure = picture(11.2, 6.0)
    axes = axes_of(figure, xlabel="first weight", ylabel="second weight", place=121)
    axes.plot(*samples.T, ".", color=GREY, markersize=2.5, alpha=0.5)
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = 2 * np.stack([np.cos(angle), np.sin(angle)])
    center = np.asarray(weights, dtype=float)[:, None]
    covariance = np.linalg.inv(matrix)
    narrow, wide = 1 / np.diag(matrix), np.diag(covariance)
    axes.plot(*(center + np.linalg.cholesky(covariance) @ circle), color=INK, linewidth=2)
    axes.plot(*(center + np.sqrt(narrow)[:, None] * circle), color=GREEN, linewidth=2.4, linestyle="--")
    axes.plot(*(center + np.sqrt(wide)[:, None] * circle), color=PURPLE, linewidth=2.4, linestyle="-.")
    axes.plot(*center, "o", color=INK, markersize=8)
    axes.set_aspect("equal")
    pushed = axes_of(figure, xlabel="first weight, pushed to zero", ylabel="", place=122)
    pushed.plot(*(center + np.linalg.cholesky(covariance) @ circle), color=INK, linewidth=2)
    few = samples[:150]
    sideways = np.linspace(0.03, 0.22, len(few))
    slid = few[:, 1] + matrix[0, 1] / matrix[1, 1] * few[:, 0]
    pushed.axvline(0, color=INK, linewidth=1)
    pushed.plot(-sideways, few[:, 1], ".", color=GREEN, markersize=5)
    pushed.plot(sideways, slid, ".", color=PURPLE, markersize=5)
    pushed.plot(*center, "o", color=INK, markersize=8)
    pushed.sharey(axes)
    pushed.sharex(axes)
    pushed.set_aspect("equal")
    handles = [
        Line2D([], [], color=INK, linewidth=2, label="posterior"),
        Line2D([], [], color=GREEN, linestyle="--", linewidth=2.4, label="reverse KL: 1/h, OBD"),
        Line2D([], [], color=PURPLE, linestyle="-.", linewidth=2.4, label="forward KL: [H⁻¹], OBS"),
        Line2D([], [], color=GREEN, marker=".", linestyle="", label="the other stays"),
        Line2D([], [], color=PURPLE, marker=".", linestyle="", label="the other moves"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, fontsize=11)
    return figure


def _example(rho: float, loose: float = 0.3) -> np.ndarray:
    """Return H of four weights: two with curvature 1 and correlation ``rho``, two alone with curvature ``loose``."""
    matrix = np.diag([1.0, 1.0, loose, loose])
    matrix[0, 1] = matrix[1, 0] = rho
    return matrix


def flip(rho: float, sign: int, loose: float = 0.3) -> tuple[Figure, str]:
    """Draw what two rankings say of four weights, and what every pair really costs; with a caption in words.

    Args:
        rho: correlation of the first two weights in H.
        sign: of the second weight, 1 or -1; all others are 1.
        loose: curvature of the other two.
    """
    matrix, weights = _example(rho, loose), np.array([1.0, sign, 1.0, 1.0])
    scores = {"obd": weights**2 * np.diag(matrix) / 2, "obs": weights**2 / np.diag(np.linalg.inv(matrix)) / 2}
    figure = picture(10.4, 4.0)
    axes = axes_of(figure, xlabel="weight", ylabel="score", title="what each ranking says", place=121)
    for shift, (name, values) in zip((-0.2, 0.2), scores.items(), strict=True):
        label, color, _ = RANKINGS[name]
        axes.bar(np.arange(4) + shift, values, 0.38, color=color, label=label)
    axes.set_xticks(range(4), [f"{number + 1}: {value:+.0f}" for number, value in enumerate(weights)])
    axes.set_ylim(0, 0.8)
    axes.legend(frameon=False, fontsize=11, loc="upper right")
    pairs = list(combinations(range(4), 2))
    costs = [_pair_cost(weights, matrix, pair) for pair in pairs]
    chosen = {name: tuple(sorted(np.argsort(values, kind="stable")[:2].tolist())) for name, values in scores.items()}
    bars = axes_of(figure, xlabel="pair removed", ylabel="true cost ½ δᵀHδ", title="what is true", place=122)
    bars.bar(range(len(pairs)), costs, 0.6, color=PALE, edgecolor=GREY)
    bars.set_xticks(range(len(pairs)), [f"{first + 1}, {second + 1}" for first, second in pairs])
    bars.set_ylim(0, 2.3)
    for name, pair in chosen.items():
        label, color, marker = RANKINGS[name]
        place = pairs.index(pair)
        lift = 0.1 if name == "obd" or chosen["obd"] != pair else 0.24
        bars.plot(
            place, costs[place] + lift, marker, color=color, markersize=10, linestyle="", label=f"the choice of {label}"
        )
    bars.legend(frameon=False, fontsize=11)
    best = min(costs)
    words = []
    for name, title in (("obd", "OBD"), ("obs", "OBS")):
        found = costs[pairs.index(chosen[name])]
        first, second = chosen[name]
        words.append(f"{title} removes {first + 1} and {second + 1} at a cost of <b>{found:.2f}</b>")
    signs = "the same sign" if sign > 0 else "opposite signs"
    others = f"1 and 2, of {signs}, would cost {costs[0]:.2f}"
    return figure, f"ρ = {rho:.2f}: {'; '.join(words)}; {others}; the cheapest pair costs {best:.2f}."


def _pair_cost(weights: np.ndarray, matrix: np.ndarray, pair: Sequence[int]) -> float:
    """Return ``½ δᵀHδ`` for δ = −w on the pair, 0 elsewhere."""
    delta = np.zeros(len(weights))
    delta[list(pair)] = -weights[list(pair)]
    return float(delta @ matrix @ delta / 2)


def three_ways(table: pd.DataFrame) -> Figure:
    """Draw the error of layers that were pruned by three prices, each used in three ways.

    Args:
        table: columns ``layer`` (a panel each), ``order`` (see ``RANKINGS``), ``way`` and ``lost``, a share; several
            rows of one kind are draws.
    """
    layers, ways = list(table["layer"].unique()), list(table["way"].unique())
    figure = picture(4.3 * len(layers), 4.2)
    for place, layer in enumerate(layers):
        axes = axes_of(
            figure,
            xlabel="",
            ylabel="" if place else "output power lost on test images (%)",
            title=layer,
            place=100 + 10 * len(layers) + place + 1,
        )
        for shift, (label, color, marker) in zip((-0.18, 0, 0.18), RANKINGS.values(), strict=True):
            part = table[(table["layer"] == layer) & (table["order"] == label)]
            found = 100 * part.groupby("way")["lost"].agg(["mean", "min", "max"]).loc[ways]
            spread = np.stack([found["mean"] - found["min"], found["max"] - found["mean"]]).clip(0)
            where = np.arange(len(ways)) + shift
            axes.errorbar(where, found["mean"], spread, fmt=marker, color=color, markersize=9, capsize=3, label=label)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xticks(range(len(ways)), ways)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=11)
    return figure

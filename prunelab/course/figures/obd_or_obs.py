"""Figures of ``06_obd_or_obs``: two factorial Gaussians on one ellipse, rankings that flip, who wins where."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from prunelab.drawing.style import BLUE, GREEN, GREY, INK, PALE, PURPLE, VERMILLION, axes_of, picture

RANKINGS = {
    "obd": ("OBD's ranking", GREEN, "D"),
    "obs": ("OBS's ranking", PURPLE, "v"),
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
    figure = picture(6.6, 6.0)
    axes = axes_of(figure, xlabel="first weight", ylabel="second weight")
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
    handles = [
        Line2D([], [], color=INK, linewidth=2, label="posterior"),
        Line2D([], [], color=GREEN, linestyle="--", linewidth=2.4, label="reverse KL: 1/h, OBD"),
        Line2D([], [], color=PURPLE, linestyle="-.", linewidth=2.4, label="forward KL: [H⁻¹], OBS"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=11)
    return figure


def example(rho: float, loose: float = 0.3) -> np.ndarray:
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
    matrix, weights = example(rho, loose), np.array([1.0, sign, 1.0, 1.0])
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
    costs = [pair_cost(weights, matrix, pair) for pair in pairs]
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
            place, costs[place] + lift, marker, color=color, markersize=10, linestyle="", label=f"choice of {label}"
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


def pair_cost(weights: np.ndarray, matrix: np.ndarray, pair: Sequence[int]) -> float:
    """Return ``½ δᵀHδ`` for δ = −w on the pair, 0 elsewhere."""
    delta = np.zeros(len(weights))
    delta[list(pair)] = -weights[list(pair)]
    return float(delta @ matrix @ delta / 2)


def with_and_without(table: pd.DataFrame, column: str, *, label: str, top: float | None = None) -> Figure:
    """Draw a measurement against the share of weights removed, for each ranking without and with compensation.

    Args:
        table: columns ``ranking`` (see ``RANKINGS``), ``compensated`` (bool), ``removed`` (share) and the measurement.
        column: the measurement.
        label: of the vertical axes, with its unit.
        top: where they end.
    """
    figure = picture(10.4, 4.2)
    for place, (compensated, title) in enumerate(((False, "survivors stay"), (True, "survivors adapt"))):
        axes = axes_of(
            figure, xlabel="weights removed (%)", ylabel=label if not place else "", title=title, place=121 + place
        )
        for name, (words, color, marker) in RANKINGS.items():
            rows = table[(table["ranking"] == name) & (table["compensated"] == compensated)]
            axes.plot(
                100 * rows["removed"],
                rows[column],
                marker=marker,
                color=color,
                linewidth=2,
                label=words if not place else None,
            )
        if "greedy" in set(table["ranking"]) and compensated:
            rows = table[table["ranking"] == "greedy"]
            axes.plot(
                100 * rows["removed"],
                rows[column],
                "--",
                marker="^",
                color=VERMILLION,
                linewidth=2,
                label="OBS, greedy",
            )
        if top is not None:
            axes.set_ylim(0, top)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=11)
    return figure

"""Figures of ``05_obs``: where the survivors go when a weight is removed, and what a price and what a move is worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from prunelab.drawing.style import BLUE, GREEN, GREY, INK, PALE, PURPLE, VERMILLION, axes_of, picture

ORDERS = {
    "magnitude": (BLUE, "o"),
    "OBD": (GREEN, "D"),
    "OBS, priced once": (VERMILLION, "^"),
    "OBS": (PURPLE, "v"),
}
"""Orders in which weights go -> colour, marker."""


def ellipse(
    weights: Sequence[float],
    matrix: np.ndarray,
    names: tuple[str, str],
) -> Figure:
    """Draw the lines of equal cost of two weights, and two ways to remove the first: straight across, or adapting.

    Args:
        weights: the trained values of both.
        matrix: their H, ``[2, 2]``.
        names: of the two weights.
    """
    w, h = np.asarray(weights, dtype=float), np.asarray(matrix, dtype=float)
    obd = np.array([0.0, w[1]])
    obs = np.array([0.0, w[1] + h[0, 1] / h[1, 1] * w[0]])
    costs = [float((end - w) @ h @ (end - w) / 2) for end in (obs, obd)]
    figure = picture(8.2, 6.2)
    axes = axes_of(figure, xlabel=f"weight of {names[0]}", ylabel=f"weight of {names[1]}")
    angle = np.linspace(0, 2 * np.pi, 200)
    root = np.linalg.cholesky(np.linalg.inv(h))
    for cost, color in zip(costs, (PURPLE, GREEN), strict=True):
        ring = w[:, None] + np.sqrt(2 * cost) * root @ np.stack([np.cos(angle), np.sin(angle)])
        axes.plot(*ring, color=color, linewidth=1.8)
    axes.margins(0.06)
    axes.axvline(0, color=INK, linewidth=1.5)
    for end, color, marker in ((obd, GREEN, "D"), (obs, PURPLE, "v")):
        axes.annotate("", tuple(end), tuple(w), arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 2.2})
        axes.plot(*end, marker, color=color, markersize=10, zorder=3)
    axes.plot(*w, "o", color=INK, markersize=9, zorder=3)
    axes.grid(False)
    handles = [
        Line2D([], [], color=INK, marker="o", linestyle="", markersize=9, label="trained"),
        Line2D([], [], color=GREEN, marker="D", markersize=9, label=f"OBD: {costs[1]:.2g} nats"),
        Line2D([], [], color=PURPLE, marker="v", markersize=9, label=f"OBS: {costs[0]:.2g} nats"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=11)
    return figure


def survivors(weights: np.ndarray, inverse: np.ndarray, chosen: int, names: Sequence[str]) -> tuple[Figure, str]:
    """Draw what all weights do when one is deleted, and what every one of them would cost; with a caption in words.

    Args:
        weights: ``[n]``.
        inverse: of their H, ``[n, n]``.
        chosen: which weight goes.
        names: of the weights.
    """
    delta = -weights[chosen] / inverse[chosen, chosen] * inverse[:, chosen]
    after = weights + delta
    obs = weights**2 / np.diag(inverse) / 2
    obd = weights**2 * np.diag(np.linalg.inv(inverse)) / 2
    figure = picture(10.4, 0.9 + 0.34 * len(weights))
    rows = np.arange(len(weights))
    axes = axes_of(figure, xlabel="value of the weight", ylabel="", place=121)
    for row in rows:
        axes.plot([weights[row], after[row]], [row, row], color=PALE if row != chosen else VERMILLION, linewidth=3)
    axes.plot(weights, rows, "o", color=GREY, markersize=7, label="before")
    axes.plot(after, rows, "v", color=PURPLE, markersize=8, label="after")
    axes.plot([0], [chosen], "X", color=VERMILLION, markersize=11, label="deleted")
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=11)
    bars = axes_of(figure, xlabel="cost of deleting it (nats, logarithmic)", ylabel="", place=122)
    bars.hlines(rows, obs, obd, color=PALE, linewidth=3)
    bars.semilogx(obd, rows, "s", color=GREEN, markersize=9)
    bars.semilogx(obs, rows, "s", color=PURPLE, markersize=9)
    bars.plot([], [], "s", color=GREEN, markersize=10, label="OBD")
    bars.plot([], [], "s", color=PURPLE, markersize=10, label="OBS")
    bars.set_yticks(rows, names)
    bars.get_yticklabels()[chosen].set_color(VERMILLION)
    bars.invert_yaxis()
    bars.legend(frameon=False, fontsize=11, loc="best")
    share = obs[chosen] / obd[chosen] if obd[chosen] else 1.0
    moved = int(np.argmax(np.where(rows == chosen, 0, np.abs(delta))))
    caption = (
        f"Deleting <b>{names[chosen]}</b> costs {obd[chosen]:.3g} nats by OBD, where the others stay, and "
        f"{obs[chosen]:.3g} by OBS, {share:.0%} of it, where they adapt; {names[moved]} moves "
        f"most, by {delta[moved]:+.3g}."
    )
    return figure, caption


def order_or_move(table: pd.DataFrame) -> Figure:
    """Draw the test loss against the share that is gone: orders in colour, solid lines where the survivors move.

    Args:
        table: columns ``layer`` (a panel each), ``order`` (see ``ORDERS``), ``others`` (``"stay"`` or ``"move"``),
            ``removed`` (share) and ``loss`` in nats; several rows of one kind are draws.
    """
    layers = list(table["layer"].unique())
    figure = picture(4.3 * len(layers), 4.4)
    for place, layer in enumerate(layers):
        axes = axes_of(
            figure,
            xlabel="weights removed (%)",
            ylabel="" if place else "test loss (nats)",
            title=layer,
            place=100 + 10 * len(layers) + place + 1,
        )
        for (order, others), rows in table[table["layer"] == layer].groupby(["order", "others"], sort=False):
            color, marker = ORDERS[str(order)]
            losses = rows.groupby("removed")["loss"].agg(["mean", "min", "max"])
            percent, line = 100 * losses.index, "--" if others == "stay" else "-"
            label = None if place else f"{order}, the others {others}"
            axes.plot(percent, losses["mean"], line, marker=marker, color=color, markersize=6, label=label)
            axes.fill_between(percent, losses["min"], losses["max"], color=color, alpha=0.15, linewidth=0)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=10)
    return figure

"""Figures of ``09_oba``: the parts of θᵀHθ by layer and by pair of layers, and what they predict for units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from prunelab.drawing.style import BLUE, GREEN, GREY, INK, VERMILLION, axes_of, picture

SIGNED = LinearSegmentedColormap.from_list("signed", [VERMILLION, "white", BLUE], N=41)
"""Few colours, so that maps make small files."""
PARTS = {
    "functional": ("functional part", VERMILLION),
    "gauss_newton": ("Gauss-Newton part", BLUE),
    "exact": ("both: the Hessian", INK),
}
MARKS = [(BLUE, "o"), (VERMILLION, "^"), (GREEN, "D")]
CLIPPED = 0.97
"""Share of a map's entries that the colours resolve; the rest is beyond the ends of the scale."""
LINEAR = 1e-3
"""Loss changes below this, in nats, are drawn on a linear scale, larger ones on a logarithmic one."""


def layer_parts(layers: Sequence[str], parts: Mapping[str, Sequence[float]]) -> Figure:
    """Draw two parts of each layer's share of θᵀHθ as bars, and their sum as a mark.

    Args:
        layers: names of weights.
        parts: ``"functional"`` and ``"gauss_newton"`` -> one number per layer, in nats.
    """
    figure = picture(8.5, 0.9 + 0.26 * len(layers))
    axes = axes_of(figure, xlabel="sum of θ ⊙ (Hθ) over the layer (nats)", ylabel="")
    place = np.arange(len(layers))
    for shift, (part, values) in zip((-0.2, 0.2), parts.items(), strict=True):
        label, color = PARTS[part]
        axes.barh(place + shift, values, 0.4, color=color, label=label)
    total = np.sum(list(parts.values()), axis=0)
    axes.plot(total, place, "d", color=INK, markersize=6, label=PARTS["exact"][0])
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(place, [_short(name) for name in layers], fontsize=10.5)
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=11)
    return figure


def pair_maps(layers: Sequence[str], maps: Mapping[str, Tensor]) -> Figure:
    """Draw θ_iᵀ H_ij θ_j for all pairs of layers, one map for each part of H, on one scale of colours.

    Args:
        layers: names of weights.
        maps: part -> ``[n, n]``, in nats.
    """
    figure = picture(1.7 + 4.4 * len(maps), 5.6)
    limit = _limit(maps)
    image = None
    for place, (part, matrix) in enumerate(maps.items()):
        axes = axes_of(figure, xlabel="", ylabel="", title=PARTS[part][0], place=100 + 10 * len(maps) + place + 1)
        image = _map(axes, layers, matrix, limit, names=not place)
    assert image is not None
    figure.colorbar(image, ax=figure.axes, shrink=0.75, extend="both").set_label("nats", fontsize=11)
    return figure


def _limit(maps: Mapping[str, Tensor]) -> float:
    return max(float(np.quantile(matrix.abs().numpy(), CLIPPED)) for matrix in maps.values()) or 1.0


def _map(axes: Axes, layers: Sequence[str], matrix: Tensor, limit: float, *, names: bool = True) -> AxesImage:
    short = [_short(name) for name in layers]
    axes.set_xticks(range(len(layers)), short, fontsize=10, rotation=90)
    axes.set_yticks(range(len(layers)), short if names else [""] * len(layers), fontsize=10)
    axes.tick_params(length=0)
    axes.grid(False)
    return axes.imshow(matrix.numpy(), cmap=SIGNED, vmin=-limit, vmax=limit, interpolation="nearest")


def _short(name: str) -> str:
    return name.removesuffix(".weight").removeprefix("layer")


def predictions(truth: Sequence[float], predicted: Mapping[str, Tensor], layers: Sequence[str]) -> Figure:
    """Draw predicted loss changes of units against measured ones, one panel for each prediction.

    Args:
        truth: measured loss changes, in nats.
        predicted: name -> as many predictions.
        layers: to which layer each unit belongs.
    """
    figure = picture(5.2 * len(predicted), 4.7)
    x, owners = np.asarray(truth), np.asarray(layers)
    for place, (name, values) in enumerate(predicted.items(), 1):
        axes = axes_of(
            figure,
            xlabel="measured ΔL (nats)",
            ylabel="predicted (nats)",
            title=name,
            place=100 + 10 * len(predicted) + place,
        )
        for owner, (color, marker) in zip(dict.fromkeys(layers), MARKS, strict=False):
            own = owners == owner
            axes.plot(x[own], values.numpy()[own], marker, color=color, markersize=7, alpha=0.85, label=owner)
        ends = [min(x.min(), 0.0), x.max()]
        axes.plot(ends, ends, color=GREY, linewidth=1.5)
        axes.set_xscale("symlog", linthresh=LINEAR)
        axes.set_yscale("symlog", linthresh=LINEAR)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.axvline(0, color=GREY, linewidth=0.8)
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            decades = [sign * 10.0**power for sign in (-1, 1) for power in (-3, -2, -1, 0, 1, 2)]
            axis.set_ticks([0.0, *(tick for tick in decades if low <= tick <= high)])
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.tick_params(axis="x", rotation=45)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, frameon=False, fontsize=11)
    return figure


def pair_view(
    layers: Sequence[str], maps: Mapping[str, Tensor], first: str, second: str, keep: str, relation: str
) -> tuple[Figure, str]:
    """Draw the map of what is kept with one pair marked, beside what θᵀHθ is made of: the widget, with a caption.

    Args:
        layers: names of weights.
        maps: part -> ``[n, n]``, in nats.
        first: one of the layers.
        second: another, or the same.
        keep: the part that is kept: ``"exact"``, ``"functional"`` or ``"gauss_newton"``.
        relation: how the two lie, in words.
    """
    figure = picture(10.5, 5)
    i, j = layers.index(first), layers.index(second)
    axes = axes_of(figure, xlabel="", ylabel="", title=f"kept: {PARTS[keep][0]}", place=121)
    _map(axes, layers, maps[keep], _limit(maps))
    axes.plot([j, i], [i, j], "s", markersize=12, markerfacecolor="none", color=INK, markeredgewidth=2)
    axes = axes_of(figure, xlabel="share of θᵀHθ (nats)", ylabel="", place=122)
    kept = [part for part in ("functional", "gauss_newton") if keep in (part, "exact")]
    names, values, colors = [], [], []
    for part in ("functional", "gauss_newton"):
        matrix = maps[part] * (part in kept)
        own = float(matrix.diagonal().sum())
        for name, value in (("layers by themselves", own), ("pairs of layers", float(matrix.sum()) - own)):
            names.append(f"{PARTS[part][0]}:\n{name}")
            values.append(value)
            colors.append(PARTS[part][1])
    axes.barh(names, values, color=colors)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.invert_yaxis()
    numbers = {part: float(matrix[i, j]) for part, matrix in maps.items()}
    words = (
        f"<b>{_short(first)} and {_short(second)}</b> ({relation}): functional {numbers['functional']:+.3g}, "
        f"Gauss-Newton {numbers['gauss_newton']:+.3g}, together {numbers['exact']:+.3g} nats. "
        f"All pairs that are kept add up to {float(maps[keep].sum()):.3g}, of {float(maps['exact'].sum()):.3g} exactly."
    )
    return figure, words


__all__ = ["layer_parts", "pair_maps", "pair_view", "predictions"]

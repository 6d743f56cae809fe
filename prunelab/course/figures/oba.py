"""Figures of ``09_oba``: the parts of θᵀHθ by pair of layers, and the row of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from prunelab.drawing.style import BLUE, GREY, INK, PALE, VERMILLION, axes_of, picture

SIGNED = LinearSegmentedColormap.from_list("signed", [VERMILLION, "white", BLUE], N=41)
"""Few colours, so that maps make small files."""
PARTS = {
    "functional": ("functional part", VERMILLION),
    "gauss_newton": ("Gauss-Newton part", BLUE),
    "exact": ("both: the Hessian", INK),
}
CLIPPED = 0.97
"""Share of a map's entries that the colours resolve; the rest is beyond the ends of the scale."""


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


def row_view(layers: Sequence[str], maps: Mapping[str, Tensor], layer: str, parts: Sequence[str]) -> tuple[Figure, str]:
    """Draw what the row of one layer is made of: its interaction with every layer, in the parts that are kept.

    Args:
        layers: names of weights, and of what else has a row.
        maps: part -> ``[n, n]``, in nats.
        layer: whose row.
        parts: of the Hessian: some of ``"functional"`` and ``"gauss_newton"``.
    """
    figure = picture(9.4, 4.4)
    axes = axes_of(figure, xlabel="", ylabel="share of its row (nats)", title=f"the row of {_short(layer)}")
    row, place = layers.index(layer), np.arange(len(layers))
    width = 0.8 / len(parts)
    for number, part in enumerate(parts):
        label, color = PARTS[part]
        shift = (number - (len(parts) - 1) / 2) * width
        axes.bar(place + shift, maps[part][row].numpy(), width, color=color, label=label)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.axvspan(row - 0.5, row + 0.5, color=PALE, zorder=0)
    axes.set_xticks(place, [_short(name) for name in layers], fontsize=10, rotation=90)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=11)
    kept = torch.stack([maps[part] for part in parts]).sum(0)
    own, whole = float(kept[row, row]), float(kept[row].sum())
    others = float(kept[row].abs().sum()) - abs(own)
    words = (
        f"<b>{_short(layer)}</b>: with itself {own:+.3g} nats, its whole row {whole:+.3g}. Its interactions with other "
        f"layers have sizes that add up to {others:.3g}."
    )
    return figure, words


__all__ = ["pair_maps", "row_view"]

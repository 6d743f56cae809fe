"""Figures of ``08_eigendamage``: the Fisher in two bases, scores of directions, what narrowing a layer costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from torch import Tensor

from prunelab.drawing.style import BLUE, GREY, INK, VERMILLION, axes_of, picture

SIGNED = LinearSegmentedColormap.from_list("signed", [VERMILLION, "white", BLUE], N=41)
"""Few colours, so that maps make small files."""
BASES = {"channels": (VERMILLION, "^"), "KFE": (BLUE, "o")}
LINEAR = 1e-3
"""Loss changes below this, in nats, are drawn on a linear scale, larger ones on a logarithmic one."""


def before_and_after(plain: Tensor, rotated: Tensor, noise: Tensor) -> Figure:
    """Draw the correlations of gradients over images, before and after a rotation, and without any correlation.

    Args:
        plain: gradients of single images, ``[n, out, in]``.
        rotated: the same in another basis, ``[n, out, in]``.
        noise: the rotated ones with random signs.
    """
    figure = picture(12.5, 4.4)
    image = None
    titles = ("before: pairs of channels", "after: pairs of directions", "after, random signs: noise")
    for place, (title, gradients) in enumerate(zip(titles, (plain, rotated, noise), strict=True)):
        rows = gradients.flatten(1)
        fisher = rows.mT @ rows
        scale = fisher.diagonal().clamp_min(torch.finfo(fisher.dtype).tiny).sqrt()
        axes = axes_of(figure, xlabel="weight", ylabel="weight", title=title, place=131 + place)
        image = axes.imshow(
            (fisher / torch.outer(scale, scale)).numpy(), cmap=SIGNED, vmin=-1, vmax=1, interpolation="nearest"
        )
        edges = np.arange(1, gradients.shape[1]) * gradients.shape[2] - 0.5
        axes.hlines(edges, -0.5, len(fisher) - 0.5, color=GREY, linewidth=0.4)
        axes.vlines(edges, -0.5, len(fisher) - 0.5, color=GREY, linewidth=0.4)
        axes.grid(False)
    assert image is not None
    figure.colorbar(image, ax=figure.axes, shrink=0.8).set_label("correlation of gradients", fontsize=11)
    return figure


def spectra(product: Tensor, measured: Tensor) -> Figure:
    """Draw measured second moments in the eigenbasis against products of eigenvalues, both ``[out, in]``."""
    figure = picture(6.2, 5)
    axes = axes_of(figure, xlabel="λ_S · λ_A", ylabel="measured second moment")
    x, y = product.flatten().numpy(), measured.flatten().numpy()
    both = (x > 0) & (y > 0)
    axes.loglog(x[both], y[both], "o", color=BLUE, markersize=3.5, alpha=0.4)
    ends = [x[both].min(), x[both].max()]
    axes.plot(ends, ends, color=GREY, linewidth=1.5)
    return figure


def importance_maps(plain: Tensor, rotated: Tensor) -> Figure:
    """Draw scores ``[out, in]`` of channels and of directions, rows and columns sorted by their sums."""
    figure = picture(10, 4.6)
    norm = _scale(plain, rotated)
    image = None
    for place, (title, scores) in enumerate((("channels", plain), ("directions of the KFE", rotated))):
        axes = axes_of(figure, xlabel="inputs, sorted", ylabel="outputs, sorted", title=title, place=121 + place)
        image = _map(axes, scores, norm)
    assert image is not None
    figure.colorbar(image, ax=figure.axes, shrink=0.85, extend="min").set_label("score (nats)", fontsize=11)
    return figure


def _scale(*scores: Tensor) -> LogNorm:
    most = max(float(score.max()) for score in scores)
    return LogNorm(most * 1e-5, most, clip=True)


def _map(axes: Axes, scores: Tensor, norm: LogNorm) -> AxesImage:
    rows, columns = (scores.sum(dim).argsort(descending=True) for dim in (1, 0))
    axes.grid(False)
    return axes.imshow(
        scores[rows][:, columns].clamp_min(norm.vmin or 0).numpy(), cmap="Greys", norm=norm, interpolation="nearest"
    )


def layer_curves(table: pd.DataFrame) -> Figure:
    """Draw the loss change of narrowing one layer against rank and against cost.

    Args:
        table: columns ``basis``, ``rank``, ``macs`` (share of the layer), ``quadratic`` and ``measured`` (nats).
    """
    figure = picture(10.5, 4.4)
    left = axes_of(figure, xlabel="rank", ylabel="change of the loss (nats)", place=121)
    right = axes_of(figure, xlabel="multiply-adds of the layer (%)", ylabel="change of the loss (nats)", place=122)
    for basis, (color, marker) in BASES.items():
        rows = table[table["basis"] == basis]
        style: dict[str, Any] = {"color": color, "marker": marker, "linewidth": 2, "markersize": 6}
        left.plot(rows["rank"], rows["measured"], label=f"{basis}: measured", **style)
        left.plot(rows["rank"], rows["quadratic"], "--", color=color, linewidth=1.2, label=f"{basis}: ½ δᵀ(S⊗A)δ")
        right.plot(100 * rows["macs"], rows["measured"], label=f"{basis}: measured", **style)
    for axes in (left, right):
        axes.set_yscale("symlog", linthresh=LINEAR)
        axes.axhline(0, color=GREY, linewidth=1)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=11)
    return figure


def kept_view(scores: Tensor, rank: int, basis: str, table: pd.DataFrame) -> tuple[Figure, str]:
    """Draw a layer's scores with a frame around what is kept, beside its curve: what the widget shows, with a caption.

    Args:
        scores: ``[out, in]``.
        rank: how many rows and columns are kept.
        basis: ``"channels"`` or ``"KFE"``.
        table: as for ``layer_curves``, with a column ``scores``, the sum of the scores that go.
    """
    figure = picture(10.5, 4.4)
    axes = axes_of(figure, xlabel="inputs, sorted", ylabel="outputs, sorted", title=basis, place=121)
    _map(axes, scores, _scale(scores))
    axes.add_patch(Rectangle((-0.5, -0.5), rank, rank, fill=False, edgecolor=VERMILLION, linewidth=2.5))
    axes = axes_of(figure, xlabel="rank", ylabel="measured change of the loss (nats)", place=122)
    for name, (color, marker) in BASES.items():
        rows = table[table["basis"] == name]
        axes.plot(rows["rank"], rows["measured"], marker=marker, color=color, linewidth=2, label=name)
    axes.set_yscale("symlog", linthresh=LINEAR)
    row = table[(table["basis"] == basis) & (table["rank"] == rank)].iloc[0]
    axes.plot(row["rank"], row["measured"], "o", markersize=17, markerfacecolor="none", color=INK, markeredgewidth=1.8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False, fontsize=11)
    words = (
        f"<b>{basis}, rank {rank}</b>: the layer takes {row['macs']:.0%} of its multiply-adds. "
        f"Scores that go add up to {row['scores']:.3g} nats, the quadratic model says {row['quadratic']:.3g}, "
        f"measured were {row['measured']:.3g}."
    )
    return figure, words


__all__ = ["before_and_after", "importance_maps", "kept_view", "layer_curves", "spectra"]

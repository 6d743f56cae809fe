"""Figures of ``07_kfac``: blocks of the Fisher beside their Kronecker products, and what comes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from prunelab.drawing.style import BLUE, GREEN, GREY, INK, PURPLE, VERMILLION, axes_of, picture

SIGNED = LinearSegmentedColormap.from_list("signed", [VERMILLION, "white", BLUE], N=41)
"""Few colours, so that maps make small files."""
MARKS = [(BLUE, "o"), (VERMILLION, "^"), (GREEN, "D"), (PURPLE, "v")]
CLIPPED = 0.995
"""Share of a block's entries that the colours resolve; the rest is beyond the ends of the scale."""


def label_draws(errors: Sequence[float], empirical: float) -> Figure:
    """Draw the error of the sampled Fisher against the number of draws, with that of the empirical one as a line.

    Args:
        errors: relative error of the mean over 1, 2, … draws.
        empirical: relative error of the empirical Fisher.
    """
    figure = picture(height=3.8)
    axes = axes_of(figure, xlabel="draws of labels", ylabel="‖F − exact‖ / ‖exact‖ (%)")
    number = np.arange(1, len(errors) + 1)
    axes.loglog(number, 100 * np.asarray(errors), "o", color=BLUE, markersize=5, label="sampled labels")
    axes.loglog(number, 100 * errors[0] / np.sqrt(number), "--", color=GREY, label="first draw / √draws")
    axes.axhline(100 * empirical, color=VERMILLION, linewidth=2, label="empirical: the labels of the data")
    for axis, ticks in ((axes.xaxis, (1, 2, 4, 8, 16, 32, 64)), (axes.yaxis, (2, 5, 10, 20, 50, 100, 200))):
        low, high = axis.get_view_interval()
        axis.set_ticks([tick for tick in ticks if low <= tick <= high])
        axis.set_ticks([], minor=True)
        axis.set_major_formatter("{x:.0f}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=11)
    return figure


def block_beside(block: Tensor, product: Tensor, *, blocks: int, title: str = "") -> Figure:
    """Draw a block of the Fisher, its Kronecker product and their difference, on one scale of colours.

    Args:
        block: ``[n, n]``.
        product: ``[n, n]``.
        blocks: how many output channels there are: lines are drawn between their blocks.
        title: of the figure.
    """
    figure = picture(10.5, 3.7)
    limit = float(np.quantile(block.abs().numpy(), CLIPPED)) or 1.0
    image = None
    panels = {"true block": block, "S ⊗ A": product, "difference": block - product}
    for place, (name, values) in enumerate(panels.items()):
        axes = axes_of(
            figure,
            xlabel="number of the weight",
            ylabel="number of the weight" if not place else "",
            title=name,
            place=131 + place,
        )
        image = axes.imshow(values.numpy(), cmap=SIGNED, vmin=-limit, vmax=limit, interpolation="nearest")
        edges = np.arange(1, blocks) * len(block) / blocks - 0.5
        axes.hlines(edges, -0.5, len(block) - 0.5, color=GREY, linewidth=0.5)
        axes.vlines(edges, -0.5, len(block) - 0.5, color=GREY, linewidth=0.5)
        axes.grid(False)
    assert image is not None
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.9, extend="both")
    bar.set_label("curvature (nats per squared weight)", fontsize=10.5)
    figure.suptitle(title, fontsize=12)
    return figure


def coverage_maps(counts: Mapping[str, Tensor]) -> Figure:
    """Draw how many patches see each pixel, as numbers on a map, one panel per convolution.

    Args:
        counts: title -> counts ``[height, width]``.
    """
    figure = picture(4.2 * len(counts), 4.2)
    most = max(float(count.max()) for count in counts.values())
    for place, (name, count) in enumerate(counts.items(), 1):
        axes = axes_of(figure, xlabel="pixel", ylabel="pixel", title=name, place=100 + 10 * len(counts) + place)
        axes.imshow(count.numpy(), cmap="Blues", vmin=0, vmax=1.6 * most)
        for (row, column), value in np.ndenumerate(count.numpy()):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center_baseline", fontsize=11, color=INK)
        axes.grid(False)
    return figure


def against_truth(truth: Tensor, scores: Mapping[str, Tensor]) -> Figure:
    """Draw approximate costs of channels against their true ones, both on logarithmic axes.

    Args:
        truth: ``[channels]``, positive, in nats.
        scores: name -> ``[channels]``.
    """
    figure = picture(6.4, 5.2)
    axes = axes_of(figure, xlabel="cost by the true block (nats)", ylabel="cost by an approximation (nats)")
    low, high = float(truth.min()), float(truth.max())
    axes.plot([low, high], [low, high], color=GREY, linewidth=1.5)
    for (name, score), (color, marker) in zip(scores.items(), MARKS, strict=False):
        axes.loglog(truth.numpy(), score.numpy(), marker, color=color, markersize=7, alpha=0.8, label=name)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=11)
    return figure


@dataclass(frozen=True)
class Recorded:
    """What one layer's factors and gradients are made of, image by image.

    Attributes:
        gradients: ``[n, out · in]``, summed over positions.
        outward: ``[n, out, out]``, ``Σ_q g_q g_qᵀ`` of every image.
        inward: ``[n, in, in]``, the mean of ``a_q a_qᵀ`` over the positions of every image.
    """

    gradients: Tensor
    outward: Tensor
    inward: Tensor

    @classmethod
    def of(cls, g: Tensor, a: Tensor) -> Recorded:
        """Record gradients ``[n, out, positions]`` and inputs ``[n, in, positions]``."""
        return cls((g @ a.mT).flatten(1), g @ g.mT, a @ a.mT / a.shape[2])

    def blocks(self, images: int) -> tuple[Tensor, Tensor]:
        """Return the true block and S ⊗ A over the first so many images, ``[out · in, out · in]`` each."""
        rows = self.gradients[:images]
        return rows.mT @ rows / len(rows), torch.kron(self.outward[:images].mean(0), self.inward[:images].mean(0))


def recorded_block(recorded: Recorded, layer: str, images: int, labels: str) -> tuple[Figure, str]:
    """Draw the block of a layer over some images beside its product: what the widget shows, with a caption in words."""
    block, product = recorded.blocks(images)
    error = float((block - product).norm() / block.norm())
    cosine = float((block * product).sum() / block.norm() / product.norm())
    size = float(product.trace() / block.trace())
    words = (
        f"<b>{layer}</b>, {images} images, {labels} labels: relative error {error:.2f}, cosine {cosine:.2f}; "
        f"the trace of S ⊗ A is {size:.2f} times the true one. "
        f"Rank of the true block: at most {min(images, len(block))} of {len(block)}."
    )
    return block_beside(block, product, blocks=recorded.outward.shape[1], title=f"{layer}, {images} images"), words


__all__ = ["Recorded", "against_truth", "block_beside", "coverage_maps", "label_draws", "recorded_block"]

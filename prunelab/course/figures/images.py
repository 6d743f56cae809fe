"""Images with what they show and what a network takes them for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from prunelab.drawing.style import INK, VERMILLION, picture


def image_grid(
    images: Tensor | np.ndarray, labels: Sequence[str], predictions: Sequence[str] | None = None, *, columns: int = 8
) -> Figure:
    """Show images with their labels; with predictions, what the network says, and the truth where it is wrong.

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

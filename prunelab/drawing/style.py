"""The look of every figure: colours, sizes, axes; one colour, marker and line for each criterion."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

# Okabe & Ito 2008, Color Universal Design: told apart with every common kind of colour vision.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY, PALE, INK = "#767676", "#E3E3E3", "#222222"
STYLES: dict[str, tuple[str, str, str]] = {
    "random": (GREY, "s", ":"),
    "magnitude": (BLUE, "o", "--"),
    "taylor": (VERMILLION, "^", "-"),
    "obd": (GREEN, "D", "-"),
    "obs": (PURPLE, "v", "--"),
    "kron_obd": (ORANGE, "P", "-."),
    "kron_obs": (ORANGE, "X", ":"),
    "eigendamage": (SKY, "h", "-"),
    "oba": (PURPLE, "<", "-."),
    "quadratic": (GREEN, ">", ":"),
    "gate": (INK, "*", "-"),
    "oracle": (INK, "d", ":"),
}
"""Criterion -> colour, marker and line style; other criteria take theirs from ``SPARE`` in order."""
SPARE = [(GREEN, "p", "-"), (PURPLE, "H", "--"), (ORANGE, "8", "-."), (SKY, "d", "-"), (INK, "4", ":")]
STAGES = {"before": "o", "cut": "v", "fine-tuned": "^"}


class Picture(Figure):
    """A figure that notebooks show by itself, whether or not pyplot was ever imported."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure, *, quick: bool = False) -> bytes:
    """Return a figure as the bytes of a PNG image.

    Figures without photographs have a palette of 256 colours: a third of the bytes, and no difference that one can see.

    Args:
        figure: in inches and dots per inch of its own.
        quick: for what is looked at once, as in a widget: no palette, and less work on making it small.
    """
    canvas = figure.canvas if isinstance(figure.canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)
    canvas.draw()  # once; savefig goes over the figure twice, for its layout and for the image
    width, height = canvas.get_width_height()
    image = Image.frombuffer("RGBA", (width, height), canvas.buffer_rgba()).convert("RGB")
    if not quick and not any(axes.images for axes in figure.axes):
        image = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1 if quick else 6)
    return buffer.getvalue()


def picture(width: float = 7.5, height: float = 4.2) -> Picture:
    """Return an empty figure of the house's look; sizes in inches at 100 dots per inch."""
    engine = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09)
    return Picture(figsize=(width, height), dpi=100, layout=engine, facecolor="white")


def axes_of(figure: Figure, *, xlabel: str, ylabel: str, title: str = "", place: Any = 111) -> Axes:
    """Add axes with labels, a light grid and no frame above and on the right."""
    axes = figure.add_subplot(place)
    axes.set_xlabel(xlabel, fontsize=12)
    axes.set_ylabel(ylabel, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, fontsize=12, loc="left")
    return axes


def styles(names: Iterable[str]) -> list[tuple[str, str, str, str]]:
    """Return name, colour, marker and line style of each criterion, in the order in which they first appear."""
    spare = iter(SPARE * 9)
    return [(name, *(STYLES[name] if name in STYLES else next(spare))) for name in dict.fromkeys(names)]

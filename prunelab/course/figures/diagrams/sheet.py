"""The sheet that diagrams are drawn on: boxes, matrices, arrows, braces and words, in inches from the upper left.

Flows in: places, numbers, words.  Flows out: a figure with alt text.  One unit is one inch, so a font size is what
the reader sees; a place further down has a larger ``y``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from prunelab.drawing.style import BLUE, INK, ORANGE, PALE, Picture, png

SIGNED = LinearSegmentedColormap.from_list("signed", [ORANGE, "white", BLUE])
"""Orange is negative, blue is positive, as in the chapters' maps."""
Color = str | tuple[float, float, float]
SMALLEST = 9
"""Points: no smaller font is used."""


class Diagram(Picture):
    """A drawing that carries its own alt text: in the image, in the notebook's output, and on the course's site.

    Attributes:
        alt: what it shows, for readers who do not see it.
        page: the axes that fill it, in inches, with ``y`` downwards.
    """

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), dpi=100, facecolor="white")
        self.alt = ""
        self.page = self.add_axes((0, 0, 1, 1))
        self.page.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        self.page.set_axis_off()

    def __repr__(self) -> str:
        return self.alt

    def _repr_png_(self) -> bytes:
        """Return the image, with the alt text as its description."""
        words, buffer = PngInfo(), io.BytesIO()
        words.add_itxt("Description", self.alt)
        Image.open(io.BytesIO(png(self))).save(buffer, "PNG", pnginfo=words, compress_level=9)
        return buffer.getvalue()

    def _ipython_display_(self) -> None:
        """Show the image with its alt text, whatever a notebook does with other figures."""
        from IPython.display import display

        data, metadata = {"image/png": self._repr_png_(), "text/plain": self.alt}, {"image/png": {"alt": self.alt}}
        display(data, metadata=metadata, raw=True)

    def plot(self, left: float, top: float, width: float, height: float, *, xlabel: str = "", ylabel: str = "") -> Axes:
        """Add axes for a plot; the place is that of its frame, labels are outside."""
        wide, high = self.get_size_inches()
        axes = self.add_axes((left / wide, 1 - (top + height) / high, width / wide, height / high))
        axes.set_xlabel(xlabel, fontsize=11)
        axes.set_ylabel(ylabel, fontsize=11)
        axes.tick_params(labelsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        return axes

    def words(self, x: float, y: float, text: str, **options: Any) -> None:
        """Write words around a place, in the middle of it unless told otherwise."""
        options = {"fontsize": 10.5, "ha": "center", "va": "center", "color": INK, **options}
        self.page.text(x, y, text, **options)

    def box(
        self, x: float, y: float, width: float, height: float, text: str = "", *, fill: Color = PALE, **options: Any
    ) -> None:
        """Draw a box with rounded corners around words; ``x`` and ``y`` are its upper left corner."""
        style = "round,pad=0,rounding_size=0.06"
        edge = {"edgecolor": options.pop("edge", INK), "linestyle": options.pop("line", "-"), "linewidth": 1.1}
        self.page.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, **edge))
        self.words(x + width / 2, y + height / 2, text, **options)

    def disc(self, x: float, y: float, text: str, *, radius: float = 0.15, fill: Color = "white") -> None:
        """Draw a circle with a sign in it."""
        self.page.add_patch(Circle((x, y), radius, facecolor=fill, edgecolor=INK, linewidth=1.1, zorder=3))
        self.words(x, y, text, fontsize=11, zorder=4)

    def arrow(self, *places: tuple[float, float], color: str = INK, width: float = 1.4, line: str = "-") -> None:
        """Draw a line through places, with a head at the last one."""
        *corners, last, end = places
        way = np.array([*corners, last])
        if len(way) > 1:
            self.page.plot(*way.T, color=color, linewidth=width, linestyle=line, solid_capstyle="butt")
        look: dict[str, Any] = {"color": color, "linewidth": width, "linestyle": line, "mutation_scale": 11}
        self.page.add_patch(FancyArrowPatch(last, end, arrowstyle="-|>", shrinkA=0, shrinkB=0, **look))

    def brace(self, x: float, y: float, width: float, text: str, *, color: str = INK) -> None:
        """Draw a flat brace under ``width``, with words below it."""
        left, right, middle, end = x + 0.02, x + width - 0.02, x + width / 2, y + 0.07
        self.page.plot([left, left, right, right], [y, end, end, y], color=color, linewidth=1)
        self.page.plot([middle, middle], [end, end + 0.05], color=color, linewidth=1)
        self.words(middle, end + 0.16, text)

    def cells(
        self,
        x: float,
        y: float,
        colors: Sequence[Any] | np.ndarray,
        cell: float | tuple[float, float],
        edge: str = "white",
    ) -> None:
        """Draw a matrix of coloured cells; ``colors`` has a name or RGB for each, in rows."""
        shades = np.array([[to_rgb(color) for color in row] for row in colors])
        (rows, columns), (wide, high) = shades.shape[:2], (cell, cell) if isinstance(cell, (int, float)) else cell
        edges = x + wide * np.arange(columns + 1), y + high * np.arange(rows + 1)
        self.page.pcolormesh(*edges, shades, edgecolor=edge, linewidth=0.6)
        self.frame(x, y, columns * wide, rows * high)

    def frame(self, x: float, y: float, width: float, height: float, *, color: str = INK, line: float = 1.1) -> None:
        """Draw an empty rectangle."""
        self.page.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=line, zorder=3))

    def numbers(self, x: float, y: float, values: np.ndarray, cell: float, *, fills: Any = None) -> None:
        """Draw a matrix with its numbers in the cells; ``fills`` are the colours of the cells, white by itself."""
        self.cells(x, y, np.full(values.shape, "white") if fills is None else fills, cell, "#BBBBBB")
        for (row, column), value in np.ndenumerate(values):
            self.words(x + (column + 0.5) * cell, y + (row + 0.5) * cell, number(value))


def tint(color: str, share: float = 0.3) -> tuple[float, float, float]:
    """Mix a colour with white; 1 is the colour itself."""
    red, green, blue = (1 - share + share * part for part in to_rgb(color))
    return red, green, blue


def shaded(values: np.ndarray) -> list[list[Any]]:
    """Return the colours of a matrix by sign and size, the largest size at full strength."""
    return [[SIGNED(0.5 + 0.5 * value)[:3] for value in row] for row in values / np.abs(values).max()]


def number(value: float) -> str:
    """Write a number as one writes it by hand: quarters as fractions, integers without a point."""
    if value in FRACTIONS:
        return FRACTIONS[value]
    return f"{value:.0f}".replace("-", "−") if float(value).is_integer() else f"{value:.2f}".replace("-", "−")


FRACTIONS = {0.25: "¼", 0.5: "½", 0.75: "¾"}

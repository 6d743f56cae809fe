"""Figures: what a notebook shows, as functions from plain data to a matplotlib ``Figure``.

Flows in: tables, scores, plans, images.  Flows out: self-contained figures; no pyplot, no global settings.
``style`` is the house's look; ``curves``, ``units`` and ``images`` serve every notebook; a module with a notebook's
name draws what only that notebook shows.  ``widgets`` redraws them at a slider's move.
"""

from prunelab.course.figures.images import image_grid
from prunelab.course.figures.units import budget_view, kept_units, rank_comparison
from prunelab.drawing.curves import accuracy_against_flops, trajectory
from prunelab.drawing.style import Picture, axes_of, picture, png

__all__ = [
    "Picture",
    "accuracy_against_flops",
    "axes_of",
    "budget_view",
    "image_grid",
    "kept_units",
    "picture",
    "png",
    "rank_comparison",
    "trajectory",
]

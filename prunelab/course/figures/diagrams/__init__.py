"""Diagrams: ideas of the notebooks, drawn in one style, with alt text.

Each function draws one and returns it; what it says in numbers it computes.  ``sheet`` has the boxes, matrices and
arrows; the other files have a topic each.
"""

from prunelab.course.figures.diagrams.bowls import bowl, surgeon
from prunelab.course.figures.diagrams.coupling import axes_meet, gate, group_slices, two_layers
from prunelab.course.figures.diagrams.factors import bottleneck, kronecker
from prunelab.course.figures.diagrams.order import cuts_and_training, refits
from prunelab.course.figures.diagrams.sheet import Diagram

__all__ = [
    "Diagram",
    "axes_meet",
    "bottleneck",
    "bowl",
    "cuts_and_training",
    "gate",
    "group_slices",
    "kronecker",
    "refits",
    "surgeon",
    "two_layers",
]

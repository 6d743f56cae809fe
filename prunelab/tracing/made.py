"""Widths that the model's code gives to tensors of one number, such as the first state of a recurrent loop.

``torch.zeros(len(x), 24)`` can have any width, so its axes are free while the model runs.  Where no weight produces
entries of the same width, nothing would be saved, and the axis is frozen.

Flows in: a recorder after the run.  Flows out: the same, with some more leaves frozen.
"""

from __future__ import annotations

from prunelab.tracing.axes import freeze, leaves
from prunelab.tracing.recorder import Recorder


def freeze_unproduced(recorder: Recorder) -> None:
    """Freeze every axis that code makes of one number, unless a weight has rows for it."""
    produced = {
        id(part)
        for (name, place), role, _ in recorder.marks
        if role == "produces"
        for part in leaves(recorder.parameters[name][place].axis)
    }
    for axis, where in recorder.made:
        for part in leaves(axis):
            if id(part) not in produced:
                freeze(part, where)

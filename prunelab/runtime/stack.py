"""The call stack: where in the user's code a call came from, however many wrappers it went through."""

from __future__ import annotations

import sys
from types import FrameType

OURS = ("prunelab", "torch", "contextlib", "functools", "tqdm")


def user_level() -> int:
    """Return the ``stacklevel`` with which the function that asks warns at the user's line."""
    level = 1
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in OURS:
        level, frame = level + 1, frame.f_back
    return level

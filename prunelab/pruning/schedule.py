"""How much is left after each step of an iterative run.

Flows in: how far the run is, and the share that is to be left at the end.  Flows out: the share to be left now.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from prunelab.errors import OptionError
from prunelab.options import plain_number, shown

Schedule = Callable[[float, float], float]
"""``(progress in (0, 1], share left at the end) -> share left now``; falls, and ends at the share."""


def linear(progress: float, final: float) -> float:
    """Take equal amounts of the whole: ``1 − p (1 − f)``."""
    return 1 - progress * (1 - final)


def geometric(progress: float, final: float) -> float:
    """Take equal shares of what is there: ``f^p``, so that no step is harder on the network than another."""
    return float(final**progress)


def cubic(progress: float, final: float) -> float:
    """Take much at first, while there is much to spare, and little at the end: ``f + (1 − f)(1 − p)³``.

    Source: Zhu & Gupta 2017, *To prune, or not to prune*, equation 1, for the share that is left (they write it for the
    sparsity) and from none pruned.
    """
    return final + (1 - final) * (1 - progress) ** 3


ScheduleName = Literal["linear", "geometric", "cubic"]
SCHEDULES: dict[ScheduleName, Schedule] = {"linear": linear, "geometric": geometric, "cubic": cubic}


def shares(schedule: str | Schedule, steps: int, final: float) -> list[float]:
    """Return what is to be left after each of so many steps.

    Raises:
        OptionError: there is no such schedule, or it rises, leaves (0, 1], or does not end at ``final``.

    >>> [round(share, 3) for share in shares("cubic", 4, 0.5)]
    [0.711, 0.562, 0.508, 0.5]
    """
    if not callable(schedule) and (not isinstance(schedule, str) or schedule not in SCHEDULES):
        raise OptionError(f"schedule={shown(schedule)} is not one of {', '.join(SCHEDULES)}, nor a function.")
    left = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
    found = [_number(left(step / steps, final)) for step in range(1, steps + 1)]
    if any(later > before + 1e-9 for before, later in pairwise([1.0, *found])) or not found[-1] > 0:
        raise OptionError(f"The schedule leaves {', '.join(f'{share:.3g}' for share in found)}: it must fall from 1.")
    if abs(found[-1] - final) > 1e-6:
        raise OptionError(f"The schedule ends at {found[-1]:.4g} instead of {final:.4g}.")
    return [*found[:-1], final]


def _number(left: object) -> float:
    number = plain_number(left)
    if number is None or not math.isfinite(number):
        raise OptionError(f"The schedule must return the share that is left, a number; it returned {shown(left)}.")
    return float(number)

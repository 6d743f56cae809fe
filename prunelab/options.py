"""What users may pass as a number, a flag or a word, and the error that says what was expected.

Flows in: the name of an option and what somebody gave for it.  Flows out: a plain ``float``, ``int``, ``bool`` or
``str`` in its range, or an ``OptionError``.  NumPy's numbers, tensors of one number, fractions and decimals all count
as numbers; ``True`` and ``"0.5"`` do not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from prunelab.errors import OptionError

Word = TypeVar("Word", bound=str)

LONGEST = 80
"""Characters of a wrong value that a message repeats."""


def shown(value: Any) -> str:
    """Return a value as a message repeats it: short, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def plain_number(value: Any) -> int | float | None:
    """Return a number of any library as Python's own, ``None`` for anything else.

    >>> plain_number(np.float32(0.5)), plain_number(np.int64(3)), plain_number(True), plain_number("0.5")
    (0.5, 3, None, None)
    """
    if isinstance(value, (Tensor, np.ndarray)):
        if value.ndim or (isinstance(value, Tensor) and value.is_meta):
            return None
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (Real, Decimal)):
        return None
    try:
        number = float(value)
        return int(value) if isinstance(value, Integral) else number
    except (OverflowError, ValueError):
        return None


def whole(name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """Return an option that counts something.

    Raises:
        OptionError: it is not an integer of at least ``least`` (and at most ``most``).
    """
    number = plain_number(value)
    if not isinstance(number, int) or number < least or (most is not None and number > most):
        raise OptionError(f"`{name}` must be {_whole_in_words(least, most)}, got {name}={shown(value)}.")
    return number


def _whole_in_words(least: int, most: int | None) -> str:
    if most is not None:
        return f"an integer from {least} to {most}"
    return {1: "a positive integer", 0: "an integer of at least 0"}.get(least, f"an integer of at least {least}")


def real(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    why: str = "",
) -> float:
    """Return an option that is a finite number between two bounds.

    Args:
        name: of the option.
        value: what was given.
        least: the smallest number allowed; or
        above: the number must be larger than this.
        most: the largest number allowed; or
        below: the number must be smaller than this.
        why: what to know of it, for the message.

    Raises:
        OptionError: it is not such a number.
    """
    number = plain_number(value)
    fits = (
        number is not None
        and math.isfinite(number)
        and (least is None or number >= least)
        and (above is None or number > above)
        and (most is None or number <= most)
        and (below is None or number < below)
    )
    if number is None or not fits:
        what = f": {why}" if why else ""
        wanted = _real_in_words(least, above, most, below)
        raise OptionError(f"`{name}` must be {wanted}, got {name}={shown(value)}{what}.")
    return float(number)


def _real_in_words(least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    low, high = (above if least is None else least), (below if most is None else most)
    if low is not None and high is not None:
        return f"a number in {'(' if least is None else '['}{low:g}, {high:g}{')' if most is None else ']'}"
    if low is not None:
        return f"a number of at least {low:g}" if least is not None else f"a number above {low:g}"
    return "a finite number" if high is None else f"a number of at most {high:g}"


def flag(name: str, value: Any) -> bool:
    """Return an option that is on or off.

    Raises:
        OptionError: it is neither ``True`` nor ``False``.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise OptionError(f"`{name}` must be True or False, got {name}={shown(value)}.")
    return bool(value)


def one_of(name: str, value: Any, allowed: Iterable[Word]) -> Word:
    """Return an option that is one of a few words.

    Raises:
        OptionError: it is not one of them.
    """
    known = list(allowed)
    if not isinstance(value, str) or value not in known:
        raise OptionError(f"{name}={shown(value)} is not one of {', '.join(known)}.")
    return known[known.index(value)]


def module(name: str, value: Any) -> nn.Module:
    """Return an option that is a module.

    Raises:
        OptionError: it is something else.
    """
    if not isinstance(value, nn.Module):
        raise OptionError(f"`{name}` must be a torch.nn.Module, got {shown(value)}.")
    return value


def path(name: str, value: Any) -> Path:
    """Return an option that is a path.

    Raises:
        OptionError: it is something else.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise OptionError(f"`{name}` must be a path, got {shown(value)}.")
    return Path(value)


def parts(name: str, value: Any) -> list[str | nn.Module]:
    """Return names and modules as a list; one of them alone will do.

    Raises:
        OptionError: something is neither a name nor a module.
    """
    given = [value] if isinstance(value, (str, nn.Module)) or not isinstance(value, Iterable) else list(value)
    wrong = [item for item in given if not isinstance(item, (str, nn.Module))]
    if wrong:
        raise OptionError(f"`{name}` takes names and modules, one or a list of them; {shown(wrong[0])} is neither.")
    return given


def function(name: str, value: Any, takes: str) -> Any:
    """Return an option that is called.

    Args:
        name: of the option.
        value: what was given.
        takes: how it is called, for the message.

    Raises:
        OptionError: it cannot be called.
    """
    if not callable(value):
        raise OptionError(f"`{name}` must be a function, called as {takes}, got {name}={shown(value)}.")
    return value

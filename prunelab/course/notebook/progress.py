"""A bar for loops that take longer than a second, which leaves nothing behind in a saved notebook."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")
DELAY = 1.0
"""Seconds that a loop may take before a bar appears."""
BAR = re.compile(r"\d+%\|.*\|\s*\d+/\d+ \[|^\S*: \d+\w* \[|^\d+\w* \[")


def progress(items: Collection[Item], what: str) -> Iterator[Item]:
    """Return the items one after the other, with a bar if that takes longer than a second; it goes when all is done.

    Args:
        items: as many as ``len`` says.
        what: what is being done, in a word or two, shown before the bar.

    >>> [2**bits for bits in progress(range(3), "counting")]
    [1, 2, 4]
    """
    return iter(tqdm(items, desc=what, leave=False, delay=DELAY))


def is_bar(data: dict[str, Any]) -> bool:
    """Whether the data of a cell's output are a progress bar, which says nothing once the cell has run."""
    return bool(BAR.search(data.get("text/plain", "")))

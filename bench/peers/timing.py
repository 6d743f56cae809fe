"""Times of several ways to do the same, side by side: in turns, in one process, medians.

Flows in: functions.  Flows out: for each of them seconds of the processor and of the clock, or the error it raised.
"""

from __future__ import annotations

import gc
import signal
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

Row = dict[str, Any]


def failure(error: BaseException) -> str:
    """Return an exception as one line: its class and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise ``TimeoutError`` in what takes longer; where there are no alarms, as on Windows, wait for it.

    Raises:
        TimeoutError: it was not done in time.
    """
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def interleaved(
    contestants: Mapping[str, Callable[..., object]],
    repeats: int,
    *,
    prepare: Mapping[str, Callable[[], tuple]] | None = None,
    slow: Collection[str] = (),
) -> dict[str, Row]:
    """Time each function `repeats` times, one after the other in every round, after a round that warms up.

    Args:
        contestants: name -> function; one that raises is not called again.
        repeats: rounds that count.
        prepare: name -> what makes the arguments of a call; it is not timed.
        slow: names of those that are timed twice at most, and do not warm up.

    Returns:
        name -> `cpu` and `wall`, medians in seconds, and the number of `rounds`; or `error`.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    errors: dict[str, str] = {}
    once = range(1, 2 if repeats < 5 else 3)
    for number in range(repeats + 1):
        gc.collect()
        for name, function in contestants.items():
            if name in errors or (name in slow and number not in once):
                continue
            arguments = prepare[name]() if prepare and name in prepare else ()
            try:
                spent = timed(function, *arguments)
            except Exception as error:  # what a peer cannot do is part of the result
                errors[name] = failure(error)
                continue
            if number:
                times[name].append(spent)
    found: dict[str, Row] = {}
    for name, values in times.items():
        if name in errors:
            found[name] = {"error": errors[name]}
        else:
            cpu, wall = (statistics.median(column) for column in zip(*values, strict=True))
            found[name] = {"cpu": cpu, "wall": wall, "rounds": len(values)}
    return found


def timed(function: Callable[..., object], *arguments: Any) -> tuple[float, float]:
    """Call a function and return seconds of the processor, over all threads, and of the clock."""
    synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    function(*arguments)
    synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall


def synchronize() -> None:
    """Wait for the GPU, if one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def clock(row: Row) -> str:
    """Return which time a row's ratios are of: on a GPU the processor only waits."""
    return "wall" if row.get("device") == "cuda" else "cpu"

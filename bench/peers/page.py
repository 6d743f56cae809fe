"""Rows into Markdown: tables, numbers with two digits that matter, and the page."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bench.peers import TABLES
from bench.peers.timing import clock

Row = dict[str, Any]


class Ratio(NamedTuple):
    """One line of the table of ratios.

    Attributes:
        what: what was measured.
        against: whom it is compared with, and how.
        value: how many times.
        goal: what was asked for, in words; empty where nothing was.
        met: whether it was.
        over: what it is the median of.
    """

    what: str
    against: str
    value: float
    goal: str = ""
    met: bool = True
    over: str = ""


def table(head: Sequence[str], body: Iterable[Sequence[object]], *, text: int = 1) -> Iterator[str]:
    """Yield the lines of a Markdown table; the first `text` columns are text, the others are numbers."""
    yield "| " + " | ".join(head) + " |"
    yield "|---" * text + "|---:" * (len(head) - text) + "|"
    for row in body:
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"


def seconds(value: float | None) -> str:
    """Return a time with three digits that matter."""
    if value is None:
        return "–"
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def times(value: float | None) -> str:
    """Return a ratio with two digits that matter."""
    if value is None or value != value:
        return "–"
    return f"{value:.0f}×" if value >= 20 else f"{value:.1f}×" if value >= 1.95 else f"{value:.2f}×"


def median(values: Iterable[float]) -> float:
    """Return the median, not a number where there is nothing."""
    found = [value for value in values if value == value]
    return statistics.median(found) if found else float("nan")


def unique(rows: Iterable[Row], name: str) -> list[Any]:
    """Return the values of a column, each once, in the order of rows."""
    return list(dict.fromkeys(row[name] for row in rows if name in row))


def chosen(rows: Iterable[Row], **key: Any) -> list[Row]:
    """Return the rows with these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in key.items())]


def pivot(rows: list[Row], case: str, method: str, floor: str, clock: str = "cpu") -> Iterator[str]:
    """Yield a table with a line per case and a column per method: times of the first method, then multiples of it."""
    methods = unique(rows, method)
    body = []
    for name in unique(rows, case):
        own = {row[method]: row for row in chosen(rows, **{case: name})}
        base = own.get(floor, {}).get(clock)
        cells = [name, seconds(base)]
        for other in methods:
            if other == floor:
                continue
            value = own.get(other, {}).get(clock)
            cells.append("fails" if "error" in own.get(other, {}) else times(value / base if value and base else None))
        body.append(cells)
    yield from table([case, floor, *(other for other in methods if other != floor)], body)


def multiples(found: list[Row], floor: str) -> Iterator[str]:
    """Yield, for each device, a table of multiples of the floor by network and method, and what failed."""
    for device in unique(found, "device"):
        own = chosen(found, device=device)
        yield f"{device}, {own[0]['images']} images in batches of {own[0]['batch']}; multiples of the floor:"
        yield ""
        yield from pivot(own, "network", "method", floor, clock(own[0]))
        yield from errors(own, "network", "method")
        yield ""


def errors(rows: Iterable[Row], case: str, method: str) -> Iterator[str]:
    """Yield what failed, in the words of its own exception."""
    lines = [f"- {row[method]}, {row[case]}: `{row['error'].replace('`', chr(39))}`" for row in rows if "error" in row]
    if lines:
        yield from ["", "What failed, in its own words:", "", *lines]


def ratio_lines(kept: dict[str, Any], *, goals: bool = False) -> list[str]:
    """Return the table of ratios, of whatever was measured; with `goals`, only of what has one, accuracies apart."""
    body = []
    for name in TABLES:
        rows = chosen(kept["rows"], table=name)
        for ratio in importlib.import_module(f"bench.peers.{name}").ratios(rows) if rows else []:
            if goals and (not ratio.goal or name == "quality"):
                continue
            verdict = "" if not ratio.goal else f"{ratio.goal}: {'met' if ratio.met else 'missed'}"
            body.append((ratio.what, ratio.against, times(ratio.value), ratio.over, verdict))
    return list(table(["what", "against", "ratio", "median over", "goal"], body, text=2)) if body else []


def summary(kept: dict[str, Any]) -> list[str]:
    """Return what the README shows: the ratios that have a goal, and the best accuracies of each side."""
    rows = chosen(kept["rows"], table="quality")
    best = importlib.import_module("bench.peers.quality").best(rows) if rows else []
    return [*ratio_lines(kept, goals=True), "", *best]


def markdown(kept: dict[str, Any]) -> str:
    """Return the whole page."""
    lines = ["# Side by side with the peers", "", *_opening(kept), "", *ratio_lines(kept), ""]
    for name in TABLES:
        rows = chosen(kept["rows"], table=name)
        if rows:
            module = importlib.import_module(f"bench.peers.{name}")
            lines += [f"## {module.TITLE}", "", *module.about(), "", *module.markdown(rows), "", _how(kept, name), ""]
    return "\n".join(lines)


def _opening(kept: dict[str, Any]) -> Iterator[str]:
    machine = kept["machine"]
    yield (
        f"`make bench` writes this page ([peers.json](peers.json) has every row). Machine: "
        f"{machine['cores']} cores, {machine['system']}, Python {machine['python']}"
        + (f", {machine['gpu']}" if "gpu" in machine else "; no GPU")
        + ". Versions: "
        + ", ".join(f"{name} {version}" for name, version in kept["versions"].items())
        + "."
    )
    yield ""
    yield (
        "In each table all libraries run in one process, in turns, on the same model and data; peers are used as "
        "their documentation says. Times are medians of repeated runs after a first one: processor seconds on one "
        "thread, wall-clock seconds on a GPU; peers.json has both."
    )


def _how(kept: dict[str, Any], name: str) -> str:
    run = kept["runs"].get(name, {})
    flag = " --quick" if run.get("quick") else ""
    return (
        f"`python -m bench.peers.{name}{flag}`, {run.get('seconds', 0):.0f} s, commit {run.get('commit', 'unknown')}, "
        f"{run.get('processor', 'unknown processor')}, load of the machine at its start {run.get('load', 0):.1f}."
    )

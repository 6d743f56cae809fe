"""The page that compares criteria: what their docstrings say, beside what the benches measured.

Flows in: ``prunelab.criteria``, ``bench/criteria.json``, ``bench/curvature.json``.  Flows out: Markdown to include; no
number on it is written by hand.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from prunelab.criteria import CRITERIA
from prunelab.criteria.base import Criterion

NONE = "–"
COSTS = (
    "Time and memory on one CPU thread. The floor is one forward and one backward pass over the same data; all else is "
    "in multiples of it. Each criterion says which of these it needs; `pl.collect` measures several in one pass."
)
ACCURACIES = (
    "The last columns of each table are accuracies in percent on test images, right after a cut to that share of the "
    "FLOPs, all at once, ranked over the whole network by score per FLOP saved, without any training: before → after "
    "compensation, where that was measured."
)
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the docstring of a criterion says.

    Attributes:
        name: as ``prunelab.criteria.get`` takes it.
        headline: the first sentence, with the formula.
        keeps: what stays of the quadratic model.
        cost: in passes over the data.
        body: everything else before the sections.
        source: paper and equation.
        options: name -> (default, what it does).
    """

    name: str
    headline: str
    keeps: str
    cost: str
    body: str
    source: str
    options: dict[str, tuple[str, str]]


def entry(name: str) -> Entry:
    """Return what the docstring of a criterion says.

    Raises:
        ValueError: it lacks a part that the page needs; the message says which.
    """
    kind = CRITERIA[name]
    text = inspect.getdoc(kind) or ""
    paragraphs = [" ".join(part.split()) if "\n- " not in part else part for part in re.split(r"\n\s*\n", text)]
    source = next((part.removeprefix("Source:").strip() for part in paragraphs if part.startswith("Source:")), "")
    plain = [part for part in paragraphs if not re.match(r"(Source|Args|Raises|Returns|Attributes|Example):", part)]
    sentences = [_sentences(part) for part in plain[1:]]
    keeps = " ".join(one for part in sentences for one in part if one.startswith("In the quadratic model"))
    cost = " ".join(_from_cost(part) for part in sentences if _from_cost(part))
    rest = [" ".join(_rest(part)) for part in sentences]
    for what, found in (("In the quadratic model …", keeps), ("Cost: …", cost), ("Source: …", source)):
        if not found:
            raise ValueError(f"The docstring of {kind.__name__} has no sentence that begins with {what!r}")
    body = "\n\n".join(part for part in rest if part)
    return Entry(name, plain[0], keeps, cost, body, source, _options(kind))


def _sentences(paragraph: str) -> list[str]:
    """Split after full stops that end a sentence; a list stays in one piece."""
    if "\n- " in paragraph:
        return [paragraph]
    return [part for part in re.split(r"(?<=[.)])\s+(?=[A-Z`(])(?<!et al\. )", paragraph) if part]


def _from_cost(sentences: list[str]) -> str:
    at = next((number for number, one in enumerate(sentences) if re.match(r"Cost( per batch)?:", one)), None)
    return "" if at is None else " ".join(sentences[at:])


def _rest(sentences: list[str]) -> list[str]:
    at = next((number for number, one in enumerate(sentences) if re.match(r"Cost( per batch)?:", one)), len(sentences))
    return [one for one in sentences[:at] if not one.startswith("In the quadratic model")]


def _options(kind: type[Criterion]) -> dict[str, tuple[str, str]]:
    """Return every option with its default and what the docstring, or that of a base class, says of it."""
    said: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        for names, text in _arguments(inspect.getdoc(base) if "__doc__" in vars(base) else None):
            for option in names:
                if option not in said or not re.match(r"(as in|see) ``", text):
                    own = re.sub(r"\bsee ``\w+``, as all other options\.?\s*", "", text)
                    said[option] = own or said.get(option, "")
    return {
        field.name: (_default(field), said.get(field.name, ""))
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
        if field.init
    }


def _arguments(doc: str | None) -> Iterator[tuple[list[str], str]]:
    """Yield names and text of every entry under ``Args:``."""
    section = re.search(r"^Args:\n((?: {4}.*\n?|\n)+)", doc or "", flags=re.MULTILINE)
    for block in re.split(r"\n(?= {4}\S)", section[1].rstrip()) if section else []:
        names, _, text = " ".join(block.split()).partition(":")
        yield names.split(", "), text.strip()


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return ""
    if isinstance(field.default, str):
        return f'"{field.default}"'
    return getattr(field.default, "__name__", None) or repr(field.default)


# ── what was measured ─────────────────────────────────────────────────────────────────────────────────────────────


def measured(rows: Iterable[Row], name: str) -> dict[str, list[Row]]:
    """Return the rows of one criterion, by the label of the variant."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if re.match(r"\w+", row["criterion"])[0] == name:  # type: ignore[index]
            found.setdefault(row["criterion"], []).append(row)
    return found


def rank_correlation(rows: Iterable[Row], network: str) -> str:
    """Return Spearman's correlation with the oracle: the mean over seeds, and their deviation."""
    found = [row["spearman"] for row in rows if row["table"] == "correlation" and row["network"] == network]
    if not found:
        return NONE
    return f"{mean(found):.2f}" + (f" ± {stdev(found):.2f}" if len(found) > 1 else "")


def accuracy(rows: Iterable[Row], network: str, share: float) -> str:
    """Return accuracy in percent after a cut at once, ranked per FLOP: before → after compensation."""
    key = {"table": "cuts", "network": network, "steps": 1, "per": "flops", "flops": share}
    found = [row for row in rows if all(row.get(name) == value for name, value in key.items())]
    ways = ([row for row in found if row.get("compensate") == which] for which in (None, "consumers"))
    return " → ".join(f"{100 * mean(row['accuracy'] for row in way):.1f}" for way in ways if way) or NONE


def networks(rows: Iterable[Row]) -> list[str]:
    """Return the networks that were measured."""
    return list(dict.fromkeys(row["network"] for row in rows))


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────


def page(root: Path) -> str:
    """Return the page's tables and sections, in Markdown."""
    rows = json.loads((root / "bench" / "criteria.json").read_text(encoding="utf-8"))["rows"]
    shares = sorted({row["flops"] for row in rows if row["table"] == "cuts"}, reverse=True)
    curvature = json.loads((root / "bench" / "curvature.json").read_text(encoding="utf-8"))
    entries = [entry(name) for name in CRITERIA]
    parts = [_overview(entries, rows), "## What the statistics cost", COSTS, _costs(curvature)]
    sections = (_section(one, measured(rows, one.name), networks(rows), shares) for one in entries)
    parts += ["## One by one", ACCURACIES, *sections]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(head: list[str], body: Iterable[list[str]], numbers_from: int = 1) -> str:
    """Return a Markdown table; columns from ``numbers_from`` on are aligned to the right."""
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|" + "|".join("---" if at < numbers_from else "---:" for at in range(len(head))) + "|")
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in body)])


def _formula(headline: str) -> str:
    found = re.findall(r"``(.+?)``", headline)
    return " or ".join(f"``{formula}``" for formula in found[: 2 if "or by ``" in headline else 1]) or NONE


def _overview(entries: list[Entry], rows: list[Row]) -> str:
    names = networks(rows)
    body = []
    for one in entries:
        found = measured(rows, one.name)
        first = next(iter(found.values()), [])
        correlations = [rank_correlation(first, network) for network in names]
        body.append([f"[`{one.name}`](#{_anchor(one)})", _formula(one.headline), _short(one.keeps), *correlations])
    head = ["criterion", "a unit's score", "of the quadratic model it keeps", *(f"`{name}`" for name in names)]
    return table(head, body, numbers_from=3)


def _short(keeps: str) -> str:
    """Return the first clause; the rest is shown under the criterion."""
    clause = re.match(r"In the quadratic model (?:this keeps )?((?:``.*?``|[^,:;.])+)", keeps)
    return clause[1] if clause else NONE


def _anchor(one: Entry) -> str:
    return f"criterion-{one.name.replace('_', '-')}"


def _costs(curvature: Any) -> str:
    rows = curvature["rows"] if isinstance(curvature, dict) else curvature
    head = list(rows[0])
    return table(head, ([str(row.get(column, NONE)) for column in head] for row in rows))


def _section(one: Entry, found: dict[str, list[Row]], names: list[str], shares: list[float]) -> str:
    kind = CRITERIA[one.name]
    lines = [f"({_anchor(one)})=", f"### {one.name}", "", f"**{one.headline}**", ""]
    lines += [f"{one.keeps} {one.cost}", "", *([one.body, ""] if one.body else []), f"Source: {one.source}", ""]
    lines += [f"Reference: `{kind.__name__}`.", ""]
    if one.options:
        body = ([f"`{name}`", f"`{default}`", text or NONE] for name, (default, text) in one.options.items())
        lines += ["````{dropdown} Options", table(["option", "default", "meaning"], body, 3), "````", ""]
    if found:
        head = ["variant", "network", "rank correlation", *(f"{share:.0%}" for share in shares)]
        body = (
            [label, f"`{network}`", rank_correlation(rows, network), *(accuracy(rows, network, at) for at in shares)]
            for label, rows in found.items()
            for network in names
        )
        lines += [table(head, (row for row in body if set(row[2:]) != {NONE}), 2)]
    else:
        lines += ["Not in the benches."]
    return "\n".join(lines)

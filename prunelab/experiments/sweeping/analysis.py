"""What a sweep has found: methods in cases, means over seeds, ranks with confidence, published numbers beside ours.

Flows in: the table of a sweep, finished or not.  Flows out: tables.

A *method* is a criterion with whatever else was varied for it; a *case* is a network, a data set and a budget, in which
methods are side by side; runs of one method in one case differ by their seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from prunelab.experiments.shootout.compare import bootstrap

METHOD = "criterion"
"""The parameter that a method is named after."""
PANEL = ("dataset", "model", "checkpoint")
"""Parameters that say on what methods are compared."""
SETTING = ("budget", "share")
"""Parameters that say how much is left."""
REPEAT = ("seed",)
"""Parameters that only repeat a run."""
LEFT = ("flops_kept", "params_kept", "weights_kept", "latency_kept")
"""Columns of what is left, to draw a metric against."""


def compared(table: pd.DataFrame, varied: Sequence[str]) -> pd.DataFrame:
    """Return the rows of a sweep that are done, with columns ``method``, ``panel``, ``setting`` and ``case``.

    Args:
        table: of ``records.table``.
        varied: names of the parameters that differ between jobs.
    """
    rows = table[table["status"] == "done"].copy()
    names = [name for name in varied if name in rows and name not in REPEAT]
    panel = [name for name in names if name in PANEL]
    setting = [name for name in names if name in SETTING]
    rows["panel"] = [_words(row, panel or [name for name in PANEL[:2] if name in rows]) for row in _records(rows)]
    rows["setting"] = [_words(row, setting) for row in _records(rows)]
    method = _telling(rows, [name for name in names if name not in (*PANEL, *SETTING)])
    rows["method"] = [_words(row, method) or str(row.get(METHOD, "all")) for row in _records(rows)]
    rows["case"] = [" | ".join(filter(None, pair)) for pair in zip(rows["panel"], rows["setting"], strict=True)]
    return rows


def _records(rows: pd.DataFrame) -> list[dict[Any, Any]]:
    return rows.to_dict("records")


def _telling(rows: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Return the parameters that tell methods apart: not those that follow from network, budget and the others."""
    chosen = [METHOD] if METHOD in names else []
    for name in names:
        if name not in chosen:
            groups = rows.groupby(["panel", "setting", *chosen], dropna=False, sort=False)
            if groups[name].nunique(dropna=False).max() > 1:
                chosen.append(name)
    return chosen


def _words(row: Mapping[Any, Any], names: Iterable[str]) -> str:
    return ", ".join(filter(None, (_word(name, row[name]) for name in names)))


def _word(name: str, value: Any) -> str:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return ""
    if name in (METHOD, *PANEL, "method"):
        return str(value)
    if isinstance(value, bool):
        return name if value else ""
    if name == "options":
        found = json.loads(value)
        return " ".join(f"{key}={word}" for key, word in found.items()) if isinstance(found, dict) else str(value)
    if isinstance(value, float):
        return f"{name} {value:g}"
    return str(value) if name == "budget" else f"{name} {value}"


def means(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return one row per case and method: mean and standard deviation of ``metric``, number of runs, what is left."""
    left = [name for name in LEFT if name in rows and rows[name].notna().any()]
    groups = rows.groupby(["panel", "setting", "method"], sort=False)
    found = groups[metric].agg(["mean", "std", "count"]).rename(columns={"mean": metric, "count": "runs"})
    return found.join(groups[left].mean()).reset_index()


def blocks(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return ``metric`` by case and seed (rows) and method (columns), where all methods that are ranked have a number.

    Methods that are missing in more than half of the blocks are not ranked; blocks that lack one that is are left out.
    """
    seed = [name for name in REPEAT if name in rows]
    wide = rows.pivot_table(index=["case", *seed], columns="method", values=metric, aggfunc="mean", sort=False)
    wide = wide.loc[:, wide.notna().mean() >= 0.5]
    return wide.dropna()


def ranking(rows: pd.DataFrame, metric: str, *, lower_is_better: bool = False, draws: int = 10_000) -> pd.DataFrame:
    """Return the methods, best first: mean rank and mean metric over blocks, each with its 95 % interval.

    Within every block, a case with one seed, methods are ranked by ``metric``, equal ones sharing the mean of their
    ranks.  Intervals are percentiles of a bootstrap in two stages, over cases and over seeds within them
    (``shootout.compare.bootstrap``); with few cases they say little.

    Returns:
        Columns ``method``, ``mean_rank``, ``low``, ``high``, the metric, ``METRIC_low``, ``METRIC_high``, ``first``
        (share of blocks in which it has the best value) and ``blocks``.
    """
    wide = blocks(rows, metric)
    columns = ["method", "mean_rank", "low", "high", metric, f"{metric}_low", f"{metric}_high", "first", "blocks"]
    if wide.empty:
        return pd.DataFrame(columns=columns)
    placed = wide.rank(axis=1, ascending=lower_is_better)
    cases = list(wide.index.get_level_values("case"))
    found = pd.DataFrame({"mean_rank": placed.mean(), metric: wide.mean(), "blocks": len(wide)})
    found["low"], found["high"] = bootstrap(placed, cases, draws=draws)
    found[f"{metric}_low"], found[f"{metric}_high"] = bootstrap(wide, cases, draws=draws)
    found["first"] = placed.eq(placed.min(axis=1), axis=0).mean()
    return found.sort_values("mean_rank", kind="stable").reset_index()[columns]


def beside(rows: pd.DataFrame, published: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return published numbers beside ours: the mean of the runs that match, their deviation and number.

    Args:
        rows: of ``compared``.
        published: entries of a grid: ``match``, ``source`` and numbers by column.
    """
    found = []
    for entry in published:
        same = rows
        for name, value in entry["match"].items():
            same = same[[_equal(given, value) for given in same[name]]] if name in same else same.iloc[:0]
        what = ", ".join(_word(name, value) or f"{name} {value}" for name, value in entry["match"].items())
        for metric, number in entry.items():
            if metric in ("match", "source"):
                continue
            ours = same[metric].dropna() if metric in same else pd.Series(dtype=float)
            row = {"case": what, "metric": metric, "published": float(number), "ours": ours.mean(), "std": ours.std()}
            row |= {"runs": len(ours), "difference": ours.mean() - number, "source": entry["source"]}
            found.append(row)
    return pd.DataFrame(found)


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, dict):
        theirs = json.dumps(theirs, sort_keys=True)
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (ours, theirs))
    return math.isclose(ours, theirs, rel_tol=1e-9) if numbers else bool(ours == theirs)

"""A widget that shows a sweep: any network, any measure of what is left, any choice of methods.

Flows in: the table of a sweep.  Flows out: a static figure for one choice, or a widget that moves through all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from prunelab import data
from prunelab.errors import PruneLabError
from prunelab.experiments.figures.shootout import NAMES
from prunelab.experiments.figures.sweeps import pareto
from prunelab.experiments.sweeping import records
from prunelab.experiments.sweeping.analysis import LEFT, METHOD, PANEL, compared

if TYPE_CHECKING:
    from prunelab.course.widgets import Explorer

EXAMPLE = "shootout/quick.csv"
"""The table of a sweep that comes with prunelab, in ``data.root()``."""


def found(folder: str | Path = "", own: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """Return what a sweep has found so far, ready to be compared: see ``analysis.compared``.

    Args:
        folder: of the sweep; by default the sweep that comes with prunelab.
        own: parameters and result of one run, to show instead where no sweep comes with prunelab.

    Raises:
        DataError: the folder holds no sweep.
        PruneLabError: none of its jobs is done.
    """
    if folder:
        rows = compared(records.table(folder), records.manifest(folder)["varied"])
    else:
        path = data.root() / EXAMPLE
        if path.is_file():
            rows = of_table(path)
        elif own is not None:
            rows = compared(pd.DataFrame([{**own, "status": "done"}]), [METHOD])
        else:
            raise PruneLabError(f"There is no table of a sweep at {path}: give the folder of one.")
    if rows.empty:
        raise PruneLabError(f"None of the jobs in {folder} is done yet.")
    return rows


def of_table(path: str | Path) -> pd.DataFrame:
    """Return what was compared, read from ``compared.csv`` in a report's folder."""
    rows = pd.read_csv(path, keep_default_na=False, na_values=[""])
    texts = [name for name in ("panel", "setting", "method", "case", *PANEL) if name in rows]
    return rows.fillna(dict.fromkeys(texts, ""))


def measures(rows: pd.DataFrame) -> dict[str, str]:
    """Return what can be drawn along the axis of what is left: its name in words -> its column."""
    there = [name for name in LEFT if name in rows and rows[name].notna().any()]
    return {NAMES[name]: name for name in there}


def drawing(
    rows: pd.DataFrame,
    panel: str,
    left: str,
    methods: Sequence[str] = (),
    *,
    metric: str = "accuracy",
    mark: tuple[float, float] | None = None,
) -> tuple[Figure, str]:
    """Return the figure of one choice, and what it shows in words, as HTML.

    Args:
        rows: of ``found``.
        panel: the data set and network.
        left: column of what is left.
        methods: those to show; all by default.
        metric: column of what is compared.
        mark: ``(left, metric)`` of a run to point out.
    """
    here = rows[(rows["panel"] == panel) & rows["method"].isin(list(methods) or list(rows["method"]))]
    if here.empty:
        here = rows[rows["panel"] == panel]
    best = here.loc[here[metric].idxmax()]
    words = (
        f"<b>{escape(panel)}</b>: {len(here)} runs of {here['method'].nunique()} methods. "
        f"The best, {escape(best['method'])}, has "
        f"{metric} {best[metric]:.1%} with {best[left]:.0%} of the {NAMES.get(left, left)}."
    )
    return pareto(here, left, metric, title=panel, mark=mark), words


def explorer(
    rows: pd.DataFrame, *, metric: str = "accuracy", mark: tuple[float, float] | None = None, panel: str = ""
) -> Explorer:
    """Return a widget with the choice of network, of what is left, and of a criterion to look at alone.

    Args:
        rows: of ``found``.
        metric: column of what is compared.
        mark: ``(left in FLOPs, metric)`` of a run to point out, on the panel ``panel``.
        panel: where the mark belongs.
    """
    from prunelab.course.widgets import explore

    panels = list(dict.fromkeys(rows["panel"]))
    names = rows[METHOD] if METHOD in rows else rows["method"]
    groups = {"all": [], **{name: list(rows["method"][names == name].unique()) for name in dict.fromkeys(names)}}

    def draw(network: str, left: str, criterion: str) -> tuple[Figure, str]:
        shown = mark if left == "flops_kept" and network == panel else None
        return drawing(rows, network, left, groups[criterion], metric=metric, mark=shown)

    return explore(draw, network=panels, left=measures(rows), criterion=list(groups))

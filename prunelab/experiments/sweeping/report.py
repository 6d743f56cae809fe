"""The report of a sweep, finished or not: tables, figures, a ranking, a page, a notebook.

Flows in: the folder of a sweep.  Flows out: a folder of self-contained files.

- ``table.csv``, ``table.parquet``: one row per result, as ``records.table`` has it;
- ``compared.csv``: those that are done, with their method and case; ``means.csv``: means over seeds;
- ``history.csv``: what happened during each run; ``ranking.csv``; ``published.csv``: published numbers beside ours;
- ``….png``: accuracy against what is left, ranks;
- ``summary.md``, ``report.html``: for people; ``report.ipynb``: to look around in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from prunelab.drawing.style import png
from prunelab.errors import DataError, PruneLabError
from prunelab.experiments.figures.sweeps import ranking as ranking_figure
from prunelab.experiments.sweeping import analysis, records
from prunelab.experiments.sweeping.explore import drawing, measures
from prunelab.experiments.sweeping.notebook import notebook
from prunelab.experiments.sweeping.page import markdown, page
from prunelab.files.atomic import replacing


@dataclass(frozen=True)
class Findings:
    """All that a report says.

    Attributes:
        folder: of the sweep.
        manifest: of the sweep.
        metric: column that is compared.
        table: every job.
        rows: those that are done, as ``analysis.compared`` has them.
        means: over seeds.
        ranking: of methods.
        published: numbers of others beside ours.
        figures: name -> PNG, and what it shows.
        failed: jobs with their error.
        missing: names of jobs without a result.
    """

    folder: Path
    manifest: dict[str, Any]
    metric: str
    table: pd.DataFrame
    rows: pd.DataFrame
    means: pd.DataFrame = field(default_factory=pd.DataFrame)
    ranking: pd.DataFrame = field(default_factory=pd.DataFrame)
    published: pd.DataFrame = field(default_factory=pd.DataFrame)
    figures: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    failed: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def report(folder: str | Path, out: str | Path | None = None, *, metric: str = "accuracy") -> list[Path]:
    """Write the report of a sweep and return the paths of its files.

    Args:
        folder: of the sweep, which need not be finished.
        out: where the files go; by default ``FOLDER/report``.
        metric: column of the results that is compared; the higher the better, unless it is a loss.

    Raises:
        DataError: the folder holds no sweep, or no job has such a column.
        PruneLabError: the files cannot be written.
    """
    found = findings(folder, metric)
    place = Path(folder) / "report" if out is None else Path(out)
    tables = {
        "table": found.table,
        "compared": found.rows,
        "means": found.means,
        "ranking": found.ranking,
        "published": found.published,
        "history": records.histories(folder),
    }
    written: list[Path] = []
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            if len(table):
                written.append(_write(place / f"{name}.csv", table.to_csv(index=False).encode()))
        written.append(_parquet(place / "table.parquet", found.table))
        for name, (image, _) in found.figures.items():
            written.append(_write(place / f"{name}.png", image))
        written.append(_write(place / "summary.md", markdown(found).encode()))
        if len(found.rows):
            written.append(_write(place / "report.ipynb", notebook(found).encode()))
        written.append(_write(place / "report.html", page(found, place).encode()))
    except OSError as error:
        raise PruneLabError(f"The report cannot be written to {place}: {error.strerror}.") from error
    return written


def findings(folder: str | Path, metric: str = "accuracy") -> Findings:
    """Return what a sweep has found so far.

    Raises:
        DataError: the folder holds no sweep, or no job that is done has such a column.
    """
    manifest, table = records.manifest(folder), records.table(folder)
    jobs = list(records.jobs(folder))
    failed = [
        {"job": job["name"], "folder": job["folder"], "attempts": record["attempts"], **record["error"]}
        for job, record in jobs
        if record is not None and record["status"] == "failed"
    ]
    missing = [job["name"] for job, record in jobs if record is None]
    rows = analysis.compared(table, manifest["varied"])
    if rows.empty:
        return Findings(Path(folder), manifest, metric, table, rows, failed=failed, missing=missing)
    numbers = [name for name in rows if pd.api.types.is_numeric_dtype(rows[name])]
    if metric not in numbers:
        raise DataError(f"The results in {folder} have no numbers called {metric!r}; they have {', '.join(numbers)}.")
    ranking = analysis.ranking(rows, metric, lower_is_better="loss" in metric)
    return Findings(
        Path(folder),
        manifest,
        metric,
        table,
        rows,
        analysis.means(rows, metric),
        ranking,
        analysis.beside(rows, manifest["published"]),
        _figures(rows, ranking, metric),
        failed,
        missing,
    )


def _figures(rows: pd.DataFrame, ranking: pd.DataFrame, metric: str) -> dict[str, tuple[bytes, str]]:
    found = {}
    panels: Sequence[str] = list(dict.fromkeys(rows["panel"]))
    for left in measures(rows).values():
        for panel in panels:
            figure, words = drawing(rows, panel, left, metric=metric)
            name = f"{metric}-{left}" + (f"-{panel.replace('/', '-').replace(', ', '-')}" if len(panels) > 1 else "")
            found[name.replace(" ", "")] = (png(figure), words)
    if len(ranking) > 1:
        words = f"Mean rank by {metric} over {ranking['blocks'].iloc[0]} blocks, with 95 % intervals."
        found["ranking"] = (png(ranking_figure(ranking)), words)
    return found


def _write(path: Path, content: bytes) -> Path:
    with replacing(path) as fresh:
        fresh.write_bytes(content)
    return path


def _parquet(path: Path, table: pd.DataFrame) -> Path:
    try:
        with replacing(path) as fresh:
            table.to_parquet(fresh, index=False)
    except ImportError as error:
        raise PruneLabError(f"Parquet files need pyarrow ({error}): pip install 'prunelab[sweep]'.") from error
    return path

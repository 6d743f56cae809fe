"""The folder of a sweep, read back: which jobs there are, the result of each, one tidy table.

Flows in: a folder, of a sweep that is finished or not.  Flows out: tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from prunelab.errors import DataError
from prunelab.experiments.sweeping.work import record_of

MANIFEST = "sweep.json"
TOOK = ("seconds", "peak_memory_gb", "attempts")
"""Columns about the run of a job, not about its result."""


def manifest(folder: str | Path) -> dict[str, Any]:
    """Return what a sweep consists of.

    Raises:
        DataError: the folder holds no sweep.
    """
    path = Path(folder) / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["name"], found["jobs"], found["calls"]
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is not the folder of a sweep: {MANIFEST} cannot be read ({error!r}).") from error


def jobs(folder: str | Path) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Yield every job of a sweep, in order, with its record; ``None`` where it is missing or made by other code."""
    for job in manifest(folder)["jobs"]:
        record = record_of(Path(folder) / "jobs" / job["folder"])
        if record is not None and record["status"] == "done" and not _current(record, job):
            record = None
        yield job, record


def _current(record: dict[str, Any], job: dict[str, Any]) -> bool:
    before, now = dict(record["depends"]), dict(job["depends"])
    if "+" not in now["package"]:  # the sweep asked for the version alone
        before["package"] = before["package"].split("+")[0]
    return before == now


def table(folder: str | Path) -> pd.DataFrame:
    """Return one row per row that a job published, in the order of the grid; one for a job without a result.

    Columns: ``job``, the parameters (of the notebook too, where it published them), the columns of the results,
    ``status``, ``seconds``, ``peak_memory_gb``, ``attempts``, ``error``.
    """
    rows: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    for job, record in jobs(folder):
        told: dict[str, Any] = {"status": "missing" if record is None else record["status"], "error": ""}
        result: dict[str, Any] = {}
        if record is not None:
            told |= {name: record[name] for name in TOOK if name in record}
            told["error"] = record.get("error", {}).get("message", "")
            result = record.get("result", {})
        given = {**result.get("parameters", {}), **job["parameters"]}
        given.pop("result_path", None)
        for row in result.get("table") or [{}]:
            rows.append({"job": job["name"], **given, **row, **told})
            names |= dict.fromkeys([*given, *row])
    columns = ["job", *names, "status", *TOOK, "error"]
    return pd.DataFrame(rows, columns=list(dict.fromkeys(columns)))


def histories(folder: str | Path) -> pd.DataFrame:
    """Return what jobs published as their ``history``, one row per stage, with the job's name and varied parameters."""
    varied = manifest(folder)["varied"]
    rows = []
    for job, record in jobs(folder):
        for row in (record or {}).get("result", {}).get("history", ()):
            rows.append({"job": job["name"], **{k: v for k, v in job["parameters"].items() if k in varied}, **row})
    return pd.DataFrame(rows)

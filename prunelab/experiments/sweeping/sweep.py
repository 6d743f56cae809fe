"""A grid becomes a folder of results: what is missing or has changed is run, whatever was there stays.

Flows in: a notebook and a grid.  Flows out: ``OUT/sweep.json``, which lists the jobs, and a folder for each of them in
``OUT/jobs``; and a table.  Everything is written in one piece, so that a sweep may be killed at any moment and called
again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from prunelab.errors import PruneLabError
from prunelab.experiments.sweeping import cluster, records
from prunelab.experiments.sweeping.grid import Grid, GridError, make_grid, read_grid
from prunelab.experiments.sweeping.jobs import Job, Prepared, prepared
from prunelab.experiments.sweeping.machine import provenance, typed
from prunelab.experiments.sweeping.work import ATTEMPT, record_of
from prunelab.files.atomic import replacing
from prunelab.options import shown
from prunelab.runtime.devices import cores

ADDRESS = re.compile(r"^[a-z]+://")
SHOWN = 5
"""Failures that are told in full at the end."""


def sweep(
    notebook: str | Path,
    grid: Mapping[str, Any] | Sequence[Mapping[str, Any]] | Grid | None = None,
    out: str | Path | None = None,
    scheduler: str | Path | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    limits: Mapping[str, Any] | None = None,
    workers: int | None = None,
    by_version: bool = False,
    command: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Run a notebook over a grid of parameters, on Dask, and return a table of all results.

    Called again, it runs only what is missing, has failed, or has changed: parameters, the notebook's code, the
    package, or a file that a parameter names.  A job that fails is noted, with its notebook, and stops no other.

    Args:
        notebook: with a cell tagged ``parameters``; or a YAML file that holds notebook, grid and limits.
        grid: values by parameter, of which every combination is run; or a list of cases, each with its parameters.
        out: folder of the results; by default ``out/NAME``, after the notebook or grid file.
        scheduler: address of a Dask scheduler, or its scheduler file; by default workers on this machine.  Their
            machines must see ``out`` under the same path and have prunelab installed.
        parameters: the same for all jobs.
        limits: ``minutes``, ``memory_gb``, ``retries``, ``gpus``, ``threads`` of each job, see ``Limits``.
        workers: processes on this machine, by default one per GPU or core; 0 runs one job after the other in this
            process, without Dask.
        by_version: accept results that other sources of the same version of prunelab have made.
        command: what to note as the command that made the results; by default that of this process.
        progress: show a progress bar, and say where the dashboard is.

    Returns:
        One row per row that a job published, in the order of the grid: ``job``, the parameters, the columns of the
        result, ``status`` (``done``, ``failed`` or ``missing``), ``seconds``, ``peak_memory_gb``, ``error``.

    Raises:
        GridError: a parameter is misspelt or of the wrong kind, or there is no job; nothing was started.
        PruneLabError: the folder is another sweep's or in use, or the scheduler cannot be reached or is gone.

    >>> import tempfile, nbformat.v4 as nb
    >>> kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    >>> cell = nb.new_code_cell("lr = 0.1", metadata={"tags": ["parameters"]})
    >>> notebook = nb.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
    >>> with tempfile.TemporaryDirectory() as folder:  # a grid is checked before anything runs
    ...     path = Path(folder) / "train.ipynb"
    ...     _ = path.write_text(nb.writes(notebook))
    ...     sweep(path, {"learning_rate": [0.1, 0.2]}, Path(folder) / "out")
    Traceback (most recent call last):
    prunelab.experiments.sweeping.grid.GridError: grid: `grid.learning_rate` is unknown. There are lr.
    """
    made = _made(notebook, grid, parameters, limits)
    folder = Path("out") / made.name if out is None else Path(out)
    if ADDRESS.match(str(out or "")):
        raise GridError(f"out={str(out)!r} looks like the address of a scheduler: give scheduler={str(out)!r}.")
    if workers is not None and (type(workers) is not int or workers < 0):
        raise GridError(f"`workers` must be an integer of at least 0, got {workers!r}.")
    import prunelab

    ready = prepared(made, prunelab.__version__ if by_version else None)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / ".lock").acquire(blocking=False)
    except Timeout:
        raise PruneLabError(f"Another sweep is running in {folder}: wait for it, or give another folder.") from None
    with held:
        _check_folder(folder, made)
        _run(made, ready, folder, scheduler, workers, by_version, command or typed(), progress)
    return records.table(folder)


def _made(notebook: str | Path, grid: Any, parameters: Any, limits: Mapping[str, Any] | None) -> Grid:
    if not isinstance(notebook, (str, Path)):
        raise GridError(f"`notebook` must be the path of a notebook or a YAML file, got {shown(notebook)}.")
    if isinstance(grid, Grid):
        return replace(grid, notebook=Path(notebook))
    if grid is None:
        if Path(notebook).suffix not in (".yaml", ".yml"):
            raise GridError("There is no grid: give lists of values by parameter, as in {'seed': [0, 1]}.")
        found = read_grid(notebook)
        allowed = make_grid(found.notebook, {"": [0]}, limits=found.limits.to_dict() | dict(limits or {})).limits
        return replace(found, parameters=found.parameters | dict(parameters or {}), limits=allowed)
    if isinstance(grid, Mapping):
        return make_grid(notebook, grid, parameters=parameters, limits=limits)
    if isinstance(grid, Sequence) and not isinstance(grid, str):
        return make_grid(notebook, None, cases=grid, parameters=parameters, limits=limits)
    raise GridError(f"The grid is {grid!r}, but should have lists of values by parameter, or be a list of cases.")


def _check_folder(folder: Path, made: Grid) -> None:
    path = folder / records.MANIFEST
    if not path.exists():
        others = [item.name for item in folder.iterdir() if item.name not in ("jobs", "report")]
        others = [name for name in others if not name.startswith(".")]  # what was killed in the middle of a file
        if others:
            raise PruneLabError(f"{folder} holds no sweep but {', '.join(sorted(others)[:3])}: give an empty folder.")
        return
    manifest = records.manifest(folder)
    if manifest["name"] != made.name:
        raise PruneLabError(f"{folder} holds the sweep `{manifest['name']}`, not `{made.name}`: give another folder.")


def _run(
    made: Grid,
    ready: Prepared,
    folder: Path,
    scheduler: str | Path | None,
    workers: int | None,
    by_version: bool,
    command: str,
    progress: bool,
) -> None:
    limits = made.limits.to_dict()
    here = cluster.default_workers(limits["gpus"]) if workers is None else workers
    if limits["threads"] is None and scheduler is None:
        limits["threads"] = max(cores() // max(here, 1), 1)
    folders = _folders(folder, ready.jobs)
    missing, why = _missing(ready.jobs, folders, by_version)
    began = time.time()
    _write_manifest(folder, made, ready, folders, command, None)
    tell = tqdm.write if progress else _silent
    done = len(ready.jobs) - len(missing)
    reasons = ", ".join(f"{number} {reason}" for reason, number in Counter(why).items())
    tell(
        f"{made.name}: {len(ready.jobs)} jobs, {done} done"
        + (f", {len(missing)} to run ({reasons})" if missing else "")
    )
    if not missing:
        return
    for stale in folder.glob(f"jobs/*/{ATTEMPT}*"):
        shutil.rmtree(stale, ignore_errors=True)
    for stale in [*folder.glob(".*.tmp"), *folder.glob("jobs/*/.*.tmp")]:
        stale.unlink(missing_ok=True)
    plain = [
        {
            "name": job.name,
            "folder": str(folders[job.name].resolve()),
            "text": ready.text,
            "parameters": job.parameters,
            "publishes": "result_path" in ready.known,
            "depends": job.depends,
            "home": os.getcwd(),
            "limits": limits,
        }
        for job in missing
    ]
    if here == 0 and scheduler is None:
        found = cluster.in_this_process(plain)
    else:
        number = min(here, len(missing))
        found = cluster.on_dask(plain, scheduler=scheduler, workers=number, retries=made.limits.retries, tell=tell)
    try:
        failed = _follow(found, done, len(ready.jobs), progress)
    except (PruneLabError, KeyboardInterrupt) as stop:
        left = len(_missing(ready.jobs, folders, by_version)[0])
        said = str(stop) or "Stopped."
        kept = (
            f"{len(ready.jobs) - left} of {len(ready.jobs)} jobs are done and kept in {folder}: call again to resume."
        )
        raise PruneLabError(f"{said} {kept}") from stop
    finally:
        _write_manifest(folder, made, ready, folders, command, round(time.time() - began, 1))
    for record in failed[:SHOWN]:
        tell(f"failed: {record['name']}: {record['error']['message']}\n        {folders[record['name']]}")
    if failed:
        more = f", {len(failed) - SHOWN} of them not shown" if len(failed) > SHOWN else ""
        tell(f"{len(failed)} of {len(ready.jobs)} jobs failed{more}; they are tried again when this is called again.")


def _follow(found: Generator[dict[str, Any]], done: int, total: int, progress: bool) -> list[dict[str, Any]]:
    failed = []
    with (
        contextlib.closing(found),
        tqdm(total=total, initial=done, unit="job", disable=not progress, file=sys.stdout) as bar,
    ):
        for record in found:
            if record["status"] == "failed":
                failed.append(record)
                bar.set_postfix(failed=len(failed))
            bar.update()
    return failed


def _folders(folder: Path, jobs: list[Job]) -> dict[str, Path]:
    """Return the folder of every job by its name: that of the same parameters where there is one already."""
    there = {path.name.rsplit("-", 1)[-1]: path for path in sorted(folder.glob("jobs/*"))}
    return {job.name: there.get(job.depends["parameters"], folder / "jobs" / job.name) for job in jobs}


def _missing(jobs: list[Job], folders: Mapping[str, Path], by_version: bool) -> tuple[list[Job], list[str]]:
    """Return the jobs that have no result, or one of other code, and why, in a word for each."""
    found, why = [], []
    for job in jobs:
        record = record_of(folders[job.name])
        if record is None or record["status"] != "done":
            reason = "new" if record is None else "failed before"
        else:
            changed = [name for name, text in job.depends.items() if not _same(name, text, record, by_version)]
            if not changed:
                continue
            reason = {"notebook": "with a changed notebook", "files": "with a changed file"}.get(
                changed[0], "with a changed package"
            )
        found.append(job)
        why.append(reason)
    return found, why


def _same(name: str, text: str, record: Mapping[str, Any], by_version: bool) -> bool:
    before = record["depends"].get(name)
    if name == "package" and by_version and isinstance(before, str):
        return before.split("+")[0] == text.split("+")[0]
    return before == text


def _write_manifest(
    folder: Path, made: Grid, ready: Prepared, folders: Mapping[str, Path], command: str, seconds: float | None
) -> None:
    """Write what the sweep consists of; what it took is added up over its calls."""
    path = folder / records.MANIFEST
    calls = records.manifest(folder)["calls"] if path.exists() else []
    if seconds is None:
        calls = [*calls, provenance(command) | {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}]
    else:
        calls = [*calls[:-1], calls[-1] | {"seconds": seconds}]
    found = {
        "name": made.name,
        "notebook": made.notebook.name,
        "varied": [name for name in ready.known if name in made.varied],
        "parameters": ready.known,
        "published": made.published,
        "limits": made.limits.to_dict(),
        "jobs": [
            {"name": job.name, "folder": folders[job.name].name, "parameters": job.parameters, "depends": job.depends}
            for job in ready.jobs
        ],
        "calls": calls,
    }
    with replacing(path) as fresh:
        fresh.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _silent(said: str) -> None:
    """Say nothing."""

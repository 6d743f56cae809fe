"""Tiny notebooks and folders of sweeps, for the tests of sweeps and reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PARAMETERS = """\
a: int = 0  # decides what happens
seed: int = 0  # of nothing
b: float = 1.0  # a number
log: str = ""  # folder in which every execution leaves a line
result_path: str = ""  # file for the result"""
RUN = """\
import json, os, signal, sys, time
first = not os.path.exists(os.path.join(log, f"{a}-{seed}"))
with open(os.path.join(log, f"{a}-{seed}"), "a") as file:
    file.write("x")
"""
PUBLISH = """\
row = {"y": 10 * a + seed + b, "where": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
result = {"name": "tiny", "parameters": {"a": a, "seed": seed, "b": b}, "columns": list(row), "table": [row]}
with open(result_path, "w") as file:
    json.dump(result, file)"""


def write_notebook(path: Path, happens: str = "", parameters: str = PARAMETERS, text: str = "# Tiny") -> Path:
    """Write a notebook that logs, does what ``happens`` says, and publishes one row; it imports little, to be quick."""
    cells = [
        new_markdown_cell(text, id="text"),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}, id="parameters"),
        new_code_cell(RUN + happens, id="run"),
        new_code_cell(PUBLISH, id="publish"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    return path


def executions(log: Path) -> dict[str, int]:
    """Return how often each job was executed."""
    return {path.name: len(path.read_text()) for path in sorted(log.iterdir())}


def write_sweep(
    folder: Path,
    results: Sequence[tuple[Mapping[str, Any], Mapping[str, Any] | str | None]],
    *,
    varied: Sequence[str],
    published: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the folder of a sweep by hand: for each job its parameters, and its row, its error, or nothing."""
    depends = {"notebook": "n", "package": "0+p", "files": ""}
    jobs = []
    for number, (parameters, row) in enumerate(results):
        job = {"name": f"job-{number}", "folder": f"job-{number}", "parameters": dict(parameters)}
        job["depends"] = {"parameters": str(number), **depends}
        jobs.append(job)
        place = folder / "jobs" / job["folder"]
        place.mkdir(parents=True)
        record = job | {"attempts": 1, "seconds": 60.0, "peak_memory_gb": 0.5}
        if isinstance(row, str):
            (place / "notebook.ipynb").write_text("{}")
            record |= {"status": "failed", "error": {"kind": "error", "message": row}}
        elif row is not None:
            result = {"parameters": dict(parameters), "columns": list(row), "table": [dict(row)]}
            record |= {"status": "done", "result": result | {"history": [{"stage": "before", **row}]}}
        if row is not None:
            (place / "job.json").write_text(json.dumps(record))
    call = {"command": "python -m prunelab sweep g.yaml", "started": "2026-01-01T00:00:00Z", "seconds": 120.0}
    call |= {"prunelab": "0.1", "commit": "abc", "python": "3.11", "hardware": "a processor, 2 cores"}
    manifest = {"name": "tried", "notebook": "n.ipynb", "varied": list(varied), "jobs": jobs, "calls": [call]}
    manifest |= {"published": list(published), "parameters": list(results[0][0])}
    (folder / "sweep.json").write_text(json.dumps(manifest))
    return folder

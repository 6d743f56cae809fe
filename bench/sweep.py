"""How much faster two workers finish a grid than one.

    python -m bench.sweep [--workers 1 2] [--out bench/sweep]

Runs the same eight jobs of notebook 15_shootout on the embedded images with each number of workers, every job on one
thread, in separate folders that are removed afterwards; OUT.json has the times, OUT.md the table, OUT.png when
which job ran.  Takes about three minutes on two quiet cores; on a busy machine it says little.
"""

from __future__ import annotations

import argparse
import calendar
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import prunelab as pl
from prunelab.drawing.style import png
from prunelab.experiments.figures.sweeps import timeline
from prunelab.experiments.sweeping.grid import shootout
from prunelab.experiments.sweeping.machine import commit, hardware

GRID = {"criterion": ["random", "magnitude", "taylor", "obd"], "share": [0.5, 0.3]}
PARAMETERS = {"epochs": 0.1, "test_images": 500, "scoring": 250, "latency_images": 0}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("bench/sweep"))
    args = parser.parse_args()
    runs = {workers: measure(workers) for workers in args.workers}
    found = {
        "command": "python -m bench.sweep",
        "commit": commit(),
        "hardware": hardware(),
        "load": round(os.getloadavg()[2], 1) if hasattr(os, "getloadavg") else None,
        "runs": {str(workers): run for workers, run in runs.items()},
    }
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    named = {f"{workers} worker{'s' * (workers > 1)}": run["jobs"] for workers, run in runs.items()}
    args.out.with_suffix(".png").write_bytes(png(timeline(named)))
    print(markdown(found))


def measure(workers: int) -> dict[str, Any]:
    """Run the grid and return its seconds of wall-clock time, and when each of its jobs began and ended."""
    with tempfile.TemporaryDirectory() as folder:
        began, start = time.time(), time.perf_counter()
        limits = {"threads": 1, "gpus": 0}
        table = pl.sweep(shootout(), GRID, folder, parameters=PARAMETERS, workers=workers, limits=limits)
        seconds = time.perf_counter() - start
        if not (table["status"] == "done").all():
            raise SystemExit("\n".join(table["error"]))
        records = [json.loads(path.read_text()) for path in Path(folder).glob("jobs/*/job.json")]
    jobs = []
    for record in records:
        end = calendar.timegm(time.strptime(record["finished"], "%Y-%m-%dT%H:%M:%SZ")) - began
        jobs.append([round(end - record["seconds"], 1), round(end, 1)])
    return {"seconds": round(seconds, 1), "jobs": sorted(jobs)}


def markdown(found: dict[str, Any]) -> str:
    """Return the page."""
    runs = found["runs"]
    first = next(iter(runs.values()))["seconds"]
    lines = [
        "# Workers of a sweep",
        "",
        f"{len(GRID['criterion']) * len(GRID['share'])} jobs of notebook 15_shootout on the embedded images, each on "
        "one thread, from the call of `pl.sweep` to its return: the start of Dask and of every kernel included.",
        "",
        "| workers | seconds | share of the time with the first |",
        "|---:|---:|---:|",
    ]
    for workers, run in runs.items():
        lines.append(f"| {workers} | {run['seconds']:.0f} | {run['seconds'] / first:.2f} |")
    lines += ["", "![When each job ran](sweep.png)", ""]
    load = (
        "" if found["load"] is None else f" Load of the machine over the last 15 minutes, at the end: {found['load']}."
    )
    lines.append(f"Command: `{found['command']}`; commit {found['commit']}; {found['hardware']}.{load}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

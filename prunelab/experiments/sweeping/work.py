"""What a worker does with one job: execute it, start it again where that may help, and leave a record, whole or none.

Flows in: a job as plain data.  Flows out: files in its folder, and a short message.  The record ``job.json`` is written
last and in one step: a job without it was not run, whenever anything was killed.

Functions of this module, and what they use of prunelab, are sent to workers with their code (``cluster``).  They use
functions and classes by name: a module as such would be imported there, and all of prunelab with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

from prunelab.experiments.sweeping.gpus import borrowed, visible
from prunelab.experiments.sweeping.kernel import Failure, annotate, execute, result_of
from prunelab.files.atomic import replacing

RECORD, NOTEBOOK, RESULT = "job.json", "notebook.ipynb", "result.json"
"""Files of a job's folder: its record, the executed notebook, and what that published."""
ATTEMPT = ".attempt-"
"""How the folders begin in which a job is executed."""


def record_of(folder: Path) -> dict[str, Any] | None:
    """Return the record of a job, or ``None`` where there is none that can be read."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "status" in found and "depends" in found else None


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job, unless somebody has done it meanwhile, and return its record without tables.

    Args:
        job: ``name``, ``folder``, ``text`` of the notebook, ``parameters``, ``publishes`` (whether the notebook has a
            parameter ``result_path``), ``depends``, ``home`` and ``limits``.
    """
    folder, limits = Path(job["folder"]), job["limits"]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        kept = record_of(folder)
        if kept is not None and kept["status"] == "done" and kept["depends"] == job["depends"]:
            return _short(kept)
        try:
            with borrowed(limits["gpus"], visible()) as devices:
                record = _attempts(job, folder, devices)
        except ValueError as error:
            record = _record(job, "failed", 0, 0.0, error={"kind": "error", "message": str(error)})
        with replacing(folder / RECORD) as fresh:
            fresh.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return _short(record)


def _attempts(job: dict[str, Any], folder: Path, devices: list[str]) -> dict[str, Any]:
    began = time.time()
    for attempt in range(1, job["limits"]["retries"] + 2):
        place = Path(tempfile.mkdtemp(prefix=ATTEMPT, dir=folder))
        try:
            measured = _attempt(job, place, devices)
            record = _record(job, "done", attempt, began, **measured)
        except Failure as failure:
            annotate(place / NOTEBOOK, failure)
            why = {"kind": failure.kind, "message": failure.message}
            record = _record(job, "failed", attempt, began, error=why)
            if failure.transient and attempt <= job["limits"]["retries"]:
                time.sleep(min(0.5 * 2**attempt, 10))
                continue
        finally:
            _keep(place, folder)
        return record
    raise AssertionError("the last attempt returns")


def _attempt(job: dict[str, Any], place: Path, devices: list[str]) -> dict[str, Any]:
    copy, published = place / NOTEBOOK, place / RESULT
    parameters = job["parameters"] | ({"result_path": str(published.resolve())} if job["publishes"] else {})
    environment = {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    if devices or job["limits"]["gpus"] == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    if job["limits"]["threads"]:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment |= dict.fromkeys(names, str(job["limits"]["threads"]))
    peak = execute(
        job["text"],
        copy,
        parameters,
        home=job["home"],
        environment=environment,
        minutes=job["limits"]["minutes"],
        memory_gb=job["limits"]["memory_gb"],
    )
    try:
        result = result_of(copy, published)
        rows = [dict(row) for row in result["table"]]
    except (ValueError, KeyError, TypeError) as error:
        raise Failure("error", f"what it published is not a result of prunelab: {error!r}") from None
    return {"peak_memory_gb": round(peak, 3), "gpus": len(devices), "result": {**result, "table": rows}}


def _record(job: dict[str, Any], status: str, attempts: int, began: float, **more: Any) -> dict[str, Any]:
    now = time.time()
    return {
        "name": job["name"],
        "status": status,
        "parameters": job["parameters"],
        "depends": job["depends"],
        "attempts": attempts,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
        "seconds": round(now - began, 2) if began else 0.0,
        "host": socket.gethostname(),
        "python": platform.python_version(),
        **more,
    }


def _short(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "result"}


def _keep(place: Path, folder: Path) -> None:
    """Move the files of an attempt into the job's folder, each in one step, and remove the rest."""
    with contextlib.suppress(OSError):
        (folder / RESULT).unlink(missing_ok=True)
        for name in (NOTEBOOK, RESULT):
            if (place / name).is_file():
                os.replace(place / name, folder / name)
    shutil.rmtree(place, ignore_errors=True)


def lost(job: dict[str, Any], message: str) -> dict[str, Any]:
    """Write and return the record of a job whose workers died, again and again."""
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    record = _record(job, "failed", 0, 0.0, error={"kind": "worker", "message": message})
    with replacing(folder / RECORD) as fresh:
        fresh.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record

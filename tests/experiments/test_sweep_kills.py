"""Whatever is killed in the middle of a sweep, nothing is lost, what was finished is not run again, and the table is
that of a sweep that nobody disturbed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pandas as pd
import psutil
import pytest

import prunelab as pl
from tests.sweeps import executions, write_notebook

pytest.importorskip("distributed")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")

GRID = {"a": [1, 2, 3], "seed": [0, 1]}
JOBS = [f"{a}-{seed}" for a in GRID["a"] for seed in GRID["seed"]]
PATIENCE = 300
"""Seconds that a busy machine may take for what takes two."""


@pytest.fixture
def log(tmp_path):
    (tmp_path / "log").mkdir()
    return tmp_path / "log"


def undisturbed() -> pd.DataFrame:
    rows = [{"a": a, "seed": seed, "y": 10.0 * a + seed + 1} for a in GRID["a"] for seed in GRID["seed"]]
    return pd.DataFrame(rows)


def check(table: pd.DataFrame) -> None:
    assert list(table["status"]) == ["done"] * len(JOBS), list(table["error"])
    pd.testing.assert_frame_equal(table[["a", "seed", "y"]], undisturbed())


def until(condition) -> None:
    """Wait for other processes."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it has taken too long"
        threading.Event().wait(0.05)


def finished(out) -> set[str]:
    """Return the jobs that have a record, by the name that they log."""
    return {
        path.parent.name.split("-")[0].replace("a=", "").replace("_seed=", "-") for path in out.glob("jobs/*/job.json")
    }


def test_a_worker_and_a_kernel_are_killed_and_the_sweep_goes_on(tmp_path, log):
    happens = (
        "if first and (a, seed) == (1, 0): os.kill(os.getpid(), signal.SIGKILL)\n"  # this job's kernel
        "if first and (a, seed) == (1, 1): os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)\n"  # its worker
    )
    notebook = write_notebook(tmp_path / "tiny.ipynb", happens)
    call = {"parameters": {"log": str(log)}, "workers": 2, "progress": False}
    check(pl.sweep(notebook, GRID, tmp_path / "out", **call))
    ran = executions(log)
    assert ran.pop("1-0") == ran.pop("1-1") == 2, "those that were killed"
    assert set(ran.values()) == {1}, "and no other"
    check(pl.sweep(notebook, GRID, tmp_path / "out", **call))
    assert sum(executions(log).values()) == len(JOBS) + 2


SCRIPT = """
import sys
import prunelab as pl
found = {name.split(".")[0] for name in sys.modules}
assert not found & {"dask", "distributed", "papermill", "nbformat", "yaml"}, found  # importing prunelab is light
pl.sweep("tiny.ipynb", %r, "out", parameters={"log": "log"}, workers=2, progress=False)  # workers do not run this
"""


def test_the_whole_sweep_is_killed_and_called_again(tmp_path, log, monkeypatch):
    notebook = write_notebook(tmp_path / "tiny.ipynb", "if first and a == 3: time.sleep(600)")
    (tmp_path / "script.py").write_text(SCRIPT % GRID)
    sweep = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        until(lambda: {"3-0", "3-1"} <= executions(log).keys() or sweep.poll() is not None)
        assert sweep.poll() is None, "the script has failed"
        children = psutil.Process(sweep.pid).children(recursive=True)
    finally:
        sweep.send_signal(signal.SIGKILL)
        sweep.wait()
    _, alive = psutil.wait_procs(children, timeout=PATIENCE)
    assert not alive, "workers and kernels end with the sweep"
    assert finished(tmp_path / "out") == {"1-0", "1-1", "2-0", "2-1"}
    monkeypatch.chdir(tmp_path)
    table = pl.sweep(notebook, GRID, tmp_path / "out", parameters={"log": "log"}, workers=0, progress=False)
    check(table)
    assert executions(log) == dict.fromkeys(JOBS[:4], 1) | dict.fromkeys(JOBS[4:], 2)


def test_the_scheduler_is_killed_and_the_sweep_called_again(tmp_path, log):
    happens = "if first and (a, seed) == (2, 0): os.kill(int(b), signal.SIGKILL)"
    notebook = write_notebook(tmp_path / "tiny.ipynb", happens)
    file = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m", "distributed.cli.dask_"]
    quiet = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    line = [*dask[:-1], f"{dask[-1]}scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    scheduler = subprocess.Popen(line, **quiet)
    line = [*dask[:-1], f"{dask[-1]}worker", "--nthreads", "1", "--no-dashboard", "--scheduler-file", str(file)]
    worker = subprocess.Popen(line, **quiet)
    try:
        until(file.is_file)
        call = {"parameters": {"log": str(log), "b": float(scheduler.pid)}, "progress": False}
        with pytest.raises(pl.PruneLabError, match=r"scheduler at .* is gone. \d of 6 jobs are done and kept in"):
            pl.sweep(notebook, GRID, tmp_path / "out", file, **call)
    finally:
        for process in (worker, scheduler):
            process.terminate()
            process.wait(PATIENCE)
    before, done = executions(log), finished(tmp_path / "out")
    assert {"1-0", "1-1"} <= done
    table = pl.sweep(notebook, GRID, tmp_path / "out", workers=0, **call)
    check(table.assign(y=table["y"] - float(scheduler.pid) + 1))
    after = executions(log)
    assert all(after[name] == before[name] for name in done), "no finished job is run again"
    assert set(after) == set(JOBS)

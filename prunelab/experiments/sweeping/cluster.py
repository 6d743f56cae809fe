"""Where jobs run: on workers of Dask on this machine, on those of a scheduler elsewhere, or one by one in this process.

Flows in: jobs as plain data.  Flows out: their records, in the order in which they end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import types
from collections import Counter, deque
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from prunelab.errors import PruneLabError
from prunelab.experiments.sweeping import gpus, kernel, work
from prunelab.files import atomic
from prunelab.runtime.devices import cores

Record = dict[str, Any]
LOOK = 5
"""Seconds between two looks for workers that have come or gone."""


def default_workers(gpus_per_job: int | None) -> int:
    """Return how many jobs this machine runs side by side: one per GPU where it has any, else one per core."""
    devices = len(gpus.visible())
    if devices and gpus_per_job != 0:
        return max(devices // (gpus_per_job or 1), 1)
    return cores()


def in_this_process(jobs: list[dict[str, Any]]) -> Generator[Record]:
    """Yield the records of jobs that are run one after the other, here."""
    for job in jobs:
        yield work.run_job(job)


def on_dask(
    jobs: list[dict[str, Any]], *, scheduler: str | Path | None, workers: int, retries: int, tell: Callable[[str], None]
) -> Generator[Record]:
    """Yield the records of jobs that workers of Dask run, each on one thread, as they end.

    Args:
        jobs: plain data for ``work.run_job``.
        scheduler: address or scheduler file; ``None`` starts a cluster on this machine and ends it.
        workers: of the cluster on this machine.
        retries: how often a job is given to another worker when its own was lost.
        tell: is given what a user should know.

    Raises:
        PruneLabError: Dask is not installed, or the scheduler is not to be reached or gone.
    """
    try:
        import cloudpickle
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise PruneLabError(f"Sweeps on several workers need Dask ({error}): pip install 'prunelab[sweep]'.") from error
    code = carried(cloudpickle)
    function = types.FunctionType(_call.__code__, {}, "run_job")  # of no module, so that workers do not look for one
    settings = {
        "distributed.scheduler.allowed-failures": 0,
        "distributed.comm.timeouts.connect": "20s",
        "distributed.worker.daemon": False,
    }
    with dask.config.set(settings), contextlib.ExitStack() as stack:
        logging.getLogger("distributed").setLevel(logging.ERROR)
        try:
            if scheduler is None:
                stack.enter_context(_hidden_script())
                cluster = stack.enter_context(
                    LocalCluster(
                        n_workers=workers,
                        threads_per_worker=1,
                        processes=True,
                        memory_limit=None,  # the kernels have limits of their own
                        dashboard_address="127.0.0.1:0" if has_dashboard() else None,
                        silence_logs=logging.CRITICAL,
                    )
                )
                client = stack.enter_context(Client(cluster))
            elif Path(scheduler).is_file():
                client = stack.enter_context(Client(scheduler_file=str(scheduler)))
            else:
                client = stack.enter_context(Client(str(scheduler)))
        except (OSError, ValueError, TypeError) as error:
            where = (
                "Dask did not start on this machine" if scheduler is None else f"No scheduler answers at {scheduler}"
            )
            raise PruneLabError(f"{where}: {error}") from error
        tell(_where(client, scheduler, workers))
        yield from _handed_out(
            client, lambda job: client.submit(function, code, job, key=_key(job), pure=False), jobs, retries
        )


def _handed_out(
    client: Any, submit: Callable[[dict[str, Any]], Any], jobs: list[dict[str, Any]], retries: int
) -> Generator[Record]:
    """Yield records of jobs, of which no more are with the scheduler at a time than its workers have threads.

    It would give all of them to workers at once, and some to one that is held up by a long job while others are free.
    """
    from distributed import CancelledError, KilledWorker, TimeoutError, wait

    waiting, running, losses = deque(jobs), {}, Counter[str]()  # type: ignore[var-annotated]
    room = 1
    try:
        while waiting or running:
            with contextlib.suppress(OSError, ValueError, TimeoutError):
                room = max(sum(client.nthreads().values()), 1)
            while waiting and len(running) < room:
                job = waiting.popleft()
                running[submit(job)] = job
            with contextlib.suppress(TimeoutError, CancelledError):
                wait(list(running), timeout=LOOK, return_when="FIRST_COMPLETED")
            for future in [future for future in running if future.status != "pending"]:
                job = running.pop(future)
                try:
                    yield future.result()
                except KilledWorker:
                    losses[job["name"]] += 1
                    if losses[job["name"]] <= retries:
                        waiting.appendleft(job)
                        continue
                    message = f"its worker was lost {retries + 1} times, perhaps killed by the system for its memory"
                    yield work.lost(job, message)
                except CancelledError:
                    raise PruneLabError(f"The scheduler at {client.scheduler.address} is gone.") from None
                except OSError as error:  # the folder cannot be written there
                    raise PruneLabError(f"A worker cannot write to {job['folder']}: {error}") from error
    finally:
        with contextlib.suppress(Exception):
            client.cancel(list(running))


@contextlib.contextmanager
def _hidden_script() -> Generator[None]:
    """Keep new processes from running the script that calls this once more, as multiprocessing would have it.

    They would start another sweep, if it is not under ``if __name__ == "__main__":``, and import whatever it does.
    """
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


def carried(cloudpickle: Any) -> bytes:
    """Return ``run_job`` with its code, and that of what it uses of prunelab.

    A worker then need not import prunelab, which takes seconds and, with PyTorch, half a gigabyte in each; the kernel
    that it starts does.
    """
    modules = (atomic, gpus, kernel, work)
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(work.run_job)
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _call(code: bytes, job: dict[str, Any]) -> Record:
    import pickle

    return pickle.loads(code)(job)


def has_dashboard() -> bool:
    """Return whether what Dask's dashboard needs is installed."""
    return importlib.util.find_spec("bokeh") is not None


def _key(job: dict[str, Any]) -> str:
    return f"{job['name']}-{os.urandom(4).hex()}"


def _where(client: Any, scheduler: str | Path | None, workers: int) -> str:
    if scheduler is None:
        said = f"{workers} worker{'s' * (workers > 1)} on this machine"
    else:
        there = client.nthreads()
        found, threads = len(there), max(there.values(), default=1)
        said = f"{found} worker{'s' * (found != 1)} at {client.scheduler.address}"
        if not found:
            said += ", which is waited for"
        if threads > 1:
            said += f", which run up to {threads} jobs at once each: start them with --nthreads 1 if that is too many"
    if scheduler is None and not has_dashboard():
        return f"{said} (with the package bokeh there is a dashboard)"
    return f"{said}, dashboard: {client.dashboard_link}"

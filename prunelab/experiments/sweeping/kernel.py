"""A notebook executed in a separate kernel, which is killed when it takes too long or too much memory.

Flows in: the text of a notebook, parameters, limits.  Flows out: an executed copy, and what it took; or a ``Failure``.
It runs on the workers of a sweep, which import nothing of prunelab: what it needs comes along, or is imported inside.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

START_TIMEOUT = 180
"""Seconds that a kernel may take to start."""
EVERY = 0.2
"""Seconds between two looks at a kernel's memory."""
TRIM = ("MALLOC_TRIM_THRESHOLD_", "65536")
"""What Dask sets for its workers, so that they give memory back at once.  A kernel that inherits it gets new pages for
every tensor, and trains 1.5 times slower."""


class Failure(Exception):
    """A job that did not come to its end.

    Attributes:
        kind: ``"error"`` in a cell, ``"time"`` or ``"memory"`` limit, ``"kernel"`` that died or did not start.
        message: what happened, in words.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind, self.message = kind, message

    @property
    def transient(self) -> bool:
        """Whether the same job may well succeed when it is started again."""
        return self.kind == "kernel"


class Guard(threading.Thread):
    """Watches the processes of a kernel, and kills them when they take too long or too much memory.

    Args:
        minutes: from the start of the guard; ``None`` for no limit.
        memory_gb: of the kernel and its children together, in 10⁹ bytes; ``None`` for no limit.

    Attributes:
        killed: why it has killed the kernel, as a ``Failure``, or ``None``.
        peak: the most memory that was seen, in 10⁹ bytes.
        process: the kernel, once it was started.
    """

    def __init__(self, minutes: float | None, memory_gb: float | None) -> None:
        super().__init__(daemon=True)
        self.minutes, self.memory_gb = minutes, memory_gb
        self.killed: Failure | None = None
        self.peak = 0.0
        self.process: Any = None
        self._over = threading.Event()
        self._began = time.monotonic()

    def run(self) -> None:
        """Look at the kernel until ``stop`` is called."""
        while not self._over.wait(EVERY):
            if self.process is None or self.killed:
                continue
            used = memory_of(self.process.pid) / 1e9
            self.peak = max(self.peak, used)
            if self.memory_gb is not None and used > self.memory_gb:
                words = f"its kernel took {used:.2f} GB, and {self.memory_gb:g} GB are allowed (limits.memory_gb)"
                self.killed = Failure("memory", words)
            elif self.minutes is not None and time.monotonic() - self._began > 60 * self.minutes:
                words = (
                    f"it was not finished after {self.minutes:g} minutes, which is all that is allowed (limits.minutes)"
                )
                self.killed = Failure("time", words)
            if self.killed:
                kill(self.process.pid)

    def stop(self) -> None:
        """End the watch, and whatever the kernel has left behind."""
        self._over.set()
        if self.process is not None:
            kill(self.process.pid)

    @property
    def ending(self) -> str:
        """How the kernel ended, in words, if it did so by itself."""
        code = None if self.process is None else self.process.poll()
        if code is None:
            return ""
        return (
            f", by signal {-code} (9 is what an operating system out of memory sends)"
            if code < 0
            else f", status {code}"
        )


def family(pid: int) -> list[Any]:
    """Return the processes that descend from ``pid``, and itself."""
    import psutil

    try:
        parent = psutil.Process(pid)
        return [*parent.children(recursive=True), parent]
    except psutil.Error:
        return []


def memory_of(pid: int) -> int:
    """Return the resident bytes of a process and of those that descend from it."""
    import psutil

    total = 0
    for process in family(pid):
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def kill(pid: int) -> None:
    """Kill a process and those that descend from it; it is not an error if they are gone."""
    import psutil

    for process in family(pid):
        with contextlib.suppress(psutil.Error):
            process.kill()


def execute(
    text: str,
    copy: Path,
    parameters: Mapping[str, Any],
    *,
    home: str,
    environment: Mapping[str, str],
    minutes: float | None = None,
    memory_gb: float | None = None,
) -> float:
    """Execute a notebook into ``copy`` and return the most memory that its kernel took, in 10⁹ bytes.

    Args:
        text: of the notebook, JSON.
        copy: where the executed copy is written as it grows, and stays, whatever happens.
        parameters: those of papermill.
        home: folder that the kernel runs in.
        environment: of the kernel, besides that of this process.
        minutes: after which it is killed.
        memory_gb: beyond which it is killed.

    Raises:
        Failure: it did not come to its end.
    """
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this environment, whatever a user has
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError

    guard = Guard(minutes, memory_gb)
    book = nbformat.reads(text, as_version=4)
    book.metadata.setdefault("papermill", {})
    with tempfile.TemporaryDirectory(prefix="prunelab-") as private:
        try:
            guard.start()
            papermill.execute_notebook(
                book,
                str(copy),
                dict(parameters),
                kernel_name="python3",
                progress_bar=False,
                start_timeout=START_TIMEOUT,
                kernel_manager_class=_manager(guard, environment, home, private),
                extra_arguments=["--IPKernelApp.log_level=50", "--HistoryManager.enabled=False"],
            )
        except PapermillExecutionError as error:
            raise Failure("error", f"{error.ename}: {error.evalue}") from None
        except Exception as error:
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise guard.killed or Failure("kernel", f"its kernel died{guard.ending}: {said}") from None
        finally:
            guard.stop()
            guard.join(5)
    return guard.peak


def _manager(guard: Guard, environment: Mapping[str, str], home: str, private: str) -> type:
    """Return a class of kernel managers that start the kernel as this job wants it, and tell the guard.

    Kernels that start at the same time may be given the same ports; sockets that are files of a private folder are safe
    from that.  A kernel looks every second whether the process that has started it is still there, and ends if not.
    """
    from jupyter_client.manager import AsyncKernelManager

    class Manager(AsyncKernelManager):
        def __init__(self, **given: Any) -> None:
            if os.name == "posix" and len(private) < 70:  # the path of a socket has 107 characters at most
                given |= {"transport": "ipc", "connection_file": os.path.join(private, "k.json")}
            super().__init__(**given)

        async def start_kernel(self, **given: Any) -> None:  # type: ignore[override]
            inherited = {name: value for name, value in os.environ.items() if (name, value) != TRIM}
            given["env"] = {**inherited, **environment}
            if os.path.isdir(home):
                given["cwd"] = home
            await self._async_start_kernel(**given)
            guard.process = self.provisioner.process  # type: ignore[union-attr]

    return Manager


def annotate(copy: Path, failure: Failure) -> None:
    """Say at the top of a notebook why it is not whole, where papermill does not: a kernel that was killed or died."""
    import nbformat

    if failure.kind == "error" or not copy.is_file():
        return
    book = nbformat.read(copy, as_version=4)
    note = nbformat.v4.new_markdown_cell(f"**This job was not finished:** {failure.message}.")
    book.cells.insert(0, note)
    nbformat.write(book, copy)


def result_of(copy: Path, path: Path) -> dict[str, Any]:
    """Return what a notebook published: in the file ``path``, else in a display of the executed copy, else nothing."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    cells = json.loads(copy.read_text(encoding="utf-8"))["cells"]
    kind = "application/vnd.prunelab.result+json"
    found = [out["data"][kind] for cell in cells for out in cell.get("outputs", ()) if kind in out.get("data", {})]
    return found[-1] if found else {"columns": [], "table": [{}]}

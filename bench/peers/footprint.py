"""How much memory a function takes: by how much the largest resident set of a process of its own grows (on Linux).

A process that has worked before holds freed memory back, so the functions run in children of a clean one: `elsewhere`
starts that, in it `grown` forks for every measurement.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.peers.timing import failure

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def grown(function: Callable[[], object]) -> dict[str, Any]:
    """Return `megabytes` by which a child process grows while it calls a function, or the `error` it raised."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(_measure(function)))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"error": "the process was killed, for want of memory as a rule"}


def _measure(function: Callable[[], object]) -> dict[str, Any]:
    try:
        RESET.write_text("5")  # reset the high-water mark
        before = _high_water()
        function()
        return {"megabytes": max(_high_water() - before, 0) / 1024}
    except Exception as error:
        return {"error": failure(error)}


def _high_water() -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())[1])  # type: ignore[index]


def elsewhere(module: str, *arguments: object) -> Any:
    """Run `python -m MODULE --footprint ARGUMENTS` in a clean process and return the JSON of its last line."""
    command = [sys.executable, "-m", module, "--footprint", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def available() -> bool:
    """Tell whether this system says how much memory a process has taken."""
    return STATUS.is_file() and RESET.exists() and hasattr(os, "fork")

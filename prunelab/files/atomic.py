"""Files that appear whole or not at all.

Flows in: a path.  Flows out: the path of a fresh file beside it, which takes its place when it is finished.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write; after the block it is at ``path``, on disk, in one step.

    Whatever goes wrong before that, a power cut included, ``path`` is what it was.  Several processes may do this at
    the same time: the last one wins.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    fresh = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield fresh
        if path.exists():
            shutil.copymode(path, fresh)
        _to_disk(fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    if os.name == "posix":
        _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """Wait until what was written is on the disk; Windows wants to write to what it is asked that for."""
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

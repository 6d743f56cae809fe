"""Where the files are that come with prunelab: images of CIFAR-10, and trained networks."""

from __future__ import annotations

import os
from pathlib import Path

from prunelab.errors import DataError


def root() -> Path:
    """Return the folder that holds the embedded images and checkpoints.

    It is ``$PRUNELAB_DATA`` if set, else ``data/`` of the repository, else the copy inside the installed package.

    Raises:
        DataError: no such folder exists.
    """
    package = Path(__file__).resolve().parents[1]
    named = os.environ.get("PRUNELAB_DATA")
    candidates = [Path(named)] if named else [package.parent / "data", package / "_data"]
    for folder in candidates:
        if (folder / "cifar10-mini").is_dir():
            return folder
    looked = " and ".join(str(folder) for folder in candidates)
    raise DataError(f"No data folder with cifar10-mini in {looked}; install prunelab again or set PRUNELAB_DATA to it.")

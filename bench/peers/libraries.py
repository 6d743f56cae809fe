"""The peers, imported where they are used, with a word about what is missing."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

EXTRA = {"torch_pruning": "torch-pruning", "curvlinops": "curvlinops-for-pytorch", "backpack": "backpack-for-pytorch"}
"""Module -> its name on PyPI."""


class MissingPeerError(ImportError):
    """A peer is not installed; the message says how to get it."""


def peer(module: str) -> ModuleType:
    """Return a peer's module.

    Raises:
        MissingPeerError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        name = EXTRA.get(module, module)
        raise MissingPeerError(
            f"{name} is not installed: `pip install -e '.[bench]'` has all peers ({error})"
        ) from error

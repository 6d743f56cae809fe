"""Packages that only part of prunelab needs: they are imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any

from prunelab.errors import MissingExtra


def extra(module: str, of: str, what: str) -> Any:
    """Return a module of another package.

    Args:
        module: its name.
        of: the extra of prunelab that installs it.
        what: what needs it, for the message.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # it is there, and lacks something of its own
        raise MissingExtra(f"{what} needs {package}: pip install 'prunelab[{of}]', or {package} itself.") from error

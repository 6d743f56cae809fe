"""Measurements kept on disk as they are made, so that a bench that is stopped can resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunelab.files.atomic import replacing


def keep(path: Path, kept: dict[str, Any], markdown: Callable[[dict[str, Any]], str]) -> None:
    """Write everything, so that a run stopped in the middle of it leaves the old file or the new.

    Args:
        path: the JSON file; the page is written beside it.
        kept: ``"rows"``, one line each, and what they have in common.
        markdown: makes the page.
    """
    rows = ",\n".join(json.dumps(row) for row in kept["rows"])
    rest = "".join(f"{json.dumps(key)}: {json.dumps(value)}, " for key, value in kept.items() if key != "rows")
    with replacing(path) as fresh:
        fresh.write_text(f'{{{rest}"rows": [\n{rows}\n]}}\n', encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(kept), encoding="utf-8")

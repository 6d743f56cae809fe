"""What a notebook found, published: one display that programs read, a JSON file, tables for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from prunelab.errors import PruneLabError
from prunelab.files.atomic import replacing

RESULT = "application/vnd.prunelab.result+json"


def publish_result(
    name: str,
    parameters: Mapping[str, Any],
    table: pd.DataFrame,
    out: str | Path | None = None,
    *,
    history: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Hand a notebook's results on: one display that programs can read, and a JSON file.

    Args:
        name: of the notebook.
        parameters: what ``validate`` returned.
        table: the results, one row per case.
        out: the file to write, in one step, ``{"name": …, "parameters": …, "columns": …, "table": rows}``; none if
            empty.
        history: how the results were reached, one row per stage; under ``"history"`` if there are any.

    Raises:
        PruneLabError: the file cannot be written.
    """
    from IPython.display import display

    rows = json.loads(table.to_json(orient="records"))
    columns = [str(column) for column in table]  # a notebook file sorts the keys of an object
    result = {"name": name, "parameters": dict(parameters), "columns": columns, "table": rows}
    said = f"Published the result of {name}: {len(rows)} rows"
    if history:
        result["history"] = json.loads(pd.DataFrame(list(history)).to_json(orient="records"))
    if out:
        try:
            with replacing(Path(out)) as fresh:
                fresh.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise PruneLabError(f"The result cannot be written to {out}: {error.strerror}.") from error
        said += f", also in {Path(out).name}"
    display({RESULT: result, "text/plain": f"{said}."}, raw=True)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table for people: shares in percent, large numbers in thousands and millions, names without underscores.

    Args:
        table: columns of floats whose name ends in ``kept`` or contains ``accuracy`` are taken for shares.
    """

    def cell(value: Any, share: bool) -> Any:
        if isinstance(value, float):
            return "–" if pd.isna(value) else f"{value:.1%}" if share else f"{value:.3g}"
        if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
            return f"{value / 1e6:.1f} M" if value >= 1_000_000 else f"{value / 1e3:.1f} k"
        return value

    columns = {}
    for name in table:
        share = str(name).endswith("kept") or "accuracy" in str(name)
        header = str(name).replace("_", " ").replace("flops", "FLOPs")
        columns[header] = [cell(value, share) for value in table[name].tolist()]
    shown = pd.DataFrame(columns, index=table.index)
    return shown.rename_axis(index=None, columns=table.index.name)  # a named index would take a row of its own


def result_of(notebook: str | Path) -> dict[str, Any] | None:
    """Return what an executed notebook published last, or ``None``."""
    import nbformat

    cells = nbformat.read(Path(notebook), as_version=4).cells
    found = [out.data[RESULT] for cell in cells for out in cell.get("outputs", ()) if RESULT in out.get("data", {})]
    return found[-1] if found else None

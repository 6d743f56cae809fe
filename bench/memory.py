"""How much memory each notebook takes, and which of its cells needs most.  Linux only.

    python -m bench.memory [NOTEBOOK …] [--out docs/memory.md]

Every notebook runs in a separate kernel, as Jupyter would run it.  What is taken down is the largest resident set of
the kernel, as Linux counts it (VmHWM), cell by cell: the counter is reset before each.  The import is what the kernel
holds after the cell ``setup``, most of it PyTorch.  Rows of other builds of PyTorch are kept, so that one page shows
them side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import nbformat
import torch
from nbclient import NotebookClient
from tqdm import tqdm

from bench.record import keep
from prunelab.course.notebook.kernel import QUIET, START_TIMEOUT, prepare_kernel

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
MB = 1024
"""Linux counts in units of 1024 bytes, and so does this: a megabyte is 2²⁰ bytes."""


def resident(pid: int, field: str) -> float:
    """Return ``VmRSS``, what a process holds, or ``VmHWM``, the most that it held, in megabytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) / MB


def measure(notebook: Path, timeout: int = 600) -> dict[str, Any]:
    """Run a copy of a notebook and return what its kernel took, in megabytes.

    Returns:
        ``"import"``, ``"peak"``, ``"cell"`` (the id of the cell that took it) and ``"cells"``, the peak by cell.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    book = nbformat.read(notebook, as_version=4)
    peaks: dict[str, float] = {}
    held: dict[str, float] = {}

    def before(cell: Any, **_: Any) -> None:
        with contextlib.suppress(OSError):  # where that is not allowed, peaks only grow from cell to cell
            Path(f"/proc/{client.km.provisioner.pid}/clear_refs").write_text("5", encoding="ascii")

    def after(cell: Any, **_: Any) -> None:
        held[cell.id] = resident(client.km.provisioner.pid, "VmRSS")
        peaks[cell.id] = resident(client.km.provisioner.pid, "VmHWM")

    client = NotebookClient(
        book,
        kernel_name="python3",
        startup_timeout=START_TIMEOUT,
        timeout=timeout,
        resources={"metadata": {"path": str(notebook.resolve().parent)}},
        extra_arguments=QUIET,
        on_cell_execute=before,
        on_cell_executed=after,
    )
    client.execute()
    largest = max(peaks, key=lambda name: peaks[name])
    cells = {name: round(peak) for name, peak in peaks.items()}
    return {"import": round(held["setup"]), "peak": cells[largest], "cell": largest, "cells": cells}


def markdown(kept: dict[str, Any]) -> str:
    """Return the page: a row per notebook, three columns per build of PyTorch."""
    rows = kept["rows"]
    builds = sorted({row["torch"] for row in rows})
    found = {(row["notebook"], row["torch"]): row for row in rows}
    head = [part for build in builds for part in (f"{build}: import", "peak", "above import")]
    table = [f"| notebook | {' | '.join(head)} | most in cell |", f"|---|{'---:|' * len(head)}---|"]
    for name in (path.stem for path in NOTEBOOKS):
        cells, where = [], ""
        for build in builds:
            row = found.get((name, build))
            cells += [f"{row['import']}", f"{row['peak']}", f"{row['peak'] - row['import']}"] if row else ["–"] * 3
            where = f"`{row['cell']}`" if row else where
        table.append(f"| {name} | {' | '.join(cells)} | {where} |")
    largest = {build: max(row["peak"] for row in rows if row["torch"] == build) for build in builds}
    most = ", ".join(f"{largest[build]} MB with PyTorch {build}" for build in builds)
    return TEXT.format(table="\n".join(table), most=most)


TEXT = """# How much memory the notebooks take

What `binder/start python -m bench.memory` measured: the largest resident set of each notebook's kernel, in MB (2²⁰
bytes), by build of PyTorch, and what of it was there after the import; – is not measured. The most is {most}.
JupyterLab's server comes on top.

{table}
"""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("notebook", nargs="*", type=Path, default=NOTEBOOKS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "memory.md")
    args = parser.parse_args(arguments)
    prepare_kernel()
    path = args.out.with_suffix(".json")
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"unit": "MB, 2^20 bytes", "rows": []}
    for notebook in tqdm(args.notebook, unit="notebook"):
        row = {"notebook": notebook.stem, "torch": torch.__version__, **measure(notebook)}
        others = [old for old in kept["rows"] if (old["notebook"], old["torch"]) != (row["notebook"], row["torch"])]
        kept["rows"] = sorted([*others, row], key=lambda one: (one["notebook"], one["torch"]))
        keep(path, kept, markdown)
        tqdm.write(f"{notebook.stem}: {row['peak']} MB, {row['peak'] - row['import']} above import, in `{row['cell']}`")


if __name__ == "__main__":
    main()

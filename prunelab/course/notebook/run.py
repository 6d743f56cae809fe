"""Run a notebook with papermill into a folder: an executed copy, its results, a web page of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunelab.course.notebook.kernel import QUIET, START_TIMEOUT, existing, gist, prepare_kernel
from prunelab.course.notebook.parameters import unknown
from prunelab.course.notebook.save import clean
from prunelab.errors import PruneLabError

LOCAL_LINK = re.compile(r"(\]\()(?![a-z]+:|[#/])([^)\s]+\))")


def run(
    notebook: str | Path, out: str | Path = "out", parameters: Mapping[str, Any] | None = None, *, timeout: int = 600
) -> Path:
    """Run a notebook with papermill into a folder, with a web page of it, and return the path of the executed copy.

    A parameter ``result_path``, where the notebook has one, is set to a JSON file beside the copy.

    Args:
        notebook: the notebook, which is not changed.
        out: a folder; it is made if missing.
        parameters: by name, instead of the notebook's own values.
        timeout: seconds that any one cell may take.

    Raises:
        PruneLabError: there is no such notebook or parameter, or a cell failed; the message names it.
    """
    source, folder = existing(notebook), Path(out)
    prepare_kernel()
    import papermill
    from papermill.exceptions import PapermillExecutionError

    try:
        known = list(papermill.inspect_notebook(str(source)))
    except Exception as error:
        raise PruneLabError(f"{source} cannot be read as a notebook: {gist(error)}") from error
    given = dict(parameters or {})
    problems = unknown(list(given), known)
    if problems:
        raise PruneLabError("\n".join(problems))
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / source.name
    if "result_path" in known:
        given.setdefault("result_path", str(copy.with_suffix(".json").resolve()))
    try:
        papermill.execute_notebook(
            str(source),
            str(copy),
            given,
            kernel_name="python3",
            start_timeout=START_TIMEOUT,
            execution_timeout=timeout,
            extra_arguments=QUIET,
        )
    except PapermillExecutionError as error:
        what = f"{error.ename}: {error.evalue}"
        raise PruneLabError(f"{_where(copy)} failed with {what}\n{_partial(copy)}") from error
    except Exception as error:  # a cell that takes too long, a kernel that dies or does not start
        raise PruneLabError(f"{_where(copy)} was not finished: {gist(error)}\n{_partial(copy)}") from error
    _write_page(copy, source.parent)
    return copy


def _where(copy: Path) -> str:
    """Name the cell of a partial notebook that failed or was running: its number, first line and heading."""
    import nbformat

    heading = ""
    for cell in nbformat.read(copy, as_version=4).cells if copy.is_file() else ():
        state = cell.metadata.get("papermill", {}).get("status")
        began = cell.metadata.get("execution", {})
        unanswered = began and "shell.execute_reply" not in began  # which papermill calls completed
        if cell.cell_type == "markdown" and "papermill-error-cell-tag" not in cell.metadata.get("tags", ()):
            heading = next(iter(re.findall(r"^#+ (.*)$", cell.source, re.MULTILINE)[-1:]), heading)
        elif state in ("failed", "running") or unanswered:
            under = f", under “{heading}”" if heading else ""
            return f"Cell In [{cell.execution_count or ' '}] (`{cell.source.strip().splitlines()[0]}`{under})"
    return copy.name


def _partial(copy: Path) -> str:
    return f"The notebook up to there: {copy}" if copy.is_file() else "No cell was run."


def _write_page(copy: Path, home: Path) -> None:
    import nbformat
    from nbconvert import HTMLExporter

    way = Path(os.path.relpath(home, copy.parent)).as_posix()
    book = nbformat.read(copy, as_version=4)
    clean(book)  # a slider on a page would move, and change nothing
    for cell in book.cells:
        if cell.cell_type == "markdown":  # links to the notebook's neighbours, from where the page is
            cell.source = LOCAL_LINK.sub(rf"\1{way}/\2", cell.source)
    page, _ = HTMLExporter().from_notebook_node(book, {"metadata": {"name": copy.stem}})
    copy.with_suffix(".html").write_text(page, encoding="utf-8")

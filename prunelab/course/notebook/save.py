"""Execute a notebook in place and clean it: widget state, versions and paths do not belong into a repository."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from prunelab.course.notebook.kernel import QUIET, START_TIMEOUT, existing, gist, prepare_kernel
from prunelab.course.notebook.progress import is_bar
from prunelab.errors import PruneLabError
from prunelab.files.atomic import replacing

WIDGET = "application/vnd.jupyter.widget-view+json"
LARGEST = 600_000
"""Bytes that a saved notebook may have."""
TORCH_LOG = re.compile(r"^[WI]\d{4} [\d:.]+ \d+ torch/.*\n?", re.MULTILINE)
MACHINE_PATH = re.compile(r"(?<![\w.~$})/-])/(?:root|home|Users|tmp|work|workspace|mnt|opt|usr|var)/[\w.-]+")
KEPT = ("tags", "jupyter", "cellView")
"""Metadata of cells that belong to a notebook: the last two fold a cell's code in JupyterLab and on Colab."""
NO_WIDGET = "(interactive: run this cell in Jupyter to move it)\n"


def save(notebook: str | Path, *, timeout: int = 600) -> None:
    """Execute a notebook in place and clean it, so that it can be committed with its outputs.

    Raises:
        PruneLabError: a cell fails or writes to stderr, an output holds a path of this machine, or the notebook gets
            larger than 600 kB; the file is then unchanged.
    """
    path = existing(notebook)
    prepare_kernel()
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    try:
        book = nbformat.read(path, as_version=4)
    except Exception as error:
        raise PruneLabError(f"{path} cannot be read as a notebook: {gist(error)}") from error
    place = {"metadata": {"path": str(path.resolve().parent)}}
    client = NotebookClient(
        book,
        kernel_name="python3",
        startup_timeout=START_TIMEOUT,
        timeout=timeout,
        resources=place,
        store_widget_state=False,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=QUIET,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise PruneLabError(f"{path.name}: a cell failed with {error.ename}: {error.evalue}") from error
    except Exception as error:
        raise PruneLabError(f"{path.name} was not finished: {gist(error)}") from error
    clean(book)
    text = nbformat.writes(book) + "\n"
    problems = _unfit(book)
    if len(text.encode()) > LARGEST:
        problems.append(f"it has {len(text.encode()) / 1000:.0f} kB, and at most {LARGEST / 1000:.0f} are allowed")
    if problems:
        raise PruneLabError(f"{path.name} was not saved: {'; '.join(problems)}.")
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def clean(book: Any) -> None:
    """Remove from an executed notebook, in place, what makes sense only where it ran: widgets, versions, logs."""
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in book.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key in KEPT}
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := _cleaned(output)) is not None]


def _cleaned(output: Any) -> Any:
    if WIDGET in output.get("data", {}) and is_bar(output.data):
        return None
    if WIDGET in output.get("data", {}):
        output.data = {key: value for key, value in output.data.items() if key == "image/png"}
        output.data["text/plain"] = NO_WIDGET
    if output.output_type == "stream" and output.name == "stderr":
        output.text = TORCH_LOG.sub("", output.text)
        return output if output.text.strip() else None
    return output


def _unfit(book: Any) -> list[str]:
    problems = []
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            name = f"cell In [{cell.execution_count}]"
            data = output.get("data", output)
            text = json.dumps({key: value for key, value in data.items() if not key.startswith("image/")})
            problems += [f"{name} shows {found}, a path of this machine" for found in MACHINE_PATH.findall(text)]
            if output.get("name") == "stderr":
                problems.append(f"{name} writes to stderr: {gist(output.text)}")
    return problems

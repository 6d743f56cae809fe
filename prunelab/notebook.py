"""What notebooks need, and what runs them: checked parameters, published results, a command line.

    python -m prunelab.notebook run notebooks/00_tour.ipynb --out out -p flops 0.7
    python -m prunelab.notebook save notebooks/00_tour.ipynb

``run`` leaves an executed copy, a web page and the results in a folder; ``save`` executes a notebook in place and
cleans it, so that it can be committed with its outputs.  Flows in: a notebook and parameters.  Flows out: files.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import re
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from prunelab.errors import PruneLabError

RESULT = "application/vnd.prunelab.result+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
LARGEST = 600_000
"""Bytes that a saved notebook may have."""
START_TIMEOUT = 180
"""Seconds that a kernel may take to start."""
QUIET = ["--IPKernelApp.log_level=50"]
"""What is passed to the kernel, so that it does not write remarks about itself between the lines of progress."""
INJECTED = "# Parameters"
"""How the cell begins that papermill adds."""
TORCH_LOG = re.compile(r"^[WI]\d{4} [\d:.]+ \d+ torch/.*\n?", re.MULTILINE)
MACHINE_PATH = re.compile(r"(?<![\w.~$})/-])/(?:root|home|Users|tmp|work|workspace|mnt|opt|usr|var)/[\w.-]+")
LOCAL_LINK = re.compile(r"(\]\()(?![a-z]+:|[#/])([^)\s]+\))")
NO_WIDGET = "(interactive: run this cell in Jupyter to get the slider)\n"


# ── what notebooks need ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Between:
    """Numbers from ``low`` to ``high``, both included; whole ones if both bounds are."""

    low: float
    high: float

    def __str__(self) -> str:
        kind = "a whole number" if self._whole else "a number"
        return f"{kind} from {self.low} to {self.high}"

    @property
    def _whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def __contains__(self, value: object) -> bool:
        kinds = int if self._whole else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high


Expected = type | Between | Collection[Any]


def validate(given: Mapping[str, Any], **expected: Expected) -> dict[str, Any]:
    """Check a notebook's parameters, which papermill does not: it takes misspelt names and wrong types silently.

    Args:
        given: ``globals()`` of a notebook, or a dict that holds parameters and nothing else.
        expected: by parameter, a type, ``Between(low, high)``, or a list of the values that it may have.

    Returns:
        The parameters by name, as plain data.

    Raises:
        PruneLabError: parameters are unknown, missing or of the wrong kind; the message names all of them.

    >>> validate({"flops": 0.5, "scope": "layer"}, flops=Between(0.1, 0.9), scope=["global", "layer"])
    {'flops': 0.5, 'scope': 'layer'}
    >>> validate({"flop": 0.5, "flops": 2}, flops=Between(0.1, 0.9))
    Traceback (most recent call last):
    prunelab.errors.PruneLabError: Parameter `flop` is unknown: did you mean `flops`? There are flops.
    Parameter `flops` is 2, but should be a number from 0.1 to 0.9.
    """
    problems = _unknown(_injected(given["In"]) if "In" in given else list(given), list(expected))
    for name, kind in expected.items():
        if name not in given:
            problems.append(f"Parameter `{name}` is missing.")
        elif not _fits(given[name], kind):
            problems.append(f"Parameter `{name}` is {given[name]!r}, but should be {_in_words(kind)}.")
    if problems:
        raise PruneLabError("\n".join(problems))
    return {name: given[name] for name in expected}


def _unknown(names: list[str], known: list[str]) -> list[str]:
    problems = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean `{near[0]}`?" if near else "."
            problems.append(f"Parameter `{name}` is unknown{hint} There are {', '.join(known)}.")
    return problems


def _injected(history: list[str]) -> list[str]:
    """Return the names that papermill's own cell sets, the last one in a notebook's history of inputs."""
    for source in reversed(history):
        if source.startswith(INJECTED):
            body = ast.parse(source).body
            targets = [target for line in body if isinstance(line, ast.Assign) for target in line.targets]
            return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def _fits(value: Any, kind: Expected) -> bool:
    if isinstance(kind, type):  # a bool is an int to Python, but not to a reader; an int will do as a float
        return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    return value in kind


def _in_words(kind: Expected) -> str:
    if isinstance(kind, type):
        names = {float: "a number", int: "a whole number", str: "text in quotes", bool: "True or False"}
        return names.get(kind, kind.__name__)
    return str(kind) if isinstance(kind, Between) else f"one of {', '.join(map(repr, kind))}"


def publish_result(
    name: str, parameters: Mapping[str, Any], table: pd.DataFrame, out: str | Path | None = None
) -> None:
    """Hand a notebook's results on: one display that programs can read, and a JSON file.

    Args:
        name: of the notebook.
        parameters: what ``validate`` returned.
        table: the results, one row per case.
        out: the file to write, ``{"name": …, "parameters": …, "columns": …, "table": rows}``; none if empty.

    Raises:
        PruneLabError: the file cannot be written.
    """
    from IPython.display import display

    rows = json.loads(table.to_json(orient="records"))
    columns = [str(column) for column in table]  # a notebook file sorts the keys of an object
    result = {"name": name, "parameters": dict(parameters), "columns": columns, "table": rows}
    said = f"Published the result of {name}: {len(rows)} rows"
    if out:
        try:
            Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
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


# ── what runs notebooks ───────────────────────────────────────────────────────────────────────────────────────────


def run(
    notebook: str | Path, out: str | Path = "out", parameters: Mapping[str, Any] | None = None, *, timeout: int = 600
) -> Path:
    """Run a notebook with papermill into a folder, with a web page of it, and return the path of the executed copy.

    A parameter ``result_path``, where the notebook has one, is set to a JSON file beside the copy.

    Args:
        notebook: the notebook, which stays as it is.
        out: a folder; it is made if missing.
        parameters: by name, instead of the notebook's own values.
        timeout: seconds that any one cell may take.

    Raises:
        PruneLabError: there is no such notebook or parameter, or a cell failed; the message names it.
    """
    source, folder = _existing(notebook), Path(out)
    _prepare_kernel()
    import papermill
    from papermill.exceptions import PapermillExecutionError

    try:
        known = list(papermill.inspect_notebook(str(source)))
    except Exception as error:
        raise PruneLabError(f"{source} cannot be read as a notebook: {_gist(error)}") from error
    given = dict(parameters or {})
    problems = _unknown(list(given), known)
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
        raise PruneLabError(f"{_where(copy)} was not finished: {_gist(error)}\n{_partial(copy)}") from error
    _write_page(copy, source.parent)
    return copy


def save(notebook: str | Path, *, timeout: int = 600) -> None:
    """Execute a notebook in place and clean it, so that it can be committed with its outputs.

    Raises:
        PruneLabError: a cell fails or writes to stderr, an output holds a path of this machine, or the notebook gets
            larger than 600 kB; the file then stays as it was.
    """
    path = _existing(notebook)
    _prepare_kernel()
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    try:
        book = nbformat.read(path, as_version=4)
    except Exception as error:
        raise PruneLabError(f"{path} cannot be read as a notebook: {_gist(error)}") from error
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
        raise PruneLabError(f"{path.name} was not finished: {_gist(error)}") from error
    clean(book)
    text = nbformat.writes(book) + "\n"
    problems = _unfit(book)
    if len(text.encode()) > LARGEST:
        problems.append(f"it has {len(text.encode()) / 1000:.0f} kB, and at most {LARGEST / 1000:.0f} are allowed")
    if problems:
        raise PruneLabError(f"{path.name} was not saved: {'; '.join(problems)}.")
    fresh = path.with_suffix(".tmp")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def clean(book: Any) -> None:
    """Remove from an executed notebook, in place, what makes sense only where it ran: widgets, versions, logs."""
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in book.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := _cleaned(output)) is not None]


def _cleaned(output: Any) -> Any:
    if WIDGET in output.get("data", {}):
        output.data = {"text/plain": NO_WIDGET}
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
                problems.append(f"{name} writes to stderr: {_gist(output.text)}")
    return problems


def _existing(notebook: str | Path) -> Path:
    if not Path(notebook).is_file():
        raise PruneLabError(f"There is no notebook {notebook}.")
    return Path(notebook)


def _prepare_kernel() -> None:
    """Let notebooks run in this environment, whatever else is installed for this user, and without debugger's notes."""
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")


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


def _gist(error: object) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


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


def result_of(notebook: str | Path) -> dict[str, Any] | None:
    """Return what an executed notebook published last, or ``None``."""
    import nbformat

    cells = nbformat.read(_existing(notebook), as_version=4).cells
    found = [out.data[RESULT] for cell in cells for out in cell.get("outputs", ()) if RESULT in out.get("data", {})]
    return found[-1] if found else None


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m prunelab.notebook", description="Run notebooks, or refresh them.")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run a notebook into a folder")
    running.add_argument("notebook")
    running.add_argument("--out", default="out", help="the folder (default: out)")
    running.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    saving = commands.add_parser("save", help="execute notebooks in place and clean them, to commit them with outputs")
    saving.add_argument("notebook", nargs="+")
    for command in (running, saving):
        command.add_argument("--timeout", type=int, default=600, help="seconds for any one cell (default: 600)")
    args = parser.parse_args(arguments)
    try:
        if args.command == "run":
            _run_and_tell(args)
        else:
            _save_and_tell(args)
    except PruneLabError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


def _run_and_tell(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    copy = run(args.notebook, args.out, {name: _value(text) for name, text in args.p}, timeout=args.timeout)
    print(f"\n{copy.stem} ran in {time.perf_counter() - start:.0f} s.\n")
    result = result_of(copy)
    if result:
        print(readable(pd.DataFrame(result["table"], columns=result["columns"])).to_string(index=False), "\n")
    print(f"Executed notebook: {copy}\nWeb page:          {copy.with_suffix('.html')}")


def _save_and_tell(args: argparse.Namespace) -> None:
    for notebook in args.notebook:
        start = time.perf_counter()
        save(notebook, timeout=args.timeout)
        print(f"{notebook}: {time.perf_counter() - start:.0f} s, {Path(notebook).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())

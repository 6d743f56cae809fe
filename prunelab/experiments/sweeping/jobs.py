"""Jobs: parameters that the notebook knows, a path for each, and what their results depend on.

Flows in: a ``Grid``.  Flows out: ``Job``s.  A job's path depends on its parameters alone; its result also on the
code of the notebook, on the package and on files that parameters name: what has changed is run again.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from prunelab.course.notebook.kernel import existing, gist
from prunelab.course.notebook.parameters import fits, in_words, unknown
from prunelab.errors import PruneLabError
from prunelab.experiments.sweeping.grid import OWN, Grid, GridError

NEUTRAL = (
    *("course/", "drawing/", "__main__.py"),
    *("experiments/sweeping/", "experiments/figures/", "experiments/__main__.py"),
)
"""Parts of the package on which no measured number depends."""
LESSON = "lesson"
"""Tag of the cells that teach, and on which no result depends: a sweep leaves them out."""
KINDS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}
LARGEST = 2_000_000_000
"""Bytes up to which a file that a parameter names is read to tell whether it has changed."""


@dataclass(frozen=True)
class Job:
    """One run of the notebook.

    Attributes:
        name: what differs between jobs, in words, and the hash of all parameters: the name of its folder.
        parameters: all that were given.
        depends: what the result depends on, as short texts: ``parameters``, ``notebook``, ``package``, ``files``.
    """

    name: str
    parameters: dict[str, Any]
    depends: dict[str, str]


@dataclass(frozen=True)
class Prepared:
    """A grid that may be started.

    Attributes:
        jobs: in the order of the grid.
        text: the notebook without outputs and without the cells tagged ``lesson``, as JSON.
        known: names of all parameters of the notebook.
    """

    jobs: list[Job]
    text: str
    known: list[str]


def prepared(grid: Grid, version: str | None = None) -> Prepared:
    """Check a grid against the parameters of its notebook, and return its jobs.

    Args:
        grid: what to run.
        version: represents the package in ``depends``; by default its version and the hash of its sources.

    Raises:
        GridError: a parameter is misspelt or of the wrong kind; the message names all of them.
        PruneLabError: there is no such notebook, or it is none.
    """
    try:
        import nbformat
        import papermill
    except ImportError as error:
        raise PruneLabError(f"Notebooks need packages to be run ({error}): pip install 'prunelab[sweep]'.") from error
    try:
        path = existing(grid.notebook)
    except PruneLabError as error:
        raise GridError(f"{grid.source}: `notebook`: {error}") from None
    try:
        book = nbformat.read(path, as_version=4)
        kinds = papermill.inspect_notebook(str(path))
    except Exception as error:
        raise PruneLabError(f"{path} cannot be read as a notebook: {gist(error)}") from error
    _check_names(grid, list(kinds))
    jobs = [{name: _converted(value, _kind(kinds[name])) for name, value in job.items()} for job in grid.jobs()]
    _check_values(grid, jobs, kinds)
    book.cells = [cell for cell in book.cells if LESSON not in cell.metadata.get("tags", ())]
    for cell in book.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    code = "\n\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
    common = {"notebook": short_hash(code), "package": version or package()}
    varied = [name for name in kinds if name in grid.varied]
    made = []
    for job in jobs:
        depends = {"parameters": short_hash(job), **common, "files": _files(job.values())}
        made.append(Job(_name(job, varied, depends["parameters"]), job, depends))
    return Prepared(made, nbformat.writes(book), list(kinds))


def _check_names(grid: Grid, known: list[str]) -> None:
    usable = [name for name in known if name not in OWN]
    places = {"parameters": grid.parameters, "grid": grid.grid}
    places |= {f"cases[{number}]": case for number, case in enumerate(grid.cases)}
    places |= {f"published[{number}].match": row["match"] for number, row in enumerate(grid.published)}
    problems = []
    for place, names in places.items():
        own = [name for name in names if name in OWN]
        problems += [f"{grid.source}: `{place}.{name}` is set by the sweep itself; leave it out." for name in own]
        texts = unknown([name for name in names if name not in OWN], usable)
        problems += [f"{grid.source}: {text.replace('Parameter `', f'`{place}.', 1)}" for text in texts]
    if not usable:
        problems = [f"{grid.notebook} has no parameters: tag the cell that sets them `parameters`."]
    if problems:
        raise GridError("\n".join(problems))


def _check_values(grid: Grid, jobs: list[dict[str, Any]], kinds: Mapping[str, Mapping[str, Any]]) -> None:
    problems = {}
    for job in jobs:
        for name, value in job.items():
            kind = _kind(kinds[name])
            if kind is not None and not fits(value, kind):
                problems[name, repr(value)] = f"is {value!r}, but the notebook expects {in_words(kind)}"
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                problems[name, repr(value)] = f"is {value!r}, which is not a plain value"
    if problems:
        raise GridError("\n".join(f"{grid.source}: `{name}` {said}." for (name, _), said in problems.items()))


def _kind(described: Mapping[str, Any]) -> type | None:
    """Return the type of a parameter, from its annotation or else from its default value."""
    named = KINDS.get(str(described.get("inferred_type_name")))
    if named is not None:
        return named
    try:
        default = ast.literal_eval(str(described.get("default")))
    except (ValueError, SyntaxError):
        return None
    return type(default) if type(default) in KINDS.values() else None


def _converted(value: Any, kind: type | None) -> Any:
    """Return whole numbers as floats where such are expected, and mappings as JSON where text is."""
    if kind is float and type(value) is int:
        return float(value)
    return json.dumps(value, sort_keys=True) if kind is str and isinstance(value, dict) else value


def _name(parameters: Mapping[str, Any], varied: Iterable[str], digest: str) -> str:
    words = []
    for name in varied:
        if name in parameters:
            value = parameters[name]
            text = Path(value).name if isinstance(value, str) else f"{value:g}" if type(value) is float else str(value)
            words.append(f"{name}={re.sub('[^A-Za-z0-9.+-]+', '-', text).strip('-')[:24]}")
    return "-".join([*(["_".join(words)[:90]] if words else []), digest])


def short_hash(value: Any) -> str:
    """Return ten digits that change when plain data change.

    >>> short_hash({"a": 1, "b": 2}) == short_hash({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


@cache
def package() -> str:
    """Return the version of prunelab and a hash of those of its sources that results may depend on."""
    import prunelab

    home = Path(prunelab.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(home.rglob("*.py")):
        if not path.relative_to(home).as_posix().startswith(NEUTRAL):
            digest.update(path.relative_to(home).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{prunelab.__version__}+{digest.hexdigest()[:10]}"


def _files(values: Iterable[Any]) -> str:
    """Return a hash of the files that parameters name, such as checkpoints; nothing if there are none."""
    found = {}
    for value in values:
        if isinstance(value, str) and 0 < len(value) < 1000 and "\0" not in value and Path(value).is_file():
            stat = Path(value).stat()
            found[value] = _digest(value, stat.st_size, stat.st_mtime_ns)
    return short_hash(found) if found else ""


@cache
def _digest(path: str, size: int, changed: int) -> str:
    if size > LARGEST:
        return f"{size} bytes, {changed}"
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""What a sweep runs: a notebook, values for its parameters, limits for each job.

Flows in: a YAML file, or a mapping.  Flows out: a ``Grid`` of the right form, and the parameters of every
job; ``jobs`` checks them against the notebook before anything is started.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from prunelab.course.notebook.parameters import unknown
from prunelab.errors import PruneLabError

KEYS = ("notebook", "name", "parameters", "grid", "cases", "published", "limits")
"""What a grid file may hold."""
OWN = ("result_path",)
"""Parameters that the sweep sets itself."""
NAME = re.compile(r"[\w.-]+")
MERGE = "tag:yaml.org,2002:merge"
"""YAML's ``<<``, which takes over the keys of another mapping."""


class GridError(PruneLabError, ValueError):
    """A grid is empty, misspelt or of the wrong form."""


@dataclass(frozen=True)
class Limits:
    """What one job may use.

    Args:
        minutes: of wall-clock time; then its kernel is killed.
        memory_gb: resident memory of its kernel and that kernel's children, in 10⁹ bytes; then it is killed.
        retries: how often a job is started again after its kernel died or did not start, and after its worker was lost.
        gpus: devices for every job of its own; by default one where the machine has any.
        threads: of its kernel; by default the cores of the machine divided by the number of workers.
    """

    minutes: float | None = None
    memory_gb: float | None = None
    retries: int = 2
    gpus: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("minutes", 0), ("memory_gb", 0), ("retries", 0), ("gpus", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is None and name != "retries":
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name in ("minutes", "memory_gb"):
                if not number or not value > low:
                    raise GridError(f"`limits.{name}` is {value!r}, but should be a number above {low}.")
            elif type(value) is not int or value < low:
                raise GridError(f"`limits.{name}` is {value!r}, but should be an integer of at least {low}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the limits as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Grid:
    """A notebook and what its jobs are.

    Attributes:
        notebook: the file.
        name: of the sweep.
        parameters: of every job.
        grid: parameter -> its values; every combination is a job.
        cases: parameters of some jobs; each case goes with every combination of ``grid``, whose values it replaces
            where both name a parameter.  A list of values within a case is one more list to combine.
        published: numbers of others to show next to ours: ``{"match": {parameter: value}, metric: value, "source": …}``
        limits: of each job.
        source: where the grid is from, for messages.
    """

    notebook: Path
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)
    published: list[dict[str, Any]] = field(default_factory=list)
    limits: Limits = field(default_factory=Limits)
    source: str = "grid"

    def jobs(self) -> list[dict[str, Any]]:
        """Return the parameters of every job, each set once, in the order of the grid.

        >>> Grid(Path("n.ipynb"), "n", {"a": 0}, {"b": [1, 2]}, [{"c": 3}, {"b": 2, "c": 4}]).jobs()
        [{'a': 0, 'b': 1, 'c': 3}, {'a': 0, 'b': 2, 'c': 3}, {'a': 0, 'b': 2, 'c': 4}]
        """
        found: dict[str, dict[str, Any]] = {}
        for case in self.cases or [{}]:
            for one in _combinations(case):
                for point in _combinations(self.grid):
                    job = self.parameters | point | one
                    found.setdefault(json.dumps(job, sort_keys=True, default=repr), job)
        return list(found.values())

    @property
    def varied(self) -> list[str]:
        """Names of the parameters that differ between jobs."""
        jobs = self.jobs()
        names = dict.fromkeys(name for job in jobs for name in job)
        return [name for name in names if len({json.dumps(job.get(name, KEYS), default=repr) for job in jobs}) > 1]


def _combinations(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    lists = [value if isinstance(value, list) else [value] for value in values.values()]
    for point in product(*lists):
        yield dict(zip(values, point, strict=True))


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────


def read_grid(path: str | Path) -> Grid:
    """Read a grid from a YAML file; its ``notebook:`` is a path from the file's own folder, by default ``15_shootout``.

    Raises:
        GridError: the file is not a grid; the message names file and key.
    """
    file = Path(path)
    try:
        import yaml
    except ImportError as error:
        raise PruneLabError("Grids in YAML need PyYAML: pip install 'prunelab[sweep]'.") from error
    try:
        given = yaml.load(file.read_text(encoding="utf-8"), _loader(yaml))
    except OSError as error:
        raise GridError(f"{file} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise GridError(f"{file} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(given, dict):
        raise GridError(f"{file} holds no keys; it may have {', '.join(KEYS)}.")
    problems = unknown([str(key) for key in given], list(KEYS))
    if problems:
        raise GridError("\n".join(f"{file}: {text.replace('Parameter', 'The key')}" for text in problems))
    notebook = given.get("notebook")
    if notebook is not None and not isinstance(notebook, str):
        raise GridError(f"{file}: `notebook` is {notebook!r}, but should be the path of a notebook.")
    limits = given.get("limits") or {}
    if not isinstance(limits, dict):
        raise GridError(f"{file}: `limits` is {limits!r}, but should be keys and values.")
    return make_grid(
        shootout() if notebook is None else file.parent / notebook,
        given.get("grid"),
        name=given.get("name", file.stem),
        parameters=given.get("parameters"),
        cases=given.get("cases"),
        published=given.get("published"),
        limits=limits,
        source=str(file),
    )


def shootout() -> Path:
    """Return the notebook that compares criteria by one protocol: that of the clone, or the installed package's copy.

    Raises:
        GridError: neither is there.
    """
    package = Path(__file__).resolve().parents[2]
    places = [folder / "15_shootout.ipynb" for folder in (package.parent / "notebooks", package / "_notebooks")]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        looked = " and ".join(str(place) for place in places)
        raise GridError(f"There is no {looked}: say in the grid which notebook to run, with `notebook: PATH`.")
    return found


def make_grid(
    notebook: str | Path,
    grid: Any,
    *,
    name: str | None = None,
    parameters: Any = None,
    cases: Any = None,
    published: Any = None,
    limits: Mapping[str, Any] | None = None,
    source: str = "grid",
) -> Grid:
    """Return a grid whose form is right; names and types are checked by ``prepared``.

    Raises:
        GridError: something is of the wrong form; the message names the key.
    """
    name = Path(notebook).stem if name is None else name
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise GridError(f"{source}: `name` is {name!r}, but should be letters, digits, dots, dashes and underscores.")
    lists = _mapping(source, "grid", grid)
    for key, values in lists.items():
        if not isinstance(values, list):
            raise GridError(
                f"{source}: `grid.{key}` is {values!r}, but should be a list of values, as in [{values!r}]."
            )
        if not values:
            raise GridError(f"{source}: `grid.{key}` is an empty list, so there is no job.")
        texts = [json.dumps(value, sort_keys=True, default=repr) for value in values]
        twice = next((text for text in texts if texts.count(text) > 1), None)
        if twice is not None:
            raise GridError(f"{source}: `grid.{key}` has {twice} twice.")
    listed = _cases(source, "cases", cases)
    for number, case in enumerate(listed):
        empty = next((key for key, values in case.items() if values == []), None)
        if empty is not None:
            raise GridError(f"{source}: `cases[{number}].{empty}` is an empty list, so there is no job.")
    try:
        known = Limits(**(limits or {}))
    except TypeError:
        names = [item.name for item in fields(Limits)]
        said = "\n".join(unknown(list(limits or {}), names)).replace("Parameter `", "The key `limits.")
        raise GridError(f"{source}: {said}") from None
    except GridError as error:
        raise GridError(f"{source}: {error}") from None
    made = Grid(
        Path(notebook),
        name,
        _mapping(source, "parameters", parameters),
        lists,
        listed,
        _published(source, _cases(source, "published", published)),
        known,
        source,
    )
    if not made.parameters and not lists and not listed:
        raise GridError(f"{source} is empty: give `grid`, lists of values by parameter, or `cases`.")
    return made


def _mapping(source: str, key: str, given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or any(not isinstance(name, str) for name in given):
        raise GridError(f"{source}: `{key}` is {given!r}, but should have values by the name of a parameter.")
    return {name: list(value) if isinstance(value, (tuple, range)) else value for name, value in given.items()}


def _cases(source: str, key: str, given: Any) -> list[dict[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise GridError(f"{source}: `{key}` is {given!r}, but should be a list.")
    return [_mapping(source, f"{key}[{number}]", case) for number, case in enumerate(given)]


def _published(source: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for number, row in enumerate(rows):
        place = f"{source}: `published[{number}]`"
        if not isinstance(row.get("match"), dict) or not row["match"]:
            raise GridError(f"{place} has no `match`: the parameters of the results that it is shown next to.")
        if not isinstance(row.get("source"), str):
            raise GridError(f"{place} has no `source`: paper, table and page.")
        metrics = {key: value for key, value in row.items() if key not in ("match", "source")}
        wrong = [
            key for key, value in metrics.items() if isinstance(value, bool) or not isinstance(value, (int, float))
        ]
        if not metrics or wrong:
            raise GridError(f"{place} needs numbers by the name of a column, as in `accuracy: 0.94`; wrong: {wrong}.")
    return rows


def _loader(yaml: Any) -> Any:
    """Return a safe loader that reads 1e-3 as a number, as YAML 1.2 does, and refuses a key that comes twice."""

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != MERGE]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", node.start_mark)
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader

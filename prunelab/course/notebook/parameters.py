"""A notebook's parameters, checked: papermill takes misspelt names and wrong types silently."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from prunelab.errors import PruneLabError

INJECTED = "# Parameters"
"""How the cell begins that papermill adds."""


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
    problems = unknown(_injected(given["In"]) if "In" in given else list(given), list(expected))
    for name, kind in expected.items():
        if name not in given:
            problems.append(f"Parameter `{name}` is missing.")
        elif not fits(given[name], kind):
            problems.append(f"Parameter `{name}` is {given[name]!r}, but should be {in_words(kind)}.")
    if problems:
        raise PruneLabError("\n".join(problems))
    return {name: given[name] for name in expected}


def unknown(names: list[str], known: list[str]) -> list[str]:
    """Return one sentence for every name that is not known, with the one that may have been meant."""
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


def fits(value: Any, kind: Expected) -> bool:
    """Return whether a value is of the kind that is expected."""
    if isinstance(kind, type):  # a bool is an int to Python, but not to a reader; an int will do as a float
        return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    return value in kind


def in_words(kind: Expected) -> str:
    """Return what is expected, as the end of a sentence."""
    if isinstance(kind, type):
        names = {float: "a number", int: "a whole number", str: "text in quotes", bool: "True or False"}
        return names.get(kind, kind.__name__)
    return str(kind) if isinstance(kind, Between) else f"one of {', '.join(map(repr, kind))}"

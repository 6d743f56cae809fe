"""A run on disk, so that one that was killed can resume.

A folder holds ``state.json`` (what the run is, the report so far) and the weights after the last stage.  Weights are
written first, under a name of their own; ``state.json``, replaced in one step, says which count.  Whenever the run is
killed, the folder says where it was after some stage.  Nothing is pickled, and nothing in the folder is ever run.

Flows in: a model and a report after every stage.  Flows out: the same again in another process.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunelab.curvature.statistics.collect import Statistics
from prunelab.errors import DataError
from prunelab.files.atomic import replacing
from prunelab.files.header import checksum
from prunelab.io import load, save
from prunelab.plans import PLANS
from prunelab.pruning.report import Report
from prunelab.runtime.isolation import copied
from prunelab.surgery.refit.options import Compensation

FORMAT = 1
FILE = "state.json"
DEEPEST = 8
"""How deep objects within objects are looked into, to tell one run from another."""


class State:
    """The folder of one run.

    Args:
        folder: made if it is not there; one process writes into it at a time.
        run: what the run is, as plain data; another run's folder is refused.
        writes: whether this process writes (rank 0 of several).

    Raises:
        DataError: the folder belongs to another run, holds something else, or is damaged.
    """

    def __init__(self, folder: str | Path, run: Mapping[str, Any], *, writes: bool = True) -> None:
        self.folder, self.run, self.writes = Path(folder), json.loads(json.dumps(run)), writes
        self.weights: str | None = None
        self.report: Report | None = None
        text = self._text()
        if text is not None:
            self._read(text)

    def _text(self) -> str | None:
        """Return what the folder says, ``None`` where it is new."""
        path = self.folder / FILE
        try:
            if self.writes:
                self.folder.mkdir(parents=True, exist_ok=True)
                for rest in self.folder.glob(".*.tmp"):  # of a run that was killed while it wrote
                    rest.unlink(missing_ok=True)
            if path.is_file():
                return path.read_text(encoding="utf-8")
            others = sorted(other.name for other in self.folder.iterdir()) if self.folder.is_dir() else []
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.folder} cannot hold the state of a run: {error}") from error
        if others:
            raise DataError(f"{self.folder} holds `{others[0]}` and no state of a run: give an empty or a new folder.")
        return None

    def _read(self, text: str) -> None:
        advice = "delete it to start again, or give another folder"
        try:
            data = json.loads(text)
            known = data["format"] == FORMAT
            found, weights = data["run"], data["weights"]
            report = Report.from_json(json.dumps(data["report"]))
            if not isinstance(found, dict) or not isinstance(weights, (str, type(None))):
                raise TypeError("run or weights")
        except (ValueError, KeyError, TypeError, RecursionError, DataError) as error:
            raise DataError(f"{self.folder / FILE} is damaged ({error!r}): {advice}.") from error
        if not known:
            raise DataError(f"{self.folder} was written by another version of prunelab: {advice}.")
        for key in sorted(self.run.keys() | found.keys()):
            here, there = self.run.get(key), found.get(key)
            if here != there and not (key == "seed" and here is None):
                shown = (json.dumps(value)[:200] for value in (there, here))
                raise DataError(
                    "{} holds the state of another run: {} is {} there and {} here; {}.".format(
                        self.folder, key, *shown, advice
                    )
                )
        if weights is not None and Path(weights).name != weights:
            raise DataError(f"{self.folder / FILE} is damaged (its weights are in `{weights[:100]}`): {advice}.")
        self.run, self.report, self.weights = found, report, weights

    def model(self, whole: nn.Module) -> nn.Module:
        """Return the model after the last stage, given the one that the run began with.

        Raises:
            DataError: its file is missing or damaged.
        """
        if self.weights is None:
            return whole
        before: list[Any] = getattr(whole, PLANS, [])
        fresh = copied(whole)
        vars(fresh).pop(PLANS, None)
        made = load(fresh, self.folder / self.weights)
        setattr(made, PLANS, [*before, *getattr(made, PLANS, [])])
        return made

    def keep(self, model: nn.Module, report: Report, whole: nn.Module) -> None:
        """Write the model, if it is not the whole one any more, and the report; once this returns they are on disk.

        Raises:
            DataError: they cannot be written.
        """
        if not self.writes:
            return
        row = report.rows[-1]
        try:
            if model is not whole:
                self.weights = f"{row['step']:04d}-{row['stage']}.safetensors"
                steps = getattr(model, PLANS, [])
                setattr(model, PLANS, steps[len(getattr(whole, PLANS, [])) :])
                try:
                    save(model, self.folder / self.weights)
                finally:
                    setattr(model, PLANS, steps)
            data = {"format": FORMAT, "run": self.run, "weights": self.weights, "report": json.loads(report.to_json())}
            with replacing(self.folder / FILE) as fresh:
                fresh.write_text(json.dumps(data), encoding="utf-8")
            for other in self.folder.glob("*.safetensors"):
                if other.name != self.weights:
                    other.unlink(missing_ok=True)
        except (OSError, TypeError, ValueError) as error:
            raise DataError(f"The state of the run cannot be kept in {self.folder}: {error}") from error


# ── what a run is, as plain data ──────────────────────────────────────────────────────────────────────────────────


def identity(model: nn.Module) -> dict[str, Any]:
    """Return the class of a model and a checksum over all it holds.

    Raises:
        DataError: it holds no data.
    """
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise DataError(f"{type(model).__name__} has no data (it is on the meta device): a run cannot be kept.")
    return {
        "class": type(model).__qualname__,
        "sha256": checksum({}, {name: value.detach().cpu().contiguous() for name, value in tensors.items()}),
    }


def described(value: Any, depth: int = 0) -> Any:
    """Return something of the same meaning in every process: fields for objects, names for functions and modules."""
    if depth > DEEPEST:
        return type(value).__qualname__
    deeper = partial(described, depth=depth + 1)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): deeper(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [deeper(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(deeper(part)) for part in value)
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "sha256": checksum({}, {"": value.detach().cpu().contiguous()})}
    if isinstance(value, nn.Module):
        return identity(value)
    if isinstance(value, Compensation):
        rest = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.name != "source"}
        return {"kind": "Compensation", "statistics": isinstance(value.source, Statistics)} | deeper(rest)
    if isinstance(value, partial):
        return {"kind": "partial"} | deeper({"of": value.func, "args": value.args, "keywords": value.keywords})
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "__dict__"):
        return {"kind": type(value).__qualname__} | deeper(vars(value))
    return repr(value)

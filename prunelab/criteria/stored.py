"""Scores on disk: measured once, planned from in another process.

A file in the safetensors format holds the numbers, and a JSON header what they are of: names, sizes and members of the
groups, shapes of the parameters, and the example inputs that the model was traced with.  No pickle, nothing that is
ever run.

Flows in: scores, or a file and a graph (or the model, which is then traced again).  Flows out: a file, or scores that
are known to be of that model.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prunelab import options
from prunelab.errors import DataError, PlanError, PruneLabError
from prunelab.files.atomic import replacing
from prunelab.files.header import LONGEST, SUM, checksum
from prunelab.files.inputs import check_inputs
from prunelab.tracing import fakes
from prunelab.tracing.trace import DependencyGraph, trace

FORMAT = 1
KEY = "prunelab_scores"
"""Where the header is in safetensors' metadata."""


class Stored(NamedTuple):
    """What a file of scores holds.

    Attributes:
        kind: name of the class of scores.
        criterion: what computed them.
        graph: of the model that was scored.
        tensors: by name, none sharing memory with another.
        layers: weight names, where layers are scored too.
    """

    kind: str
    criterion: str
    graph: DependencyGraph
    tensors: Mapping[str, Tensor]
    layers: tuple[str, ...]


def write(stored: Stored, path: str | PathLike[str]) -> None:
    """Write scores to a file, which appears whole or not at all.

    Raises:
        DataError: the file cannot be written, or the scores hold something that such a file cannot.
    """
    path, graph = options.path("path", path), stored.graph
    try:
        data = {
            "format": FORMAT,
            "kind": stored.kind,
            "criterion": stored.criterion,
            "model": type(graph.model).__name__,
            "layers": list(stored.layers),
            **_about(graph),
        }
        check_inputs(data["inputs"])
        tensors = {name: _own(value.detach().cpu()) for name, value in stored.tensors.items()}
        header = json.dumps(data | {SUM: checksum(data, tensors)}, sort_keys=True)
        with replacing(path) as fresh:
            save_file(tensors, str(fresh), metadata={KEY: header})
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, DataError) as error:
        raise DataError(f"{path} cannot be written: {error}") from error


def read(path: str | PathLike[str], graph: DependencyGraph | nn.Module, kinds: Collection[str]) -> Stored:
    """Return what a file of scores holds, as that of ``graph``.

    Args:
        path: of the file.
        graph: of the model that was scored, or the model itself.
        kinds: names of the classes of scores that there are.

    Raises:
        DataError: the file is missing, damaged, edited, of another format, or not one of scores.
        PlanError: the scores are of another model; the message says what differs.
        TraceError: the model that was given cannot be traced.
    """
    path = options.path("path", path)
    if not isinstance(graph, (DependencyGraph, nn.Module)):
        raise PlanError(f"Scores are loaded for a graph, or for a model, not for {options.shown(graph)}.")
    data, tensors = _read(path, kinds)
    try:
        if isinstance(graph, nn.Module):
            graph = trace(graph, fakes.recall_inputs(data["inputs"]), ignore=data["ignored"])
    except PruneLabError as error:
        made = f"{path} holds scores of a {data['model'][:100]}, and this model cannot be traced as that one was"
        raise type(error)(f"{made}: {error}") from error
    problem = _difference(data, json.loads(json.dumps(_about(graph))))
    if problem:
        kinds = f"a {data['model'][:100]}, this is a {type(graph.model).__name__}"
        raise PlanError(f"The scores in {path} are of another model ({kinds}): {problem}.")
    return Stored(data["kind"], data["criterion"], graph, tensors, tuple(data["layers"]))


# ── what the file holds ───────────────────────────────────────────────────────────────────────────────────────────


def _about(graph: DependencyGraph) -> dict[str, Any]:
    """Return what must be the same in a graph for which scores are loaded, and what it takes to make it again."""
    groups = [[g.name, g.size, [[member.name, member.dim] for member in g.members]] for g in graph.groups]
    inputs = fakes.shapes_only(graph.inputs)  # their values belong to the user
    return {"groups": groups, "shapes": graph.shapes, "inputs": inputs, "ignored": list(graph.ignored)}


def _own(value: Tensor) -> Tensor:
    """Return a tensor that shares no memory, since a file of tensors cannot; a whole one is not copied."""
    whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    return value if whole else value.clone(memory_format=torch.contiguous_format)


def _difference(data: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return in words what differs first between the model in the file and the one that is here."""
    there, mine = ({group[0]: group[1:] for group in about["groups"]} for about in (data, here))
    for name, (size, members) in there.items():
        if name not in mine:
            return f"it has no group `{name[:100]}`"
        if mine[name][0] != size:
            return f"group `{name[:100]}` has {size} units in the file and {mine[name][0]} in the model"
        if mine[name][1] != members:
            return f"group `{name[:100]}` couples other parameters"
    extra = next((name for name in mine if name not in there), None)
    if extra is not None:
        return f"its group `{extra}` has no scores in the file"
    for name in sorted(data["shapes"].keys() | here["shapes"].keys()):
        shapes = [about["shapes"].get(name) for about in (data, here)]
        if shapes[0] != shapes[1]:
            return f"`{name[:100]}` has the shape {shapes[0]} in the file and {shapes[1]} in the model"
    return ""


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _read(path: Path, kinds: Collection[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise DataError(f"There are no scores at {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise DataError("it has no header of scores")
            data = _checked(text, kinds)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
        if data.pop(SUM, None) != checksum(data, tensors):
            raise DataError("its contents do not have the checksum that was written with them")
        check_inputs(data["inputs"])
    except DataError as error:
        raise DataError(f"{path} is not a file of scores, or is damaged or edited: {error}.") from error
    except Exception as error:  # whatever a foreign file makes safetensors or the checks raise
        raise DataError(f"{path} is not a file of scores, or is damaged or edited: {error!r}.") from error
    return data, tensors


def _checked(text: str, kinds: Collection[str]) -> dict[str, Any]:
    """Return the header if it has the form that is written.

    Raises:
        DataError: it has not, or is of another format.
    """
    if len(text) > LONGEST:
        raise DataError(f"its header has {len(text)} characters")
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DataError(f"it is not of format {FORMAT}, which this version reads: update prunelab or score again")
    lists = all(isinstance(data.get(key), list) for key in ("groups", "ignored", "layers"))
    words = all(isinstance(data.get(key), str) for key in ("kind", "criterion", "model"))
    if not lists or not words or data["kind"] not in kinds or not isinstance(data.get("shapes"), dict):
        raise DataError("its header lacks the kind, the groups or the shapes")
    names = [*data["ignored"], *data["layers"], *(group[0] for group in data["groups"])]
    if not all(isinstance(name, str) for name in names) or any(len(group) != 3 for group in data["groups"]):
        raise DataError("its header has invalid groups or names")
    return data

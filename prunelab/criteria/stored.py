"""Scores on disk: measured once, planned from in another process.

A file in the safetensors format holds the numbers, and a JSON header what they are of: names, sizes and members of the
groups, shapes of the parameters, and the example inputs that the model was traced with.  No pickle, nothing that is
ever run.

Flows in: scores, or a file and a graph (or the model, which is then traced again).  Flows out: a file, or scores that
are known to be of that model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prunelab import options
from prunelab.criteria.base import Scores
from prunelab.criteria.eigendamage import EigenScores, LayerScores
from prunelab.errors import DataError, PlanError, PruneLabError
from prunelab.io.atomic import replacing
from prunelab.io.header import LONGEST, SUM, checksum
from prunelab.io.steps import check_inputs
from prunelab.tracing import fakes
from prunelab.tracing.trace import DependencyGraph, trace

FORMAT = 1
KEY = "prunelab_scores"
"""Where the header stands in safetensors' metadata."""
PARTS = ("importance", "Q_S", "Q_A")
"""What is kept of every layer of ``EigenScores``."""
KINDS: dict[str, type[Scores]] = {"Scores": Scores, "EigenScores": EigenScores}


def save(scores: Scores, path: str | PathLike[str]) -> None:
    """Write scores to a file, which appears whole or not at all.

    Raises:
        DataError: the file cannot be written, or the scores hold something that such a file cannot.
    """
    path, kind = options.path("path", path), type(scores).__name__
    if KINDS.get(kind) is not type(scores):
        raise DataError(f"{path} cannot be written: only {' and '.join(KINDS)} can be kept, not a {kind}.")
    graph = scores.graph
    try:
        check_inputs(graph.inputs)
        tensors = _tensors(scores)
        data = {
            "format": FORMAT,
            "kind": kind,
            "criterion": scores.criterion,
            "model": type(graph.model).__name__,
            "layers": list(scores.layers) if isinstance(scores, EigenScores) else [],
            **_about(graph),
        }
        header = json.dumps(data | {SUM: checksum(data, tensors)}, sort_keys=True)
        with replacing(path) as fresh:
            save_file(tensors, str(fresh), metadata={KEY: header})
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, DataError) as error:
        raise DataError(f"{path} cannot be written: {error}") from error


def load(path: str | PathLike[str], graph: DependencyGraph | nn.Module) -> Scores:
    """Return the scores in a file, as those of ``graph``.

    Raises:
        DataError: the file is missing, damaged, edited, of another format, or not one of scores.
        PlanError: the scores are of another model; the message says what differs.
        TraceError: the model that was given cannot be traced.
    """
    path = options.path("path", path)
    if not isinstance(graph, (DependencyGraph, nn.Module)):
        raise PlanError(f"Scores are loaded for a graph, or for a model, not for {options.shown(graph)}.")
    data, tensors = _read(path)
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
    try:
        return _made(data, tensors, graph)
    except (KeyError, TypeError, PlanError) as error:
        raise DataError(f"{path} is not a file of scores, or is damaged or edited: {error!r}.") from error


# ── what the file holds ───────────────────────────────────────────────────────────────────────────────────────────


def _about(graph: DependencyGraph) -> dict[str, Any]:
    """Return what must be the same in a graph for which scores are loaded, and what it takes to make it again."""
    groups = [[g.name, g.size, [[member.name, member.dim] for member in g.members]] for g in graph.groups]
    return {"groups": groups, "shapes": graph.shapes, "inputs": graph.inputs, "ignored": list(graph.ignored)}


def _tensors(scores: Scores) -> dict[str, Tensor]:
    found = {f"scores/{group.name}": scores[group] for group in scores.graph.groups}
    if scores.matrix is not None:
        found["matrix"] = scores.matrix
    for name, layer in scores.layers.items() if isinstance(scores, EigenScores) else ():
        found |= {f"layers/{name}/{part}": getattr(layer, part) for part in PARTS}
    return {name: _own(value.detach().cpu()) for name, value in found.items()}


def _own(value: Tensor) -> Tensor:
    """Return a tensor that shares no memory, since a file of tensors cannot; a whole one is not copied."""
    whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    return value if whole else value.clone(memory_format=torch.contiguous_format)


def _made(data: Mapping[str, Any], tensors: Mapping[str, Tensor], graph: DependencyGraph) -> Scores:
    by_name = {group.name: tensors[f"scores/{group.name}"] for group in graph.groups}
    rest = (graph, by_name, str(data["criterion"]), tensors.get("matrix"))
    if KINDS[data["kind"]] is Scores:
        return Scores(*rest)
    layers = {name: LayerScores(name, *(tensors[f"layers/{name}/{part}"] for part in PARTS)) for name in data["layers"]}
    return EigenScores(*rest, layers=layers)


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


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise DataError(f"There are no scores at {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise DataError("it has no header of scores")
            data = _checked(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
        if data.pop(SUM, None) != checksum(data, tensors):
            raise DataError("its contents do not have the checksum that was written with them")
        check_inputs(data["inputs"])
    except DataError as error:
        raise DataError(f"{path} is not a file of scores, or is damaged or edited: {error}.") from error
    except Exception as error:  # whatever a foreign file makes safetensors or the checks raise
        raise DataError(f"{path} is not a file of scores, or is damaged or edited: {error!r}.") from error
    return data, tensors


def _checked(text: str) -> dict[str, Any]:
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
    if not lists or not words or data["kind"] not in KINDS or not isinstance(data.get("shapes"), dict):
        raise DataError("its header lacks the kind, the groups or the shapes")
    names = [*data["ignored"], *data["layers"], *(group[0] for group in data["groups"])]
    if not all(isinstance(name, str) for name in names) or any(len(group) != 3 for group in data["groups"]):
        raise DataError("its header has groups or names that are not ones")
    return data

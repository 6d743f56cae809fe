"""Reading: what is what in a batch, where its samples are, and which loss it has.

Flows in: a batch of any structure, a model and what a ``Task`` says.  Flows out: a ``Batch``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.batches.batch import WRONG, Batch, call
from prunelab.batches.losses import Loss, is_own_of_torch, logits_of, own_loss, recipe_for
from prunelab.batches.samples import places_of
from prunelab.batches.task import Task
from prunelab.batches.trees import tree_leaves
from prunelab.errors import BatchError

LABELS = ("labels", "label", "targets", "target", "y")
"""Names of targets in a mapping whose inputs have another name than the model's only argument."""


def read(item: Any, model: nn.Module | None, task: Task, where: str) -> tuple[Any, Any]:
    """Return inputs and targets of a batch.

    Raises:
        BatchError: it is of no kind that can be read, or a function of the task fails.
    """
    try:
        inputs = None if task.inputs is None else task.inputs(item)
        targets = None if task.targets is None else task.targets(item)
    except WRONG as error:
        raise BatchError(
            f"{where}: a function of the task cannot take this {type(item).__name__}: {type(error).__name__}: {error}."
        ) from error
    if task.inputs is not None:
        return inputs, targets
    found = _split(item, model)
    if found is None:
        raise BatchError(
            f"{where} is not a pair (inputs, targets) but {type(item).__name__}, and nothing that a model could be "
            "called with: say what is what with pl.Task(batches, inputs=…, targets=…)."
        )
    return found[0], found[1] if task.targets is None else targets


def _split(item: Any, model: nn.Module | None) -> tuple[Any, Any] | None:
    if isinstance(item, Mapping):
        names = _taken_by(model)
        rest = {key: value for key, value in item.items() if names is not None and key not in names}
        given = {key: value for key, value in item.items() if key not in rest}
        if not given:  # a model of one argument has some name for it that the batch need not know
            labels = [key for key in item if key in LABELS]
            others = [key for key in item if key not in LABELS]
            fits = len(labels) == len(others) == 1 and names is not None and len(names) == 1
            return (item[others[0]], item[labels[0]]) if fits else None
        return given, (next(iter(rest.values())) if len(rest) == 1 else rest or None)
    if isinstance(item, Tensor):
        return item, None
    if not isinstance(item, (tuple, list)) or not item:
        return None
    if len(item) <= 2:
        return item[0], item[1] if len(item) == 2 else None
    first = min(max(1, _required(model)), len(item) - 1)
    targets = item[first:]
    inputs = item[0] if first == 1 else tuple(item[:first])
    return inputs, targets[0] if len(targets) == 1 else tuple(targets)


def _parameters(model: nn.Module | None) -> list[inspect.Parameter] | None:
    try:
        return None if model is None else list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return None


def _taken_by(model: nn.Module | None) -> set[str] | None:
    """Return the names of the arguments that a model takes; ``None`` if it may take any."""
    found = _parameters(model)
    if found is None or any(one.kind == one.VAR_KEYWORD for one in found):
        return None
    return {one.name for one in found if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}


def _required(model: nn.Module | None) -> int:
    """Return how many positional arguments a model must be given."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(one.kind in kinds and one.default is one.empty for one in _parameters(model) or ())


def placed(batch: Batch, where: str) -> Batch:
    """Return the batch with the places of its samples, or the reason why nobody knows them."""
    said = batch.task.samples if batch.task is not None else None
    pair = said if isinstance(said, tuple) and len(said) == 2 else (said, said)
    inputs, odd = places_of(batch.inputs, batch.size, pair[0])
    targets, odd_target = places_of(batch.targets, batch.size, pair[1])
    first = next((leaf for leaf in tree_leaves(batch.inputs) if _is_other(leaf, batch.size)), None)
    problem = guess = None
    if first is not None:
        guess = f"{where} has {len(first)} inputs of shape {list(first.shape)} but {batch.size} targets."
        if batch.targets is None:
            guess = f"{where} has inputs of shape {list(first.shape)} among {batch.size} samples."
    if odd is not None:
        problem = guess
    elif odd_target is not None:
        problem = f"{where} has {batch.size} samples but targets of shape {list(odd_target)}."
    return replace(batch, places=(inputs, targets), problem=problem, guess=None if said is not None else guess)


def _is_other(leaf: Any, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) not in (1, size)


def with_loss(batch: Batch, task: Task, loss: Loss) -> Batch:
    """Return the batch with its loss: the task's, that of whoever asks, or the model's own."""
    chosen, labels = task.loss or loss, _labels(batch)
    own = task.loss is None and loss is F.cross_entropy and batch.targets is None and task.outputs is None
    pick = task.outputs or (_tensor if is_own_of_torch(chosen) else whole)
    batch = replace(batch, loss=chosen, pick=pick, own=own)
    return _labelled(batch) if batch.targets is None and labels is not None and not own else batch


def _labelled(batch: Batch) -> Batch:
    """Return the batch with the labels that the model takes as targets too."""
    labels = _labels(batch)
    dims, _ = places_of(labels, batch.size)
    return replace(batch, targets=labels, places=(batch.places[0], dims), own=False)


def own(model: nn.Module, batch: Batch, where: str) -> Callable[[Batch], Batch]:
    """Return what makes a batch one of a model that returns its own loss; seen on the first of them.

    Raises:
        BatchError: the model returns none.
    """
    with torch.no_grad():
        raw = call(model, batch.inputs)
    if own_loss(raw) is None:
        if _labels(batch) is not None:
            return _labelled
        raise BatchError(
            f"{where} is not a pair (inputs, targets), and {type(model).__name__} returns no `.loss`: give pairs, "
            "mappings with the labels that the model takes, or pl.Task(batches, loss=…, targets=…)."
        )
    recipe = recipe_for(raw, _labels(batch))

    def made(batch: Batch) -> Batch:
        labels = _labels(batch)
        if recipe is None or labels is None:
            return replace(batch, loss=_own_loss, pick=whole, task=None)
        made = replace(
            batch,
            targets=recipe.targets(labels),
            loss=recipe.loss,
            pick=lambda raw: recipe.outputs(_precise(logits_of(raw))),
            recipe=recipe,
            task=None,
        )
        return replace(placed(made, where), problem=batch.problem)

    return made


def _labels(batch: Batch) -> Any:
    return batch.inputs.get("labels") if isinstance(batch.inputs, Mapping) else None


def _own_loss(outputs: Any, targets: Any) -> Tensor:
    value = own_loss(outputs)
    if value is None:
        raise BatchError("The model returned a loss with the first batch, but none with this one.")
    return value.reshape(())


def _precise(logits: Tensor | None) -> Tensor:
    if logits is None:
        raise BatchError("The model returned logits with the first batch, but none with this one.")
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def whole(outputs: Any) -> Any:
    """Return what the model returned, as it is."""
    return outputs


def _tensor(outputs: Any) -> Any:
    """Return the one tensor that PyTorch's own losses take."""
    found = None if isinstance(outputs, Tensor) else logits_of(outputs)
    return outputs if found is None else found

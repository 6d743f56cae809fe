"""Batches as criteria take them: what a model is called with, what its loss is given, and which samples they hold.

Flows in: any iterable of batches, or a ``Task``.  Flows out: each as a ``Batch`` on the model's device, or a
``BatchError``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.errors import BatchError
from prunelab.losses import (
    Loss,
    Recipe,
    close,
    is_own_of_torch,
    logits_of,
    own_loss,
    recipe_for,
    weights_of,
)
from prunelab.samples import Places, length, places_of, taken
from prunelab.task import Task, task_of
from prunelab.trees import tree_leaves, tree_map

__all__ = ["Batch", "Batches", "Loss", "batch_of", "call", "checked", "device_of", "eval_mode", "mean_loss"]

Batches = Iterable[Any]
LABELS = ("labels", "label", "targets", "target", "y")
"""Names of targets in a mapping whose inputs have another name than the model's only argument."""

WRONG = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError)
"""What a model or a loss raises when it is given what it cannot take."""


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter; the CPU for a model without any."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a while; every module then gets back the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def call(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` on a tensor, a tuple of positional arguments or a mapping of keyword arguments.

    Raises:
        BatchError: the model cannot take the inputs; the message gives their shapes.
    """
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    except WRONG as error:
        raise BatchError(f"{type(model).__name__} cannot take inputs of shape {_shapes(inputs)}: {error}") from error


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch, read.

    Attributes:
        inputs: what the model is called with.
        targets: what the loss is given beside the outputs.
        size: how many samples.
        loss: ``loss(outputs, targets)``, a mean over samples.
        pick: what the model returns -> what the loss is given.
        places: where the samples are in the inputs and in the targets.
        own: whether the loss is the model's own.
        recipe: what that is made of, if known.
        task: what the user said.
        problem: why the samples cannot be told apart, if so.
        guess: the same, where a dimension other than the first was taken for that of the samples.
        fixed: how much each sample counts, where that is not to be seen from the targets.
    """

    inputs: Any
    targets: Any
    size: int
    loss: Loss
    pick: Callable[[Any], Any]
    places: tuple[Places, Places]
    own: bool = False
    recipe: Recipe | None = None
    task: Task | None = None
    problem: str | None = None
    guess: str | None = None
    fixed: Tensor | None = None

    def __len__(self) -> int:
        return self.size

    def run(self, model: nn.Module, *, check: bool = True) -> Any:
        """Return what the loss is given: the outputs of the model, or what the task makes of them.

        Args:
            model: the network.
            check: of a loss that is the model's own, whether it is what it is taken for.

        Raises:
            BatchError: the model cannot take the inputs.
        """
        raw = call(model, self.inputs)
        outputs = self.picked(raw)
        if check and self.recipe is not None:
            value = own_loss(raw)
            if value is None or not close(value, self.loss(_no_grad(outputs), self.targets)):
                raise BatchError(
                    f"The loss that {type(model).__name__} returns was that of its logits in the first batch, but is "
                    "not in this one: give pl.Task(batches, loss=…, outputs=…)."
                )
        return outputs

    def picked(self, raw: Any) -> Any:
        """Return what the loss is given, from what the model returned."""
        try:
            return self.pick(raw)
        except WRONG as error:
            raise BatchError(f"`outputs` of the task cannot take what the model returns: {error}") from error

    def value(self, outputs: Any) -> Tensor:
        """Return the mean loss, one number.

        Raises:
            BatchError: the loss cannot take these outputs, or is no number with a gradient.
        """
        try:
            value = self.loss(outputs, self.targets)
        except WRONG as error:
            given = f"outputs of shape {_shapes(outputs)} and targets of shape {_shapes(self.targets)}"
            raise BatchError(self.problem or f"The loss cannot take {given}: {error}") from error
        if not isinstance(value, Tensor) or value.dim():
            found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise BatchError(f"The loss is no single number but {found}: it must be the mean over the samples.")
        return value

    def summed(self, outputs: Any) -> Tensor:
        """Return ``Σ_n c_n ℓ_n``, from outputs that require a gradient.

        Raises:
            BatchError: as for ``value``, or the loss has no gradient in them.
        """
        value = self.value(outputs) * self.total
        if not value.requires_grad:
            raise BatchError(
                "The loss has no gradient in the outputs of the model: it must be computed from them by "
                "differentiable operations, not from numbers or detached tensors."
            )
        return value

    def take(self, index: slice | list[int]) -> Batch:
        """Return some of the samples."""
        inputs, targets = self.places
        number = len(range(self.size)[index]) if isinstance(index, slice) else len(index)
        return replace(
            self,
            inputs=taken(self.inputs, inputs, index),
            targets=taken(self.targets, targets, index),
            size=number,
            fixed=None if self.fixed is None else self.fixed[index],
        )

    def relabelled(self, targets: Any) -> Batch:
        """Return the batch with labels that were drawn, each sample counting as before.

        Raises:
            BatchError: how much a sample counts depends on its label.
        """
        new = replace(self, targets=targets)
        said = self.task is not None and self.task.weights is not None
        if said and not torch.equal(new.weights, self.weights):  # type: ignore[arg-type]
            raise BatchError("The task's weights depend on the labels, so that labels cannot be sampled.")
        return replace(new, fixed=self.weights)

    def singles(self) -> Iterator[Batch]:
        """Yield every sample as a batch of its own."""
        return (self.take(slice(place, place + 1)) for place in range(self.size))

    def opened(self, needed_by: str) -> Batch:
        """Return the batch, of which the loss is needed as a function of the outputs.

        Raises:
            BatchError: it is the model's own and none that is known.
        """
        if self.own and self.recipe is None:
            raise BatchError(
                f"`{needed_by}` needs the loss as a function of the model's outputs, and the loss that the model "
                "returns is none of its logits and labels that prunelab knows: give pl.Task(batches, loss=…, "
                "targets=…, outputs=…)."
            )
        return self

    def apart(self, needed_by: str) -> Batch:
        """Return the batch, of which single samples are needed.

        Raises:
            BatchError: they cannot be told apart.
        """
        if self.problem is not None:
            raise BatchError(
                f"{self.problem} `{needed_by}` needs single samples: say where they are with pl.Task(batches, "
                "samples=…)."
            )
        return self

    @cached_property
    def weights(self) -> Tensor | None:
        """How much each sample counts in the mean, ``[size]``; ``None`` where all count as one.

        Raises:
            BatchError: the task's weights are no numbers of at least 0, one for each sample.
        """
        if self.fixed is not None:
            return self.fixed
        if self.task is None or self.task.weights is None:
            return weights_of(self.loss, self.targets, self.size, by_label=self.own)
        found = self.task.weights(self.targets)
        if not isinstance(found, Tensor) or tuple(found.shape) != (self.size,) or bool((found < 0).any()):
            what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise BatchError(f"`weights` of the task must give {self.size} numbers of at least 0, got {what}.")
        return found.float()

    @cached_property
    def total(self) -> float:
        """What all samples count together; their number where each counts as one."""
        return float(self.size) if self.weights is None else float(self.weights.sum())


def batch_of(inputs: Any) -> Batch:
    """Return inputs alone as a batch without targets or a loss."""
    size = length(inputs, None)
    return _placed(Batch(inputs, None, size, F.cross_entropy, _whole, ((), ())), "The batch")


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of a batch.

    Raises:
        BatchError: the model cannot take the inputs, or the loss not what the model gives with these targets.
    """
    raw = call(model, batch.inputs)
    value = own_loss(raw) if batch.own and batch.task is None else None
    return batch.value(batch.picked(raw)) if value is None else value.reshape(())


def checked(
    model: nn.Module, batches: Batches | None, needed_by: str, loss: Loss | None = F.cross_entropy
) -> Iterator[Batch]:
    """Yield the batches on the model's device; batches on the CPU are moved, any other mismatch is an error.

    Batches of which no label counts are left out.

    Args:
        model: the network, in the mode in which it is measured.
        batches: batches, or a ``Task``.
        needed_by: who asks, for errors.
        loss: of whoever asks; a task's own goes before it.  ``None`` where only inputs are needed.

    Raises:
        BatchError: there are none, one has no targets and the model no loss of its own, or they are on a device other
            than the CPU and the model's.
    """
    if batches is None:
        raise BatchError(f"`{needed_by}` needs batches of (inputs, targets): pass a data loader.")
    device, number, counts, known = device_of(model), -1, False, None
    task = task_of(batches)
    for number, item in enumerate(batches):
        if isinstance(item, Batch):  # read before
            counts = True
            yield item
            continue
        where = f"Batch {number} of `{needed_by}`"
        for tensor in (leaf for leaf in tree_leaves(item) if isinstance(leaf, Tensor)):
            if tensor.device.type not in ("cpu", device.type):
                raise BatchError(
                    f"{where} is on {tensor.device}, the model on {device}: move the batch with `.to({str(device)!r})`."
                )
        item = tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, item)
        inputs, targets = read(item, model, task, where)
        size = length(inputs, targets, task.samples)
        if size == 0:
            raise BatchError(f"Batch {number} is empty.")
        batch = _placed(Batch(inputs, targets, size, loss or F.cross_entropy, _whole, ((), ()), task=task), where)
        if loss is None:
            counts = True
            yield batch
            continue
        batch = _with_loss(batch, task, loss)
        if batch.own:
            known = known or _own(model, batch, where)
            batch = known(batch)
        if batch.total > 0:
            counts = True
            yield batch
    if number < 0:
        raise BatchError(f"`{needed_by}` got an empty loader; one that can only be read once may be used up.")
    if not counts:
        raise BatchError(f"No label counts in any batch of `{needed_by}`: all of them are ignored.")


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
            f"{where} is no pair (inputs, targets) but {type(item).__name__}, and nothing that a model could be called "
            "with: say what is what with pl.Task(batches, inputs=…, targets=…)."
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


def _placed(batch: Batch, where: str) -> Batch:
    """Return the batch with where its samples are, or why nobody knows."""
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


def _with_loss(batch: Batch, task: Task, loss: Loss) -> Batch:
    chosen, labels = task.loss or loss, _labels(batch)
    own = task.loss is None and loss is F.cross_entropy and batch.targets is None and task.outputs is None
    pick = task.outputs or (_tensor if is_own_of_torch(chosen) else _whole)
    batch = replace(batch, loss=chosen, pick=pick, own=own)
    return _labelled(batch) if batch.targets is None and labels is not None and not own else batch


def _labelled(batch: Batch) -> Batch:
    """Return the batch with the labels that the model takes as targets too."""
    labels = _labels(batch)
    dims, _ = places_of(labels, batch.size)
    return replace(batch, targets=labels, places=(batch.places[0], dims), own=False)


def _own(model: nn.Module, batch: Batch, where: str) -> Callable[[Batch], Batch]:
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
            f"{where} is no pair (inputs, targets), and {type(model).__name__} returns no `.loss`: give pairs, "
            "mappings with the labels that the model takes, or pl.Task(batches, loss=…, targets=…)."
        )
    recipe = recipe_for(raw, _labels(batch))

    def made(batch: Batch) -> Batch:
        labels = _labels(batch)
        if recipe is None or labels is None:
            return replace(batch, loss=_own_loss, pick=_whole, task=None)
        made = replace(
            batch,
            targets=recipe.targets(labels),
            loss=recipe.loss,
            pick=lambda raw: recipe.outputs(_precise(logits_of(raw))),
            recipe=recipe,
            task=None,
        )
        return replace(_placed(made, where), problem=batch.problem)

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


def _whole(outputs: Any) -> Any:
    return outputs


def _tensor(outputs: Any) -> Any:
    """Return the one tensor that PyTorch's own losses take."""
    found = None if isinstance(outputs, Tensor) else logits_of(outputs)
    return outputs if found is None else found


def _no_grad(outputs: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, outputs)


def _shapes(tree: Any) -> str:
    return ", ".join(str(list(leaf.shape)) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def shape_of(tree: Sequence[Any] | Any) -> str:
    """Return the shapes of all tensors in a structure, for messages."""
    return _shapes(tree)

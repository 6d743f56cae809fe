"""A batch: what a model is called with, what its loss is given, and which samples both hold.

Flows in: what ``batches`` has read.  Flows out: outputs, losses, and batches of some of the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.batches.losses import Loss, Recipe, close, own_loss, weights_of
from prunelab.batches.samples import Places, taken
from prunelab.batches.task import Task
from prunelab.batches.trees import tree_leaves, tree_map
from prunelab.errors import BatchError
from prunelab.runtime.devices import raise_out_of_memory

WRONG = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError)
"""What a model or a loss raises when it is given what it cannot take."""


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
        raise_out_of_memory(error)
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
            raise_out_of_memory(error)
            raise BatchError(f"`outputs` of the task cannot take what the model returns: {error}") from error

    def value(self, outputs: Any) -> Tensor:
        """Return the mean loss, one number.

        Raises:
            BatchError: the loss cannot take these outputs, or is not one number with a gradient.
        """
        try:
            value = self.loss(outputs, self.targets)
        except WRONG as error:
            raise_out_of_memory(error)
            given = f"outputs of shape {_shapes(outputs)} and targets of shape {_shapes(self.targets)}"
            raise BatchError(self.problem or f"The loss cannot take {given}: {error}") from error
        if not isinstance(value, Tensor) or value.dim():
            found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise BatchError(f"The loss is not a single number but {found}: it must be the mean over the samples.")
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
                "returns is not one that prunelab finds from its logits and labels: give pl.Task(batches, loss=…, "
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
            BatchError: the task's weights are not numbers of at least 0, one for each sample.
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


def _no_grad(outputs: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, outputs)


def _shapes(tree: Any) -> str:
    return ", ".join(str(list(leaf.shape)) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def shape_of(tree: Any) -> str:
    """Return the shapes of all tensors in a structure, for messages."""
    return _shapes(tree)

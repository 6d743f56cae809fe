"""Task: how batches are read where the defaults cannot know.

Flows in: batches of any structure, and functions that say what is what in them.  Flows out: batches that can be given
wherever batches are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prunelab.errors import BatchError


class Wrapped:
    """Batches around others, which may come with a task: ``distributed.Sharded``."""

    batches: Iterable[Any]


@dataclass(frozen=True, eq=False)
class Task:
    """Batches together with how they are read: give it wherever batches are taken.

    Without a task, a batch is a pair ``(inputs, targets)``; or a mapping, of which the model is called with the keys
    that its ``forward`` takes, the others being targets; or inputs alone, of a model that returns its own loss.  A task
    says what is different, and no more than that.

    Args:
        batches: an iterable of batches of any structure.
        loss: ``loss(outputs, targets)``, a mean over samples; by default the loss that the criterion has, or the
            model's own where a batch has no targets.
        inputs: batch -> what the model is called with: a tensor, a tuple of arguments or a mapping of keyword
            arguments.
        targets: batch -> what the loss is given beside the outputs.
        outputs: what the model returns -> what the loss is given: best one tensor ``[B, …]`` of logits.
        samples: which dimension counts samples: a number for all tensors; or ``(of the inputs, of the targets)``, each
            a number or the same structure as what it is for, with ``None`` for what all samples share.  By default it
            is the first; or the only one that is as long as there are targets.
        weights: targets -> ``[B]``, how much each sample counts in the loss's mean, as with ignored labels: their
            number.  By default known for PyTorch's own losses, and for labels below zero.

    Raises:
        BatchError: the batches are ``Sharded``; a task goes inside, ``Sharded(Task(…))``.

    Example:
        >>> import torch, prunelab as pl
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> loader = [{"x": torch.randn(4, 3), "y": torch.tensor([0, 1, 0, 1]), "id": ["a", "b", "c", "d"]}]
        >>> batches = pl.Task(loader, inputs=lambda batch: batch["x"], targets=lambda batch: batch["y"])
        >>> pl.criteria.get("taylor")(pl.trace(model, torch.randn(1, 3)), batches)["0"].shape
        torch.Size([8])
    """

    batches: Iterable[Any]
    loss: Callable[[Any, Any], Tensor] | None = None
    inputs: Callable[[Any], Any] | None = None
    targets: Callable[[Any], Any] | None = None
    outputs: Callable[[Any], Any] | None = None
    samples: Any = None
    weights: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.batches, Task):
            raise BatchError("Task takes the batches themselves, not a Task; one task says all.")
        if isinstance(self.batches, Wrapped):
            kind = type(self.batches).__name__
            raise BatchError(f"Task takes the batches themselves, not a {kind}: write {kind}(Task(loader, …)).")
        for name in ("loss", "inputs", "targets", "outputs", "weights"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise BatchError(f"Task: `{name}` must be a function, got {type(value).__name__}.")

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches as they are."""
        return iter(self.batches)


def task_of(batches: Any) -> Task:
    """Return the task that batches come with, inside ``Sharded`` too; one that says nothing if there is none."""
    inner = batches.batches if isinstance(batches, Wrapped) else batches
    return inner if isinstance(inner, Task) else Task(())

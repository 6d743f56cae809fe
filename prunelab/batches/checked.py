"""Batches as criteria take them: read, checked, and on the model's device before a model sees them.

Flows in: any iterable of batches, or a ``Task``.  Flows out: each as a ``Batch``, or a ``BatchError``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.batches.batch import Batch, call
from prunelab.batches.losses import Loss, own_loss
from prunelab.batches.mean_check import odd_labels, weighed
from prunelab.batches.reading import own, placed, read, whole, with_loss
from prunelab.batches.samples import length
from prunelab.batches.task import task_of
from prunelab.batches.trees import tree_leaves, tree_map
from prunelab.errors import BatchError
from prunelab.runtime.isolation import ordinary

Batches = Iterable[Any]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter; the CPU for a model without any."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def batch_of(inputs: Any) -> Batch:
    """Return inputs alone as a batch without targets or a loss."""
    size = length(inputs, None)
    return placed(Batch(inputs, None, size, F.cross_entropy, whole, ((), ())), "The batch")


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
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise BatchError(f"`{needed_by}` needs an iterable of batches, such as a data loader, got {batches!r}.")
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
        item = tree_map(lambda value: ordinary(value.to(device)) if isinstance(value, Tensor) else value, item)
        inputs, targets = read(item, model, task, where)
        size = length(inputs, targets, task.samples)
        if size == 0:
            raise BatchError(f"Batch {number} is empty.")
        batch = placed(Batch(inputs, targets, size, loss or F.cross_entropy, whole, ((), ()), task=task), where)
        if loss is None:
            counts = True
            yield batch
            continue
        batch = with_loss(batch, task, loss)
        if batch.own:
            known = known or own(model, batch, where)
            batch = known(batch)
        if odd_labels(batch):
            batch = weighed(model, batch)
        if batch.total > 0:
            counts = True
            yield batch
    if number < 0:
        raise BatchError(f"`{needed_by}` got an empty loader; one that can only be read once may be used up.")
    if not counts:
        raise BatchError(f"No label counts in any batch of `{needed_by}`: all of them are ignored.")

"""Batches as people have them: pairs, dicts, graphs, time first, with a loss of our own, of theirs or of the model's.

``checked`` reads any iterable of batches, one ``Batch`` at a time, on the model's device; ``task`` says what cannot be
read off a batch; ``reading`` finds inputs, targets and loss, ``samples`` the dimension that counts samples, ``losses``
what is known of losses, and ``mean_check`` whether a loss is the mean over samples.  docs/batches.md is the contract.
"""

from prunelab.batches.batch import Batch, call, shape_of
from prunelab.batches.checked import Batches, batch_of, checked, device_of, mean_loss
from prunelab.batches.losses import Loss
from prunelab.batches.reading import read
from prunelab.batches.task import Task, task_of

__all__ = [
    "Batch",
    "Batches",
    "Loss",
    "Task",
    "batch_of",
    "call",
    "checked",
    "device_of",
    "mean_loss",
    "read",
    "shape_of",
    "task_of",
]

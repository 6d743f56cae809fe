"""Activation checkpointing: say what is wrong where a model computes parts of itself again on the way back.

What watches or changes a forward pass does not see the second one, and PyTorch then finds other tensors than before.

Flows in: any measurement.  Flows out: the same, or an error that says what to switch off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import CheckpointError

from prunelab.errors import BatchError


@contextmanager
def no_checkpoints(model: nn.Module, what: str) -> Iterator[None]:
    """Turn PyTorch's errors about checkpointing into one that says what to do.

    Raises:
        BatchError: the model uses checkpoints where they cannot be followed.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, CheckpointError) and "torch.utils.checkpoint" not in str(error):
            raise
        raise BatchError(
            f"{type(model).__name__} recomputes activations (torch.utils.checkpoint), which `{what}` cannot follow: "
            "switch that off while scores are computed."
        ) from error

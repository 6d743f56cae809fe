"""Limits of autograd: checkpoints that compute parts of a model again, and operators without a (second) derivative.

What watches or changes a forward pass does not see the second one of a checkpoint, and PyTorch then finds other tensors
than before.

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
    """Turn PyTorch's errors about checkpoints and missing derivatives into one that says what to do.

    Raises:
        BatchError: the model uses checkpoints where they cannot be followed, or an operator has no derivative.
    """
    try:
        yield
    except RuntimeError as error:
        if "derivative for" in str(error) and "not implemented" in str(error):
            raise BatchError(
                f"`{what}` needs a derivative that an operator of {type(model).__name__} or of its loss does not have: "
                f'{error}. First derivatives are enough for taylor, and with "empirical" for obd and gate.'
            ) from error
        if not isinstance(error, CheckpointError) and "torch.utils.checkpoint" not in str(error):
            raise
        raise BatchError(
            f"{type(model).__name__} recomputes activations (torch.utils.checkpoint), which `{what}` cannot follow: "
            "switch that off while scores are computed."
        ) from error

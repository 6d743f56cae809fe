"""Batches as criteria take them: pairs of inputs and targets, checked before a model sees them.

Flows in: any iterable of ``(inputs, targets)``.  Flows out: the same pairs on the model's device, or a ``BatchError``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prunelab.devices import raise_out_of_memory
from prunelab.errors import BatchError

Batches = Iterable[tuple[Any, Tensor]]
Loss = Callable[[Any, Tensor], Tensor]


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
    """Call ``model`` on a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        BatchError: the model cannot take the inputs; the message gives their shapes.
    """
    try:
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise_out_of_memory(error)
        raise BatchError(f"{type(model).__name__} cannot take inputs of shape {_shapes(inputs)}: {error}") from error


def mean_loss(model: nn.Module, inputs: Any, targets: Tensor, loss: Loss) -> Tensor:
    """Return ``loss(model(inputs), targets)``.

    Raises:
        BatchError: the model cannot take the inputs, or the loss not what the model gives with these targets.
    """
    outputs = call(model, inputs)
    try:
        return loss(outputs, targets)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise_out_of_memory(error)
        given = f"outputs of shape {_shapes(outputs)} and targets of shape {_shapes(targets)}"
        raise BatchError(f"The loss of {type(model).__name__} cannot take {given}: {error}") from error


def _shapes(tree: Any) -> str:
    return ", ".join(str(list(leaf.shape)) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def checked(model: nn.Module, batches: Batches | None, needed_by: str) -> Iterator[tuple[Any, Tensor]]:
    """Yield the batches on the model's device; batches on the CPU are moved, any other mismatch is an error.

    Raises:
        BatchError: there are none, one is no pair of inputs and targets, their lengths differ, or they are on a device
            other than the CPU and the model's.
    """
    if batches is None:
        raise BatchError(f"`{needed_by}` needs batches of (inputs, targets): pass a data loader.")
    device, number = device_of(model), -1
    for number, batch in enumerate(batches):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            raise BatchError(
                f"Batch {number} of `{needed_by}` is no pair (inputs, targets) but {type(batch).__name__}."
            )
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            if tensor.device.type not in ("cpu", device.type):
                raise BatchError(
                    f"Batch {number} of `{needed_by}` is on {tensor.device}, the model on {device}: "
                    f"move the batch with `.to({str(device)!r})`."
                )
            if tensor.dim() and len(tensor) != len(batch[1]):
                raise BatchError(
                    f"Batch {number} of `{needed_by}` has {len(tensor)} inputs of shape {list(tensor.shape)} "
                    f"but {len(batch[1])} targets."
                )
        yield tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, tuple(batch))
    if number < 0:
        raise BatchError(f"`{needed_by}` got an empty loader; one that can only be read once may be used up.")

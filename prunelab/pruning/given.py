"""What ``prune`` is given, in the forms in which people have it.

Flows in: what was given as ``compensate`` and ``finetune``.  Flows out: a ``Compensation``; a model that was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from prunelab.curvature.statistics.statistics import Statistics
from prunelab.errors import OptionError, PruneLabError
from prunelab.options import shown
from prunelab.surgery.refit.options import Compensation


def compensation(given: Any) -> Compensation | None:
    """Return how to compensate: ``None`` for not at all, and without a source for the data of the criterion.

    Raises:
        OptionError: it is nothing that says how.
    """
    if given is None or given is False:
        return None
    if given is True:
        return Compensation()
    if isinstance(given, Compensation):
        return given
    if isinstance(given, Statistics) or (isinstance(given, Iterable) and not isinstance(given, (str, bytes))):
        return Compensation(given)
    raise OptionError(
        f"`compensate` must be True, False, batches, statistics or a pl.Compensation, got {shown(given)}."
    )


def train(finetune: Callable[[nn.Module], Any], model: nn.Module) -> None:
    """Fine-tune a model in place, and take over the weights of a trained copy if one is returned.

    Modules keep the modes that they had.

    Raises:
        PruneLabError: a model is returned that has other parameters or buffers.
    """
    modes = [(module, module.training) for module in model.modules()]
    result = finetune(model)
    for module, training in modes:
        module.training = training
    if isinstance(result, nn.Module):
        take_over(model, result)


@torch.no_grad()
def take_over(model: nn.Module, trained: nn.Module) -> None:
    """Copy all parameters and buffers of a trained copy, unless it is the model itself or a wrapper around it.

    Raises:
        PruneLabError: it has other ones; the message names the first.
    """
    for wrapper in ("module", "_orig_mod"):
        inner = getattr(trained, wrapper, None)
        if isinstance(inner, nn.Module) and not hasattr(model, wrapper):
            trained = inner
    if trained is model:
        return
    mine, theirs = ({**dict(one.named_parameters()), **dict(one.named_buffers())} for one in (model, trained))
    for name in [*mine, *theirs]:
        shapes = [list(found[name].shape) if name in found else "missing" for found in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise PruneLabError(
                f"`finetune` returned a {type(trained).__name__} of another structure: `{name}` is {shapes[1]} there "
                f"and {shapes[0]} in the model that it was given. Train that model in place and return None, or "
                "return a trained copy of it."
            )
    for name, value in mine.items():
        value.copy_(theirs[name])

"""Losses: what they are a mean over, and what a model that computes its own loss has computed.

A loss is a mean over samples, ``L = Σ_n c_n ℓ_n / Σ_n c_n``, with ℓ_n the loss of sample n alone.  Mostly all c_n are
one.  With ignored labels c_n is the share of the sample's labels that count, with class weights their weight.

Flows in: a loss and targets, or what a model returned with its ``.loss``.  Flows out: the c_n; or the outputs, targets
and loss that this ``.loss`` is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.batches.trees import tree_leaves

Loss = Callable[[Any, Any], Tensor]

IGNORED = -100
"""The label that ``F.cross_entropy`` ignores by default."""


def is_cross_entropy(loss: Any) -> bool:
    """Return whether a loss is PyTorch's cross-entropy, of logits ``[B, classes, …]``."""
    return loss is F.cross_entropy or type(loss) is nn.CrossEntropyLoss


def is_known(loss: Any) -> bool:
    """Return whether ``weights_of`` is exact for this loss, whatever the targets."""
    return (is_cross_entropy(loss) or loss is F.nll_loss or type(loss) is nn.NLLLoss) and (
        getattr(loss, "reduction", "mean") == "mean"
    )


def is_own_of_torch(loss: Any) -> bool:
    """Return whether a loss is one of PyTorch's own, which take one tensor as outputs."""
    module = getattr(loss if callable(loss) and hasattr(loss, "__name__") else type(loss), "__module__", "") or ""
    return module.startswith("torch.nn")


def ignored_label(loss: Any) -> int:
    """Return the label that a loss ignores."""
    return int(getattr(loss, "ignore_index", IGNORED))


def class_weights(loss: Any) -> Tensor | None:
    """Return the weight of every class, where a loss has some."""
    found = getattr(loss, "weight", None)
    return found if isinstance(found, Tensor) and is_known(loss) else None


def counted(loss: Any, targets: Tensor) -> Tensor:
    """Return which labels count in a loss, bool like the targets."""
    return targets != (ignored_label(loss) if is_known(loss) else IGNORED)


def weights_of(loss: Any, targets: Any, samples: int, *, by_label: bool = False) -> Tensor | None:
    """Return c_n ``[samples]``: how much each sample counts in the mean; ``None`` where all count as one.

    Args:
        loss: the loss.
        targets: of a batch.
        samples: how many samples it has.
        by_label: count labels: a sample with twice as many counts twice.  By default a sample whose labels all count is
            one, as many as it has.
    """
    if not isinstance(targets, Tensor) or targets.dim() == 0 or len(targets) != samples:
        return None
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool or not targets[0].numel():
        return None
    used, weight = counted(loss, targets), class_weights(loss)
    if weight is None and bool(used.all()):
        each = targets[0].numel() if by_label else 1
        return None if each == 1 else torch.full((samples,), float(each), device=targets.device)
    share = used.to(torch.float32 if targets.device.type == "mps" else torch.float64)
    if weight is not None:
        share = share * weight.to(share)[targets.masked_fill(~used, 0)]
    total = share.flatten(1).sum(1) if share.dim() > 1 else share
    return total if by_label else total / targets[0].numel()


# ── models that compute their own loss ────────────────────────────────────────────────────────────────────────────


def own_loss(outputs: Any) -> Tensor | None:
    """Return the loss among what a model returned: ``.loss``, ``["loss"]``, or the one single number."""
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(found, Tensor):
        return found if found.numel() == 1 else None
    if isinstance(outputs, (Tensor, tuple, list)):
        numbers = [
            leaf
            for leaf in tree_leaves(outputs)
            if isinstance(leaf, Tensor) and leaf.dim() == 0 and leaf.is_floating_point()
        ]
        return numbers[0] if len(numbers) == 1 else None
    return None


def logits_of(outputs: Any) -> Tensor | None:
    """Return the tensor of logits among what a model returned: ``.logits``, or the one floating-point tensor."""
    if isinstance(outputs, Tensor):
        return outputs if outputs.dim() else None
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(found, Tensor):
        return found
    tensors = [
        leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.dim() and leaf.is_floating_point()
    ]
    return tensors[0] if len(tensors) == 1 else None


class Recipe(NamedTuple):
    """A loss as a function of logits and labels: what is made of each, and the loss of the two."""

    outputs: Callable[[Tensor], Tensor]
    targets: Callable[[Tensor], Tensor]
    loss: Loss


def _classes_second(logits: Tensor) -> Tensor:
    return logits.movedim(-1, 1)


def _as_they_are(values: Tensor) -> Tensor:
    return values


RECIPES: tuple[Recipe, ...] = (
    Recipe(lambda z: _classes_second(z[:, :-1]), lambda y: y[:, 1:], F.cross_entropy),  # the next token
    Recipe(_classes_second, _as_they_are, F.cross_entropy),
    Recipe(_as_they_are, _as_they_are, F.cross_entropy),
    Recipe(_as_they_are, _as_they_are, F.binary_cross_entropy_with_logits),
    Recipe(_as_they_are, _as_they_are, F.mse_loss),
    Recipe(lambda z: z.squeeze(-1), lambda y: y.squeeze(-1) if y.dim() > 1 else y, F.mse_loss),
)
"""What models make of their logits, each tried on a batch until one gives their ``.loss``."""


def close(value: Tensor, other: Tensor) -> bool:
    """Return whether two losses are the same number, to the precision of the first."""
    exact = value.dtype in (torch.float32, torch.float64)
    gap = float((value.detach().cpu().double() - other.detach().cpu().double()).abs())
    return gap <= (1e-4 if exact else 2e-2) * float(value.detach().abs()) + 1e-6


def recipe_for(outputs: Any, labels: Any) -> Recipe | None:
    """Return how a model computed its loss from its logits and the labels; ``None`` if by none of ``RECIPES``."""
    value, logits = own_loss(outputs), logits_of(outputs)
    if value is None or logits is None or not isinstance(labels, Tensor):
        return None
    logits = logits.detach()
    for recipe in RECIPES:
        if recipe.loss is F.cross_entropy and (labels.is_floating_point() or logits.dim() != labels.dim() + 1):
            continue
        if recipe.loss is not F.cross_entropy and not labels.is_floating_point():
            continue
        try:
            z, y = recipe.outputs(logits), recipe.targets(labels)
            if recipe.loss is F.cross_entropy or z.shape == y.shape:
                found = recipe.loss(z.float() if z.dtype.itemsize < 4 else z, y.to(z) if y.is_floating_point() else y)
                if close(value, found):
                    return recipe
        except (RuntimeError, ValueError, IndexError):
            continue
    return None

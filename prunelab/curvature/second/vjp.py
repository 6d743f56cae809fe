"""Pieces: what every exact second derivative goes through: parts of batches, slopes in the outputs, and back.

Flows in: a model, batches and a loss.  Flows out: sums of derivatives over the samples of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from prunelab.batches import Batch, Batches, Loss, checked
from prunelab.batches.mean_check import check_apart, check_mean, check_own
from prunelab.batches.trees import tree_flatten, tree_unflatten
from prunelab.errors import BatchError, OptionError

HessianPart = Literal["exact", "functional", "gauss_newton"]
PARTS: tuple[HessianPart, ...] = get_args(HessianPart)
"""H, and the two parts that it is the sum of."""


def check_part(part: str) -> None:
    """Check the name of a part.

    Raises:
        OptionError: there is no such part.
    """
    if part not in PARTS:
        raise OptionError(f"part={part!r} is not one of {', '.join(PARTS)}.")


def finite(value: Tensor) -> bool:
    """Return whether all entries are; the sum tells, unless it is too large for a number itself."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def check_finite(names: Any, values: list[Tensor], number: int) -> None:
    """Check sums over the batches up to this one.

    Raises:
        BatchError: one is not finite.
    """
    for name, value in zip(names, values, strict=True):
        if not finite(value):
            raise BatchError(f"The curvature in `{name}` is not finite in batch {number}: check its inputs.")


def half_batches(
    model: nn.Module, batches: Batches | None, what: str, loss: Loss, part: HessianPart = "exact"
) -> Iterator[tuple[int, Batch]]:
    """Yield every batch in halves, with its number: a second derivative keeps twice what a first one does.

    Raises:
        BatchError: the batches do not fit the model.
    """
    for number, batch in enumerate(checked(model, batches, what, loss)):
        if part != "exact":
            batch.opened(f'{what} with "{part}"')
        check_own(model, batch)
        if batch.own and batch.recipe is None:
            yield number, batch  # the model alone knows what this loss is of a half
            continue
        batch.apart(what)
        if number == 0:
            check_apart(model, batch)
        middle = (batch.size + 1) // 2
        for half in (batch.take(slice(0, middle)), batch.take(slice(middle, None))):
            if half.size and half.total > 0:
                yield number, half


def differentiable(outputs: Any) -> list[Tensor]:
    """Return the outputs that depend on the parameters."""
    return [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor) and leaf.requires_grad]


def output_gradients(outputs: Any, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs, cut off from the model, and the slopes of the summed loss in them, on a graph of their own.

    Args:
        outputs: of the model.
        batch: whose they are.

    Raises:
        BatchError: the loss cannot take the outputs, or is not a mean.
    """
    flat, structure = tree_flatten(outputs)
    cut = [leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf for leaf in flat]
    ends = [new for new, old in zip(cut, flat, strict=True) if isinstance(old, Tensor) and old.requires_grad]
    again = tree_unflatten(cut, structure)
    check_mean(again, batch)
    if not ends:
        return ends, []
    return ends, list(torch.autograd.grad(batch.summed(again), ends, create_graph=True, materialize_grads=True))


def vjp(
    values: Sequence[Tensor],
    ends: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    free_graph: bool = False,
    create_graph: bool = False,
) -> list[Tensor]:
    """Return ``Σ_k ∂(value_k · v_k)/∂end`` for every end; zeros where nothing leads there.

    Args:
        values: what is differentiated.
        ends: with respect to what.
        vectors: one like each value.
        free_graph: whether the graph is not needed any more.
        create_graph: whether the result is differentiated further.
    """
    pairs = [(value, v) for value, v in zip(values, vectors, strict=True) if value.requires_grad]
    if not pairs:
        return [torch.zeros_like(end) for end in ends]
    used, backs = zip(*pairs, strict=True)
    keep = create_graph or not free_graph
    return list(
        torch.autograd.grad(used, ends, backs, retain_graph=keep, create_graph=create_graph, materialize_grads=True)
    )

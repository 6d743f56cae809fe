"""Mean check: whether the loss of a batch is the mean of the losses of its samples, as all sums over samples assume.

Flows in: outputs and a batch.  Flows out: nothing, or the error that says what the loss is instead.  Only the loss is
computed, for every sample by itself; PyTorch's cross-entropy needs no check, since it is known what it is a mean over.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.batches.batch import Batch
from prunelab.batches.losses import is_known, weights_of
from prunelab.batches.trees import tree_flatten, tree_leaves, tree_map, tree_unflatten
from prunelab.errors import BatchError
from prunelab.runtime.switches import ignoring

TOLERANCE = 1e-4
"""Of float32: the mean of many numbers against the mean of means.  Half precision has three digits."""


def check_mean(outputs: Any, batch: Batch) -> None:
    """Check that the loss of a batch is ``Σ_n c_n ℓ_n / Σ_n c_n``, ℓ_n the loss of sample n alone.

    Raises:
        BatchError: it cannot be computed, is not a single number, or differs.
    """
    if (is_known(batch.loss) and (batch.task is None or batch.task.weights is None)) or (
        batch.own and batch.recipe is None
    ):
        return
    with torch.no_grad():
        outputs = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, outputs)
        if batch.size == 1:
            batch, outputs = batch.take([0, 0]), _rows(outputs, 1, [0, 0])
        whole = batch.value(outputs)
        if not whole.isfinite():
            return  # what is not finite is told elsewhere
        counts = torch.ones(batch.size) if batch.weights is None else batch.weights.cpu()
        used = counts > 0
        values = _singles(outputs, batch, used)
        mean = float((values * counts).double()[used].sum() / counts.double().sum())
        size = float((values.abs() * counts).double()[used].sum() / counts.double().sum())
        gap = abs(float(whole) - mean)
        exact = all(leaf.element_size() >= 4 for leaf in tree_leaves(outputs) if _is_float(leaf))
        if not gap <= (TOLERANCE if exact else 3e-2) * size + 1e-6:
            raise BatchError(
                f"The loss of a batch is {float(whole):.4g}, the mean over its samples {mean:.4g}; it must be the "
                "plain mean over the samples. Ignored labels and class weights are right in nn.CrossEntropyLoss (or "
                "F.cross_entropy) itself; for other weighted means give pl.Task(batches, loss=…, weights=…)."
            )


def odd_labels(batch: Batch) -> bool:
    """Return whether labels are below zero and the loss may ignore them, which is not known of the user's own."""
    labels = batch.targets
    plain = isinstance(labels, Tensor) and labels.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)
    said = batch.own or batch.problem is not None or (batch.task is not None and batch.task.weights is not None)
    return plain and not said and not is_known(batch.loss) and bool((labels < 0).any())


def weighed(model: nn.Module, batch: Batch) -> Batch:
    """Return a batch with what its samples count in the loss, which is found out.

    A language model's first label, or last, is often left out.  Cost: one forward pass, and the loss a few times.

    Raises:
        BatchError: the loss is not a weighted mean of that kind.
    """
    with torch.no_grad():
        outputs = batch.run(model)
        labels = batch.targets
        if labels.dim() > 1 and labels.shape[1] > 1:
            first, last = (not _matters(outputs, batch, column) for column in (0, labels.shape[1] - 1))
            labels = labels[:, int(first) : labels.shape[1] - int(last)]
    fixed = weights_of(batch.loss, labels, batch.size)
    one = replace(batch, fixed=torch.ones(batch.size, device=labels.device) if fixed is None else fixed)
    if one.total > 0:
        check_mean(outputs, one)
    return one


def _matters(outputs: Any, batch: Batch, column: int) -> bool:
    """Return whether the loss looks at the labels in a column, by giving it others there."""
    labels = batch.targets.clone()
    now = labels[:, column]
    if not bool((now >= 0).any()):
        return True
    labels[:, column] = torch.where(now < 0, now, (now == 0).to(now))
    return not torch.equal(batch.value(outputs), replace(batch, targets=labels).value(outputs))


def check_own(model: nn.Module, batch: Batch) -> None:
    """Check a loss that the model computes itself in some unknown way, by calling it on parts of the batch.

    Raises:
        BatchError: it is not a mean over samples.
    """
    if not batch.own or batch.recipe is not None or batch.size < 2:
        return
    with torch.no_grad():
        whole = batch.value(batch.run(model))
        parts = [batch.take(slice(start, None, 2)) for start in (0, 1)]
        values = [part.value(part.run(model)) for part in parts]
        mean = sum(float(value) * part.size for value, part in zip(values, parts, strict=True)) / batch.size
        size = sum(abs(float(value)) for value in values)
        if not abs(float(whole) - mean) <= 1e-3 * size + 1e-6:
            raise BatchError(
                f"The loss that {type(model).__name__} returns is {float(whole):.4g} for a batch and {mean:.4g} in the "
                "mean over its parts; it must be the plain mean over the samples, or pl.Task(batches, loss=…, "
                "weights=…) must say what it is."
            )


def check_apart(model: nn.Module, batch: Batch, outputs: Any = None) -> None:
    """Check that the samples of a batch do not depend on each other, where it was guessed which they are.

    Args:
        model: the network.
        batch: the batch.
        outputs: for all of it, if they are known.

    Raises:
        BatchError: a part of the batch has other outputs.
    """
    dims = {dim for places in batch.places if not isinstance(places, str) for dim in places}
    if dims <= {0} and batch.targets is not None and not batch.own:
        return
    index = sorted({0, batch.size - 1})
    with torch.no_grad():
        outputs = batch.run(model) if outputs is None else outputs
        try:
            alone = batch.take(index).run(model)
        except BatchError as error:
            raise BatchError(batch.guess or str(error)) from error
    for found, whole in zip(tree_leaves(alone), tree_leaves(outputs), strict=False):
        if not _is_float(found) or not whole.dim() or len(whole) != batch.size:
            continue
        there = whole.detach()[index]
        if there.shape != found.shape or not torch.allclose(
            found, there, rtol=1e-2, atol=1e-3 * float(there.abs().max())
        ):
            raise BatchError(
                "Some samples of a batch give other outputs by themselves than with the others: it is not known which "
                f"dimension counts samples. {batch.guess or ''} Say it with pl.Task(batches, samples=…)."
            )


def _singles(outputs: Any, batch: Batch, used: Tensor) -> Tensor:
    """Return the loss of every sample by itself, ``[size]`` on the CPU; zero for those that do not count."""
    plain = isinstance(outputs, Tensor) and isinstance(batch.targets, Tensor) and batch.targets.dim() > 0
    if plain and batch.places[1] == (0,) and bool(used.all()):
        try:
            with ignoring():  # warnings of operators without a batching rule
                one = lambda z, y: batch.loss(z[None], y[None])  # noqa: E731
                return torch.func.vmap(one)(outputs, batch.targets).detach().float().cpu()
        except Exception:  # whatever vmap cannot take goes sample by sample
            pass
    values = torch.zeros(batch.size)
    for place in used.nonzero().flatten().tolist():
        values[place] = float(batch.take([place]).value(_rows(outputs, batch.size, [place])))
    return values


def _rows(outputs: Any, size: int, index: list[int]) -> Any:
    leaves, structure = tree_flatten(outputs)
    rows = [leaf[index] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size else leaf for leaf in leaves]
    return tree_unflatten(rows, structure)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()

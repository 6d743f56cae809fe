"""Fisher: what is sent back from the outputs, so that the squares of what arrives add up to the curvature wanted.

For the outputs z_n of sample n, with loss ℓ_n, all three are second moments of gradients that start from columns v:

- ``"empirical"``: v = ∂ℓ_n/∂z_n with the labels as given;
- ``"mc"``: the same with labels sampled from the model's softmax, so that E[v vᵀ] is the Fisher's;
- ``"ggn"``: the columns of a root of the output Hessian, Σ_c v_c v_cᵀ = ∂²ℓ_n/∂z_n²: exact, one backward pass each.

Flows in: outputs, targets and the loss.  Flows out: the columns, one backward pass each.  Notebook 04_obd derives them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from prunelab.batches import Loss
from prunelab.errors import BatchError
from prunelab.options import one_of

FISHERS = ("empirical", "mc", "ggn")


def check_fisher(fisher: str) -> None:
    """Check the name of a Fisher.

    Raises:
        OptionError: there is no such one.
    """
    one_of("fisher", fisher, FISHERS)


def columns(outputs: Any, targets: Tensor, loss: Loss, fisher: str, seed: int, first: int) -> Iterator[list[Tensor]]:
    """Yield the columns v of the losses of single samples, each as one tensor like every floating output.

    Args:
        outputs: what the model gives: a tensor ``[B, …]``, or several in any structure for ``"empirical"``.
        targets: ``[B, …]``.
        loss: ``loss(outputs, targets)``, a mean over samples.
        fisher: ``"empirical"``, ``"mc"`` or ``"ggn"``.
        seed: of the sampled labels.
        first: number of the first sample of this batch, so that its labels do not depend on the batches before it.

    Raises:
        BatchError: ``"mc"`` without class labels, ``"ggn"`` of a loss that is not convex in the outputs, or either with
            several outputs.
    """
    if fisher == "empirical":
        yield _slopes(outputs, targets, loss)
        return
    if not isinstance(outputs, Tensor):
        raise BatchError(f'fisher="{fisher}" needs a model with one tensor as output, not {type(outputs).__name__}.')
    if fisher == "mc":
        yield _slopes(outputs, sampled_labels(outputs, targets, seed, first), loss)
    elif _is_cross_entropy(loss) and outputs.dim() > 1 and not targets.is_floating_point():
        yield from ([column] for column in _softmax_root(outputs.detach()))
    else:
        yield from ([column] for column in _hessian_root(outputs.detach(), targets, loss))


def check_mean(outputs: Any, targets: Tensor, loss: Loss) -> None:
    """Check on one batch that the loss of a batch is the mean of the losses of its samples.

    Raises:
        BatchError: it cannot be computed, is no single number, or another one.
    """
    with torch.no_grad():
        half = len(targets) // 2
        parts = [slice(0, half), slice(half, None)] if half else [slice(None)]
        if not half:
            outputs, targets = (tree_map(_twice, value) for value in (outputs, targets))
            parts = [slice(0, 1), slice(1, 2)]
        whole = _tried(outputs, targets, loss)
        if not isinstance(whole, Tensor) or whole.dim():
            raise BatchError(f"The loss is no single number but {_shape(whole)}: it must be the mean over the samples.")
        values = [loss(tree_map(lambda leaf, part=part: _rows(leaf, part), outputs), targets[part]) for part in parts]
        lengths = [len(targets[part]) for part in parts]
        mean = sum(value * length for value, length in zip(values, lengths, strict=True)) / len(targets)
        gap, size = float((whole - mean).abs()), float(sum(value.abs() for value in values))
        if gap > 1e-2 * size + 1e-6:
            raise BatchError(
                f"The loss of a batch is {float(whole):.4g}, the mean over its halves {float(mean):.4g}; "
                "it must be the plain mean over the samples (no sum, no class weights, no ignored labels)."
            )


def sampled_labels(outputs: Tensor, targets: Tensor, seed: int, first: int) -> Tensor:
    """Return labels drawn from ``softmax(outputs)`` over dimension 1; sample n's draw depends on seed and n alone.

    Raises:
        BatchError: the targets are no class labels.
    """
    places = outputs.shape[2:]
    if targets.is_floating_point() or outputs.dim() < 2 or targets.shape != (len(outputs), *places):
        raise BatchError(
            f'fisher="mc" samples class labels, but the targets are {targets.dtype} {list(targets.shape)} for outputs '
            f'{list(outputs.shape)}; use fisher="ggn".'
        )
    draws = torch.from_numpy(np.stack([_uniform(seed, first + n, places.numel()) for n in range(len(outputs))]))
    cumulative = outputs.detach().double().softmax(1).cumsum(1) if outputs.device.type != "mps" else None
    if cumulative is None:  # which has no float64
        cumulative = outputs.detach().cpu().double().softmax(1).cumsum(1)
    bar = draws.view(len(outputs), 1, *places).to(cumulative.device) * cumulative[:, -1:]
    return (cumulative <= bar).sum(1).clamp_max(outputs.shape[1] - 1).to(targets)


def _uniform(seed: int, sample: int, count: int) -> np.ndarray:
    """Return uniform numbers from a stream of the sample's own."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, sample])).random(count)


def _slopes(outputs: Any, targets: Tensor, loss: Loss) -> list[Tensor]:
    """Return ``∂ℓ_n/∂z_n`` for every sample, from the mean loss of the batch."""
    tensors, structure = tree_flatten(outputs)
    tensors = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in tensors]
    floating = [leaf.requires_grad_() for leaf in tensors if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    with torch.enable_grad():
        value = loss(tree_unflatten(tensors, structure), targets) * len(targets)
        found = torch.autograd.grad(value, floating, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(floating, found, strict=True)]


def _is_cross_entropy(loss: Loss) -> bool:
    return loss is F.cross_entropy or (isinstance(loss, nn.CrossEntropyLoss) and loss.weight is None)


def _softmax_root(outputs: Tensor) -> Iterator[Tensor]:
    """Yield ``√p_c (e_c − p)`` per class and position: ``Σ_c v_c v_cᵀ = diag(p) − p pᵀ``, cross-entropy's Hessian."""
    flat = outputs.flatten(2) if outputs.dim() > 2 else outputs[..., None]
    probabilities = flat.softmax(1)
    for place in range(flat.shape[2]):
        p = probabilities[:, :, place]
        for label in range(flat.shape[1]):
            column = torch.zeros_like(flat)
            column[:, :, place] = -p
            column[:, label, place] += 1
            yield (column * (p[:, label] / flat.shape[2]).sqrt()[:, None, None]).view(outputs.shape)


def _hessian_root(outputs: Tensor, targets: Tensor, loss: Loss) -> Iterator[Tensor]:
    """Yield the columns of a root of ``∂²ℓ_n/∂z_n²``, from the eigenvectors of each sample's output Hessian."""
    leaf = outputs.requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(loss(leaf, targets) * len(targets), leaf, create_graph=True)
        flat = slope.flatten(1)
        rows = []
        for place in range(flat.shape[1] if flat.requires_grad else 0):
            (row,) = torch.autograd.grad(flat[:, place].sum(), leaf, retain_graph=True, allow_unused=True)
            rows.append(torch.zeros_like(leaf) if row is None else row)
    if not rows:
        return  # a loss linear in the outputs has no curvature
    hessian = torch.stack([row.flatten(1) for row in rows], 1)
    values, vectors = torch.linalg.eigh(hessian.cpu().double())
    if float(values.min()) < -1e-6 * float(values.max()):
        raise BatchError("The loss is not convex in the outputs, so it has no generalised Gauss-Newton matrix.")
    for place in range(values.shape[1]):
        column = vectors[:, :, place] * values[:, place, None].clamp_min(0).sqrt()
        if bool(column.any()):
            yield column.to(outputs).view(outputs.shape)


def _tried(outputs: Any, targets: Tensor, loss: Loss) -> Any:
    try:
        return loss(outputs, targets)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(list(leaf.shape)) for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor))
        given = f"outputs of shape {shapes} and targets of shape {list(targets.shape)}"
        raise BatchError(f"The loss cannot take {given}: {error}") from error


def _rows(leaf: Any, part: slice) -> Any:
    return leaf[part] if isinstance(leaf, Tensor) and leaf.dim() else leaf


def _twice(leaf: Any) -> Any:
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() else leaf


def _shape(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

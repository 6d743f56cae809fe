"""Fisher: what is sent back from the outputs, so that the squares of what arrives add up to the curvature wanted.

For the outputs z_n of sample n, with loss ℓ_n, all three are second moments of gradients that start from columns v:

- ``"empirical"``: v = ∂ℓ_n/∂z_n with the labels as given;
- ``"mc"``: the same with labels sampled from the model's softmax, so that E[v vᵀ] is the Fisher's;
- ``"ggn"``: the columns of a root of the output Hessian, Σ_c v_c v_cᵀ = ∂²ℓ_n/∂z_n²: exact, one backward pass each.

Flows in: outputs, targets and the loss.  Flows out: the columns, one backward pass each.  Notebook 04_obd derives them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from prunelab.batches import Batch
from prunelab.batches.losses import class_weights, counted, ignored_label, is_cross_entropy, is_known
from prunelab.batches.trees import tree_flatten, tree_unflatten
from prunelab.errors import BatchError
from prunelab.options import one_of
from prunelab.runtime.devices import exact

Fisher = Literal["empirical", "mc", "ggn"]
"""Whose outer products: of gradients for the labels as given, for labels sampled from the model, or all of them."""
FISHERS: tuple[Fisher, ...] = get_args(Fisher)

Curvature = Literal[Fisher, "hessian"]
"""A Fisher, or the Hessian itself."""
CURVATURES: tuple[Curvature, ...] = get_args(Curvature)


def check_fisher(fisher: str) -> None:
    """Check the name of a Fisher.

    Raises:
        OptionError: there is no such one.
    """
    one_of("fisher", fisher, FISHERS)


def columns(
    outputs: Any, batch: Batch, fisher: str, seed: int, first: int, option: str = "fisher"
) -> Iterator[list[Tensor]]:
    """Yield the columns v of the losses of single samples, each as one tensor like every floating output.

    A sample that counts c_n in the loss's mean has columns √c_n times those of its own loss.

    Args:
        outputs: what the loss is given: a tensor ``[B, …]``, or several in any structure.
        batch: the batch.
        fisher: ``"empirical"``, ``"mc"`` or ``"ggn"``.
        seed: of the sampled labels.
        first: number of the first sample of this batch, so that its labels do not depend on the batches before it.
        option: by which the user chose the Fisher, for errors.

    Raises:
        BatchError: ``"mc"`` without class labels or with class weights, ``"ggn"`` of a loss that is not convex in the
            outputs or has no second derivative.
    """
    if fisher == "empirical":
        yield _rooted(slopes(outputs, batch), batch)
    elif fisher == "mc":
        yield _rooted(_sampled_slopes(outputs, batch, seed, first, option), batch)
    else:
        leaf = outputs if isinstance(outputs, Tensor) else None
        if leaf is not None and is_softmax(leaf, batch):
            yield from ([column] for column in _softmax_root(leaf.detach(), batch))
        else:
            yield from _hessian_root(outputs, batch, option)


def passes(outputs: Any, batch: Batch, fisher: str) -> int:
    """Return how many backward passes the columns of a batch take, at most."""
    if fisher != "ggn":
        return 1
    tensors = [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return sum(leaf[0].numel() for leaf in tensors if leaf.dim() and len(leaf) == batch.size)


def is_softmax(outputs: Tensor, batch: Batch) -> bool:
    """Return whether the loss is cross-entropy with class labels, whose Hessian is known."""
    labels = batch.targets
    return (
        is_cross_entropy(batch.loss)
        and is_known(batch.loss)
        and class_weights(batch.loss) is None
        and isinstance(labels, Tensor)
        and outputs.dim() > 1
        and not labels.is_floating_point()
    )


def slopes(outputs: Any, batch: Batch) -> list[Tensor]:
    """Return ``c_n ∂ℓ_n/∂z_n`` for every sample and floating output, from the mean loss of the batch."""
    tensors, structure = tree_flatten(outputs)
    tensors = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in tensors]
    floating = [leaf.requires_grad_() for leaf in tensors if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    with torch.enable_grad():
        value = batch.summed(tree_unflatten(tensors, structure))
        found = torch.autograd.grad(value, floating, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(floating, found, strict=True)]


def _rooted(found: list[Tensor], batch: Batch) -> list[Tensor]:
    """Return slopes ``c_n ∂ℓ_n/∂z_n`` divided by √c_n."""
    weights = batch.weights
    if weights is None:
        return found
    scale = torch.where(weights > 0, weights.clamp_min(1e-30).rsqrt(), 0)
    return [
        slope * scale.to(slope).view(-1, *(1 for _ in slope.shape[1:]))
        if slope.dim() and len(slope) == batch.size
        else slope
        for slope in found
    ]


def _sampled_slopes(outputs: Any, batch: Batch, seed: int, first: int, option: str) -> list[Tensor]:
    """Return the slopes with labels sampled from the model's softmax; ignored ones stay ignored."""
    if class_weights(batch.loss) is not None:
        raise BatchError(
            f'{option}="mc" samples labels, and class weights belong to labels as given: use {option}="ggn".'
        )
    tensors, _ = tree_flatten(outputs)
    places = [
        n for n, leaf in enumerate(tensors) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1
    ]
    if len(places) > 1:  # those that the loss looks at
        found = slopes(outputs, batch)
        floats = [n for n, leaf in enumerate(tensors) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        places = [n for n in places if bool(found[floats.index(n)].any())]
    if len(places) != 1 or not isinstance(batch.targets, Tensor):
        what = f"targets that are one tensor, not {type(batch.targets).__name__}"
        if len(places) != 1:
            what = f"one tensor of logits among the outputs, of which the loss uses {len(places)}"
        raise BatchError(f'{option}="mc" needs {what}: use {option}="ggn", or pl.Task(batches, outputs=…).')
    logits, labels = tensors[places[0]].detach(), batch.targets
    last = _classes_last(logits, labels, batch)
    shown = logits.movedim(-1, 1) if last else logits
    sampled = sampled_labels(shown, labels, seed, first, option)
    drawn = batch.relabelled(torch.where(counted(batch.loss, labels), sampled, labels))
    if is_cross_entropy(batch.loss) and bool(getattr(batch.loss, "label_smoothing", 0)):
        # a smoothed label is not a sample of the softmax, a sharp one is, and the Hessian is the same
        drawn = replace(drawn, loss=nn.CrossEntropyLoss(ignore_index=ignored_label(batch.loss)))
    found = slopes(outputs, drawn)
    if last:
        floats = [n for n, leaf in enumerate(tensors) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        _check_places(found[floats.index(places[0])], shown, drawn.targets, counted(batch.loss, labels), option)
    return found


def _check_places(slope: Tensor, logits: Tensor, labels: Tensor, kept: Tensor, option: str) -> None:
    """Check that each position's label is that of its own logits, not of those before it.

    Raises:
        BatchError: it is not.
    """
    wanted = logits.softmax(1).scatter_add(1, labels.masked_fill(~kept, 0)[:, None], -torch.ones_like(logits[:, :1]))
    wanted = (wanted * kept[:, None]).flatten(1)
    given = slope.movedim(-1, 1).flatten(1)
    scale = (given * wanted).sum(1, keepdim=True) / wanted.square().sum(1, keepdim=True).clamp_min(1e-30)
    gap = (given - scale * wanted).norm(dim=1)
    if bool((gap > 2e-2 * given.norm(dim=1) + 1e-12).any()):
        raise BatchError(
            f'{option}="mc" samples the label of each position from the logits of that position, and the loss compares '
            "others, as language models do that predict the next word: shift both with pl.Task(batches, outputs=…, "
            "targets=…)."
        )


def _classes_last(logits: Tensor, labels: Tensor, batch: Batch) -> bool:
    """Return whether the last dimension counts classes, not dimension 1."""
    if logits.dim() < 3 or is_known(batch.loss) or labels.shape != logits.shape[:-1]:
        return False
    if labels.shape != (len(logits), *logits.shape[2:]):
        return True
    slope = slopes(logits, batch)[0]  # over classes, the slopes of a negative log-likelihood add up to nothing
    return float(slope.sum(-1).abs().max()) < float(slope.sum(1).abs().max())


def sampled_labels(outputs: Tensor, targets: Tensor, seed: int, first: int, option: str = "fisher") -> Tensor:
    """Return labels drawn from ``softmax(outputs)`` over dimension 1; sample n's draw depends on seed and n alone.

    Raises:
        BatchError: the targets are not class labels.
    """
    places = outputs.shape[2:]
    if targets.is_floating_point() or outputs.dim() < 2 or targets.shape != (len(outputs), *places):
        raise BatchError(
            f'{option}="mc" samples class labels, but the targets are {targets.dtype} {list(targets.shape)} for '
            f'outputs {list(outputs.shape)}; use {option}="ggn".'
        )
    draws = torch.from_numpy(np.stack([_uniform(seed, first + n, places.numel()) for n in range(len(outputs))]))
    cumulative = exact(outputs.detach()).softmax(1).cumsum(1)
    bar = draws.view(len(outputs), 1, *places).to(cumulative.device) * cumulative[:, -1:]
    return (cumulative <= bar).sum(1).clamp_max(outputs.shape[1] - 1).to(targets)


def _uniform(seed: int, sample: int, count: int) -> np.ndarray:
    """Return uniform numbers from a stream of the sample's own."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, sample])).random(count)


def _softmax_root(outputs: Tensor, batch: Batch) -> Iterator[Tensor]:
    """Yield ``√p_c (e_c − p)`` per class and position: ``Σ_c v_c v_cᵀ = diag(p) − p pᵀ``, cross-entropy's Hessian."""
    flat = outputs.flatten(2) if outputs.dim() > 2 else outputs[..., None]
    probabilities = flat.softmax(1)
    used = counted(batch.loss, batch.targets).view(len(flat), -1)
    per_label = batch.total / max(1.0, float(used.sum()))  # c_n over the number of the sample's labels that count
    for place in range(flat.shape[2]):
        p = probabilities[:, :, place]
        share = used[:, place].to(p) * per_label
        for label in range(flat.shape[1]):
            column = torch.zeros_like(flat)
            column[:, :, place] = -p
            column[:, label, place] += 1
            yield (column * (p[:, label] * share).sqrt()[:, None, None]).view(outputs.shape)


def _hessian_root(outputs: Any, batch: Batch, option: str) -> Iterator[list[Tensor]]:
    """Yield the columns of a root of ``c_n ∂²ℓ_n/∂z_n²``, from the eigenvectors of each sample's output Hessian."""
    tensors, structure = tree_flatten(outputs)
    tensors = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in tensors]
    floating = [leaf.requires_grad_() for leaf in tensors if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    size, rows = batch.size, []
    with torch.enable_grad():
        value = batch.summed(tree_unflatten(tensors, structure))
        found = torch.autograd.grad(value, floating, create_graph=True, allow_unused=True)
        used = [(leaf, slope) for leaf, slope in zip(floating, found, strict=True) if slope is not None]
        if any(leaf.dim() == 0 or len(leaf) != size for leaf, _ in used):
            shapes = [list(leaf.shape) for leaf, _ in used]
            raise BatchError(
                f'{option}="ggn" needs outputs with a row for each of {size} samples, not {shapes}: pl.Task(batches, '
                "outputs=…) says where they are."
            )
        ends = [leaf for leaf, _ in used]
        for slope in (slope.reshape(size, -1) for _, slope in used if slope.requires_grad):
            for place in range(slope.shape[1]):
                try:
                    row = torch.autograd.grad(slope[:, place].sum(), ends, retain_graph=True, allow_unused=True)
                except RuntimeError as error:
                    raise BatchError(
                        f'The loss has no second derivative in the outputs, which {option}="ggn" needs: use '
                        f'{option}="empirical". ({error})'
                    ) from error
                parts = [torch.zeros_like(e) if r is None else r for e, r in zip(ends, row, strict=True)]
                rows.append(torch.cat([part.reshape(size, -1) for part in parts], 1))
    if not rows:
        return  # a loss linear in the outputs has no curvature
    widths = [leaf.numel() // size for leaf in ends]
    blank = sum(widths) - len(rows)
    if blank:  # outputs in which the loss is linear have rows of zeros
        rows = _with_blank_rows(rows, [slope.requires_grad for _, slope in used], widths)
    hessian = torch.stack(rows, 1)
    values, vectors = torch.linalg.eigh(hessian.cpu().double())
    if float(values.min()) < -1e-6 * float(values.max()):
        several = ""
        if not isinstance(outputs, Tensor):
            several = (
                f'  {option}="ggn" needs a model with one tensor as output, not {type(outputs).__name__}, or a loss '
                "that is convex in all of them together: pl.Task(batches, outputs=…) can say which counts."
            )
        raise BatchError(
            f"The loss is not convex in the outputs, so it has no generalised Gauss-Newton matrix.{several}"
        )
    places = {id(leaf): n for n, leaf in enumerate(ends)}
    blanks = [torch.zeros_like(leaf.detach()) for leaf in floating]
    for place in range(values.shape[1]):
        column = vectors[:, :, place] * values[:, place, None].clamp_min(0).sqrt()
        if not bool(column.any()):
            continue
        parts = column.split(widths, 1)
        yield [
            parts[places[id(leaf)]].to(leaf).view(leaf.shape) if id(leaf) in places else blank
            for leaf, blank in zip(floating, blanks, strict=True)
        ]


def _with_blank_rows(rows: list[Tensor], bent: list[bool], widths: list[int]) -> list[Tensor]:
    """Return the rows of a Hessian, with zeros for the outputs that have none."""
    given, out = iter(rows), []
    for bends, width in zip(bent, widths, strict=True):
        out += [next(given) if bends else torch.zeros_like(rows[0]) for _ in range(width)]
    return out

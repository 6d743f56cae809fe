"""Exact: dense Hessian, Gauss-Newton matrix and Fishers of tiny networks, by plain autograd, to test all else against.

Nothing here is clever, and nothing is shared with the fast ways: a matrix is built row by row from its definition, over
all samples one batch at a time.  Parameters are flattened row by row and joined in the order of their names as given.

Flows in: a tiny model and batches.  Flows out: ``[n, n]`` matrices.  Notebooks 04_obd, 05_obs and 07_kfac use them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.batches import Batch, Batches, Loss, checked, mean_loss
from prunelab.batches.losses import counted
from prunelab.batches.mean_check import check_apart, check_mean, check_own
from prunelab.batches.trees import tree_flatten, tree_unflatten
from prunelab.curvature.fisher import sampled_labels
from prunelab.curvature.watching.checkpoints import no_checkpoints
from prunelab.errors import BatchError, BudgetError, PruneLabError
from prunelab.runtime.isolation import evaluating
from prunelab.runtime.switches import plain_attention, undisturbed

LIMIT = 5000
"""Parameters; a matrix of that size has 25 million entries."""

LabelSource = Literal["empirical", "mc", "exact"]
"""The labels of ``fisher``: as given, drawn from the model, or all of them."""
LABEL_SOURCES: tuple[LabelSource, ...] = get_args(LabelSource)

Names = Sequence[str] | None


def hessian(
    model: nn.Module,
    batches: Batches | None,
    loss: Loss = F.cross_entropy,
    names: Names = None,
    *,
    max_parameters: int = LIMIT,
) -> Tensor:
    """Return the Hessian of the mean loss over all samples, ``H = E[∂²ℓ_n/∂θ²]``, in eval mode.

    Cost: one double backward pass per parameter, for every batch.

    Args:
        model: the network; unchanged afterwards.
        batches: pairs ``(inputs, targets)``.
        loss: ``loss(outputs, targets)``, a mean over the samples.
        names: of the parameters, in this order; all by default.
        max_parameters: refuse more than so many.

    Returns:
        ``[n, n]``, symmetric, on the model's device.

    Raises:
        PruneLabError: a name is not a parameter of the model.
        BudgetError: there are more than ``max_parameters``.
        BatchError: the batches do not fit the model, or the matrix is not finite.

    >>> hessian(nn.Linear(1, 1), [(torch.tensor([[2.0]]), torch.zeros(1, 1))], F.mse_loss)
    tensor([[8., 4.],
            [4., 2.]])
    """

    def rows(parameters: list[Tensor], batch: Batch) -> Tensor:
        value = mean_loss(model, batch)
        return jacobian(
            flat(torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)), parameters
        )

    return _mean(model, batches, loss, names, max_parameters, rows)


def ggn(
    model: nn.Module,
    batches: Batches | None,
    loss: Loss = F.cross_entropy,
    names: Names = None,
    *,
    max_parameters: int = LIMIT,
) -> Tensor:
    """Return the generalised Gauss-Newton matrix ``E[J_nᵀ Λ_n J_n]``; see ``hessian``.

    J_n is the Jacobian of one sample's outputs, Λ_n the Hessian of its loss in them.  Cost: one backward pass per
    sample and output.
    """

    def rows(parameters: list[Tensor], batch: Batch) -> Tensor:
        total: Tensor | int = 0
        for one in counting(batch):
            outputs = one.run(model)
            leaves, structure = tree_flatten(outputs)
            reached = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves]
            cut = [leaf.detach().requires_grad_() if on else leaf for leaf, on in zip(leaves, reached, strict=True)]
            ends = [leaf for leaf, on in zip(cut, reached, strict=True) if on]
            value = one.summed(tree_unflatten(cut, structure)) / one.total
            slope = torch.autograd.grad(value, ends, create_graph=True, materialize_grads=True)
            bend = jacobian(flat(slope), ends)
            jacobian_n = jacobian(flat([leaf for leaf, on in zip(leaves, reached, strict=True) if on]), parameters)
            total = total + one.total * (jacobian_n.T @ bend @ jacobian_n)
        return torch.as_tensor(total) / batch.total

    return _mean(model, batches, loss, names, max_parameters, rows, "gauss_newton")


def fisher(
    model: nn.Module,
    batches: Batches | None,
    loss: Loss = F.cross_entropy,
    names: Names = None,
    *,
    kind: LabelSource = "exact",
    seed: int = 0,
    max_parameters: int = LIMIT,
) -> Tensor:
    """Return a Fisher matrix, ``E[g_n g_nᵀ]`` with g_n the gradient of one sample's loss; see ``hessian``.

    Cost: one backward pass per sample, times the number of classes for ``kind="exact"``.

    Args:
        model: the network; unchanged afterwards.
        batches: pairs ``(inputs, labels)``.
        loss: the negative log-likelihood of labels, a mean over the samples.
        names: of the parameters, in this order; all by default.
        kind: the labels: ``"empirical"`` as given, ``"mc"`` drawn from the softmax of the outputs, ``"exact"`` all of
            them, weighted by the softmax.
        seed: of the drawn labels, which are those of ``collect(…, fisher="mc", seed=seed)``.
        max_parameters: refuse more than so many.

    Raises:
        BudgetError: there is no such kind, or there are more than ``max_parameters``.
        BatchError: the batches do not fit the model, or the targets are not labels although labels are drawn.
    """
    if kind not in LABEL_SOURCES:
        raise BudgetError(f"kind={kind!r} is not one of {', '.join(LABEL_SOURCES)}.")
    seen = 0

    def rows(parameters: list[Tensor], batch: Batch) -> Tensor:
        nonlocal seen
        total: Tensor | int = 0
        for place, one in enumerate(batch.singles()):
            if not one.total > 0:
                continue
            outputs, y = one.run(model), one.targets
            labels, weights = [y], [1.0]
            if kind == "mc":
                labels = [torch.where(counted(one.loss, y), sampled_labels(outputs, y, seed, seen + place), y)]
            elif kind == "exact":
                if not isinstance(outputs, Tensor) or outputs.dim() != 2 or y.is_floating_point():
                    raise BatchError(f'kind="exact" needs outputs [B, classes] and labels, not {list(outputs.shape)}.')
                weights = outputs.detach().softmax(1)[0].tolist()
                labels = [torch.full_like(y, label) for label in range(len(weights))]
            for label, weight in zip(labels, weights, strict=True):
                value = one.relabelled(label).value(outputs)
                g = flat(torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True))
                total = total + one.total * weight * g[:, None] * g
        seen += batch.size
        return torch.as_tensor(total) / batch.total

    return _mean(model, batches, loss, names, max_parameters, rows)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return all entries of some tensors, one after the other, ``[n]``."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def jacobian(values: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return ``[values, n]``: the derivative of every value in all entries of some tensors."""
    number = sum(parameter.numel() for parameter in parameters)
    rows = values.new_zeros(len(values), number)
    for row, value in zip(rows, values, strict=True):
        if value.requires_grad:
            row += flat(torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True))
    return rows


def counting(batch: Batch) -> Iterator[Batch]:
    """Yield the samples that count in the loss, each a batch of one."""
    return (one for one in batch.singles() if one.total > 0)


@undisturbed()
def _mean(
    model: nn.Module,
    batches: Batches | None,
    loss: Loss,
    names: Names,
    limit: int,
    rows: Callable[[list[Tensor], Batch], Tensor],
    part: str = "exact",
) -> Tensor:
    """Return the mean over samples of a matrix that ``rows`` gives for each batch."""
    named = dict(model.named_parameters())
    chosen = list(named) if names is None else list(names)
    for name in chosen:
        if name not in named:
            raise PruneLabError(f"`{name}` is not a parameter of {type(model).__name__}.")
    number = sum(named[name].numel() for name in chosen)
    if number > limit:
        raise BudgetError(
            f"A dense matrix over {number} parameters has {number**2} entries; {limit} parameters are the limit. "
            "Name fewer with names=, raise max_parameters=, or use products (prunelab.curvature.second.hvp)."
        )
    total: Tensor | int = 0
    seen = 0.0
    with no_checkpoints(model, "an exact matrix"), evaluating(model), torch.enable_grad(), plain_attention:
        for number, batch in enumerate(checked(model, batches, "an exact matrix", loss)):
            if part != "exact":
                batch.opened("an exact matrix")
            check_own(model, batch)
            if not batch.own or batch.recipe is not None:
                check_apart(model, batch.apart("an exact matrix"))
                check_mean(batch.run(model), batch)
            matrix = rows([named[name] for name in chosen], batch).detach()
            if not bool(matrix.isfinite().all()):
                raise BatchError(f"The matrix is not finite in batch {number}: check its inputs.")
            total = total + matrix * batch.total
            seen += batch.total
    return torch.as_tensor(total) / seen

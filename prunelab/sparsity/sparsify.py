"""Unstructured pruning: single weights become zero and stay zero while the model is trained.

Flows in: a model and a score per weight.  Flows out: the model with masks (``masks``), of the same class and the same
shapes.  Notebook 05_obs uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from prunelab.distributed import refuse_wrapped
from prunelab.errors import BudgetError, OptionError, PlanError
from prunelab.options import flag, one_of, parts, real, shown
from prunelab.runtime.isolation import copied
from prunelab.runtime.switches import undisturbed
from prunelab.sparsity.masks import input_dim, mask_of, parameters_of, plain_name, prunable, put_masks, value_of

WeightScope = Literal["global", "layer"]
WEIGHT_SCOPES: tuple[WeightScope, ...] = get_args(WeightScope)


def sparsify(
    model: nn.Module,
    scores_elementwise: Mapping[str, Tensor],
    density: float | None = None,
    *,
    scope: WeightScope = "global",
    pattern: tuple[int, int] | None = None,
    names: Iterable[str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Return ``model`` with only the weights of highest score left; the others are zero, also during training.

    Every pruned weight gets a parametrization: the parameter moves to ``<module>.parametrizations.<name>.original``, in
    the ``state_dict`` too, with its mask beside it.  With ``inplace=True`` optimizers go on with the same parameters.
    Weights that are tied share one mask.  The weights that are left do not change; on networks of some thousand
    weights ``criteria.obs.prune_weights`` removes one after the other and adapts all that are left.  On a model that is
    sparse already, what is zero stays zero and ``density`` counts from the whole.

    Args:
        model: any module.
        scores_elementwise: parameter name -> tensor like the parameter; higher = costlier to remove.  As
            ``criterion.elementwise(model, batches)`` returns them; weights without a score stay dense.
        density: the share of weights that is kept, in (0, 1]; of those that are pruned at all.
        scope: ``"global"`` ranks all weights together; ``"layer"`` keeps the same share of every weight tensor.
        pattern: ``(n, m)`` keeps n of every m neighbours along the input dimension (2:4 for sparse tensor cores), in
            every tensor; the density is then n/m.  Weights whose input dimension is not a multiple of m stay dense.
        names: prune exactly these parameters; by default the weights of linear, convolution, attention, embedding and
            recurrent layers, never biases or norms.
        inplace: put the masks on ``model`` itself instead of a copy.

    Returns:
        The sparse model, of the same class, in the same mode, on the same device.

    Raises:
        OptionError: ``density``, ``scope`` or ``pattern`` is out of range.
        BudgetError: more weights should stay than are left.
        PlanError: a score is of a parameter that the model does not have, of another shape, or not a number; nothing
            can be pruned; ``names`` asks for something without a score, or that the pattern does not fit.

    Source: the magnitude rule is that of Han et al. 2015; N:M patterns as in Mishra et al. 2021, *Accelerating Sparse
    Deep Neural Networks*.

    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> sparse = sparsify(model, {"0.weight": torch.arange(8.0).view(2, 4)}, 0.25)
    >>> (sparse[0].weight != 0).tolist()
    [[False, False, False, False], [False, False, True, True]]
    """
    with undisturbed():
        refuse_wrapped(model)
        inplace = flag("inplace", inplace)
        density = _checked_density(density, pattern)
        one_of("scope", scope, WEIGHT_SCOPES)
        scores = _checked_scores(model, scores_elementwise, names)
        if pattern is not None:
            fits = {name: score for name, score in scores.items() if _fits(model, name, score, pattern[1], names)}
            if not fits:
                raise PlanError(f"No weight with a score has an input dimension that is a multiple of {pattern[1]}.")
            masks = {name: _pattern_mask(score, pattern, input_dim(model, name)) for name, score in fits.items()}
        elif scope == "layer":
            masks = {name: top(score, density, name) for name, score in scores.items()}
        else:
            flat = top(torch.cat([score.flatten() for score in scores.values()]), density, "all weights")
            parts = flat.split([score.numel() for score in scores.values()])
            masks = {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}
        return put_masks(model if inplace else copied(model), masks)


# ── which weights stay ────────────────────────────────────────────────────────────────────────────────────────────


def top(score: Tensor, density: float, what: str) -> Tensor:
    """Return bool like ``score``: True for the share ``density`` of highest score; of equal ones, the first."""
    count = max(round(density * score.numel()), 1)
    flat = score.flatten()
    left = int((flat > -torch.inf).sum())
    if left < count:
        raise BudgetError(
            f"density={density:.4g} of {what} is {count} weights, but only {left} are left; the others are masked."
        )
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view_as(score)


def _pattern_mask(score: Tensor, pattern: tuple[int, int], dim: int) -> Tensor:
    n, m = pattern
    blocks = score.movedim(dim, -1).unflatten(-1, (-1, m))
    order = blocks.argsort(dim=-1, descending=True, stable=True)[..., :n]
    mask = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, order, True)
    return (mask & (blocks > -torch.inf)).flatten(-2).movedim(-1, dim).contiguous()


def _fits(model: nn.Module, name: str, score: Tensor, m: int, names: Iterable[str] | None) -> bool:
    dim = input_dim(model, name)
    fits = score.dim() > dim and score.shape[dim] % m == 0
    if not fits and names is not None:
        raise PlanError(f"`{name}` has shape {list(score.shape)}: its inputs, dimension {dim}, do not split into {m}s.")
    return fits


def _checked_density(density: float | None, pattern: tuple[int, int] | None) -> float:
    why = "outside that; it is the share of the weights to keep"
    if pattern is not None:
        whole = isinstance(pattern, (tuple, list)) and len(pattern) == 2 and all(type(part) is int for part in pattern)
        if not whole or not 0 < pattern[0] <= pattern[1]:
            raise OptionError(f"pattern={shown(pattern)} must be a pair (n, m) of integers with 0 < n <= m.")
        share = pattern[0] / pattern[1]
        if density is not None and abs(real("density", density, above=0, most=1, why=why) - share) > 1e-6:
            raise OptionError(
                f"density={density!r} contradicts pattern={pattern}, which keeps {share:.4g}; leave it out."
            )
        return share
    return real("density", density, above=0, most=1, why=why)


def _checked_scores(model: nn.Module, given: Mapping[str, Tensor], names: Iterable[str] | None) -> dict[str, Tensor]:
    """Return float scores of the parameters that are to be pruned, tied ones once; −inf where they are masked."""
    parameters = parameters_of(model)
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise PlanError(
            "`scores_elementwise` must map names of parameters to tensors like them, as criterion.elementwise(model, "
            f"batches) returns, got a {type(given).__name__}."
        )
    for name, score in given.items():
        if not isinstance(score, Tensor):
            raise PlanError(f"The score of {name!r} must be a tensor like that parameter, got {shown(score)}.")
    by_name = {plain_name(name): score for name, score in given.items()}
    if names is not None:
        asked = [plain_name(name) for name in parts("names", names) if isinstance(name, str)]
        without = [name for name in asked if name not in by_name]
        if without:
            raise PlanError(f"names asks for `{without[0]}`, which has no score.")
        by_name = {name: by_name[name] for name in asked}
    scores: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, score in by_name.items():
        if name not in parameters:
            raise PlanError(f"There is a score for `{name}`, but {type(model).__name__} has no such parameter.")
        parameter = parameters[name]
        if names is None and not prunable(model, name):
            continue
        if score.shape != value_of(model, name).shape:
            shapes = f"{list(score.shape)}, the parameter {list(parameter.shape)}"
            raise PlanError(f"The score of `{name}` has shape {shapes}: scores are one number per weight.")
        if score.isnan().any():
            raise PlanError(f"The score of `{name}` is not a number for some weights.")
        if id(parameter) not in seen:
            seen.add(id(parameter))
            old = mask_of(model, name)
            floating = score.detach().cpu()
            floating = floating if floating.dtype == torch.float64 else floating.float()
            floating = floating.clamp_min(torch.finfo(floating.dtype).min)
            scores[name] = floating if old is None else floating.masked_fill(~old.mask.cpu(), -torch.inf)
    if not scores:
        kinds = "names of parameters" if names is not None else "weights of linear, convolution or attention layers"
        raise PlanError(f"Nothing to prune: none of the {len(by_name)} scores is for {kinds}.")
    return scores

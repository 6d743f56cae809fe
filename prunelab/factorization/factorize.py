"""Factorise: put bottlenecks in the eigenbasis of the Fisher in the place of layers, until a budget is met.

Flows in: a model and the ``EigenScores`` of EigenDamage.  Flows out: a model of the same class in which layers are
``Bottleneck``s, and a note of what was done to it.  Notebook 08_eigendamage derives it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, Literal, get_args

from torch import nn

from prunelab.cost import Cost, count
from prunelab.criteria.base import Scores
from prunelab.criteria.eigendamage import EigenScores, LayerScores
from prunelab.errors import BudgetError, PlanError
from prunelab.factorization.factorized import Factorized, Narrowed, build
from prunelab.factorization.ranks import Layer, choose
from prunelab.factorization.sites import Positions, Site, find, uses
from prunelab.options import flag, one_of, real
from prunelab.runtime.devices import exact
from prunelab.runtime.isolation import copied
from prunelab.runtime.switches import undisturbed
from prunelab.sparsity.masks import mask_of, parameters_of
from prunelab.surgery.layers import free
from prunelab.tracing import fakes
from prunelab.tracing.named import covered

RankPer = Literal["auto", "flops", "params", "unit"]
RANK_PERS: tuple[RankPer, ...] = get_args(RankPer)

TOLERANCE = 0.01
"""How far below its budget a model may end before a warning, as a share of the budget."""


def factorize(
    model: nn.Module,
    scores: Scores,
    *,
    flops: float | None = None,
    params: float | None = None,
    per: RankPer = "auto",
    ignore: Iterable[str | nn.Module] = (),
    train_rotations: bool = True,
    inplace: bool = False,
) -> nn.Module:
    """Replace layers by their bottlenecks in the Kronecker-factored eigenbasis, at the least damage for a budget.

    A convolution becomes a 1×1 convolution Q_Aᵀ (in → r_in), its core Q_Sᵀ W Q_A (r_in → r_out) and a 1×1 convolution
    Q_S (r_out → out), as far as that is cheaper: a side at full rank is not rotated, and a layer that would not get
    cheaper stays.  A linear layer keeps one side: with no kernel between them, a second rotation only costs.  A layer
    that is a bottleneck already has its new rotations merged into the old.

    Args:
        model: the model that was scored, or one with the same layers.
        scores: from ``EigenDamage``.
        flops: share of the FLOPs that is kept, in (0, 1], of which 1 changes nothing; or
        params: share of the parameters that is kept.  Exactly one of the two.
        per: weigh the damage of ranks against the ``"flops"`` or ``"params"`` that they cost (``"auto"``: as the budget
            is given); or keep all rows and columns above one threshold, whatever they cost (``"unit"``, as published).
        ignore: names or modules that do not change.
        train_rotations: whether the rotations require gradients; they are in ``state_dict`` either way.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The model with bottlenecks, of the same class, in the same mode, on the same device.  Its FLOPs or parameters
        are at most the budget, within 1 % of it where ranks allow; a warning otherwise.

    Raises:
        OptionError: an option is out of its range or of another type.
        BudgetError: no or two budgets are given, or the budget cannot be met.
        PlanError: the scores are not EigenDamage's or do not fit the model; the model has masks; or ``ignore`` names
            something unknown.

    Source: Wang et al. 2019, *EigenDamage*, section 4; choosing ranks by what they cost is ours.

    >>> import torch
    >>> from prunelab import trace
    >>> _ = torch.manual_seed(0)
    >>> from prunelab.criteria import EigenDamage
    >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32, 4))
    >>> images, labels = torch.randn(50, 3, 5, 5), torch.arange(50) % 4
    >>> scores = EigenDamage()(trace(model, images[:1]), [(images, labels)])
    >>> small = factorize(model, scores, flops=0.5)
    >>> type(small[2]).__name__, count(small, images).flops <= 0.5 * count(model, images).flops
    ('Bottleneck', True)
    """
    with undisturbed():
        _refuse_masks(model)
        kind, share = _budget(flops, params)
        one_of("per", per, RANK_PERS)
        train_rotations, inplace = flag("train_rotations", train_rotations), flag("inplace", inplace)
        if not isinstance(scores, EigenScores):
            name = scores.criterion if isinstance(scores, Scores) else type(scores).__name__
            raise PlanError(f"factorize needs the scores of pl.criteria.EigenDamage(); these are of `{name}`.")
        inputs = fakes.recall_inputs(scores.graph.inputs)
        whole = count(model, inputs)
        sites, used, dense = _candidates(model, scores, inputs, ignore)
        layers = [_layer(site, scores.layers[name], used[name], whole, kind, per) for name, site in sites.items()]
        rest = 1 - sum(layer.pick(0).cost for layer in layers)
        asked = f"{kind}={share}"
        by_price, slack = per != "unit", TOLERANCE * share
        choices = {} if share == 1 else choose(layers, share - rest, by_price=by_price, slack=slack, asked=asked)
        narrowed = [
            Narrowed(name, site.shape, choices[name].inward, choices[name].outward)
            for name, site in sites.items()
            if name in choices and (choices[name].inward or choices[name].outward)
        ]
        damage = sum(choice.damage for choice in choices.values())
        budget: dict[str, Any] = {"asked": {kind: share}, "per": per, "criterion": scores.criterion, "damage": damage}
        note = Factorized(tuple(narrowed), train_rotations, budget, dense)
        target = build(model if inplace else copied(model), note, scores.layers)
        made = count(target, inputs)
        budget["kept"] = {"flops": made.flops / whole.flops, "params": made.params / whole.params}
        if budget["kept"][kind] > share * (1 + 1e-9):
            warnings.warn(
                f"{asked}: the model ends at {budget['kept'][kind]:.3f}, other code reads its weights.", stacklevel=2
            )
        return target


def _refuse_masks(model: nn.Module) -> None:
    """Refuse a sparse model: in a rotated basis its zeros are none any more.

    Raises:
        PlanError: a weight has a mask.
    """
    sparse = next((name for name in parameters_of(model) if mask_of(model, name) is not None), None)
    if sparse is not None:
        raise PlanError(
            f"`{sparse}` has a mask, and a bottleneck would not keep its zeros: bake first, with pl.bake(model)."
        )


def _candidates(
    model: nn.Module, scores: EigenScores, inputs: Any, ignore: Iterable[str | nn.Module]
) -> tuple[dict[str, Site], dict[str, Positions], dict[str, str]]:
    """Return the layers that may become bottlenecks, how they are used, and why others may not."""
    mode = fakes.fake_mode()
    rehearsal = free(fakes.fake_model(model, mode), {score.weight for score in scores.layers.values()})
    sites, dense = find(rehearsal)
    skipped = covered(model, ignore)
    used, foreign = uses(rehearsal, sites, mode, inputs)
    dense = dense | foreign
    for name, site in list(sites.items()):
        found = scores.layers.get(name)
        if name in skipped:
            dense[name] = "it is to be ignored"
        elif name in used and found is None:
            dense[name] = "it has no score"
        elif name in used and found is not None:
            groups = site.shape[:1] if site.shape[0] > 1 else ()
            if found.importance.shape != (*groups, *site.shape[1:3]):
                raise PlanError(
                    f"`{name}` has the shape {list(site.shape)} (groups, out, in, kernel) and scores of shape "
                    f"{list(found.importance.shape)}: they were made for another model."
                )
            continue
        del sites[name]
    if not sites:
        reasons = "; ".join(f"`{name}`: {reason}" for name, reason in list(dense.items())[:5])
        raise PlanError(
            f"No layer of {type(model).__name__} can be factorised. {reasons or 'It has none with a score.'}"
        )
    return sites, used, dense


def _layer(site: Site, scores: LayerScores, positions: Positions, whole: Cost, kind: str, per: str) -> Layer:
    def prices(kind: str) -> tuple[float, float, float]:
        inward, core, outward = (
            2 * number / whole.flops if kind == "flops" else 1 / whole.params for number in positions
        )
        return inward, core, outward

    importance = exact(scores.importance).reshape(site.shape[:3])
    trade = prices(per) if per in ("flops", "params") else None
    return Layer(site.weight, importance, math.prod(site.shape[3:]), site.around, prices(kind), trade)


def _budget(flops: float | None, params: float | None) -> tuple[str, float]:
    asked = {name: value for name, value in (("flops", flops), ("params", params)) if value is not None}
    if len(asked) != 1:
        raise BudgetError(f"Give exactly one budget, flops or params; given: {', '.join(asked) or 'none'}.")
    name, value = next(iter(asked.items()))
    return name, real(name, value, above=0, most=1, why=f"the share of the {name} to keep; 1 changes nothing")

"""Plans: budgets are met with the cheapest units, and options do what they say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunelab as pl
from prunelab.cost import CostModel

INPUTS = torch.ones(1, 3, 32, 32)


@pytest.fixture(scope="module", params=["resnet20", "vgg13_narrow", "vit_small"])
def scores(request) -> pl.Scores:
    torch.manual_seed(0)
    return pl.criteria.Random()(pl.trace(pl.zoo.build(request.param), INPUTS))


@pytest.mark.parametrize("share", [0.85, 0.5, 0.2])
@pytest.mark.parametrize("kind", ["flops", "params"])
@pytest.mark.parametrize("scope", ["global", "isomorphic"])
def test_a_budget_is_met_within_one_percent_by_independent_count(scores, kind, share, scope):
    plan = pl.plan(scores, **{kind: share}, scope=scope)
    whole = pl.count(scores.graph.model, INPUTS)
    cut = pl.count(pl.apply(scores.graph.model, plan), INPUTS)
    found = getattr(cut, kind) / getattr(whole, kind)
    assert 0.99 * share <= found <= share
    assert plan.budget["kept"][kind] == pytest.approx(found, rel=1e-12)


def test_the_cost_model_counts_what_torch_counts(scores):
    whole, found = pl.count(scores.graph.model, INPUTS), CostModel(scores.graph)({})
    assert (found["flops"], found["params"]) == (whole.flops, whole.params)


def test_within_a_group_the_lowest_scores_go(scores):
    plan = pl.plan(scores, flops=0.5)
    for group in scores.graph.groups:
        removed = list(plan.removed.get(group.name, ()))
        kept = [unit for unit in range(group.size) if unit not in removed]
        if removed:
            assert scores[group][removed].max() <= scores[group][kept].min()


def test_a_global_ranking_takes_the_lowest_scores_of_all(small):
    graph = pl.trace(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 2)), torch.ones(1, 2))
    values = {"0": torch.tensor([1.0, 2, 3, 4]), "1": torch.tensor([5.0, 6, 7, 0.5])}
    plan = pl.plan(pl.Scores(graph, values, "test"), ratio=0.375)
    assert plan.removed == {"0": (0, 1), "1": (3,)}
    assert pl.plan(pl.Scores(graph, values, "test"), ratio=0.5, scope="layer").removed == {"0": (0, 1), "1": (0, 3)}


def test_options_are_obeyed(scores):
    first, second = scores.graph.groups[0], scores.graph.groups[1]
    plan = pl.plan(scores, flops=0.6, ignore=[first.name], overrides={second.name: 0.5}, max_ratio=0.7, round_to=4)
    sizes = {group.name: group.size for group in scores.graph.groups}
    assert first.name not in plan.removed
    assert len(plan.removed[second.name]) == second.size // 2
    for name, units in plan.removed.items():
        assert len(units) <= 0.7 * sizes[name] and (sizes[name] - len(units)) % 4 == 0


def test_a_module_can_be_ignored():
    model = pl.zoo.resnet20()
    scores = pl.criteria.Random()(pl.trace(model, INPUTS))
    plan = pl.plan(scores, flops=0.6, ignore=[model.layer2])
    assert not any(member.startswith("layer2.") for cut in plan.cuts for member, _ in cut.members)


def test_plans_are_plain_json(scores):
    plan = pl.plan(scores, flops=0.5)
    assert pl.Plan.from_json(plan.to_json()) == plan and "keeps" in repr(plan)
    for text in ("{", "[]", '{"format": 99}', plan.to_json().replace('"removed"', '"gone"')):
        with pytest.raises(pl.PlanError, match="plan"):
            pl.Plan.from_json(text)


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, "half", float("nan"), True])
@pytest.mark.parametrize("kind", ["flops", "params", "ratio"])
def test_a_budget_outside_its_range_is_an_error_that_names_it(scores, kind, share):
    with pytest.raises(pl.BudgetError, match=kind):
        pl.plan(scores, **{kind: share})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one budget"),
        ({"flops": 0.5, "params": 0.5}, "flops, params"),
        ({"flops": 0.001}, "cannot be met"),
        ({"flops": 0.5, "max_ratio": 0}, "max_ratio"),
        ({"flops": 0.5, "round_to": 0}, "round_to"),
        ({"flops": 0.5, "scope": "local"}, "scope"),
        ({"flops": 0.5, "ignore": ["layer9"]}, "layer9"),
        ({"flops": 0.5, "ignore": [nn.Linear(1, 1)]}, "Linear"),
        ({"flops": 0.5, "overrides": {"layer9": 0.5}}, "layer9"),
    ],
)
def test_bad_options_are_errors_that_name_the_culprit(scores, options, message):
    with pytest.raises(pl.PruneLabError, match=message):
        pl.plan(scores, **options)


@pytest.mark.filterwarnings("default")
def test_units_too_large_for_the_budget_are_reported():
    scores = pl.criteria.Random()(pl.trace(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), torch.ones(1, 2)))
    with pytest.warns(UserWarning, match="too large to come closer"):
        assert pl.plan(scores, flops=0.6).budget["kept"]["flops"] == pytest.approx(1 / 3)

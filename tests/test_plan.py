"""Plans: budgets are met with the cheapest units, and options do what they say."""

from __future__ import annotations

from itertools import combinations

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


# ── scores that carry a matrix ────────────────────────────────────────────────────────────────────────────────────


def with_matrix(graph: pl.DependencyGraph, seed: int, rank: int = 6) -> pl.Scores:
    """Return random scores and a matrix as those of a quadratic: ``½ G_uu``, perhaps less a slope, and ``G``."""
    generator = torch.Generator().manual_seed(seed)
    units = sum(group.size for group in graph.groups)
    factor = torch.randn(rank, units, generator=generator)
    matrix = factor.t() @ factor
    scores = matrix.diagonal() / 2 - 0.3 * torch.rand(units, generator=generator)
    parts = scores.split([group.size for group in graph.groups])
    return pl.Scores(graph, {g.name: part for g, part in zip(graph.groups, parts, strict=True)}, "test", matrix)


def quadratic(scores: pl.Scores, removed: dict[str, list[int]]) -> float:
    """Return the cost of removing units, from its definition: all scores, and the matrix over all pairs."""
    places, start = [], 0
    for group in scores.graph.groups:
        places += [start + unit for unit in removed.get(group.name, ())]
        start += group.size
    flat = torch.cat([scores[group] for group in scores.graph.groups]).double()
    pairs = sum(float(scores.matrix[u, v]) for u in places for v in places if u < v)
    return float(flat[places].sum()) + pairs


@pytest.fixture
def chain() -> pl.DependencyGraph:
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 2))
    return pl.trace(model, torch.ones(1, 2))


@pytest.mark.parametrize("seed", range(5))
def test_every_greedy_step_adds_as_little_as_any_unit_could(chain, seed):
    """Brute force: one plan after the other takes one unit more, and no other unit would have cost less."""
    scores, before = with_matrix(chain, seed), {}
    for number in range(1, 8):
        removed = {name: list(units) for name, units in pl.plan(scores, ratio=number / 12).removed.items()}
        costs = {}
        for group in chain.groups:
            gone = before.get(group.name, [])
            for unit in set(range(group.size)) - set(gone):
                if len(gone) < group.size - 1:
                    trial = before | {group.name: [*gone, unit]}
                    costs[quadratic(scores, trial)] = {name: sorted(units) for name, units in trial.items()}
        assert removed == costs[min(costs)]
        assert scores.together(removed) == pytest.approx(min(costs), rel=1e-6)
        before = removed


def test_greedy_sees_what_a_ranking_cannot(chain):
    """Units 0 and 1 are cheap and stand in for each other: a ranking removes both, greedy only one."""
    size = sum(group.size for group in chain.groups)
    matrix = torch.eye(size)
    matrix[0, 1] = matrix[1, 0] = 10.0
    values = torch.arange(size) + 1.0
    parts = values.split([group.size for group in chain.groups])
    by_name = {group.name: part for group, part in zip(chain.groups, parts, strict=True)}
    assert pl.plan(pl.Scores(chain, by_name, "test"), ratio=2 / size).removed == {"0": (0, 1)}
    assert pl.plan(pl.Scores(chain, by_name, "test", matrix), ratio=2 / size).removed == {"0": (0, 2)}


def test_greedy_is_near_the_best_of_all_sets(chain):
    """On average over seeds; and it is far better than the ranking by scores alone."""
    greedy, ranking, best = [], [], []
    places = [(group.name, unit) for group in chain.groups for unit in range(group.size)]
    for seed in range(10):
        scores = with_matrix(chain, seed)
        every = []
        for chosen in combinations(places, 4):
            removed: dict[str, list[int]] = {}
            for name, unit in chosen:
                removed.setdefault(name, []).append(unit)
            if all(len(removed.get(group.name, ())) < group.size for group in chain.groups):
                every.append(quadratic(scores, removed))
        best.append(min(every))
        greedy.append(scores.together(pl.plan(scores, ratio=4 / 12).removed))
        ranking.append(scores.together(pl.plan(pl.Scores(chain, scores.by_name, "test"), ratio=4 / 12).removed))
    assert all(one >= two - 1e-5 for one, two in zip(greedy, best, strict=True))
    assert sum(greedy) - sum(best) < 0.5 * (sum(ranking) - sum(best))


def test_a_diagonal_matrix_changes_nothing(scores):
    units = sum(group.size for group in scores.graph.groups)
    same = pl.Scores(scores.graph, scores.by_name, "test", torch.eye(units))
    first = scores.graph.groups[0].name
    for options in ({"flops": 0.5}, {"params": 0.4, "scope": "isomorphic"}, {"ratio": 0.3, "scope": "layer"}):
        options |= {"round_to": 2, "overrides": {first: 0.25}, "max_ratio": 0.8}
        assert pl.plan(same, **options).removed == pl.plan(scores, **options).removed


@pytest.mark.parametrize("kind", ["flops", "params"])
@pytest.mark.parametrize("scope", ["global", "layer", "isomorphic"])
def test_greedy_plans_obey_all_options(scores, kind, scope):
    graph = scores.graph
    coupled = with_matrix(graph, 0, rank=50)
    first, second = graph.groups[0], graph.groups[1]
    options = {"ignore": [first.name], "overrides": {second.name: 0.5}, "max_ratio": 0.7, "round_to": 4}
    plan = pl.plan(coupled, **{kind: 0.7}, scope=scope, **options)
    sizes = {group.name: group.size for group in graph.groups}
    assert first.name not in plan.removed and len(plan.removed[second.name]) == second.size // 2
    for name, units in plan.removed.items():
        assert len(units) == len(set(units)) <= 0.7 * sizes[name] and (sizes[name] - len(units)) % 4 == 0
    free = pl.plan(coupled, **{kind: 0.7}, scope=scope)
    assert 0.69 <= free.budget["kept"][kind] <= 0.7


def test_tied_groups_lose_equal_numbers_greedily():
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.other = nn.Linear(3, 8), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = self.first(x).chunk(2, dim=1)
            return self.last(left) + self.other(right)

    graph = pl.trace(Apart(), torch.ones(1, 3))
    (bundle,) = graph.bundles
    assert len(bundle) == 2 and [group.size for group in bundle] == [4, 4]
    for seed in range(4):
        scores, first, second = with_matrix(graph, seed), *(group.name for group in bundle)
        removed = pl.plan(scores, ratio=0.25).removed
        wanted = {first: (int(scores[first].argmin()),), second: (int(scores[second].argmin()),)}
        one, two = removed[first][0], removed[second][0]
        # The second group's unit is chosen knowing which the first one gave.
        after = scores[second].double() + scores.matrix[one, graph.groups[0].size :]
        assert removed[first] == wanted[first] and two == int(after.argmin())
        assert [len(units) for units in pl.plan(scores, ratio=0.5).removed.values()] == [2, 2]


def test_prices_compare_what_units_save(chain):
    """Scores in proportion to what a unit saves rank all units alike, per FLOP; the smaller ones go first else."""
    whole, cost = CostModel(chain)({})["flops"], CostModel(chain)
    saved = {group.name: whole - cost({group.name: group.size - 1})["flops"] for group in chain.groups}
    order = sorted(chain.groups, key=lambda group: saved[group.name])
    assert saved[order[0].name] < saved[order[-1].name]
    values = {g.name: torch.full((g.size,), float(saved[g.name])) for g in chain.groups}
    values[order[-1].name] *= 0.9  # a little cheaper than its savings are worth
    plain, priced = (pl.plan(pl.Scores(chain, values, "test"), ratio=1 / 12, per=per) for per in ("unit", "flops"))
    assert plain.removed.keys() == {order[0].name} and priced.removed.keys() == {order[-1].name}
    matrix = torch.zeros(12, 12)
    for per in ("unit", "flops", "params"):
        one, two = (pl.plan(pl.Scores(chain, values, "test", m), ratio=0.5, per=per) for m in (None, matrix))
        assert one.removed == two.removed
    with pytest.raises(pl.BudgetError, match="per='byte'"):
        pl.plan(pl.Scores(chain, values, "test"), flops=0.5, per="byte")


def test_a_matrix_must_fit(chain):
    values = {group.name: torch.ones(group.size) for group in chain.groups}
    with pytest.raises(pl.PlanError, match="there are 12 units"):
        pl.Scores(chain, values, "test", torch.eye(3))
    with pytest.raises(pl.PlanError, match="no number for some pairs"):
        pl.Scores(chain, values, "test", torch.full((12, 12), float("nan")))

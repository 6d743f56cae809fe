"""Plans: budgets are met with the cheapest units, and options do what they say."""

from __future__ import annotations

import warnings
from itertools import combinations, product

import pytest
import torch
from torch import nn

import prunelab as pl
from prunelab.cost import CostModel
from prunelab.planning.timing import Timing
from prunelab.plans import Cut

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


# ── budgets in bytes and latency, names, blocks ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("share", [0.7, 0.3])
def test_a_budget_in_bytes_counts_parameters_and_buffers(scores, share):
    plan = pl.plan(scores, bytes=share, per="bytes")
    whole, cut = pl.count(scores.graph.model, INPUTS), pl.count(pl.apply(scores.graph.model, plan), INPUTS)
    assert 0.99 * share <= cut.bytes / whole.bytes <= share
    assert plan.budget["kept"]["bytes"] == pytest.approx(cut.bytes / whole.bytes, rel=1e-12)


def test_bytes_know_the_types_of_tensors(chain):
    half = pl.trace(nn.Sequential(nn.Linear(2, 4).half(), nn.Linear(4, 3).half()), torch.ones(1, 2).half())
    assert CostModel(half)({})["bytes"] == 2 * CostModel(half)({})["params"]


def clock(model: nn.Module) -> float:
    """Stands for a clock: a machine on which a network takes time in proportion to its parameters."""
    return 1e-6 * sum(parameter.numel() for parameter in model.parameters())


def test_a_budget_in_latency_is_found_by_measuring(scores):
    seen = []

    def measure(model: nn.Module) -> float:
        seen.append(clock(model))
        return seen[-1]

    timing = Timing(measure=measure, resolution=1 / 32)
    plan = quiet(scores, latency=0.5, timing=timing)
    assert len(seen) <= timing.measurements == 7 and seen[0] == clock(scores.graph.model)
    found = clock(pl.apply(scores.graph.model, plan)) / seen[0]
    assert plan.budget["kept"]["latency"] == pytest.approx(found) and found <= 0.5
    # The place before takes too long: nothing nearer was to be had at this resolution.
    facts = plan.budget["measured"]
    assert facts["before"] > 0.5 or found >= 0.99 * 0.5
    assert facts["measurements"] == len(seen) and facts["resolution"] == 1 / 32
    assert f"on {len(seen)} networks at places 0.0312 of the order apart" in str(plan)
    assert quiet(scores, latency=0.5, timing=timing) == plan  # apart from the clock nothing varies


def quiet(scores: pl.Scores, **options) -> pl.Plan:
    """Plan without the warning of a budget that is missed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pl.plan(scores, **options)


def test_latency_is_that_of_this_machine_by_default():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 64))
    scores = pl.criteria.Magnitude()(pl.trace(model, torch.ones(256, 64)))
    facts = quiet(scores, latency=0.9, timing=Timing(seconds=0.02, resolution=1 / 8)).budget["measured"]
    assert 0 < facts["seconds"]["cut"] <= 0.9 * facts["seconds"]["whole"]


def test_what_cannot_be_measured_or_reached_in_latency_is_an_error(scores):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    bare = pl.criteria.Random()(pl.trace(model, torch.ones(1, 2)))
    with pytest.raises(pl.BudgetError, match="meta device"):
        pl.plan(bare, latency=0.5)
    with pytest.raises(pl.BudgetError, match="latency=0.5 cannot be met: .* 1.000"):
        pl.plan(scores, latency=0.5, timing=Timing(measure=lambda model: 1.0))
    for options in ({"seconds": 0}, {"resolution": 0.9}, {"resolution": float("nan")}, {"seconds": True}):
        with pytest.raises(pl.BudgetError, match=next(iter(options))):
            Timing(**options)


def test_isomorphic_groups_compete_whatever_their_size():
    """Topology, not width: the first convolutions of all blocks of a ResNet are one class, and lose the same share."""
    graph = pl.trace(pl.zoo.resnet20(), INPUTS)
    inner = [group for group in graph.groups if group.name.endswith("conv1") and "layer" in group.name]
    values = {group.name: torch.ones(group.size) for group in graph.groups}
    for group in inner:  # the deeper, the cheaper
        values[group.name] = torch.full((group.size,), 1.0 if group.size < 64 else 0.1)
    plan = pl.plan(pl.Scores(graph, values, "test"), ratio=0.25, scope="isomorphic")
    lost = {group.name: len(plan.removed.get(group.name, ())) for group in inner}
    assert sum(lost.values()) == round(0.25 * sum(group.size for group in inner))
    assert not any(lost[group.name] for group in inner if group.size < 64)
    rest = [group for group in graph.groups if group not in inner]
    assert sum(len(plan.removed.get(group.name, ())) for group in rest) > 0  # their own classes lose as much


def test_layers_lose_the_same_share_to_a_unit(scores):
    plan = quiet(scores, flops=0.6, scope="layer")
    whole = {b[0].name: min(int(0.9 * b[0].size), b[0].size - 1) for b in scores.graph.bundles}
    share = max(len(plan.removed.get(name, ())) / most for name, most in whole.items() if most > 20)
    for name, most in whole.items():
        assert abs(len(plan.removed.get(name, ())) - share * most) <= 2


def test_names_of_modules_stand_for_the_groups_that_they_produce():
    graph = pl.trace(pl.zoo.resnet20(), INPUTS)
    scores = pl.criteria.Random()(graph)
    plan = pl.plan(
        scores,
        ratio=0.3,
        overrides={"layer2": 0.25, "layer2.0": 0.5, "layer2.0.conv1": 0.0, "layer1": 0.5},
        ignore=["layer1.1.conv1"],
        max_ratio={"layer3": 0.6, "layer3.1.conv1": 0.125},
    )
    share = {g.name: len(plan.removed.get(g.name, ())) / g.size for g in graph.groups}
    assert share["layer2.0.conv1"] == 0 and share["layer2.1.conv1"] == share["layer2.2.conv1"] == 0.25
    assert share["layer1.1.conv1"] == 0 and share["layer1.0.conv1"] == 0.5
    assert share["layer3.1.conv1"] <= 0.125 and share["layer3.0.conv1"] <= 0.6
    for wrong in ({"overrides": {"layer1.1.conv1": 0.5}, "ignore": ["layer1.1.conv1"]}, {"max_ratio": {"fc": 0.5}}):
        with pytest.raises(pl.PlanError, match=r"`(layer1.1.conv1|fc)`"):
            pl.plan(scores, ratio=0.2, **wrong)
    with pytest.raises(pl.BudgetError, match=r"max_ratio\['layer1'\]"):
        pl.plan(scores, ratio=0.2, max_ratio={"layer1": 2})


def test_a_tensor_with_two_names_is_ignored_by_either():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x).relu() + self.second(x).relu())

    scores = pl.criteria.Random()(pl.trace(Tied(), torch.ones(1, 4)))
    assert scores.graph.groups and not pl.plan(scores, ratio=0.25, ignore="second.weight").cuts


@pytest.mark.parametrize("seed", range(6))
def test_blocks_hit_a_budget_wherever_any_numbers_do(seed):
    """Brute force over all numbers of blocks: where some are within 1 %, the plan is, else it says so."""
    torch.manual_seed(seed)
    widths = torch.randint(4, 20, (3,)).tolist()
    layers = [nn.Linear(m, n) for m, n in zip([5, *widths], [*widths, 3], strict=True)]
    graph = pl.trace(nn.Sequential(*layers), torch.ones(1, 5))
    scores, cost, met = pl.criteria.Random(seed)(graph), CostModel(graph), []
    for share in torch.linspace(0.3, 0.9, 13).tolist():
        options = {"flops": share, "round_to": 1 + seed % 4, "max_ratio": 0.8}
        counts = [
            [
                g.size,
                *(n for n in range(g.size - 1, 0, -1) if n % options["round_to"] == 0 and g.size - n <= 0.8 * g.size),
            ]
            for g in graph.groups
        ]
        every = [
            cost(dict(zip([g.name for g in graph.groups], left, strict=True)))["flops"] / cost({})["flops"]
            for left in product(*counts)
        ]
        possible = any(0.99 * share <= found <= share for found in every)
        if min(every) > share:
            continue
        plan = quiet(scores, **options)
        met.append(0.99 * share <= plan.budget["kept"]["flops"] <= share)
        assert met[-1] == possible == ("why" not in plan.budget)
    assert any(met)


def test_a_missed_budget_says_by_how_much_and_why():
    graph = pl.trace(nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 2)), torch.ones(1, 2))
    plan = quiet(pl.criteria.Random()(graph), flops=0.6, round_to=4)
    assert plan.budget["kept"]["flops"] == 0.5 and plan.budget["missed"] == pytest.approx(0.5 / 0.6 - 1)
    assert "ends 16.7% below the budget" in str(plan) and "4 units of `0`, would keep 1.0000" in str(plan)
    assert pl.Plan.from_json(plan.to_json()) == plan
    plan = quiet(pl.criteria.Random()(graph), flops=0.9, overrides={"0": 0.5})
    assert "what is overridden alone" in plan.budget["why"]
    plan = quiet(pl.criteria.Random()(graph), ratio=0.4, round_to=4)
    assert "0.5000 of the units go" in str(plan)


def test_plans_can_be_read(scores):
    plan = pl.plan(scores, flops=0.5)
    table = plan.table()
    assert dict(zip(table.group, table.removed, strict=True)) == {k: len(v) for k, v in plan.removed.items()}
    assert (table.removed + table.left == table.units).all()
    text = str(plan)
    assert "Asked for flops=0.5 (criterion random, scope global, per unit)." in text
    assert all(cut.group in text for cut in plan.cuts)


# ── plans put together ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["resnet20", "vgg13_narrow", "vit_small"])
def test_a_plan_and_a_later_one_are_one_plan_of_the_first_model(name):
    torch.manual_seed(0)
    model = pl.zoo.build(name).eval()
    first = pl.plan(pl.criteria.Random(0)(pl.trace(model, INPUTS)), flops=0.7)
    once = pl.apply(model, first)
    later = pl.plan(pl.criteria.Random(1)(pl.trace(once, INPUTS)), flops=0.7)
    twice = pl.apply(once, later)
    both = first + later
    assert both == first.merge(later, after=True) == pl.Plan.from_json(both.to_json())
    same = pl.apply(model, both)
    assert [value.shape for value in same.state_dict().values()] == [v.shape for v in twice.state_dict().values()]
    for (key, one), two in zip(same.state_dict().items(), twice.state_dict().values(), strict=True):
        assert torch.allclose(one, two, rtol=1e-5), key  # attention's scale is folded in one step or in two
    whole, cost = pl.count(model, INPUTS), pl.count(same, INPUTS)
    assert both.budget["kept"]["flops"] == pytest.approx(cost.flops / whole.flops, rel=1e-9)
    assert both.budget["kept"]["bytes"] == pytest.approx(cost.bytes / whole.bytes, rel=1e-9)
    third = pl.plan(pl.criteria.Random(2)(pl.trace(twice, INPUTS)), flops=0.8)
    assert ((first + later) + third).removed == (first + (later + third)).removed
    assert len((first + later + third).budget["merged"]) == 3


def test_two_plans_of_one_model_remove_what_either_does(chain):
    one, two = (pl.plan(pl.criteria.Random(seed)(chain), ratio=0.25) for seed in (0, 3))
    both = one + two
    for group in chain.groups:
        wanted = {*one.removed.get(group.name, ()), *two.removed.get(group.name, ())}
        assert set(both.removed.get(group.name, ())) == wanted
    assert "kept" not in both.budget  # a share of what, only the model knows
    pl.apply(chain.model, both)


def test_plans_that_do_not_belong_together_are_an_error():
    def cut(size: int, removed: tuple[int, ...], name: str = "0", dim: int = 0) -> pl.Plan:
        return pl.Plan((Cut(name, size, removed, ((f"{name}.weight", dim),)),), None)

    first = cut(6, (0, 1))
    for other, message in [
        (cut(5, (0,)), "in which it has 5"),
        (cut(4, (7,)), "removes unit 7"),
        (cut(4, (0, 1, 2, 3)), "none of the units"),
        (cut(6, (2, 3, 4, 5)), "none of the units"),
        (cut(4, (0,), dim=1), "different parameters"),
    ]:
        with pytest.raises(pl.PlanError, match=message):
            first + other
    two = pl.Plan((*first.cuts, *cut(6, (0,), "1").cuts), None)
    mixed = pl.Plan((*cut(4, (0,)).cuts, *cut(6, (1,), "1").cuts), None)
    with pytest.raises(pl.PlanError, match="by group `0` .* by group `1`"):
        two + mixed

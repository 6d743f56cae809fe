"""All at once: from a trained network to a smaller one, with a report that says what happened."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

import prunelab as pl
from prunelab import data, training

INPUTS = torch.ones(1, 3, 32, 32)


def test_pruning_reports_what_independent_counts_say(mini):
    model, batches = pl.zoo.resnet20(), data.loader(mini.train.subset(64), 32)
    small, report = pl.prune(
        model, INPUTS, criterion="taylor", data=batches, flops=0.5, evaluate=lambda m: {"accuracy": 0.5}
    )
    table, whole, cost = report.table(), pl.count(model, INPUTS), pl.count(small, INPUTS)
    assert list(table.stage) == ["before", "cut"] and list(table.flops) == [whole.flops, cost.flops]
    assert cost.flops / whole.flops == pytest.approx(0.5, rel=0.02)
    assert json.loads(report.to_json())["plans"][0] == json.loads(report.plans[0].to_json())
    assert report.plot().axes


@pytest.mark.parametrize("budget", [{"flops": 0.3}, {"params": 0.3}, {"ratio": 0.6}])
def test_steps_reach_the_same_budget_and_finetune_after_each(budget):
    seen = []
    small, report = pl.prune(
        pl.zoo.resnet20(), INPUTS, **budget, steps=3, finetune=lambda model: seen.append(model.train())
    )
    assert len(seen) == 3 and seen[-1] is small
    assert list(report.table().stage) == ["before", *["cut", "fine-tuned"] * 3]
    kind, share = next(iter(budget.items()))
    if kind == "ratio":
        units = [sum(group.size for group in pl.trace(m, INPUTS).groups) for m in (pl.zoo.resnet20(), small)]
        assert 1 - units[1] / units[0] == pytest.approx(share, abs=0.01)
    else:
        assert report.rows[-1][f"{kind}_kept"] == pytest.approx(share, rel=0.02)


def test_the_model_is_kept_when_anything_fails(mini):
    model = pl.zoo.resnet20().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = data.loader(mini.train.subset(32), 32)

    def broken(_: nn.Module) -> dict[str, float]:
        raise RuntimeError("the user's own error")

    with pytest.raises(RuntimeError, match="own error"):
        pl.prune(model, INPUTS, data=batches, flops=0.5, evaluate=broken)
    for options in ({"flops": 1.5}, {"flops": 0.5, "criterion": "obx"}, {"flops": 0.5, "steps": 0}, {}):
        with pytest.raises(pl.PruneLabError):
            pl.prune(model, INPUTS, data=batches, **options)
    with pytest.raises(pl.PruneLabError, match="needs batches"):
        pl.prune(model, INPUTS, criterion="taylor", flops=0.5)
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_report_without_metrics_cannot_be_plotted():
    _, report = pl.prune(pl.zoo.resnet20(), INPUTS, flops=0.5)
    with pytest.raises(pl.PruneLabError, match="pass evaluate="):
        report.plot()


def test_taylor_is_ahead_of_random_on_the_trained_network(mini):
    """Half the FLOPs of the trained ResNet-20, no fine-tuning: worth more than every one of three random cuts."""
    model, batches = pl.zoo.load("resnet20"), data.loader(mini.train.subset(500), 250)
    graph, test = pl.trace(model, INPUTS), data.loader(mini.test.subset(500), 250)

    def loss(scores: pl.Scores) -> float:
        return training.evaluate(pl.apply(model, pl.plan(scores, flops=0.8)), test)["loss"]

    assert loss(pl.criteria.Taylor()(graph, batches)) < min(loss(pl.criteria.Random(seed)(graph)) for seed in range(3))


# ── steps ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def kept(report: pl.Report, kind: str = "flops") -> list[float]:
    return [row[f"{kind}_kept"] for row in report.rows if row["stage"] == "cut"]


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("linear", [0.85, 0.7, 0.55, 0.4]),
        ("geometric", [0.4**0.25, 0.4**0.5, 0.4**0.75, 0.4]),
        # Zhu & Gupta's equation 1 with t0 = 0, s_i = 0, s_f = 0.6 and n = 4: sparsities 0.347, 0.525, 0.591, 0.6
        ("cubic", [1 - 0.6 * (1 - (1 - step / 4) ** 3) for step in (1, 2, 3, 4)]),
        (lambda progress, final: 1 - (1 - final) * min(1.0, 2 * progress), [0.7, 0.4, 0.4, 0.4]),
    ],
)
def test_schedules_leave_what_their_formulas_say(schedule, wanted):
    small, report = pl.prune(pl.zoo.resnet20(), INPUTS, flops=0.4, steps=4, schedule=schedule, progress=False)
    assert kept(report) == pytest.approx(wanted, rel=0.01) and all(
        a <= b for a, b in zip(kept(report), wanted, strict=False)
    )
    assert pl.count(small, INPUTS).flops == report.rows[-1]["flops"]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("quartic", "'quartic' is not one of linear, geometric, cubic"),
        (lambda progress, final: 1 - final * progress, "ends at 0.6"),
        (lambda progress, final: 1 + progress * (1 - progress) - progress * (1 - final), "must fall"),
    ],
)
def test_bad_schedules_are_errors(schedule, message):
    with pytest.raises(pl.BudgetError, match=message):
        pl.prune(pl.zoo.resnet20(), INPUTS, flops=0.4, steps=4, schedule=schedule)


def test_statistics_are_measured_anew_in_every_step():
    graphs = []

    class Watching(pl.criteria.Magnitude):
        def __call__(self, graph, batches=None):
            graphs.append(sum(group.size for group in graph.groups))
            return super().__call__(graph, batches)

    _, report = pl.prune(pl.zoo.resnet20(), INPUTS, Watching(), ratio=0.5, steps=3, schedule="linear", progress=False)
    assert graphs == pytest.approx([graphs[0], graphs[0] * 5 / 6, graphs[0] * 4 / 6], abs=1)
    assert len(report.steps) == 3 and [len(one.plans) for one in report.steps] == [1, 1, 1]


def test_all_steps_are_one_plan_of_the_first_model():
    """Cutting at once by the merged plan gives the very weights, as nothing was trained in between."""
    model = pl.zoo.load("resnet20")
    small, report = pl.prune(model, INPUTS, params=0.5, steps=3, progress=False)
    same = pl.apply(model, report.plan)
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), same.state_dict().values(), strict=True))
    assert report.plan.budget["kept"]["params"] == pytest.approx(report.rows[-1]["params_kept"], rel=1e-9)
    with pytest.raises(pl.PlanError, match="nothing was cut"):
        _ = pl.Report().plan


def test_shares_of_groups_are_of_what_they_had_at_first():
    """Over many steps too, no group loses more than max_ratio, and what is overridden loses what was said."""
    model = pl.zoo.resnet20()
    options = {"max_ratio": 0.5, "overrides": {"layer2.0.conv1": 0.25}, "ignore": [model.layer1]}
    small, report = pl.prune(model, INPUTS, flops=0.65, steps=5, progress=False, **options)
    before, after = ({g.name: g.size for g in pl.trace(m, INPUTS).groups} for m in (model, small))
    assert after["layer2.0.conv1"] == 24
    assert all(after[name] >= size / 2 for name, size in before.items())
    assert all(after[name] == size for name, size in before.items() if name.startswith("layer1"))
    numbers = [dict(zip(p.table().group, p.table().left, strict=False)).get("layer2.0.conv1") for p in report.plans]
    assert [n for n in numbers if n is not None] == sorted((n for n in numbers if n is not None), reverse=True)
    assert len([n for n in numbers if n is not None]) > 1  # it goes with the schedule, not at once


def test_small_steps_add_up_to_the_share_of_units():
    """Twelve units in ten steps: rounding each step by itself would never remove one."""
    model = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 2))
    for scope in ("global", "layer", "isomorphic"):
        small, report = pl.prune(model, torch.ones(1, 3), ratio=0.5, steps=10, scope=scope, progress=False)
        assert small[0].out_features == 6 and len(report.plans) == 10


@pytest.mark.parametrize(("budget", "empty"), [({"flops": 0.5}, 6), ({"ratio": 0.5}, 6)])
def test_a_step_with_nothing_to_cut_is_no_error_and_the_users_model_is_not_trained(budget, empty, tmp_path):
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    trained: list = []
    how = {"steps": 8, "schedule": "linear", "progress": False}
    for state in (None, tmp_path / "state", tmp_path / "state"):
        small, report = pl.prune(model, torch.ones(1, 2), **budget, **how, state=state, finetune=trained.append)
        assert small[0].out_features == 2 and all(net is not model for net in trained)
        assert [len(plan.cuts) for plan in report.plans].count(0) == empty
    assert len(trained) == 16  # the third run was only read


def test_a_missed_budget_is_one_warning_about_the_whole():
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"^flops=0.6: 0.5000 are left. .* units are too large") as caught:
        pl.prune(model, torch.ones(1, 2), flops=0.6, steps=3, progress=False)
    assert len(caught) == 1


def test_bytes_and_latency_are_budgets_of_runs_too():
    def measure(model: nn.Module) -> float:
        return 1e-6 * sum(parameter.numel() for parameter in model.parameters())

    small, report = pl.prune(pl.zoo.resnet20(), INPUTS, bytes=0.5, steps=2, progress=False)
    whole, cut = pl.count(pl.zoo.resnet20(), INPUTS), pl.count(small, INPUTS)
    assert report.rows[-1]["bytes_kept"] == cut.bytes / whole.bytes and 0.495 <= cut.bytes / whole.bytes <= 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timing = pl.Timing(measure=measure, resolution=1 / 16)
        small, report = pl.prune(pl.zoo.resnet20(), INPUTS, latency=0.5, steps=2, timing=timing, progress=False)
    found = measure(small) / measure(pl.zoo.resnet20())
    assert found <= 0.5 and report.rows[-1]["latency_kept"] == pytest.approx(found)


def test_modes_of_modules_survive_finetuning():
    model = pl.zoo.resnet20().train()
    model.bn1.eval()
    small, _ = pl.prune(model, INPUTS, flops=0.8, finetune=lambda net: net.eval())
    assert small.training and small.layer1[0].bn1.training and not small.bn1.training


def test_reports_travel_as_json():
    _, report = pl.prune(pl.zoo.resnet20(), INPUTS, flops=0.6, steps=2, progress=False)
    assert pl.Report.from_json(report.to_json()) == report
    for text in ("{", '{"rows": [{}], "plans": []}', '{"rows": [], "plans": [1]}'):
        with pytest.raises(pl.DataError, match="not a report"):
            pl.Report.from_json(text)


def test_unknown_options_are_named():
    with pytest.raises(pl.BudgetError, match="'round'; those of plan are .*round_to"):
        pl.prune(pl.zoo.resnet20(), INPUTS, flops=0.5, round=8)
    with pytest.raises(pl.PlanError, match="layer9"):
        pl.prune(pl.zoo.resnet20(), INPUTS, flops=0.5, ignore=["layer9"])

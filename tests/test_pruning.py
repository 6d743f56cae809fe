"""All at once: from a trained network to a smaller one, with a report that says what happened."""

from __future__ import annotations

import json

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

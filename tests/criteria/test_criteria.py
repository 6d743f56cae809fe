"""Criteria: each computes its formula, checked by hand or by removing weights one at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunelab as pl
from prunelab.criteria.base import NORMALIZERS, REDUCTIONS
from prunelab.curvature import mean_gradient

BATCHES = [(torch.randn(5, 3, generator=torch.Generator().manual_seed(n)), torch.arange(5) % 2) for n in range(3)]


@pytest.fixture
def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.fixture
def batches() -> list:
    return [(inputs.double(), targets) for inputs, targets in BATCHES]


@pytest.fixture
def graph(mlp) -> pl.DependencyGraph:
    return pl.trace(mlp, torch.ones(1, 3).double())


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_is_the_norm_of_every_member(mlp, graph, p):
    rows = mlp[0].weight.detach().abs().pow(p).sum(1), mlp[2].weight.detach().abs().pow(p).sum(0)
    found = pl.criteria.Magnitude(p=p, normalizer="none")(graph)["0"]
    torch.testing.assert_close(found, torch.stack(rows).mean(0).float())
    with_bias = pl.criteria.Magnitude(p=p, normalizer="none", group_reduction="sum", bias=True)(graph)["0"]
    torch.testing.assert_close(with_bias, (sum(rows) + mlp[0].bias.detach().abs().pow(p)).float())


def test_the_mean_gradient_is_that_of_all_samples_at_once(mlp, batches):
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    F.cross_entropy(mlp(inputs), targets).backward()
    uneven = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    for split in (batches, uneven):
        found = mean_gradient(mlp, split)
        for name, parameter in mlp.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad)


def test_taylor_is_the_slope_of_the_loss_along_each_weight(mlp, graph, batches):
    """|w g| is how fast the loss changes as a weight is scaled towards zero: finite differences tell."""

    def loss() -> float:
        return sum(F.cross_entropy(mlp(inputs), targets).item() for inputs, targets in batches) / len(batches)

    found, step = pl.criteria.Taylor().elementwise(mlp, batches), 1e-6
    for name, parameter in mlp.named_parameters():
        flat = parameter.data.view(-1)
        for place in range(len(flat)):
            whole = flat[place].item()
            flat[place] = whole * (1 + step)
            above = loss()
            flat[place] = whole * (1 - step)
            slope = (above - loss()) / (2 * step)
            flat[place] = whole
            assert found[name].flatten()[place].item() == pytest.approx(abs(slope), abs=1e-8)
    unit = pl.criteria.Taylor(group_reduction="sum", normalizer="none")(graph, batches)["0"]
    torch.testing.assert_close(unit, (found["0.weight"].sum(1) + found["2.weight"].sum(0)).float())


def test_summing_first_lets_signs_cancel(mlp, graph, batches):
    products = {
        name: parameter.detach() * mean_gradient(mlp, batches)[name] for name, parameter in mlp.named_parameters()
    }
    options = {"group_reduction": "sum", "normalizer": "none"}
    found = pl.criteria.Taylor(multivariable=True, **options)(graph, batches)["0"]
    torch.testing.assert_close(found, (products["0.weight"].sum(1).abs() + products["2.weight"].sum(0).abs()).float())
    assert (found <= pl.criteria.Taylor(**options)(graph, batches)["0"] + 1e-7).all()


def test_the_gradient_leaves_the_model_as_it_was(mlp, batches):
    mlp.train()
    mlp[0].weight.requires_grad_(False)
    mean_gradient(mlp, batches)
    assert mlp.training and not mlp[0].weight.requires_grad and mlp[2].weight.grad is None


def test_random_is_seeded(graph):
    scores = [pl.criteria.Random(seed)(graph)["0"] for seed in (0, 0, 1)]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])


def test_reductions_over_members():
    rows, roles = torch.tensor([[1.0, 2.0], [3.0, 5.0], [2.0, 1.0]]), ["produces", "carries", "consumes"]
    wanted = {"mean": [2, 8 / 3], "sum": [6, 8], "max": [3, 5], "prod": [6, 10], "first": [1, 2], "gate": [3, 5]}
    assert wanted.keys() == REDUCTIONS.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(REDUCTIONS[name](rows, roles), torch.tensor(values, dtype=torch.float32))


def test_normalizers_over_units():
    score = torch.tensor([1.0, 4.0, 3.0])
    wanted = {
        "none": [1, 4, 3],
        "mean": [3 / 8, 12 / 8, 9 / 8],
        "sum": [1 / 8, 4 / 8, 3 / 8],
        "max": [1 / 4, 1, 3 / 4],
        "standardization": [0, 1, 2 / 3],
        "lamp": [1 / 8, 1, 3 / 7],
    }
    for name, values in wanted.items():
        torch.testing.assert_close(NORMALIZERS[name](score), torch.tensor(values, dtype=torch.float32))
    gaussian = NORMALIZERS["gaussian"](score)
    assert gaussian.mean().abs() < 1e-6 and gaussian.std(correction=0) == pytest.approx(1)
    assert pl.criteria.Magnitude(normalizer="standarization").normalizer == "standardization"


def test_only_the_asked_types_of_layers_count(small):
    graph = pl.trace(*small)
    only_norms = pl.criteria.Magnitude(target_types=[nn.BatchNorm2d], normalizer="none")(graph)["0"]
    torch.testing.assert_close(only_norms, small[0][1].weight.detach() ** 2)


def test_criteria_are_found_by_name():
    assert {"random", "magnitude", "taylor", "obd"} <= set(pl.criteria.names())
    assert pl.criteria.get("magnitude", p=1).p == 1
    with pytest.raises(pl.PruneLabError, match="no criterion 'obx'.*taylor"):
        pl.criteria.get("obx")
    with pytest.raises(pl.PruneLabError, match="norm.*its options are"):
        pl.criteria.get("magnitude", norm=1)
    with pytest.raises(pl.PruneLabError, match="normalizer='l2'"):
        pl.criteria.Magnitude(normalizer="l2")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, "needs batches"),
        ([], "empty loader"),
        ([torch.ones(2, 3)], "not a pair"),
        ([(torch.ones(2, 5), torch.zeros(2).long())], "shape \\[2, 5\\]"),
        ([(torch.ones(2, 3, device="meta"), torch.zeros(2).long())], "on meta, the model on cpu"),
        ([(torch.ones(3, 3), torch.zeros(2).long())], "but 2 targets"),
        ([(torch.ones(2, 3), torch.full((2,), 7))], "outputs of shape \\[2, 2\\].*out of bounds"),
        ([(torch.full((2, 3), float("nan")), torch.zeros(2).long())], "`0.weight` is not finite in batch 0"),
    ],
)
def test_bad_batches_are_errors_and_the_model_stays(batches, message):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    graph = pl.trace(model, torch.ones(1, 3))
    with pytest.raises(pl.PruneLabError, match=message):
        pl.criteria.Taylor()(graph, batches)
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_scores_must_fit_the_graph(graph):
    with pytest.raises(pl.PlanError, match="units are 4"):
        pl.Scores(graph, {"0": torch.ones(3)}, "test")
    with pytest.raises(pl.PlanError, match="no number"):
        pl.Scores(graph, {"0": torch.tensor([1.0, float("nan"), 1, 1])}, "test")


def test_a_criterion_of_ones_own_is_known_by_its_name(small):
    model, x = small

    class Mine(pl.criteria.Criterion, name="mine"):
        def __call__(self, graph, batches=None):
            return pl.Scores(graph, {group.name: torch.arange(float(group.size)) for group in graph.groups}, str(self))

    try:
        scores = pl.criteria.get("mine")(pl.trace(model, x))
        assert scores.criterion == "mine" and "mine" in pl.criteria.names()
        assert pl.plan(scores, ratio=0.5).removed == {"0": (0, 1, 2, 3)}
        with pytest.raises(pl.OptionError, match="There is a criterion 'obd' already, prunelab.criteria.obd.OBD"):
            type("Other", (pl.criteria.Criterion,), {}, name="obd")
    finally:
        del pl.criteria.CRITERIA["mine"]

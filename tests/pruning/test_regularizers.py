"""Sparse training: gradients are the formulas', whole units shrink together, wherever the model lies."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab.regularizers import DepGraphNorm, GroupLasso, NetworkSlimming, Regularizer
from tests.cases import OWN, Case, perturb

GROUPWISE = (GroupLasso, DepGraphNorm)


def unit_tensors(graph: pl.DependencyGraph, group: pl.Group, unit: int) -> dict[str, tuple[pl.Member, Tensor]]:
    """Return every slice of a unit, cut out of the model's parameters by the graph's own account of positions."""
    parameters = dict(graph.model.named_parameters())
    return {
        f"{member.name}, {member.dim}": (
            member,
            parameters[member.name].detach().index_select(member.dim, member.positions(unit)),
        )
        for member in group.members
        if member.name in parameters
    }


def gradient_of(penalty: Regularizer) -> dict[str, Tensor]:
    penalty.model.zero_grad()
    penalty.loss().backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in penalty.model.named_parameters()
    }


def traced(case: Case) -> pl.DependencyGraph:
    return pl.trace(*case.make())


@pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", GROUPWISE)
def test_the_gradient_is_that_of_the_formula(kind, case):
    """Slice by slice: λ √n θ/‖θ‖ of the lasso, 2 λ γ θ of DepGraph's norm, added up over the groups that share it."""
    graph = traced(case)
    wanted = {name: torch.zeros_like(p) for name, p in graph.model.named_parameters()}
    for group in graph.groups:
        units = [unit_tensors(graph, group, unit) for unit in range(group.size)]
        squares = torch.stack([sum(value.square().sum() for _, value in unit.values()) for unit in units])
        for number, unit in enumerate(units):
            count = sum(value.numel() for _, value in unit.values())
            spread = squares.max() - squares.min()
            factor = {
                GroupLasso: 0.1 * count**0.5 / squares[number].sqrt(),
                DepGraphNorm: 0.1 * 2 * 2 ** (4 * (squares.max() - squares[number]) / spread),
            }[kind]
            for member, value in unit.values():
                wanted[member.name].index_add_(member.dim, member.positions(number), factor * value)
    found = gradient_of(kind(graph, 0.1))
    assert any(value.any() for value in wanted.values())
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["resnet20", "vgg13_narrow"])
def test_slimming_pulls_every_scale_by_lambda_and_nothing_else(name):
    torch.manual_seed(0)
    model = perturb(pl.zoo.build(name))
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).weight[0] = 0
    penalty = NetworkSlimming(pl.trace(model, torch.randn(1, 3, 32, 32)), 0.3)
    scales = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, slope in gradient_of(penalty).items():
        assert torch.equal(slope, 0.3 * model.get_parameter(name).sign() if name in scales else torch.zeros_like(slope))
    total = sum(float(model.get_parameter(name).detach().abs().sum()) for name in scales)
    assert float(penalty.loss().detach()) == pytest.approx(0.3 * total, rel=1e-5)  # float32 sums


def test_a_scale_of_units_that_cannot_go_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    penalty = NetworkSlimming(pl.trace(model, torch.randn(2, 3, 4, 4)), 1.0)
    slopes = gradient_of(penalty)
    assert slopes["1.weight"].all() and not slopes["4.weight"].any()  # the last one scales the outputs


def test_other_norms_count_when_asked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
    graph = pl.trace(model, torch.randn(1, 3))
    with pytest.raises(pl.PlanError, match="no batch norm with a scale runs through its groups"):
        NetworkSlimming(graph)
    assert gradient_of(NetworkSlimming(graph, every_norm=True))["1.weight"].any()


def trained(penalty: Regularizer, batches: list[tuple[Tensor, Tensor]], steps: int, lr: float) -> None:
    optimizer = torch.optim.SGD(penalty.model.parameters(), lr=lr)
    for step in range(steps):
        inputs, targets = batches[step % len(batches)]
        optimizer.zero_grad()
        (F.cross_entropy(penalty.model(inputs), targets) + penalty.loss()).backward()
        optimizer.step()


@pytest.mark.parametrize(("kind", "strength"), [(GroupLasso, 5e-3), (DepGraphNorm, 5e-3)])
def test_training_makes_whole_units_small_in_all_layers_at_once(kind, strength):
    """Ten of the inputs say nothing of the classes, and a few units are enough for the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)).double()
    inputs = torch.randn(256, 12).double()
    targets = (inputs[:, 0] * inputs[:, 1] > 0).long()
    graph = pl.trace(model, inputs)
    plain = copy.deepcopy(model)
    penalty = kind(graph, strength)
    trained(penalty, [(inputs, targets)], 400, 0.2)
    trained(kind(pl.trace(plain, inputs), 0.0), [(inputs, targets)], 400, 0.2)
    before = _smallest_share(plain, graph)
    squares = penalty.squares()["0"].detach()
    order = squares.argsort()
    small, large = order[:4], order[-2:]
    assert squares[small].mean() < 1e-3 * squares[large].mean()  # units part ways …
    assert _smallest_share(model, graph) < 0.1 * before  # … more than they do by themselves
    for parameter, dim in ((model[0].weight, 0), (model[1].weight, 0), (model[3].weight, 1)):  # … in every member
        sizes = parameter.detach().square().movedim(dim, 0).flatten(1).sum(1) if parameter.dim() > 1 else None
        sizes = parameter.detach().square() if sizes is None else sizes
        assert sizes[small].max() < sizes[large].min()


def _smallest_share(model: nn.Module, graph: pl.DependencyGraph) -> float:
    squares = GroupLasso(pl.trace(model, torch.randn(2, 12).double())).squares()[graph.groups[0].name].detach()
    return float(squares.sort().values[:4].sum() / squares.sum())


def test_slimming_sends_scales_to_zero_where_plain_training_does_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    inputs = torch.randn(256, 12)
    batches = [(inputs, (inputs[:, 0] * inputs[:, 1] > 0).long())]
    plain = copy.deepcopy(model)
    trained(NetworkSlimming(pl.trace(model, inputs), 0.02), batches, 400, 0.2)
    trained(NetworkSlimming(pl.trace(plain, inputs), 0.0), batches, 400, 0.2)
    assert int((model[1].weight.abs() < 0.02).sum()) >= 4 > int((plain[1].weight.abs() < 0.02).sum())


def test_a_unit_that_is_zero_stays_zero_and_gives_no_nan():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1], model[2].weight[:, 1] = 0, 0, 0
    for kind in GROUPWISE:
        slopes = gradient_of(kind(pl.trace(model, torch.randn(1, 3)), 1.0))
        assert all(slope.isfinite().all() for slope in slopes.values())
        assert not slopes["0.weight"][1].any() and not slopes["2.weight"][:, 1].any()
        assert slopes["0.weight"][0].any()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for kind in GROUPWISE:
        assert float(kind(pl.trace(model, torch.randn(1, 3)), 1.0).loss().detach()) < 1e-15


def test_biases_count_unless_told_otherwise():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = pl.trace(model, torch.randn(1, 3))
    for kind in GROUPWISE:
        assert gradient_of(kind(graph, 1.0))["0.bias"].any()
        assert not gradient_of(kind(graph, 1.0, bias=False))["0.bias"].any()


@pytest.mark.parametrize("kind", [NetworkSlimming, *GROUPWISE])
def test_it_works_on_tensors_without_data_and_follows_the_model(kind):
    with torch.device("meta"):
        model = pl.zoo.build("resnet20")
    penalty = kind(pl.trace(model, torch.empty(1, 3, 32, 32, device="meta")), 0.1)
    loss = penalty.loss()
    assert loss.is_meta and loss.shape == ()
    loss.backward()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    assert penalty.loss().device.type == "cpu" and float(penalty.loss().detach()) > 0
    double = float(penalty.loss().detach())
    model.double()
    assert penalty.loss().dtype == torch.float64 and float(penalty.loss().detach()) == pytest.approx(double, rel=1e-5)


@pytest.mark.parametrize("kind", GROUPWISE)
def test_small_numbers_of_half_precision_are_squared_in_single(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-3)
    wanted = float(kind(pl.trace(model, torch.randn(1, 3)), 1.0).loss().detach())
    found = kind(pl.trace(model.bfloat16(), torch.randn(1, 3).bfloat16()), 1.0).loss()
    assert found.dtype == torch.float32 and float(found.detach()) == pytest.approx(
        wanted, rel=0.02
    )  # bfloat16 has 8 bits


def test_masks_and_cuts_after_the_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    inputs = torch.randn(5, 3)
    graph = pl.trace(model, inputs)
    penalty, scores = GroupLasso(graph, 1.0), pl.criteria.Magnitude()(graph)
    whole = float(penalty.loss().detach())
    pl.sparsify(model, pl.criteria.Magnitude().elementwise(model), 0.3, inplace=True)
    assert float(penalty.loss().detach()) < whole  # of the weights as they are used
    pl.bake(model, inplace=True)
    pl.apply(model, pl.plan(scores, ratio=0.5), inplace=True)
    with pytest.raises(pl.PlanError, match=r"`0.weight` had the shape \[4, 3\].*\[2, 3\]: trace the model again"):
        penalty.loss()


def test_strength_can_be_scheduled_and_options_are_checked():
    graph = pl.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(1, 3))
    penalty = GroupLasso(graph, 1e-3)
    first = float(penalty.loss().detach())
    penalty.strength *= 2
    assert float(penalty.loss().detach()) == pytest.approx(2 * first)
    for wrong in (-1, float("nan"), True, "much"):
        with pytest.raises(pl.BudgetError, match="`strength` must be"):
            GroupLasso(graph, wrong)
    with pytest.raises(pl.BudgetError, match="`alpha` must be"):
        DepGraphNorm(graph, alpha=-1)
    with pytest.raises(pl.PlanError, match="no group that GroupLasso could act on"):
        GroupLasso(pl.trace(nn.Sequential(nn.Linear(3, 4)), torch.randn(1, 3)))
    assert "GroupLasso" in repr(penalty) and pl.regularizers.GroupLasso is GroupLasso

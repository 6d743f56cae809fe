"""Compensation of whole networks: in order and at once, from batches and statistics, and what cannot be used."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import prunelab as pl
from prunelab import Compensation, training
from prunelab.kept import open_plan
from prunelab.surgery.refit.compensate import make_up
from tests.cases import OWN, Case, error, images, perturb, random_plan
from tests.surgery.test_compensate import EXACT, LAYERS, batches, fit, inputs_of, make, put_back, same_shapes, stays

SMALL = [
    Case("vit", lambda: pl.zoo.VisionTransformer(16, depth=1, width=24, heads=2, mlp_width=20), images(16, 5)),
    Case("resnet", lambda: pl.zoo.ResNet(8, width=4), images(8, 5)),
    *OWN,
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_no_layer_is_worse_on_the_calibration_data(case: Case):
    model, x = case.make()
    plan = random_plan(model, x)
    keep = stays(model, plan)
    layers = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) and not keep[f"{name}.weight"].all()
    ]
    plain, refitted = (
        put_back(pl.apply(model, plan, compensate=how), keep)
        for how in (None, Compensation(batches(x, 4), sequential=False))
    )
    args, better = inputs_of(model, layers, x), 0
    for name in layers:
        layer = model.get_submodule(name)
        wanted = layer(*args[name]).detach()

        def distance(values: dict[str, Tensor], name=name, layer=layer, wanted=wanted) -> float:
            own = {part: values[f"{name}.{part}"] for part, _ in layer.named_parameters()}
            out = functional_call(layer, own, args[name])
            rows = out.flatten(0, -2).abs().sum(0) > 0 if isinstance(layer, nn.Linear) else out.abs().sum((0, 2, 3)) > 0
            gone = (out - wanted)[..., rows] if isinstance(layer, nn.Linear) else (out - wanted)[:, rows]
            return gone.detach().square().sum().item()

        assert distance(refitted) <= distance(plain) * (1 + 1e-9), name
        better += distance(refitted) < 0.99 * distance(plain)
    assert better > len(layers) / 3


@pytest.mark.parametrize("sequential", [False, True])
def test_channels_that_others_tell_cost_nothing(sequential: bool):
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 2, 2))
    model, x = perturb(linear).double().eval(), torch.randn(9, 3, 7, 7).double()
    plan = pl.plan(pl.criteria.Random()(pl.trace(model, x)), ratio=0.3, overrides={"2": 0.0, "0": 0.3})
    gone = list(plan.removed["0"])
    stay = [unit for unit in range(8) if unit not in gone]
    with torch.no_grad():  # before the norm, removed channels are mixtures of those that stay, but for a constant
        model[0].weight[gone] = torch.einsum(
            "gk,k...->g...", torch.randn(len(gone), len(stay)).double(), model[0].weight[stay]
        )
        model[2].padding = (0, 0)
        how = Compensation(batches(x, 4), damping=0.0, sequential=sequential)
        assert (
            error(pl.apply(model, plan, compensate=how)(x), model(x)) < 1e-8 < error(pl.apply(model, plan)(x), model(x))
        )


def test_twins_cost_nothing_behind_padding_norms_and_relu():
    """A channel that is another one times a number is told exactly, zeros at the border included."""
    model, x = SMALL[1].make()
    plan = random_plan(model, x)
    with torch.no_grad():
        for group in pl.trace(model, x).groups:
            gone = set(plan.removed.get(group.name, ()))
            stay = [unit for unit in range(group.size) if unit not in gone]
            for place, unit in enumerate(sorted(gone)):
                twin = stay[place % len(stay)]
                for member in group.members:
                    if member.role != "consumes":
                        values = model.state_dict()[member.name].movedim(member.dim, 0)
                        values[unit] = values[twin]
        for sequential in (False, True):
            how = Compensation(batches(x, 4), damping=1e-12, sequential=sequential)
            assert error(pl.apply(model, plan, compensate=how)(x), model(x)) < 1e-8
        assert error(pl.apply(model, plan)(x), model(x)) > 1e-2


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_batch_size_does_not_matter_and_the_cut_is_that_of_the_refitted_network(case: Case, sequential: bool):
    model, x = case.make()
    x = torch.cat([x, x.flip(0)]) if case.name == "embedded" else x
    plan = random_plan(model, x)
    one, other = (
        pl.apply(model, plan, compensate=Compensation(batches(x, size), sequential=sequential)) for size in (2, 5)
    )
    assert same_shapes(one, pl.apply(model, plan)) and type(one) is type(model)
    with torch.no_grad():
        assert error(one(x), other(x)) < 1e-7
        whole = copy.deepcopy(model)
        for name, value in put_back(one, stays(model, plan)).items():
            whole.get_parameter(name).copy_(value)
        if case.name not in ("vit", "embedded"):  # there query rows are scaled for the narrower heads
            assert error(pl.masked(whole, plan)(x), one(x)) < 1e-9


def test_narrower_heads_keep_their_scale_when_refitted():
    model, x = SMALL[0].make()
    plan = random_plan(model, x)
    graph = pl.trace(model, x)
    assert any("head_width" in name for name in plan.removed) and len(plan.cuts) > 3
    how = Compensation(batches(x), sequential=False)
    values = make_up(model, plan, *open_plan(model, plan), how)
    whole = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in values.items():
            whole.get_parameter(name).copy_(value)
        assert len(graph.groups) >= len(plan.cuts)
        assert error(pl.apply(model, plan, compensate=how)(x), pl.masked(whole, plan)(x)) < 1e-9


def test_in_order_each_layer_is_fitted_to_the_whole_model_on_what_it_really_gets():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    model, x = model.double(), torch.randn(60, 5).double()
    plan = random_plan(model, x)
    cut = pl.apply(model, plan, compensate=Compensation(batches(x, 7), damping=0.0))
    keep = stays(model, plan)
    with torch.no_grad():
        real, whole = model[0](x)[:, keep["0.bias"]].tanh(), model[0](x).tanh()
        for place in (2, 4, 6):
            rows = keep[f"{place}.bias"]
            whole = model[place](whole)
            weight, bias = fit(real, whole[:, rows], torch.ones(real.shape[1], dtype=torch.bool))
            assert error(cut[place].weight, weight) < 1e-7 and error(cut[place].bias, bias) < 1e-7
            real, whole = (real @ weight.T + bias).tanh(), whole.tanh()
        once = pl.apply(model, plan, compensate=Compensation(batches(x), **EXACT))
        assert (cut(x) - model(x)).square().sum() < (once(x) - model(x)).square().sum()


def test_statistics_serve_as_well_as_their_batches():
    model, x = SMALL[1].make()
    graph, plan = pl.trace(model, x), random_plan(model, x)
    parts = [pl.collect(graph, batches(half, 2), {"inputs"}) for half in x.chunk(2)]
    whole = pl.collect(graph, batches(x), {"inputs"})
    wanted = pl.apply(model, plan, compensate=Compensation(batches(x), sequential=False))
    for statistics in (whole, parts[0] + parts[1]):
        found = pl.apply(model, plan, compensate=statistics)
        assert all(
            error(value, wanted.state_dict()[name]) < 1e-8 for name, value in found.state_dict().items() if value.any()
        )
    in_order = pl.apply(model, plan, compensate=Compensation(whole, sequential=True))
    assert error(in_order(x), pl.apply(model, plan, compensate=batches(x))(x)) < 1e-9


def test_input_moments_are_second_moments_of_patches():
    model, x = make(LAYERS[2][0])
    model = model.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())
    found = pl.collect(pl.trace(model, x), batches(x, 2), {"inputs"}).inputs["2.weight"]
    u = torch.nn.functional.unfold(model[:2](x), 3, padding=1).movedim(1, -1).flatten(0, 1).detach()
    u = torch.cat([u, torch.ones(len(u), 1)], 1)
    assert found.count == len(u) and found.over == "patches"
    assert error(found.moment[0], u.T @ u / len(u)) < 1e-12 and error(found.mean[0], u.mean(0)[:-1]) < 1e-12


def test_producers_move_as_in_kron_obs():
    """The rows that stay minimise ½ δᵀ(S ⊗ A)δ, where those that go are held at δ = −w."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = [(torch.randn(30, 4).double(), torch.randint(3, (30,)))]
    plan = random_plan(model, data[0][0])
    statistics = pl.collect(pl.trace(model, data[0][0]), data, {"kronecker"})
    cut = pl.apply(model, plan, compensate=Compensation(statistics, side="producers", damping=0.0))
    factors = statistics.kronecker["0.weight"]
    augmented = torch.cat([factors.A, factors.mean[:, None]], 1)
    augmented = torch.cat([augmented, torch.cat([factors.mean, torch.ones(1).double()])[None]])
    fisher = torch.kron(factors.S, augmented).double()
    whole = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach().double()
    gone = torch.zeros_like(whole, dtype=torch.bool)
    gone[list(plan.removed["0"])] = True
    gone = gone.flatten()
    change = torch.linalg.solve(fisher[~gone][:, ~gone], fisher[~gone][:, gone] @ whole.flatten()[gone])
    wanted = (whole.flatten()[~gone] + change).view(-1, 5)
    assert error(cut[0].weight, wanted[:, :-1]) < 1e-7 and error(cut[0].bias, wanted[:, -1]) < 1e-7
    assert error(cut[2].weight, model[2].weight[:, ~gone.view(6, 5)[:, 0]]) == 0


@pytest.mark.filterwarnings("ignore:2 samples are too few")
def test_producers_of_any_kind_are_updated():
    model, x = SMALL[2].make()
    plan, data = random_plan(model, x), batches(x)
    cut = pl.apply(model, plan, compensate=Compensation(data, side="producers"))
    found, keep = put_back(cut, stays(model, plan)), stays(model, plan)
    for name in ("first", "transposed"):
        for part in ("weight", "bias"):
            stayed = keep[f"{name}.{part}"]
            assert error(found[f"{name}.{part}"][stayed], model.get_parameter(f"{name}.{part}")[stayed]) > 1e-6


class Halves(nn.Module):
    """Two layers on one input; their weights are two parameters, or halves of one."""

    def __init__(self, one: bool, transposed: bool) -> None:
        super().__init__()
        self.function = F.conv_transpose2d if transposed else F.conv2d
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(5, 2, 1)
        left, right = torch.randn(2, *((4, 5) if transposed else (5, 4)), 3, 3)
        self.weights = nn.ParameterList([torch.cat([left, right])] if one else [left, right])
        self.biases = nn.ParameterList(list(torch.randn(2, 5)))

    def forward(self, x: Tensor) -> Tensor:
        x, both = self.first(x).relu(), self.weights[0]
        left, right = (both[: len(both) // 2], both[len(both) // 2 :]) if len(self.weights) == 1 else self.weights
        gate = self.function(x.flip(2), right, self.biases[1]).sigmoid()
        return self.last(self.function(x, left, self.biases[0]) * gate).mean((2, 3))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("options", [EXACT, {"sequential": True}, {"side": "producers"}])
def test_a_slice_is_refitted_like_a_parameter_of_its_own(options: dict, transposed: bool):
    found = []
    for one in (False, True):
        torch.manual_seed(0)
        model, x = Halves(one, transposed).double(), torch.randn(20, 3, 5, 5).double()
        plan = pl.plan(pl.criteria.Random()(pl.trace(model, x)), ratio=0.4)
        how = Compensation([(x, torch.arange(20) % 2)], **options)
        found.append((list(plan.removed.values()), make_up(model, plan, *open_plan(model, plan), how)))
    assert found[0][0] == found[1][0] and all(found[0][0])
    fresh, halves = (dict(values) for _, values in found)
    torch.testing.assert_close(torch.cat([fresh.pop("weights.0"), fresh.pop("weights.1")]), halves.pop("weights.0"))
    assert fresh.keys() == halves.keys()
    torch.testing.assert_close(fresh, halves)


def test_prune_compensates_after_every_step(mini, small):
    data, test = pl.data.loader(mini.train.subset(64), 32), pl.data.loader(mini.test.subset(100), 100)
    seen = []
    for compensate in (False, True):
        cut, _ = pl.prune(
            pl.zoo.load("resnet20"), torch.ones(1, 3, 32, 32), data=data, flops=0.7, compensate=compensate
        )
        seen.append(training.evaluate(cut, test)["accuracy"])
    assert seen[0] + 0.3 < seen[1]
    model, x = small
    once = Compensation(sequential=False)
    cut, report = pl.prune(model, x, data=batches(x), ratio=0.6, steps=2, compensate=once)
    wanted = model
    for plan in report.plans:
        wanted = pl.apply(wanted, plan, compensate=Compensation(batches(x), sequential=False))
    assert len(report.plans) == 2 and error(cut(x), wanted(x)) < 1e-5
    with pytest.raises(pl.BatchError, match="needs batches"):
        pl.prune(model, x, ratio=0.5, compensate=True)


def test_bad_options_are_errors():
    for options in (
        {"side": "both"},
        {"side": "producers", "sequential": True},
        {"damping": -1.0},
        {"damping": "much"},
    ):
        with pytest.raises(pl.BudgetError):
            Compensation(None, **options)


def test_what_cannot_be_used_is_an_error_and_the_model_stays(small):
    model, x = small
    plan, graph = random_plan(model, x), pl.trace(model, x)
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    other = pl.zoo.ResNet(8, width=4)
    wrong = pl.collect(pl.trace(other, x), batches(x), {"inputs"})
    narrow = pl.apply(model, plan)
    late = pl.collect(pl.trace(narrow, x), batches(x), {"inputs"})
    infinite = x.clone()
    infinite[4] = float("inf")
    for given, message in (
        ([], "empty loader"),
        (Compensation(None), "needs batches"),
        (pl.collect(graph, batches(x), {"grad"}), "not 'inputs'"),
        (Compensation(pl.collect(graph, iter(batches(x)), {"inputs"}), sequential=True), "hold none"),
        (wrong, "another model"),
        (late, "another model"),
        (batches(infinite, 2), "not finite in batch 2"),
        (Compensation(batches(infinite, 2), sequential=False), "`5.weight` is not finite in batch 2"),
        ([(x[:, :2], torch.zeros(6))], "cannot take inputs"),
    ):
        with pytest.raises(pl.BatchError, match=message):
            pl.apply(model, plan, inplace=True, compensate=given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not model[1].training and not model[0].weight.requires_grad


@pytest.mark.parametrize("sequential", [False, True])
def test_a_singular_layer_is_named_and_left_as_cut(small, sequential: bool):
    model, x = small[0].double(), small[1].double()
    plan = random_plan(model, x)
    how = Compensation(batches(x[:3]), damping=0.0, sequential=sequential)
    with pytest.warns(UserWarning, match=r"`5.weight` \(the inputs that stay are linearly dependent"):
        cut = pl.apply(model, plan, compensate=how)
    assert torch.equal(cut(x), pl.apply(model, plan)(x))


def test_weights_that_no_layer_uses_are_named():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,ij->bj", self.first(x).relu(), self.last)

    model, x = Plain(), torch.randn(20, 4)
    plan = random_plan(model, x)
    for sequential in (False, True):
        with pytest.warns(UserWarning, match=r"`last` \(no layer with it was seen"):
            pl.apply(model, plan, compensate=Compensation(batches(x), sequential=sequential))

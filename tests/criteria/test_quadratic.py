"""Quadratic: gᵀδ + ½ δᵀHδ of every unit, against dense matrices and the loss itself along the step."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab import zoo
from prunelab.curvature import exact, mean_gradient
from prunelab.curvature.statistics.collect import collect
from tests.cases import Grouped, perturb


class Residual(nn.Module):
    """A convolution that adds to what it reads, so that a unit's row and column of its weight meet; norm, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv(F.gelu(self.norm(x)))
        return self.head(F.relu(x).mean((2, 3)))


class Attention(nn.Module):
    """Heads, a raw parameter and a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(3, 4), nn.Parameter(torch.zeros(2, 4))
        self.attention, self.norm, self.head = zoo.Attention(4, 2), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        return self.head(self.norm(x + self.attention(x)).mean(1))


NETWORKS = {
    "plain": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()),
            *(nn.Conv2d(4, 3, 2, bias=False), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 3)),
        ),
        (2, 3, 3),
    ),
    "residual": (Residual, (2, 3, 3)),
    "attention": (Attention, (2, 3)),
    "grouped": (Grouped, (3, 4, 4)),
}


def make(name: str) -> tuple[nn.Module, pl.DependencyGraph, list[tuple[Tensor, Tensor]]]:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = perturb(build()).double().eval()
    batches = [(torch.randn(n, *shape).double(), torch.arange(n) % 3) for n in (5, 2)]
    return model, pl.trace(model, batches[0][0]), batches


def step(model: nn.Module, group: pl.Group, unit: int) -> dict[str, Tensor]:
    """δ: minus the parameters where any member holds the unit."""
    delta = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for member in group.members:
        if member.name in delta:
            whole = -model.get_parameter(member.name).detach()
            places = member.positions(unit)
            delta[member.name].index_copy_(member.dim, places, whole.index_select(member.dim, places))
    return delta


def units(graph: pl.DependencyGraph) -> list[tuple[pl.Group, int]]:
    return [(group, unit) for group in graph.groups for unit in range(group.size)]


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("name", ["plain", "residual", "attention"])
def test_every_unit_against_the_dense_matrix(name, curvature):
    model, graph, batches = make(name)
    matrix = {"hessian": exact.hessian, "ggn": exact.ggn}[curvature](model, batches)
    g = exact.flat(list(mean_gradient(model, batches).values()))
    terms = pl.criteria.Quadratic(curvature=curvature).terms(graph, batches)
    scores = pl.criteria.Quadratic(curvature=curvature)(graph, batches)
    alone = pl.criteria.Quadratic(curvature=curvature, linear=False)(graph, batches)
    assert len(graph.groups) > 0
    for group, unit in units(graph):
        delta = exact.flat(list(step(model, group, unit).values()))
        first, second = g @ delta, delta @ matrix @ delta / 2
        torch.testing.assert_close(terms[group.name][0][unit], first)
        torch.testing.assert_close(terms[group.name][1][unit], second)
        torch.testing.assert_close(scores[group][unit], (first + second).float())
        torch.testing.assert_close(alone[group][unit], second.float())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_unit_against_the_loss_along_its_step(name):
    """Central differences of L(θ + ε δ): no derivative of ours is in there."""
    model, graph, batches = make(name)
    inputs, targets = (torch.cat(values) for values in zip(*batches, strict=True))
    terms = pl.criteria.Quadratic().terms(graph, batches)

    def loss(delta: dict[str, Tensor], size: float) -> Tensor:
        moved = {name: value.detach() + size * delta[name] for name, value in model.named_parameters()}
        return F.cross_entropy(torch.func.functional_call(model, moved, (inputs,)), targets)

    size = 1e-4
    for group, unit in units(graph):
        delta = step(model, group, unit)
        above, here, below = (loss(delta, e) for e in (size, 0, -size))
        torch.testing.assert_close(terms[group.name][0][unit], (above - below) / 2 / size, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            terms[group.name][1][unit], (above + below - 2 * here) / 2 / size**2, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("name", NETWORKS)
def test_chunks_order_and_batch_size_do_not_matter(name, curvature):
    _, graph, batches = make(name)
    inputs, targets = (torch.cat(values) for values in zip(*batches, strict=True))
    wanted = pl.criteria.Quadratic(curvature=curvature).terms(graph, batches)
    single = [(inputs[n : n + 1], targets[n : n + 1]) for n in (3, 0, 6, 1, 2, 5, 4)]
    for criterion, given in (({"chunk": 3}, batches), ({}, single), ({}, [(inputs, targets)])):
        found = pl.criteria.Quadratic(curvature=curvature, **criterion).terms(graph, given)
        for key, pair in wanted.items():
            torch.testing.assert_close(found[key], pair)


def test_the_curvature_of_gauss_newton_is_never_negative_and_the_linear_term_is_minus_taylor():
    model, graph, batches = make("residual")
    terms = pl.criteria.Quadratic(curvature="ggn").terms(graph, batches)
    assert all(bool((second >= 0).all()) for _, second in terms.values())
    gradient = mean_gradient(model, batches)
    hidden = next(group for group in graph.groups if group.name == "stem")
    for unit in range(hidden.size):
        wanted = sum((gradient[name] * part).sum() for name, part in step(model, hidden, unit).items())
        torch.testing.assert_close(terms["stem"][0][unit], wanted)


def test_where_the_loss_is_quadratic_along_the_step_the_score_is_the_change_itself():
    """Least squares on frozen features: units that only the head holds leave exactly what the score says."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.randn(5)), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(x[:, :1] * self.scale))

    torch.manual_seed(0)
    model = Head().double()
    batch = [(torch.randn(8, 1).double(), torch.randn(8, 2).double())]
    group = pl.Group(
        "only the head", 5, tuple(m for m in pl.trace(model, batch[0][0]).groups[0].members if "head" in m.name), None
    )  # type: ignore[arg-type]
    graph = pl.trace(model, batch[0][0])
    graph.groups = (group,)
    scores = pl.criteria.Quadratic(loss=F.mse_loss)(graph, batch)
    for unit in range(5):
        cut = copy.deepcopy(model)
        cut.head.weight.data[:, unit] = 0
        change = F.mse_loss(cut(batch[0][0]), batch[0][1]) - F.mse_loss(model(batch[0][0]), batch[0][1])
        torch.testing.assert_close(scores[group][unit], change.detach().float())


def test_a_loss_that_is_not_convex_in_the_outputs_has_a_hessian_all_the_same():
    model, graph, batches = make("plain")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.sin().sum(1) * targets).mean()

    g = exact.flat(list(mean_gradient(model, batches, loss).values()))
    for curvature, matrix in (("hessian", exact.hessian), ("ggn", exact.ggn)):
        dense = matrix(model, batches, loss)
        scores = pl.criteria.Quadratic(curvature=curvature, loss=loss)(graph, batches)
        for group, unit in units(graph):
            delta = exact.flat(list(step(model, group, unit).values()))
            torch.testing.assert_close(scores[group][unit], (g @ delta + delta @ dense @ delta / 2).float())


def test_it_runs_on_the_networks_of_the_zoo():
    torch.manual_seed(0)
    vit = zoo.VisionTransformer(image_size=16, width=8, depth=1, heads=2, mlp_width=6)
    for model in (vit, zoo.ResNet(8, width=2)):
        batch = [(torch.randn(4, 3, 16, 16), torch.arange(4))]
        graph = pl.trace(model, batch[0][0])
        for curvature in ("hessian", "ggn"):
            scores = pl.criteria.get("quadratic", curvature=curvature, progress=False)(graph, batch)
            assert all(bool(scores[group].isfinite().all()) and bool(scores[group].any()) for group in scores)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_the_model_stays_as_it_was_also_after_an_error(curvature):
    model, graph, batches = make("plain")
    model.train()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    criterion = pl.criteria.Quadratic(curvature=curvature)
    criterion(graph, batches)
    with pytest.raises(pl.BatchError, match="not finite in batch 1"):
        criterion(graph, [batches[0], (batches[1][0] / 0, batches[1][1])])
    assert model.training and model[1].training and not model[0].weight.requires_grad and model[0].bias.requires_grad
    assert all(value.grad is None for value in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_statistics_lend_their_batches_and_bad_input_is_named():
    _, graph, batches = make("plain")
    criterion = pl.criteria.Quadratic()
    lent = criterion(graph, collect(graph, batches, {"grad"}))
    torch.testing.assert_close(lent["0"], criterion(graph, batches)["0"])
    for options, message in (({"curvature": "fisher"}, "curvature='fisher'"), ({"chunk": 0}, "chunk=0")):
        with pytest.raises(pl.BudgetError, match=message):
            pl.criteria.Quadratic(**options)
    for given, message in (
        (None, "needs batches"),
        ([], "empty loader"),
        ([(batches[0][0][:, :1], batches[0][1])], "cannot take inputs"),
        ([(batches[0][0], batches[0][1] + 7)], "The loss cannot take.*out of bounds"),
    ):
        for curvature in ("hessian", "ggn"):
            with pytest.raises(pl.BatchError, match=message):
                pl.criteria.Quadratic(curvature=curvature)(graph, given)
    with pytest.raises(pl.BatchError, match="the plain mean"):
        pl.criteria.Quadratic(loss=lambda o, t: F.cross_entropy(o, t, reduction="sum"))(graph, batches)

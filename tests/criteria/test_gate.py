"""Gates: the scores are second derivatives of the loss, checked by autograd in scaled weights and by differences."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlockV2

import prunelab as pl
from prunelab.criteria.gate import Gate
from prunelab.criteria.gates import Gates
from prunelab.plans import Cut
from tests.cases import Grouped, perturb

Batch = tuple[Tensor, Tensor]


class Shared(nn.Module):
    """A layer that runs twice, and a plain product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(3, 5), nn.Linear(5, 5)
        self.plain = nn.Parameter(torch.randn(5, 4))
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = x + torch.tanh(self.twice(x))
        x = x + torch.tanh(self.twice(x))
        return self.last(torch.tanh(x @ self.plain))


class TokensFirst(nn.Module):
    """Attention over ``[tokens, batch, width]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(3, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.transpose(0, 1)))
        x = x + self.attention(x, x, x)[0]
        return self.last(x).mean(0)


class Separate(nn.Module):
    """Queries, keys and values from layers of their own, attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ self.key(x).transpose(1, 2) / 2).softmax(-1)
        return self.last((weights @ self.value(x)).mean(1))


def swin(version: int) -> nn.Module:
    block = {} if version == 1 else {"block": SwinTransformerBlockV2}
    return SwinTransformer(
        [2, 2], 8, [2], [2], [2, 2], num_classes=3, stochastic_depth_prob=0.0, mlp_ratio=1.0, **block
    )


BUILDS = {
    "cnn": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Tanh()),
            *(nn.Flatten(), nn.Linear(5 * 16, 3)),
        ),
        (3, 8, 8),
    ),
    "resnet": (lambda: pl.zoo.ResNet(8, num_classes=3, width=2), (3, 8, 8)),
    "vit": (lambda: pl.zoo.VisionTransformer(8, 8, 2, 2, 6, num_classes=3), (3, 8, 8)),
    "grouped": (Grouped, (3, 8, 8)),
    "shared": (Shared, (3,)),
    "tokens first": (TokensFirst, (4, 3)),
    "separate": (Separate, (4, 3)),
    "swin": (lambda: swin(1), (3, 8, 8)),
    "swin v2": (lambda: swin(2), (3, 8, 8)),
}


def make(name: str, sizes: tuple[int, ...] = (3, 2)) -> tuple[pl.DependencyGraph, list[Batch]]:
    build, shape = BUILDS[name]
    torch.manual_seed(3)
    model = perturb(build()).double().eval()
    labels = 4 if name == "grouped" else 3
    sizes = (2, 1) if name == "swin v2" else sizes
    batches = [(torch.randn(n, *shape).double(), torch.randint(0, labels, (n,))) for n in sizes]
    return pl.trace(model, batches[0][0]), batches


def scaled(graph: pl.DependencyGraph, z: Tensor) -> dict[str, Tensor]:
    """Return the parameters, every unit's consuming slices multiplied by its gate, queries by that of their width.

    For layers, that is the same function as gates on their inputs, by another route.
    """
    parameters = {name: value.detach().clone() for name, value in graph.model.named_parameters()}

    def multiply(name: str, dim: int, unit: Tensor, gates: Tensor) -> None:
        factor = torch.cat([gates, gates.new_ones(1)])[unit]
        parameters[name] = parameters[name] * factor.view(-1, *(1 for _ in range(dim + 1, parameters[name].dim())))

    start = 0
    for group in graph.groups:
        gates = z[start : start + group.size]
        start += group.size
        for member in group.members:
            consumed = member.role == "consumes" or (member.name == "twice.weight" and member.dim == 1)
            if consumed and member.name in parameters:
                multiply(member.name, member.dim, member.unit, gates)
        if group.name.endswith("head_width"):
            for member in group.members:
                query = member.unit.clone()
                if _normalised(graph):
                    continue
                fused = any(part in member.name for part in ("qkv", "in_proj"))
                if fused:
                    query[len(query) // 3 :] = -1
                if member.dim == 0 and (fused or member.name.startswith("query")):
                    multiply(member.name, 0, query, gates)
    return parameters


def _normalised(graph: pl.DependencyGraph) -> bool:
    """Tell whether queries and keys are divided by their norms before they meet."""
    return any(isinstance(module, SwinTransformerBlockV2) for module in graph.model.modules())


@contextmanager
def gated_norms(graph: pl.DependencyGraph, z: Tensor) -> Iterator[None]:
    """Let every layer norm count each unit with its gate: mean Σzx/Σz, variance Σz(x - mean)²/Σz.

    Queries and keys of cosine attention become z·q/‖z·q‖ and k/‖z·k‖.
    """
    starts, start, modules, widths = {}, 0, dict(graph.model.named_modules()), []
    normalize = F.normalize
    for group in graph.groups:
        if group.name.endswith("head_width") and (group.members[0].unit[: len(group.members[0].unit) // 3] >= 0).any():
            widths += [z[start : start + group.size]] * 2
        for member in group.members:
            owner = member.name.rpartition(".")[0]
            if isinstance(modules[owner], nn.LayerNorm) and member.name.endswith("weight"):
                starts[owner] = z[start : start + group.size][member.unit]
        start += group.size

    def normed(layer: nn.LayerNorm, gates: Tensor, x: Tensor) -> Tensor:
        x = x - (gates * x).sum(-1, keepdim=True) / gates.sum()
        return x / ((gates * x**2).sum(-1, keepdim=True) / gates.sum() + layer.eps).sqrt() * layer.weight + layer.bias

    def normalized(x: Tensor, dim: int) -> Tensor:
        gates, query = widths.pop(0), len(widths) % 2 == 1
        found = x / (gates * x).norm(dim=dim, keepdim=True)
        return found * gates if query else found

    for name, gates in starts.items():
        modules[name].forward = partial(normed, modules[name], gates)
    if _normalised(graph):
        F.normalize = normalized
    try:
        yield
    finally:
        F.normalize = normalize
        for name in starts:
            del modules[name].forward


def derivatives(graph: pl.DependencyGraph, batches: list[Batch], *, second: bool = False) -> dict[str, Tensor]:
    """Return gradient, GGN, empirical Fisher and, if asked, Hessian of the mean loss in the gates, by brute force."""
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    ones = torch.ones(sum(group.size for group in graph.groups), dtype=torch.float64)

    def logits(z: Tensor) -> Tensor:
        with gated_norms(graph, z):
            return functional_call(graph.model, scaled(graph, z), (inputs,))

    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(logits, ones)
        hessian = ones
        if second:
            hessian = torch.autograd.functional.hessian(lambda z: F.cross_entropy(logits(z), targets), ones)
        p = logits(ones).softmax(1).detach()
    root = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    slopes = torch.einsum("nc,ncu->nu", p - F.one_hot(targets, p.shape[1]), jacobian)
    return {
        "gradient": slopes.mean(0),
        "hessian": hessian,
        "ggn": torch.einsum("ncu,ncv->uv", jacobian, root @ jacobian) / len(p),
        "empirical": slopes.t() @ slopes / len(p),
    }


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", BUILDS)
def test_gradient_and_curvature_in_the_gates_are_those_of_autograd(name):
    graph, batches = make(name)
    wanted = derivatives(graph, batches)
    assert all(part.max() > 0 for part in wanted["ggn"].diagonal().split([g.size for g in graph.groups]))
    for curvature in ("ggn", "empirical"):
        gradient, matrix = Gate(curvature=curvature, linear=True, interactions=True).measure(graph, batches)
        close(gradient, wanted["gradient"])
        close(matrix, wanted[curvature])
    _, diagonal = Gate().measure(graph, batches)
    close(diagonal, wanted["ggn"].diagonal())


@pytest.mark.parametrize("name", ["cnn", "vit", "shared", "tokens first"])
def test_the_hessian_in_the_gates_is_that_of_autograd(name):
    graph, batches = make(name)
    wanted = derivatives(graph, batches, second=True)
    gradient, matrix = Gate(curvature="hessian", interactions=True).measure(graph, batches)
    close(gradient, wanted["gradient"])
    close(matrix, wanted["hessian"])
    close(Gate(curvature="hessian").measure(graph, batches)[1], wanted["hessian"].diagonal())


def test_the_hessian_predicts_the_loss_of_a_small_step_in_all_gates():
    """No autograd on this side: the third-order rest shrinks by 8 when the step shrinks by 2."""
    graph, batches = make("cnn")
    gradient, matrix = Gate(curvature="hessian", interactions=True).measure(graph, batches)
    gates = Gates(graph, batches[0][0])
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    step = torch.randn(gates.size, generator=torch.Generator().manual_seed(0)).double()

    def loss(scale: float) -> float:
        with torch.no_grad():
            return F.cross_entropy(gates.run(inputs, 1 + scale * step), targets).item()

    def rest(scale: float) -> float:
        linear, quadratic = float(gradient @ step), float(step @ matrix @ step)
        return loss(scale) - loss(0) - scale * linear - scale**2 / 2 * quadratic

    assert abs(loss(0.02) - loss(0)) > 1e-4
    assert rest(0.02) / rest(0.01) == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize(
    "name", ["cnn", "resnet", "grouped", "shared", "vit", "tokens first", "separate", "swin", "swin v2"]
)
def test_a_gate_of_zero_is_a_silenced_unit(name):
    graph, batches = make(name)
    inputs, start = batches[0][0], 0
    gates = Gates(graph, inputs)
    for group in graph.groups:
        unit = group.size - 1
        z = torch.ones(gates.size).double()
        z[start + unit] = 0
        start += group.size
        cut = Cut(group.name, group.size, (unit,), tuple((member.name, member.dim) for member in group.members))
        with torch.no_grad():
            wanted = pl.masked(graph.model, pl.Plan((cut,), graph.inputs))(inputs)
            close(gates.run(inputs, z), wanted)
            if gates.per_sample:
                close(gates.run(inputs, z.expand(len(inputs), -1)), wanted)


def test_sampled_labels_give_the_ggn_in_the_mean():
    graph, batches = make("cnn")
    exact = Gate(interactions=True).measure(graph, batches)[1]
    few, many = (
        Gate(curvature="mc", samples=samples, interactions=True).measure(graph, batches)[1] for samples in (20, 500)
    )
    assert torch.dist(many, exact) < 0.1 * exact.norm()
    assert torch.dist(many, exact) < 0.5 * torch.dist(few, exact)


def test_a_temperature_is_that_of_the_loss():
    """The curvature is that of T² ℓ(outputs / T), the gradient that of ℓ."""
    graph, batches = make("cnn")
    hot = Gate(temperature=3.0, linear=True, interactions=True).measure(graph, batches)
    by_hand = Gate(loss=lambda outputs, targets: 9 * F.cross_entropy(outputs / 3, targets), interactions=True)
    close(hot[1], by_hand.measure(graph, batches)[1])
    close(hot[0], derivatives(graph, batches)["gradient"])


def test_any_convex_loss_has_a_ggn():
    graph, batches = make("cnn")
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    batches = [(x, F.one_hot(y, 3).double()) for x, y in batches]
    ones = torch.ones(sum(group.size for group in graph.groups)).double()
    jacobian = torch.autograd.functional.jacobian(
        lambda z: functional_call(graph.model, scaled(graph, z), (inputs,)), ones
    )
    found = Gate(loss=F.mse_loss, interactions=True).measure(graph, batches)[1]
    close(found, 2 / 3 * torch.einsum("ncu,ncv->uv", jacobian, jacobian) / len(inputs))
    assert targets.shape == (len(jacobian),)


@pytest.mark.parametrize("curvature", ["ggn", "mc", "empirical", "hessian"])
def test_batch_size_does_not_matter(curvature):
    graph, batches = make("cnn")
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    gate = Gate(curvature=curvature, linear=True, interactions=True)
    for one, two in zip(
        gate.measure(graph, batches),
        gate.measure(graph, zip(inputs.split(1), targets.split(1), strict=True)),
        strict=True,
    ):
        close(one, two)


def test_scores_are_half_the_curvature_minus_the_slope():
    graph, batches = make("resnet")
    gradient, matrix = Gate(linear=True, interactions=True).measure(graph, batches)
    scores = pl.criteria.get("gate", linear=True, interactions=True)(graph, batches)
    torch.testing.assert_close(torch.cat([scores[g] for g in graph.groups]), (matrix.diagonal() / 2 - gradient).float())
    torch.testing.assert_close(scores.matrix, matrix.float())
    plain = Gate()(graph, batches)
    torch.testing.assert_close(torch.cat([plain[g] for g in graph.groups]), (matrix.diagonal() / 2).float())
    assert plain.matrix is None


def test_the_model_stays_as_it_was(small):
    model, inputs = small
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    graph = pl.trace(model, inputs)
    for targets in (torch.arange(6) % 4, torch.full((6,), 9)):
        try:
            Gate(linear=True)(graph, [(inputs, targets)])
        except pl.BatchError:
            assert targets[0] == 9
        assert model.training and not model[1].training and model[0].training
        assert not model[0].weight.requires_grad and model[5].weight.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_half_precision_sums_in_single():
    graph, batches = make("cnn")
    wanted = Gate().measure(graph, batches)[1]
    graph.model.bfloat16()
    found = Gate().measure(graph, [(x.bfloat16(), y) for x, y in batches])[1]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0.2, atol=0.02 * float(wanted.max()))


def test_a_model_without_groups_has_no_scores():
    graph = pl.trace(nn.Linear(3, 2), torch.ones(1, 3))
    assert not graph.groups and len(Gate()(graph, [(torch.ones(2, 3), torch.arange(2))])) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "fisher"}, "empirical, mc, ggn, hessian"),
        ({"samples": 0}, "samples=0"),
        ({"temperature": 0}, "temperature=0"),
    ]
    + [({"temperature": 2.0, "curvature": "hessian"}, "1 for curvature='hessian'")],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(pl.BudgetError, match=message):
        Gate(**options)


def test_samples_may_be_in_any_dimension():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    first, labels = torch.randn(6, 7, 4).double(), torch.arange(6) % 3
    second = first.transpose(0, 1).contiguous()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.mean(1), targets)

    task = pl.Task([(second, labels)], samples=(1, 0), outputs=lambda out: out.transpose(0, 1), loss=loss)
    for curvature in ("ggn", "empirical", "hessian"):
        criterion = Gate(curvature, linear=True, loss=loss)
        wanted = criterion(pl.trace(model, first), [(first, labels)])["0"]
        torch.testing.assert_close(criterion(pl.trace(model, second), task)["0"], wanted)


def test_a_hessian_needs_no_single_samples():
    torch.manual_seed(0)
    model, x, goal = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(7, 6, 4), torch.randn(3)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.mean((0, 1)) - targets).square().sum()

    graph = pl.trace(model, x)
    found = Gate("hessian", loss=loss)(graph, [(x, goal)])["0"]
    parts = (F.relu(model[0](x)).mean((0, 1))[:, None] * model[2].weight.t()).detach()  # [unit, output]
    torch.testing.assert_close(found, parts.square().sum(1))
    with pytest.raises(pl.BatchError, match="single samples"):
        Gate("ggn", loss=loss)(graph, [(x, goal)])


def test_a_warning_about_its_cost_is_at_the_user_s_line(monkeypatch, small):
    monkeypatch.setattr("prunelab.criteria.gate.MANY", 1)
    model, inputs = small
    graph = pl.trace(model, inputs)
    with pytest.warns(UserWarning, match="one backward pass for every number") as caught:
        Gate()(graph, [(inputs, torch.arange(6) % 4)])
    assert caught[0].filename == __file__


def test_bad_batches_are_errors(small):
    model, inputs = small
    graph, targets = pl.trace(model, inputs), torch.arange(6) % 4
    for batches, message in (
        (None, "needs batches"),
        ([], "empty loader"),
        ([(inputs * float("nan"), targets)], "not finite in batch 0"),
        ([(inputs, targets[:3])], "but 3 targets"),
    ):
        with pytest.raises(pl.BatchError, match=message):
            Gate()(graph, batches)
    unsteady = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    unsteady = nn.Sequential(unsteady, nn.Linear(4 * 64, 4))
    with pytest.raises(pl.BatchError, match="normalises over the batch"):
        Gate()(pl.trace(unsteady, inputs), [(inputs, targets)])

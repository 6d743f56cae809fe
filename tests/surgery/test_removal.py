"""What removal means: nothing reads the unit any more, and statistics are over the units that stay.

The cut network, the silenced one, gates of zero and the oracle all compute this, whatever operators are between a unit
and what consumes it, on inputs of any size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab.criteria.gates import Gates
from prunelab.plans import Cut
from tests.cases import error, random_plan


class Between(nn.Module):
    """A layer that makes 12 units, some code, and a layer that may read what it gives."""

    def __init__(self, code: Callable[[nn.Module, Tensor], Tensor], out: int = 12) -> None:
        super().__init__()
        self.make, self.code, self.read = nn.Linear(6, 12), code, nn.Linear(out, 5)
        self.other = nn.Linear(6, 12)
        self.scale, self.shift = nn.Parameter(torch.rand(12) + 0.5), nn.Parameter(torch.randn(12))
        self.register_buffer("position", torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.code(self, self.make(x)))


def layer_norm(model: nn.Module, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-3).sqrt() * model.scale + model.shift


def by_var(model: nn.Module, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, unbiased=False, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-3)


def softmax(model: nn.Module, x: Tensor) -> Tensor:
    x = x.exp()
    return x / x.sum(-1, keepdim=True)


CODE = {
    "sigmoid, then a layer": (lambda m, x: x.sigmoid(), 12),
    "sigmoid, then a sum": (lambda m, x: x.sigmoid().sum(-1, keepdim=True), 1),
    "exp, then a mean": (lambda m, x: x.exp().mean(-1, keepdim=True), 1),
    "less its mean": (lambda m, x: x - x.mean(-1, keepdim=True), 12),
    "its mean beside it": (lambda m, x: x * x.mean(-1, keepdim=True), 12),
    "standardised": (lambda m, x: (x - x.mean(-1, True)) / x.std(-1, keepdim=True), 12),
    "variance": (lambda m, x: torch.cat([x.var(-1, keepdim=True), x.std(dim=-1, correction=0, keepdim=True)], -1), 2),
    "layer norm by hand": (layer_norm, 12),
    "layer norm by var_mean": (by_var, 12),
    "root mean square by hand": (lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * m.scale, 12),
    "root mean square norm": (lambda m, x: F.rms_norm(x, (x.shape[-1],), m.scale), 12),
    "layer norm without weights": (lambda m, x: F.layer_norm(x + 1, (x.shape[-1],)), 12),
    "softmax by hand": (softmax, 12),
    "a buffer, then a norm": (lambda m, x: F.normalize(x + m.position, dim=-1), 12),
    "a number, then a norm": (lambda m, x: F.normalize(x + 1, dim=-1) * m.scale, 12),
    "a product of activations": (lambda m, x: (x.sigmoid() * m.shift) @ x.cos().transpose(-2, -1).mean(-1, True), 1),
    "einsum": (lambda m, x: torch.einsum("bnd,bmd->bn", F.elu(x) + 1, x.exp()).unsqueeze(-1), 1),
    "a logarithm of nothing": (lambda m, x: (x - m.shift).relu().log().exp().sum(-1, keepdim=True), 1),
    "in place": (lambda m, x: x.sub_(1).exp_().sum(-1, keepdim=True), 1),
    "written into": (lambda m, x: _written(x).sum(-1, keepdim=True), 1),
    "a mean over all": (lambda m, x: x.sigmoid().mean() * x, 12),
    "weights alone": (lambda m, x: x * m.scale * (m.scale.exp() * m.shift).sum(), 12),
    "a view of what is overwritten": (lambda m, x: _overwritten(x).sum(-1, keepdim=True), 1),
}


def _overwritten(x: Tensor) -> Tensor:
    x = x.clone()
    view = x.flatten(0, 1)
    x.exp_()
    return view.unflatten(0, x.shape[:2])


def _written(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 3.0
    return x


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    code, out = CODE[name]
    return Between(code, out).double().eval(), torch.randn(2, 7, 6).double()


@pytest.mark.parametrize("name", CODE)
def test_the_cut_network_is_the_silenced_one_at_any_size(name: str):
    model, x = make(name)
    plan = random_plan(model, x, seed=1)
    assert plan.cuts, "a test of nothing"
    cut, silent = pl.apply(model, plan), pl.masked(model, plan)
    with torch.no_grad():
        assert error(cut(x), model(x)) > 1e-4, "a cut that changes nothing tests nothing"
        for inputs in (x, torch.randn(3, 5, 6).double()):
            assert error(cut(inputs), silent(inputs)) < 1e-12
    with torch.inference_mode():
        assert error(cut(x), silent(x)) < 1e-12


@pytest.mark.parametrize("name", CODE)
def test_gates_of_zero_and_the_oracle_mean_the_same(name: str):
    model, x = make(name)
    graph = pl.trace(model, x)
    unit = torch.ones(sum(group.size for group in graph.groups)).double()
    unit[[1, 4, 5]] = 0
    cut = pl.Plan((_cut(graph.groups[0], (1, 4, 5)),), graph.inputs)
    with torch.no_grad():
        assert error(Gates(graph, x).run(x, unit), pl.masked(model, cut)(x)) < 1e-12

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()

    targets = torch.randn(2, 7, 5).double()
    scores = pl.criteria.Oracle(loss=loss, progress=False)(graph, [(x, targets)])
    with torch.no_grad():
        without = pl.masked(model, pl.Plan((_cut(graph.groups[0], (3,)),), graph.inputs))
        wanted = loss(without(x), targets) - loss(model(x), targets)
    assert float(scores[graph.groups[0]][3]) == pytest.approx(float(wanted), rel=1e-5, abs=1e-7)  # scores are float32


def _cut(group: pl.Group, units: tuple[int, ...]) -> Cut:
    return Cut(group.name, group.size, units, tuple((member.name, member.dim) for member in group.members))


@pytest.mark.parametrize("name", CODE)
def test_gradients_of_the_silenced_network_are_those_of_the_cut_one(name: str):
    model, x = make(name)
    plan = random_plan(model, x, seed=1)
    cut, silent = pl.apply(model, plan), pl.masked(model, plan)
    for network in (cut, silent):
        network(x).square().sum().backward()
    kept = [unit for unit in range(12) if unit not in plan.cuts[0].removed]
    assert plan.cuts[0].group.startswith("make")
    assert error(cut.make.weight.grad, silent.make.weight.grad[kept]) < 1e-10


def test_gates_refuse_a_function_of_two_tensors_that_is_no_product():
    """The cosine divides by the norms of both, so a gate on one of them is not enough."""
    model, x = make("sigmoid, then a layer")
    model.code = lambda m, x: x * F.cosine_similarity(x + 1, x.exp(), dim=-1).unsqueeze(-1)
    graph, plan = pl.trace(model, x), random_plan(model, x)
    with torch.no_grad():
        assert error(pl.apply(model, plan)(x), pl.masked(model, plan)(x)) < 1e-12
    with pytest.raises(pl.BatchError, match="`cosine_similarity` consumes units of several tensors"):
        Gates(graph, x)


class LinearAttention(nn.Module):
    """Attention without a softmax: queries and keys meet in two products of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x).unflatten(-1, (2, -1)) for layer in (self.query, self.key, self.value))
        query, key = F.elu(query) + 1, F.elu(key) + 1
        total = 1 / (torch.einsum("bnhd,bhd->bnh", query, key.sum(1)) + 1e-6)
        mixed = torch.einsum("bnhd,bhde,bnh->bnhe", query, torch.einsum("bnhd,bnhe->bhde", key, value), total)
        return self.out(mixed.flatten(2))


def test_units_of_linear_attention_are_removed_where_queries_meet_keys():
    torch.manual_seed(0)
    model, x = LinearAttention().double().eval(), torch.randn(2, 7, 6).double()
    for seed in range(3):
        plan = random_plan(model, x, seed=seed)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*was rebuilt")  # its code writes down two heads
            for inputs in (x, torch.randn(3, 7, 6).double()):
                assert error(pl.apply(model, plan)(inputs), pl.masked(model, plan)(inputs)) < 1e-12


def test_a_statistic_that_is_not_known_is_refused_by_name():
    model, x = make("sigmoid, then a layer")
    model.code = lambda m, x: torch.ops.aten.native_layer_norm(x, [x.shape[-1]], None, None, 1e-5)[0]
    silent = pl.masked(model, random_plan(model, x))
    with pytest.raises(pl.PlanError, match="native_layer_norm"):
        silent(x)


class Slots(nn.Module):
    """Makes room for keys of two kinds and writes each into its part, as DeepSeek's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(6, 12), nn.Linear(6, 8)
        self.place, self.last = nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        plain, place = self.key(x), self.place(x)
        width = self.key.out_features
        keys = plain.new_empty(*plain.shape[:-1], width + self.place.out_features)
        keys[..., :width].copy_(plain)
        keys[..., width:].copy_(place)
        return self.last((self.query(x) @ keys.transpose(-1, -2)).softmax(-1) @ x)


def test_a_slice_that_is_written_to_is_a_part_of_the_same_tensor():
    torch.manual_seed(0)
    model, x = Slots().double().eval(), torch.randn(2, 5, 6).double()
    graph = pl.trace(model, x)
    scores = pl.Scores(graph, {group.name: torch.arange(float(group.size)) for group in graph.groups}, "mine")
    plan = pl.plan(scores, ratio=0.5, scope="layer")
    assert sum(map(len, plan.removed.values())) >= 4
    torch.use_deterministic_algorithms(True)  # room is filled with what is no number
    try:
        with torch.no_grad():
            found, wanted = pl.masked(model, plan)(x), pl.apply(model, plan)(x)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)

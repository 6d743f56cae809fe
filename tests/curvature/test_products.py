"""Linear layers written as products with a matrix ``[in, out]``, as in GPT-2, are linear layers to everything."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab.curvature.statistics.collect import collect
from prunelab.curvature.watching.layer_calls import LayerCalls
from prunelab.surgery.silence import masked

pytestmark = pytest.mark.filterwarnings("ignore:.*samples are too few")


class Product(nn.Module):
    """``x W + b`` with W ``[in, out]``, written in one of three ways."""

    def __init__(self, inputs: int, outputs: int, way: str) -> None:
        super().__init__()
        self.weight, self.bias, self.way = nn.Parameter(torch.randn(inputs, outputs)), None, way
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "addmm":
            rows = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
            return rows.view(*x.shape[:-1], -1)
        if self.way == "matmul":
            return torch.matmul(x, self.weight) + self.bias
        return x @ self.weight + self.bias


class Net(nn.Module):
    """Tokens ``[B, T, 6]`` to logits ``[B, 3]``."""

    def __init__(self, way: str) -> None:
        super().__init__()
        make = nn.Linear if way == "linear" else (lambda i, o: Product(i, o, way))
        self.first, self.second, self.head = make(6, 8), make(8, 4), make(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).sum(1))


WAYS = ["addmm", "matmul", "operator"]


@pytest.fixture(params=WAYS)
def both(request) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    linear, product = Net("linear").double(), Net(request.param).double()
    for name, value in linear.named_parameters():
        product.get_parameter(name).data.copy_(value.t() if value.dim() > 1 else value)
    batches = [(torch.randn(40, 5, 6).double(), torch.randint(3, (40,))) for _ in range(2)]
    return linear, product, batches


def test_products_are_recorded_with_input_and_output():
    torch.manual_seed(0)
    model, x = Net("addmm"), torch.randn(2, 5, 6)
    with LayerCalls(model) as taps:
        model(x)
    assert [(call.weight, call.kind, call.view.out_dim, call.bias) for call in taps.calls] == [
        (f"{name}.weight", "linear", 1, f"{name}.bias") for name in ("first", "second", "head")
    ]
    for call in taps.calls:
        wanted = call.input @ model.get_parameter(call.weight) + model.get_parameter(call.bias)
        torch.testing.assert_close(call.output, wanted)


def test_what_is_no_layer_is_left_alone():
    model, x = nn.Linear(3, 3, bias=False), torch.randn(3, 3)
    with LayerCalls(model) as taps:
        for found, wanted in (
            (x @ x, torch.mm(x, x)),
            (torch.addmm(x, x, x), x + torch.matmul(x, x)),
            (model.weight @ x, torch.matmul(model.weight, x)),
            (torch.addmm(x, x, model.weight, beta=2), 2 * x + x @ model.weight.detach()),
        ):
            torch.testing.assert_close(found, wanted)
    assert not taps.calls


CRITERIA = ["taylor", "obd", "c_obd", "c_obs", "kron_obd", "kron_obs", "obs", "eigendamage", "gate", "quadratic", "oba"]


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_are_those_of_linear_layers(name, both):
    linear, product, batches = both
    options = {"correction": "ekfac"} if name == "eigendamage" else {}
    found, wanted = (
        pl.criteria.get(name, **options)(pl.trace(model, batches[0][0]), batches) for model in (product, linear)
    )
    wanted_by_size = {group.size: wanted[group] for group in wanted.graph.groups}
    assert {group.size for group in found.graph.groups} == {8, 4}
    for group in found.graph.groups:
        torch.testing.assert_close(found[group], wanted_by_size[group.size], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("side", ["consumers", "producers"])
def test_compensation_is_that_of_linear_layers(side, sequential, both):
    if side == "producers" and sequential:
        pytest.skip("producers are updated at once")
    linear, product, batches = both
    outputs = []
    for model in (linear, product):
        graph = pl.trace(model, batches[0][0])
        scores = pl.criteria.Magnitude(group_reduction="sum", normalizer="none")(graph)
        plan = pl.plan(scores, ratio=0.5, scope="layer")
        how = pl.Compensation(batches, side=side, sequential=sequential)
        cut = pl.apply(model, plan, compensate=how)
        outputs.append(cut(batches[0][0]))
        assert not torch.allclose(cut(batches[0][0]), masked(model, plan)(batches[0][0]))
    if product.head.way == "addmm":
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-6, atol=1e-8)
        return
    if side == "consumers":  # a bias that is added by itself stays as it is, so less is made up for
        x = batches[0][0]
        whole, plain = product(x), pl.apply(product, plan)(x)
        assert (outputs[1] - whole).square().mean() < (plain - whole).square().mean()


class Odd(nn.Module):
    """Its middle layer is a contraction that no tap knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 8))
        self.second = nn.Parameter(torch.randn(8, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,io->bo", x, self.first).tanh()
        return self.head(torch.einsum("bi,io->bo", hidden, self.second).tanh())


@pytest.mark.parametrize("name", ["c_obs", "kron_obd", "kron_obs", "obs", "eigendamage"])
def test_units_of_layers_that_nobody_knows_have_a_score_and_a_warning(name):
    torch.manual_seed(0)
    model, batches = Odd(), [(torch.randn(40, 6), torch.randint(3, (40,)))]
    graph = pl.trace(model, batches[0][0])
    with pytest.warns(UserWarning, match=r"`first` \(`first`, `second`\).*scored by ½ Σ w² E\[g²\]"):
        scores = pl.criteria.get(name)(graph, batches)
    assert all(scores[group].isfinite().all() for group in graph.groups)
    torch.testing.assert_close(scores["first"], pl.criteria.OBD()(graph, batches)["first"])
    with pytest.warns(UserWarning, match="the largest known score"):
        last = pl.criteria.get(name)(graph, iter(batches))
    assert last["first"].isfinite().all() and (last["first"] == max(last[g].max() for g in graph.groups)).all()


class Tied(nn.Module):
    """An autoencoder whose decoder has the encoder's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 32), nn.Linear(32, 12)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.b(self.a(x).relu())
        return F.linear(F.linear(hidden, self.b.weight.t()).relu(), self.a.weight.t())


class Shared(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(30, 16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.down(self.up(self.embedding(x)).relu()), self.embedding.weight)


def test_tied_weights_are_named_where_compensation_leaves_them():
    torch.manual_seed(0)
    for model, x, names in (
        (Tied(), torch.randn(64, 20), ["a.weight", "b.weight"]),
        (Shared(), torch.randint(30, (64, 3)), ["embedding.weight"]),
    ):
        plan = pl.plan(pl.criteria.Magnitude()(pl.trace(model, x)), ratio=0.5, scope="layer")
        with pytest.warns(UserWarning, match="Cut without compensation: ") as caught:
            pl.apply(model, plan, compensate=[(x, x)])
        text = " ".join(str(one.message) for one in caught)
        assert all(f"`{name}` (used in two ways)" in text for name in names)
        graph = pl.trace(model, x)
        with pytest.warns(UserWarning, match="used in two ways"):
            pl.apply(model, plan, compensate=collect(graph, [(x, x)], {"inputs"}))


def test_a_weight_used_in_both_directions_has_the_gradients_of_both():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(F.linear(x, self.weight)) @ self.weight

    torch.manual_seed(0)
    model, x, y = Both().double(), torch.randn(6, 3).double(), torch.arange(6) % 3
    wanted = sum(
        torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), model.weight)[0] ** 2 for n in range(6)
    )
    statistics = collect(model, [(x, y)], {"moments", "kronecker", "ekfac"})
    torch.testing.assert_close(statistics.moments["weight"], wanted / 6)
    sides = {name: found.view.out_dim for name, found in statistics.kronecker.items()}
    assert sides == {"weight": 0, "weight.T": 1}

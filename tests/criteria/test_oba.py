"""OBA: θ ⊙ (Hθ) against the dense Hessian, its parts, Euler's identity and the pairs of layers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab import zoo
from prunelab.curvature import exact, mean_gradient
from prunelab.curvature.second import higher, hvp
from prunelab.curvature.second.hvp import PARTS
from prunelab.curvature.statistics.collect import collect


@pytest.fixture
def cnn() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()),
        *(nn.Conv2d(4, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(12, 3)),
    )
    return model.double().eval()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 2, 3, 3, generator=generator).double(), torch.arange(n) % 3) for n in (5, 2)]


def matrix(part: str, model: nn.Module, batches: list) -> Tensor:
    whole, bent = exact.hessian(model, batches), exact.ggn(model, batches)
    return {"exact": whole, "gauss_newton": bent, "functional": whole - bent}[part]


def theta(model: nn.Module) -> Tensor:
    return exact.flat(list(model.parameters())).detach()


def flat(scores: dict[str, Tensor]) -> Tensor:
    return exact.flat(list(scores.values()))


class Homogeneous(nn.Module):
    """L layers without biases or norms, ReLU and max pooling between them, with or without a convolution first."""

    def __init__(self, widths: list[int], convolution: bool) -> None:
        super().__init__()
        first = [nn.Conv2d(1, 2, 2, bias=False), nn.ReLU(), nn.MaxPool2d(2)] if convolution else []
        layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]
        body = [layer for linear in layers for layer in (nn.ReLU(), linear)][1:]
        self.layers, self.depth = nn.Sequential(*first, nn.Flatten(), *body), len(layers) + convolution

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("part", PARTS)
def test_a_weight_is_scored_by_its_row_of_the_quadratic_form(cnn, batches, part):
    found = pl.criteria.OBA(part=part, signed=True).elementwise(cnn, batches)
    torch.testing.assert_close(flat(found), theta(cnn) * (matrix(part, cnn, batches) @ theta(cnn)))


def test_the_first_order_term_makes_it_a_share_of_the_quadratic_model(cnn, batches):
    """Σ scores = gᵀδ + ½ δᵀHδ for δ = −θ: the sign of the Taylor term is that of δ."""
    found = pl.criteria.OBA(first_order=True, signed=True).elementwise(cnn, batches)
    g, H, delta = flat(mean_gradient(cnn, batches)), exact.hessian(cnn, batches), -theta(cnn)
    torch.testing.assert_close(flat(found), g * delta + delta * (H @ delta) / 2)
    torch.testing.assert_close(flat(found).sum(), g @ delta + delta @ H @ delta / 2)


@pytest.mark.parametrize("signed", [False, True])
def test_a_unit_is_scored_by_the_sums_over_its_slices_and_in_absolute_values_unless_signed(cnn, batches, signed):
    weights = pl.criteria.OBA(signed=True).elementwise(cnn, batches)
    slices = [weights["0.weight"].sum((1, 2, 3)), weights["3.weight"].sum((0, 2, 3))]
    slices += [weights[name] for name in ("0.bias", "1.weight", "1.bias")]
    assert min(float(one.min()) for one in slices) < 0 < max(float(one.max()) for one in slices)
    wanted = sum(one if signed else one.abs() for one in slices)
    found = pl.criteria.get("oba", signed=signed)(pl.trace(cnn, batches[0][0]), batches)["0"]
    torch.testing.assert_close(found, wanted.float())


def test_as_published_the_score_of_a_weight_is_an_absolute_value(cnn, batches):
    signed = pl.criteria.get("oba", signed=True).elementwise(cnn, batches)
    assert min(float(value.min()) for value in signed.values()) < 0
    for name, value in pl.criteria.get("oba").elementwise(cnn, batches).items():
        torch.testing.assert_close(value, signed[name].abs())


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_without_biases_and_norms_the_functional_part_is_the_taylor_term_again(depth, convolution):
    """Euler: f is homogeneous of degree 1 in each of the L layers, so θ ⊙ (H_functional θ) = (L−1) θ ⊙ g, weight by
    weight and with a plus sign.  (The removal's first-order term, gᵀδ with δ = −θ, has a minus.)
    """
    torch.manual_seed(0)
    widths = [18 if convolution else 5, 7, 6, 4][:depth] + [3]
    model = Homogeneous(widths, convolution).double()
    x = torch.randn(6, 1, 7, 7) if convolution else torch.randn(6, 5)
    batches = [(x.double(), torch.arange(6) % 3)]
    functional, whole, bent = (
        pl.criteria.OBA(part=p, signed=True).elementwise(model, batches) for p in PARTS[1::-1] + PARTS[2:]
    )
    gradient = mean_gradient(model, batches)
    for name, value in model.named_parameters():
        taylor = value.detach() * gradient[name]
        assert taylor.abs().max() > 1e-4
        torch.testing.assert_close(functional[name], (model.depth - 1) * taylor)
        torch.testing.assert_close(whole[name], bent[name] + functional[name])


def test_with_biases_the_identity_fails_after_the_first_of_them(batches):
    """A path that starts at the second bias holds two parameters, one from the input three: degrees differ."""
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(18, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
    model = nn.Sequential(*layers).double()
    found, gradient = (
        pl.criteria.OBA(part="functional", signed=True).elementwise(model, batches),
        mean_gradient(model, batches),
    )
    gap = {
        name: (found[name] - 2 * value.detach() * gradient[name]).abs().max()
        for name, value in model.named_parameters()
    }
    assert gap["1.weight"] < 1e-12 < 1e-3 < gap["5.weight"]
    assert found["5.bias"].abs().max() == 0 < 1e-3 < gap["5.bias"]


@pytest.mark.parametrize("part", PARTS)
def test_pairs_of_layers_are_blocks_of_the_quadratic_form(cnn, batches, part):
    names, found = pl.criteria.layer_pairs(cnn, batches, part)
    assert names == ("0.weight", "3.weight", "6.weight")
    sizes = [value.numel() for value in cnn.parameters()]
    ends = torch.tensor(sizes).cumsum(0)
    places = {name: slice(end - n, end) for (name, _), n, end in zip(cnn.named_parameters(), sizes, ends, strict=True)}
    whole, w = matrix(part, cnn, batches), theta(cnn)
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            block = whole[places[one], places[other]]
            torch.testing.assert_close(found[i, j], w[places[one]] @ block @ w[places[other]])


@pytest.mark.parametrize("part", PARTS)
def test_the_rows_of_the_pairs_sum_to_the_scores_of_the_layers(cnn, batches, part):
    everything = [name for name, _ in cnn.named_parameters()]
    names, pairs = pl.criteria.layer_pairs(pl.trace(cnn, batches[0][0]), batches, part, names=everything)
    scores = pl.criteria.OBA(part=part, signed=True).elementwise(cnn, batches)
    torch.testing.assert_close(pairs.sum(1), torch.stack([scores[name].sum() for name in names]))
    torch.testing.assert_close(pairs, pairs.T)


def test_layers_that_are_added_have_no_functional_pair():
    """Two branches that are added: no path runs through both, so only the loss couples them."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.top = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(self.left(x).tanh() + self.right(x).tanh())

    torch.manual_seed(0)
    model = Added().double()
    batches = [(torch.randn(8, 4).double(), torch.arange(8) % 3)]
    names, functional = pl.criteria.layer_pairs(model, batches, "functional")
    _, bent = pl.criteria.layer_pairs(model, batches, "gauss_newton")
    left, right, top = (names.index(f"{name}.weight") for name in ("left", "right", "top"))
    assert functional[left, right].abs() < 1e-12 < 1e-4 < functional[left, top].abs()
    assert bent[left, right].abs() > 1e-5


def test_layers_that_are_multiplied_have_a_functional_pair():
    """The paper's parallel connectivity: each is on a path beside the other's, and both are factors of the product."""

    class Multiplied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.top = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(self.left(x) * self.right(x))

    torch.manual_seed(0)
    model = Multiplied().double()
    batches = [(torch.randn(8, 4).double(), torch.arange(8) % 3)]
    names, functional = pl.criteria.layer_pairs(model, batches, "functional")
    left, right = (names.index(f"{name}.weight") for name in ("left", "right"))
    assert functional[left, right].abs() > 1e-4
    assert functional[left, left].abs() < 1e-12


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_an_order_is_the_derivative_with_all_places_but_one_filled_by_the_weights(order):
    """Against the whole tensor of k-th derivatives, by k nested Jacobians."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    x, y = torch.randn(5, 2).double(), torch.arange(5) % 2
    start, shapes = exact.flat(list(model.parameters())).detach(), [value.shape for value in model.parameters()]

    def value(flat_weights: Tensor) -> Tensor:
        parts = flat_weights.split([shape.numel() for shape in shapes])
        weights = {n: p.view(s) for (n, _), p, s in zip(model.named_parameters(), parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, weights, x), y)

    derivative = value
    for _ in range(order):
        derivative = torch.func.jacrev(derivative)
    tensor = derivative(start)
    for _ in range(order - 1):
        tensor = tensor @ start
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    found = flat(pl.criteria.OBA(order=order, signed=True).elementwise(model, batches))
    torch.testing.assert_close(found, start * tensor)


def test_higher_orders_agree_with_the_second_and_the_first(cnn, batches):
    gradient = mean_gradient(cnn, batches)
    first = pl.criteria.OBA(order=1, signed=True).elementwise(cnn, batches)
    for name, value in cnn.named_parameters():
        torch.testing.assert_close(first[name], value.detach() * gradient[name])
    second = higher.self_derivative(cnn, batches, 2)
    for name, product in hvp.self_product(cnn, batches).items():
        torch.testing.assert_close(second[name], product)
    with pytest.raises(pl.OptionError, match="order=3"):
        pl.criteria.OBA(order=3, part="functional")
    with pytest.raises(pl.OptionError, match="`order`"):
        pl.criteria.OBA(order=0)


def test_statistics_lend_their_batches(cnn, batches):
    graph = pl.trace(cnn, batches[0][0])
    statistics = collect(graph, batches, {"grad"})
    torch.testing.assert_close(pl.criteria.OBA()(graph, statistics)["0"], pl.criteria.OBA()(graph, batches)["0"])
    assert torch.equal(*(pl.criteria.layer_pairs(cnn, given)[1] for given in (statistics, batches)))


def test_it_runs_on_a_transformer_and_a_residual_network():
    torch.manual_seed(0)
    vit = zoo.VisionTransformer(image_size=16, width=16, depth=1, heads=2, mlp_width=12)
    for model, size in ((vit, 16), (zoo.ResNet(8, width=4), 16)):
        batch = [(torch.randn(4, 3, size, size), torch.arange(4))]
        scores = pl.criteria.get("oba")(pl.trace(model, batch[0][0]), batch)
        assert len(scores) > 4 and all(bool(scores[group].isfinite().all()) for group in scores)


def test_bad_input_is_named(cnn, batches):
    with pytest.raises(pl.BudgetError, match="part='series'"):
        pl.criteria.OBA(part="series")
    with pytest.raises(pl.BudgetError, match="part='series'"):
        pl.criteria.layer_pairs(cnn, batches, "series")
    with pytest.raises(pl.PruneLabError, match="`4.weight` is not a parameter"):
        pl.criteria.layer_pairs(cnn, batches, names=["4.weight"])
    with pytest.raises(pl.BatchError, match="needs batches"):
        pl.criteria.OBA().elementwise(cnn, None)
    with pytest.raises(pl.BatchError, match="not finite in batch 1"):
        pl.criteria.OBA().elementwise(cnn, [batches[0], (batches[1][0] / 0, batches[1][1])])
    with pytest.raises(pl.BatchError, match="the plain mean"):
        pl.criteria.OBA(loss=lambda o, t: F.cross_entropy(o, t, reduction="sum")).elementwise(cnn, batches)

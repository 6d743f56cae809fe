"""Products with the Hessian and its parts: against the dense matrices, on layers of every kind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab.curvature import exact
from prunelab.curvature.second.hvp import PARTS, functional_product, ggn_product, hessian_product, product, self_product
from tests.cases import perturb


class Attention(nn.Module):
    """Fused attention in both dialects, layer norm, GELU, a tied weight and a parameter that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(3, 4))
        self.norm = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(F.gelu(self.out(x))).mean(1)


NETWORKS = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 2, 2, stride=2, bias=False),
            nn.GELU(),
            nn.Conv2d(2, 2, 3, padding="same", dilation=2),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8, 3),
        ),
        (2, 4, 4),
    ),
    "attention": (Attention, (3, 4)),
    "in place": (lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 3, bias=False)), (3,)),
}


def make(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = perturb(build()).double().eval()
    return model, [(torch.randn(n, *shape).double(), torch.arange(n) % 3) for n in (4, 3)]


def directions(model: nn.Module, number: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(number, *value.shape, generator=generator).double()
        for name, value in model.named_parameters()
    }


def matrix(part: str, model: nn.Module, batches: list, names: list[str] | None = None) -> Tensor:
    whole, gauss_newton = exact.hessian(model, batches, names=names), exact.ggn(model, batches, names=names)
    return {"exact": whole, "gauss_newton": gauss_newton, "functional": whole - gauss_newton}[part]


def flat(vectors: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten(1) for value in vectors.values()], 1)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_product_is_that_with_the_dense_matrix(name, part):
    model, batches = make(name)
    vectors = directions(model)
    found = product(model, batches, vectors, part=part)
    torch.testing.assert_close(flat(found), flat(vectors) @ matrix(part, model, batches))


@pytest.mark.parametrize("name", NETWORKS)
def test_vectorised_directions_are_the_same(name, monkeypatch):
    model, batches = make(name)
    vectors = directions(model, 5)
    one = product(model, batches, vectors)
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: calls.append(0) or grad(*args, **options))
    several = product(model, batches, vectors, chunk=3)
    assert len(calls) == 4 * (2 + 2)  # halves of two batches: two orders, two chunks
    for key in one:
        torch.testing.assert_close(several[key], one[key])


def test_one_direction_has_no_leading_dimension():
    model, batches = make("in place")
    vectors = directions(model)
    found = ggn_product(model, batches, {key: value[1] for key, value in vectors.items()})
    for key, value in ggn_product(model, batches, vectors).items():
        torch.testing.assert_close(found[key], value[1])


def test_a_subset_of_the_parameters_has_its_own_block():
    model, batches = make("attention")
    names = ["norm.weight", "out.weight"]
    vectors = {name: directions(model)[name] for name in names}
    for part in PARTS:
        found = product(model, batches, vectors, part=part)
        torch.testing.assert_close(flat(found), flat(vectors) @ matrix(part, model, batches, names))


def test_the_parts_add_up_and_gauss_newton_is_not_negative():
    model, batches = make("convolutions")
    vectors = directions(model)
    whole, bent, rest = (way(model, batches, vectors) for way in (hessian_product, ggn_product, functional_product))
    for key in whole:
        torch.testing.assert_close(bent[key] + rest[key], whole[key])
    assert ((flat(vectors) * flat(bent)).sum(1) > 0).all()


@pytest.mark.parametrize("part", PARTS)
def test_neither_batch_size_nor_order_matters(part):
    model, batches = make("convolutions")
    inputs, targets = (torch.cat(values) for values in zip(*batches, strict=True))
    vectors = directions(model, 1)
    wanted = product(model, batches, vectors, part=part)
    order = torch.tensor([6, 0, 3, 1, 5, 2, 4])
    for split in ([(inputs, targets)], [(inputs[n : n + 1], targets[n : n + 1]) for n in order]):
        for key, value in product(model, split, vectors, part=part).items():
            torch.testing.assert_close(value, wanted[key])
    for key, value in self_product(model, [(inputs[order], targets[order])], part=part).items():
        torch.testing.assert_close(value, self_product(model, batches, part=part)[key])


def test_other_losses_and_several_outputs():
    """A loss of two outputs that multiplies them: its Hessian in the outputs couples both."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.left, self.right = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = self.body(x).tanh()
            return {"left": self.left(hidden), "right": self.right(hidden)}

    def loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return ((outputs["left"] * outputs["right"]).sum(1) - targets).square().mean()

    torch.manual_seed(0)
    model = Two().double()
    batches, vectors = [(torch.randn(5, 2).double(), torch.randn(5).double())], directions(model)
    whole = exact.hessian(model, batches, loss)
    torch.testing.assert_close(flat(hessian_product(model, batches, vectors, loss)), flat(vectors) @ whole)
    parts = [flat(way(model, batches, vectors, loss)) for way in (ggn_product, functional_product)]
    torch.testing.assert_close(sum(parts), flat(vectors) @ whole)


@pytest.mark.parametrize("way", [lambda m, b: product(m, b, directions(m)), self_product])
def test_the_model_stays_as_it_was_also_after_an_error(way):
    model, batches = make("convolutions")
    model.train()
    model[0].weight.requires_grad_(False)
    model[0].bias.grad = torch.ones_like(model[0].bias)
    before = copy.deepcopy(model.state_dict())
    way(model, batches)
    with pytest.raises(pl.BatchError, match="not finite in batch 1"):
        way(model, [batches[0], (batches[1][0] * float("inf"), batches[1][1])])
    assert model.training and model[1].training and not model[0].weight.requires_grad and model[0].bias.requires_grad
    assert model[0].weight.grad is None and (model[0].bias.grad == 1).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("way", [lambda m, b, loss: hessian_product(m, b, directions(m), loss), self_product])
@pytest.mark.parametrize(
    ("change", "loss", "message"),
    [
        (lambda x, y: None, F.cross_entropy, "needs batches"),
        (lambda x, y: [], F.cross_entropy, "empty loader"),
        (lambda x, y: [x], F.cross_entropy, "not a pair"),
        (lambda x, y: [(x[:, :1], y)], F.cross_entropy, "cannot take inputs"),
        (lambda x, y: [(x, y + 9)], F.cross_entropy, "The loss cannot take.*out of bounds"),
        (lambda x, y: [(x, y)], lambda o, t: F.cross_entropy(o, t, reduction="sum"), "the plain mean"),
    ],
)
def test_bad_batches_and_losses_are_named(way, change, loss, message):
    model, batches = make("in place")
    with pytest.raises(pl.BatchError, match=message):
        way(model, change(*batches[0]), loss)


def test_bad_directions_are_named():
    model, batches = make("in place")
    for vectors, message in (
        ({"3.weight": torch.ones(1)}, "`3.weight` is not a parameter of Sequential"),
        ({"0.bias": torch.ones(4)}, "for `0.bias` has shape \\[4\\], the parameter \\[5\\]"),
        ({"0.bias": torch.ones(2, 5), "2.weight": torch.ones(3, 3, 5)}, "same number"),
        ({}, "at least one"),
    ):
        with pytest.raises(pl.PruneLabError, match=message):
            hessian_product(model, batches, vectors)
    with pytest.raises(pl.BudgetError, match="part='full' is not one of exact"):
        product(model, batches, directions(model), part="full")
    with pytest.raises(pl.BudgetError, match="chunk=0"):
        product(model, batches, directions(model), chunk=0)

"""Dual numbers: products with one direction, against the dense matrices and the way that differentiates twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from prunelab import zoo
from prunelab.curvature import exact
from prunelab.curvature.second import hvp
from prunelab.curvature.second.dual_mode import CONVOLUTIONS, SHORTER, WRONG
from prunelab.curvature.second.hvp import PARTS, hessian_product, product, self_product
from tests.cases import perturb


class Tokens(nn.Module):
    """Attention of every kind that has a way of its own, layer norms with and without scale and shift."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bare = nn.LayerNorm(4), nn.LayerNorm((3, 4), elementwise_affine=False)
        self.scaled = nn.LayerNorm(4, bias=False)
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True)
        self.bias = nn.Parameter(torch.randn(3, 3))
        self.qkv, self.keys, self.out = nn.Linear(4, 12), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.scaled_dot_product_attention(x, self.keys(self.scaled(x[:, :2])), x[:, :2].detach(), scale=0.7)
        x = x + F.scaled_dot_product_attention(x, x, x, self.bias)
        x = x + F.scaled_dot_product_attention(x, x, x, torch.eye(3, dtype=torch.bool) | (x[:, :, :1] > 0).mT)
        x = x + self.heads(x, x, x, need_weights=False, attn_mask=torch.ones(3, 3, dtype=torch.bool).triu(1))[0]
        x = x + self.heads(x, x, x, need_weights=False, attn_mask=torch.eye(3, dtype=x.dtype))[0]
        return self.out(F.gelu(self.bare(x))).mean(1)


class Steps(nn.Module):
    """Ends of the map: plain inputs to norms, layers that share a weight, a weight computed from another, no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.start, self.body = nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.rand(3))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) + self.start(x)
        with torch.no_grad():
            size = self.body.weight.norm() + x.abs().mean(1, keepdim=True)
        x = F.silu(self.body(self.body(x) / size), inplace=True)
        x = x + F.softmax(x, 1)
        return F.linear(x, self.out.weight * self.gain[:, None], self.out.bias)


NETWORKS = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 2, 2, stride=2, bias=False),
            nn.BatchNorm2d(2, affine=False),
            nn.GELU(),
            nn.Conv2d(2, 2, 3, padding="same", dilation=2),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
            nn.GELU("tanh"),
            nn.Hardswish(inplace=True),
            nn.Flatten(),
            nn.ELU(inplace=True),
            nn.Linear(8, 3),
        ),
        (2, 4, 4),
    ),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)), (2, 4)),
    "tokens": (Tokens, (3, 4)),
    "steps": (Steps, (4,)),
}


def make(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = perturb(build()).double().eval()
    return model, [(torch.randn(n, *shape).double(), torch.arange(n) % 3) for n in (4, 3)]


def direction(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {n: torch.randn(p.shape, generator=generator).double() for n, p in model.named_parameters()}


def theta(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def flat(vectors: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in vectors.values()])


def matrix(part: str, model: nn.Module, batches: list, names: list[str] | None = None) -> Tensor:
    whole, bent = exact.hessian(model, batches, names=names), exact.ggn(model, batches, names=names)
    return {"exact": whole, "gauss_newton": bent, "functional": whole - bent}[part]


@pytest.fixture
def only(monkeypatch):
    """Let products be taken on dual numbers only, or only in the other way."""

    def choose(way: str) -> None:
        def refuse(*args: object, **options: object) -> None:
            raise AssertionError(f"This product was not taken in the {way} way.")

        if way == "dual":
            monkeypatch.setattr(hvp, "_add", refuse)
        else:
            monkeypatch.setattr(hvp, "along", lambda *args, **options: None)

    return choose


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_one_direction_is_a_product_with_the_dense_matrix(name, part, only):
    model, batches = make(name)
    only("dual")
    vector, wanted = direction(model), matrix(part, model, batches)
    torch.testing.assert_close(flat(product(model, batches, vector, part=part)), wanted @ flat(vector))
    torch.testing.assert_close(flat(self_product(model, batches, part=part)), wanted @ flat(theta(model)))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_subset_of_the_parameters_may_move(name, only):
    """Weights alone, biases alone, and both, each along itself or elsewhere."""
    model, batches = make(name)
    only("dual")
    everything, whole = [key for key, _ in model.named_parameters()], exact.hessian(model, batches)
    place = dict(zip(everything, whole.split([p.numel() for p in model.parameters()]), strict=True))
    sizes = torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(model.parameters())])
    ways = {"weight": lambda n: n.endswith("weight"), "bias": lambda n: n.endswith("bias")}
    ways |= {"even": lambda n: everything.index(n) % 2 == 0, "odd": lambda n: everything.index(n) % 2}
    for chosen in ([n for n in everything if way(n)] for way in ways.values()):
        columns = torch.isin(sizes, torch.tensor([everything.index(n) for n in chosen]))
        for vectors in (direction(model), theta(model)):
            vectors = {n: vectors[n] for n in chosen}
            for n, found in hessian_product(model, batches, vectors).items():
                torch.testing.assert_close(found.flatten(), place[n][:, columns] @ flat(vectors))


@pytest.mark.parametrize("name", ["resnet20", "vit_small"])
def test_trained_networks_go_this_way_and_agree_with_the_other(name, only, monkeypatch):
    model, data = zoo.load(name).double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    batches = [(data, torch.arange(3))]
    with monkeypatch.context() as patch:
        patch.setattr(hvp, "_add", None)
        found = self_product(model, batches)
    only("other")
    for key, value in self_product(model, batches).items():
        torch.testing.assert_close(found[key], value)


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.function = nn.Linear(3, 4), nn.Linear(4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


class Doubled(Function):
    """Knows its gradient and that of its gradient, and nothing of forward derivatives."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return 2 * g


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return torch.tanh(x) * x


def standardized(x: Tensor) -> Tensor:
    return F.instance_norm(x[:, None])[:, 0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("lose", [Doubled.apply, scripted, lambda x: x.add_(x.softmax(-1)), standardized])
def test_where_a_forward_derivative_is_missing_the_product_is_taken_in_the_other_way(lose):
    """A function of TorchScript drops it without a word, after having been called a few times; the next one overwrites
    it, and the last has one whose own derivative is wrong.
    """
    model = Between(lose).double()
    batches = [(torch.randn(6, 3).double(), torch.arange(6) % 3)]
    vector, wanted = direction(model), exact.hessian(model, batches)
    for _ in range(5):
        torch.testing.assert_close(flat(hessian_product(model, batches, vector)), wanted @ flat(vector))


def test_a_loss_that_knows_the_parameters_is_differentiated_whole():
    """Weight decay as part of the loss: twice its strength is added to the diagonal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batches, vector = [(torch.randn(5, 3).double(), torch.arange(5) % 3)], direction(model)

    def decayed(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + 0.1 * sum(p.square().sum() for p in model.parameters())

    plain, found = hessian_product(model, batches, vector), hessian_product(model, batches, vector, decayed)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value + 0.2 * vector[name])


def padded(x: Tensor) -> Tensor:
    """Normalise zeros too, as Swin V2 does with its padding: what is zero for any weights adds nothing."""
    return F.normalize(torch.stack([x, 0 * x], 1), dim=-1).sum(1)


SAME = {
    "hard sigmoid, whose second derivative PyTorch lacks": (F.hardsigmoid, lambda x: F.relu6(x + 3) / 6),
    "vectors of zeros, normalized": (padded, lambda x: x / x.square().sum(-1, keepdim=True).sqrt()),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("way", ["dual", "other"])
def test_two_ways_to_write_a_function_have_one_product(way, name, only):
    torch.manual_seed(0)
    batches = [(torch.randn(6, 3).double(), torch.arange(6) % 3)]
    only(way)
    one, other = (self_product(Between(function).double(), batches) for function in SAME[name])
    assert all((value - other[key]).abs().max() < 1e-14 < value.abs().max() for key, value in one.items())


def test_nothing_is_kept_of_tokens_squared():
    """What the backward pass waits with is of the size of queries, keys and values."""
    from prunelab.curvature.second.dual_attention import Attention

    six = [torch.randn(2, 3, 50, 4, requires_grad=True) for _ in range(6)]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: kept.append(value.numel()) or value, lambda value: value
    ):
        Attention.apply(0.5, None, *six)
    assert kept and max(kept) <= six[0].numel()


def test_every_shorter_way_is_tested_here():
    """Each operator of the table is called by one of the networks above, so that a new one asks for a test."""
    seen = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.add(func)
            return func(*args, **(kwargs or {}))

    for name in NETWORKS:
        model, batches = make(name)
        with Watch():
            model(batches[0][0])
    same = (
        {F.relu, torch.relu, Tensor.relu},
        {*CONVOLUTIONS},
        {F.softmax, torch.softmax, Tensor.softmax},
    )
    assert not set(SHORTER) - seen - set(WRONG) - {F.hardsigmoid, F.normalize}.union(*same)
    assert all(seen & group for group in same)

"""Moments: E[g_n²] for every parameter, against the gradients of one sample after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn
from torch.autograd.functional import hessian as hessian_of

from prunelab.curvature.fisher import sampled_labels
from prunelab.curvature.statistics import squared_products
from prunelab.curvature.statistics.collect import collect
from prunelab.curvature.statistics.one_pass import evaluating
from prunelab.curvature.watching.samples import Layout, routes
from prunelab.errors import BatchError
from tests.cases import OWN, ZOO, Case


def one_by_one(model: nn.Module, inputs: Tensor, columns: Callable[[Tensor, int], list[Tensor]]) -> dict[str, Tensor]:
    """Return E[Σ_v (∂(v·z_n)/∂w)²], one backward pass per sample and column."""
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for n in range(len(inputs)):
        output = model(inputs[n : n + 1])
        for column in columns(output, n):
            found = torch.autograd.grad(output, list(parameters.values()), column, retain_graph=True, allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    total[name] += gradient**2 / len(inputs)
    return total


def slopes(targets: Tensor, loss: Callable = F.cross_entropy) -> Callable[[Tensor, int], list[Tensor]]:
    """Return the columns of the empirical Fisher."""

    def column(output: Tensor, n: int) -> list[Tensor]:
        leaf = output.detach().requires_grad_()
        return list(torch.autograd.grad(loss(leaf, targets[n : n + 1]), leaf))

    return column


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    scale = max(float(value.abs().max()) for value in wanted.values())
    assert found.keys() == wanted.keys() and scale > 0
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-14 * scale, msg=name)


class Several(nn.Module):
    """Convolutions with every option, in one, two and three dimensions, grouped, depthwise and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, stride=2, padding=(2, 1), dilation=(1, 2))
        self.grouped = nn.Conv2d(6, 9, (2, 3), padding=1, groups=3, bias=False)
        self.depthwise = nn.Conv2d(9, 18, 3, stride=(1, 2), padding=1, groups=9)
        self.up = nn.ConvTranspose2d(18, 4, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2)
        self.norm = nn.InstanceNorm2d(4, affine=True)
        self.line = nn.Conv1d(4, 5, 3, padding=2, dilation=2)
        self.back = nn.ConvTranspose1d(5, 5, 2, stride=3)
        self.volume = nn.Conv3d(1, 3, (1, 2, 2), stride=(1, 2, 1), padding=(0, 1, 0))
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.grouped(F.relu(self.first(x), inplace=True)))
        x = torch.tanh(self.norm(self.up(F.silu(self.depthwise(x)))))
        x = torch.tanh(self.back(torch.tanh(self.line(x.flatten(2)))))
        x = torch.tanh(self.volume(x[:, None, None]))
        return self.head(x.mean((2, 3, 4)))


class Tokens(nn.Module):
    """A class token, position embedding, layer scale, temperature, and an attention layer that puts tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(7, 8))
        self.scale, self.temperature = nn.Parameter(torch.rand(8)), nn.Parameter(torch.tensor(1.5))
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.last = nn.LayerNorm(8), nn.RMSNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        first = self.norm(x).transpose(0, 1)
        x = x + self.scale * self.attention(first, first, first)[0].transpose(0, 1)
        x = x + self.cross(self.norm(x), torch.sin(x), torch.cos(x))[0]
        return self.head(self.last(x)[:, 0]) / self.temperature


class Shared(nn.Module):
    """One weight used several times: by calls, by rows of it, transposed, and through its own second name."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6, padding_idx=2)
        self.twice, self.rows = nn.Linear(6, 6), nn.Parameter(torch.randn(8, 6))
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.twice.weight
        self.both = nn.Parameter(torch.randn(6, 6))
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(self.words(tokens)))))
        x = torch.cat([F.linear(x, self.rows[:5]), F.linear(x, self.rows[3:4])], -1)
        x = self.tied(torch.tanh(x).mean(1))
        return self.head(torch.tanh(F.linear(x, self.both) + x @ self.both))


class Otherwise(nn.Module):
    """Weights that no layer call holds by sample: recurrent, transposed, made from a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(4, 5, batch_first=True)
        self.table, self.places = nn.Linear(2, 5), nn.Parameter(torch.randn(3, 5))
        self.slope = nn.PReLU(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.recurrent(x)[0] + self.table(torch.ones(3, 2).to(x)) + self.places[[2, 0, 1]]
        x = self.slope(x.transpose(1, 2)).mean(2)
        return self.head(x) @ self.head.weight @ self.head.weight.t()


def swin() -> nn.Module:
    return tv.SwinTransformer([2, 2], 12, [1, 1], [2, 2], [2, 2], num_classes=4, stochastic_depth_prob=0.0)


MORE = [
    Case("several", Several, lambda: torch.randn(4, 2, 7, 7)),
    Case("tokens", Tokens, lambda: torch.randn(4, 6, 8)),
    Case("shared", Shared, lambda: torch.randint(0, 9, (4, 5))),
    Case("swin", swin, lambda: torch.randn(4, 3, 16, 16)),
]
QUICK = [case for case in ZOO if case.name in ("resnet20", "vit_small")] + OWN + MORE


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_moments_are_those_of_one_sample_after_the_other(case):
    model, inputs = case.make()
    output = model(inputs)
    targets = torch.randint(0, output.shape[1], (len(inputs), *output.shape[2:]))
    batches = [(inputs[:1], targets[:1]), (inputs[1:], targets[1:])]
    found = collect(model, batches, {"moments"})
    agree(found.moments, one_by_one(model, inputs, slopes(targets)))


def test_weights_that_no_call_holds_are_found_by_vmap_or_by_a_loop():
    torch.manual_seed(0)
    model, inputs, targets = Otherwise().double(), torch.randn(5, 3, 4).double(), torch.randint(0, 3, (5,))
    with evaluating(model):
        rest = routes(model, inputs).rest
    assert rest >= {"recurrent.weight_ih_l0", "table.weight", "table.bias", "places", "slope.weight", "head.weight"}
    with pytest.warns(UserWarning, match=r"torch.func.vmap cannot take Otherwise.*recurrent\.weight_hh_l0"):
        found = collect(model, [(inputs, targets)], {"moments"}).moments
    agree(found, one_by_one(model, inputs, slopes(targets)))


@pytest.mark.parametrize(
    ("case", "rest"),
    [
        (ZOO[0], set()),
        (ZOO[3], set()),
        (MORE[1], set()),
        (MORE[2], set()),
        (MORE[3], {f"features.{n}.0.attn.relative_position_bias_table" for n in (1, 3)}),
    ],
    ids=["resnet20", "vit_small", "tokens", "shared", "swin"],
)
def test_only_what_no_call_holds_goes_through_vmap(case, rest):
    model, inputs = case.make()
    with evaluating(model):
        assert routes(model, inputs).rest == rest


def test_tokens_and_windows_are_told_from_samples():
    model, inputs = MORE[1].make()
    with evaluating(model):
        found = routes(model, inputs)
    by_call = dict(zip((weight for weight, *_ in found.calls), found.layouts, strict=True))
    assert by_call["attention.in_proj_weight"] == Layout(1, 1, 1)  # [tokens, B, …]
    assert by_call["attention.out_proj.weight"] == Layout(0, 7, 1)  # [tokens · B, …]
    assert by_call["head.weight"] == Layout(0, 1, 1)
    model, inputs = MORE[3].make()
    with evaluating(model):
        found = routes(model, inputs)
    by_call = dict(zip((weight for weight, *_ in found.calls), found.layouts, strict=True))
    assert by_call["features.1.0.attn.qkv.weight"] == Layout(0, 1, 16)  # [B · windows, …]


def test_layers_before_a_head_of_zeros_are_seen_too():
    """Fresh Transformers start with a head of zeros: no gradient passes it, and tokens could be samples."""
    model, inputs = MORE[1].make()
    with evaluating(model):
        wanted = routes(model, inputs)
        model.head.weight.data.zero_()
        assert routes(model, inputs) == wanted


def test_the_layout_is_inverted_by_hand():
    rows = torch.arange(24).view(12, 2)
    inner, outer = Layout(0, 4, 1).by_sample(rows), Layout(0, 1, 4).by_sample(rows)
    assert torch.equal(inner[1], rows[1::3]) and torch.equal(outer[1], rows[4:8])
    middle = Layout(0, 2, 2).by_sample(rows)
    assert torch.equal(middle[1], torch.cat([rows[2:4], rows[8:10]]))
    assert Layout(0, 2, 2).samples(rows) == 3 and Layout(0, 5, 1).samples(rows) == 0


@pytest.mark.parametrize("case", [OWN[0], MORE[1], MORE[0]], ids=["grouped", "tokens", "several"])
def test_the_ggn_is_exact(case):
    """E[Jᵀ H J]'s diagonal: per sample Σ_ab J_a J_b H_ab, with H from autograd and no root of it."""
    model, inputs = case.make()
    targets = torch.zeros(len(inputs), dtype=torch.int64)
    found = collect(model, [(inputs, targets)], {"moments"}, fisher="ggn").moments
    parameters = dict(model.named_parameters())
    wanted = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for n in range(len(inputs)):
        output = model(inputs[n : n + 1])[0]
        hessian = hessian_of(lambda z: F.cross_entropy(z[None], torch.tensor([0])), output.detach())
        rows = [torch.autograd.grad(z, list(parameters.values()), retain_graph=True, allow_unused=True) for z in output]
        for name, jacobian in zip(parameters, zip(*rows, strict=True), strict=True):
            if jacobian[0] is not None:
                wanted[name] += torch.einsum(
                    "a...,ab,b...->...", *(torch.stack(jacobian), hessian, torch.stack(jacobian))
                )
    agree(found, {name: value / len(inputs) for name, value in wanted.items()})


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (F.mse_loss, torch.randn(4, 3, 2).double()),
        (nn.CrossEntropyLoss(label_smoothing=0.1), torch.tensor([[0, 1], [2, 2], [1, 0], [0, 0]])),
        (lambda z, y: F.smooth_l1_loss(z, y, beta=0.3), torch.randn(4, 3, 2).double()),
        (lambda z, y: F.binary_cross_entropy_with_logits(z[..., 0], y), torch.rand(4, 3).double()),
    ],
    ids=["mse", "smoothed", "huber", "binary"],
)
def test_the_ggn_takes_any_convex_loss_and_positions(loss, targets):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(4, 2, 2).double()
    targets = torch.rand_like(targets) if targets.is_floating_point() else targets
    net = nn.Sequential(model, Transposed())
    batches = [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])]
    found = collect(net, batches, {"moments"}, fisher="ggn", loss=loss).moments

    def columns(output: Tensor, n: int) -> list[Tensor]:
        flat = hessian_of(lambda z: loss(z.view(output.shape), targets[n : n + 1]), output.detach().flatten())
        values, vectors = torch.linalg.eigh(flat)
        return [(v * e.clamp_min(0).sqrt()).view(output.shape) for e, v in zip(values, vectors.T, strict=True)]

    agree(found, one_by_one(net, inputs, columns))


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_sampled_labels_depend_on_seed_and_sample_alone():
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(50, 4, 3, generator=generator), torch.zeros(50, 3, dtype=torch.int64)
    whole = sampled_labels(outputs, targets, 5, 100)
    parts = [sampled_labels(outputs[n : n + 7], targets[n : n + 7], 5, 100 + n) for n in range(0, 50, 7)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, sampled_labels(outputs, targets, 6, 100))
    assert not torch.equal(whole, sampled_labels(outputs, targets, 5, 101))


def test_sampled_labels_follow_the_softmax():
    outputs = torch.tensor([[0.0, 1.0, -2.0, 0.5]]).expand(4000, 4)
    labels = sampled_labels(outputs, torch.zeros(4000, dtype=torch.int64), 0, 0)
    shares = torch.bincount(labels, minlength=4) / 4000
    deviation = (shares * (1 - shares) / 4000).sqrt()
    assert ((shares - outputs[0].softmax(0)).abs() < 4 * deviation).all()


def test_the_sampled_fisher_comes_near_the_ggn_and_forgets_the_batches():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double(), torch.randn(400, 3).double()
    targets = torch.zeros(400, dtype=torch.int64)
    exact = collect(model, [(inputs, targets)], {"moments"}, fisher="ggn").moments
    sampled = collect(model, [(inputs, targets)], {"moments"}, fisher="mc", seed=3).moments
    pieces = [(inputs[n : n + 90], targets[n : n + 90]) for n in range(0, 400, 90)]
    agree(collect(model, pieces, {"moments"}, fisher="mc", seed=3).moments, sampled)
    for name, value in exact.items():
        assert float((sampled[name].sum() / value.sum()).log().abs()) < 0.15  # 400 samples: a few percent
    labels = sampled_labels(model(inputs), targets, 3, 0)
    agree(sampled, one_by_one(model, inputs, slopes(labels)))


def test_chunks_of_any_size_give_the_same(monkeypatch):
    model, inputs = MORE[0].make()
    targets = torch.arange(4) % 3
    whole = collect(model, [(inputs, targets)], {"moments"}).moments
    monkeypatch.setitem(squared_products.CHUNK, "cpu", 1)
    agree(collect(model, [(inputs, targets)], {"moments"}).moments, whole)


def test_layers_without_gradient_have_zero_moments():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Linear(2, 2)).double()
    model[0].bias.data.fill_(-100)  # no unit is ever on
    found = collect(model, [(torch.rand(3, 3).double(), torch.tensor([0, 1, 0]))], {"moments"}).moments
    assert not found["0.weight"].any() and not found["2.weight"].any() and found["2.bias"].all()


def test_half_precision_is_squared_in_single():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).bfloat16()
    inputs, targets = torch.randn(4, 3, 5, 5), torch.tensor([0, 1, 2, 0])
    found = collect(model, [(inputs.bfloat16(), targets)], {"moments"}).moments
    wanted = collect(model.float(), [(inputs.bfloat16().float(), targets)], {"moments"}).moments
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert float((value - wanted[name]).norm() / wanted[name].norm()) < 0.05  # eight bits


def test_what_cannot_have_per_sample_gradients_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    with pytest.raises(BatchError, match="`1` normalises over the batch"):
        collect(model, batches, {"moments"})
    assert collect(model, batches, {"grad"}).gradient["0.weight"].any()
    with pytest.raises(BatchError, match='mc" samples class labels'):
        collect(nn.Linear(3, 2), [(torch.randn(4, 3), torch.randn(4, 2))], {"moments"}, fisher="mc", loss=F.mse_loss)
    with pytest.raises(BatchError, match="not convex"):
        collect(nn.Linear(3, 1), batches, {"moments"}, fisher="ggn", loss=lambda z, y: -z.square().mean())
    with pytest.raises(BatchError, match="No output has one row for each of the 3 samples"):
        collect(Mean(), batches, {"moments"}, loss=lambda z, y: z.square().mean())


class Mean(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(0, keepdim=True)


@pytest.mark.parametrize("chunk", [1, 300, 2**19])
@pytest.mark.parametrize("positions", [1, 2, 4, 5, 9])
def test_squared_products_by_pairs_or_by_pieces(positions, chunk, monkeypatch):
    monkeypatch.setitem(squared_products.CHUNK, "cpu", chunk)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(7, 2, rows, positions, generator=generator).double() for rows in (11, 3))
    found = squared_products.squared_products(lambda n: left[n], lambda n: right[n], 7, (2, 11, 3, positions))
    torch.testing.assert_close(found, (left @ right.mT).square().sum(0))

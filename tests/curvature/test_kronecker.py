"""Kronecker factors: against patches cut by brute force, the exact Fisher where S ⊗ A is exact, and curvlinops."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.curvature.statistics.collect import collect
from prunelab.curvature.statistics.factor_sums import gram
from prunelab.curvature.statistics.kronecker import Factors, eigh
from prunelab.errors import BudgetError

CONVS = {
    "plain": nn.Conv2d(4, 6, 3, padding=1),
    "options": nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
    "strided 1x1": nn.Conv2d(4, 6, 1, stride=2, bias=False),
    "gaps": nn.Conv2d(4, 6, 2, stride=3),
    "grouped": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "few places": nn.Conv2d(4, 9, 2, stride=(2, 3)),
    "few places, grouped": nn.Conv2d(4, 16, 2, stride=(2, 3), groups=2),
    "line": nn.Conv1d(4, 5, 3, padding=2, dilation=2),
    "volume": nn.Conv3d(4, 5, (1, 2, 2), stride=(1, 2, 1), padding=(0, 1, 0)),
    "up": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "up grouped": nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, dilation=2),
    "back": nn.ConvTranspose1d(4, 5, 3),
}
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class One(nn.Module):
    """One convolution between two nonlinear functions, averaged over its positions."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x)).flatten(2).cumsum(2).sin().mean(2)


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    conv = CONVS[name].double()
    return One(conv), torch.randn(5, 4, *(7, 6, 5)[: conv.weight.dim() - 2]).double(), torch.arange(5) % 3


def windows(images: Tensor, conv: nn.Module) -> Tensor:
    """Return patches ``[N, C, K, P]`` by convolving every channel with every one-hot kernel."""
    kernel = conv.weight.shape[2:]
    hot = torch.eye(kernel.numel(), dtype=images.dtype).view(-1, 1, *kernel)
    cut = CONV[len(kernel)](images.flatten(0, 1)[:, None], hot, None, conv.stride, conv.padding, conv.dilation)
    return cut.flatten(2).unflatten(0, images.shape[:2])


def by_hand(model: One, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs ``[N, groups, in, K, P]`` and output gradients ``[N, groups, out, P]``; K is where patches are."""
    conv = model.conv
    output = conv(inputs)
    tail = torch.tanh(output).flatten(2).cumsum(2).sin().mean(2)
    losses = F.cross_entropy(tail, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(losses, output)
    if isinstance(conv, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        return inputs.flatten(2).unflatten(1, (conv.groups, -1))[:, :, :, None], windows(gradient, conv).unflatten(
            1, (conv.groups, -1)
        )
    cut = windows(inputs, conv).unflatten(1, (conv.groups, -1))
    return cut, gradient.flatten(2).unflatten(1, (conv.groups, -1))


@pytest.mark.parametrize("name", CONVS)
def test_channel_factors_are_those_of_patches(name):
    model, inputs, targets = build(name)
    found = collect(model, [(inputs[:1], targets[:1]), (inputs[1:], targets[1:])], {"kronecker"}).kronecker
    factors = found["conv.weight"]
    a, g = by_hand(model, inputs, targets)
    seconds = torch.einsum("ngikp,ngjkp->gij", a, a) / (len(a) * a.shape[-1] * a.shape[-2])
    if g.dim() == 5:  # transposed: the mean over kernel positions is on the other side
        slopes = torch.einsum("ngikp,ngjkp->gij", g, g) / (len(g) * g.shape[-2])
    else:
        slopes = torch.einsum("ngip,ngjp->gij", g, g) / len(g)
    mean = a.mean((0, 3, 4))
    wanted = (seconds, slopes, mean) if model.conv.groups > 1 else (seconds[0], slopes[0], mean[0])
    for value, truth in zip((factors.A, factors.S, factors.mean), wanted, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-14)
    assert factors.samples == 5 and factors.positions == a[:, 0, 0].numel()


@pytest.mark.parametrize("name", [name for name in CONVS if "up" not in name and name != "back"])
def test_full_factors_are_those_of_patches(name):
    model, inputs, targets = build(name)
    factors = collect(model, [(inputs, targets)], {"kronecker"}, factor="full").kronecker["conv.weight"]
    a, _ = by_hand(model, inputs, targets)
    flat = a.flatten(2, 3)
    wanted = torch.einsum("ngip,ngjp->gij", flat, flat) / (len(a) * a.shape[-1])
    torch.testing.assert_close(factors.A, wanted if model.conv.groups > 1 else wanted[0], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(factors.mean, flat.mean((0, 3)) if model.conv.groups > 1 else flat.mean((0, 3))[0])


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_of_one_sample_without_positions_the_factors_are_the_fisher(fisher):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batch = (torch.randn(1, 4).double(), torch.tensor([1]))
    with pytest.warns(UserWarning, match="rank 1 at most"):
        found = collect(model, [batch], {"kronecker", "moments"}, fisher=fisher, seed=2)
        assert found.kronecker
    for name, factors in found.kronecker.items():
        block = torch.kron(factors.S, factors.A)
        assert torch.linalg.matrix_rank(block) == 1
        torch.testing.assert_close(block.diagonal(), found.moments[name].flatten())
        if fisher == "empirical":
            weight = model.get_parameter(name)
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), weight)
            torch.testing.assert_close(block, gradient.flatten().outer(gradient.flatten()))


def test_of_a_deep_linear_network_the_factors_are_the_hessian():
    """With squared error the output gradients do not depend on the inputs, and S ⊗ A is the Hessian's block itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3), nn.Linear(3, 2)).double()
    inputs, targets = torch.randn(9, 4).double(), torch.randn(9, 2).double()
    found = collect(
        model, [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])], {"kronecker"}, fisher="ggn", loss=F.mse_loss
    )
    for name, factors in found.kronecker.items():
        weight = model.get_parameter(name).detach()

        def loss(value: Tensor, name: str = name) -> Tensor:
            return F.mse_loss(torch.func.functional_call(model, {name: value}, inputs), targets)

        hessian = torch.autograd.functional.hessian(loss, weight).view(weight.numel(), -1)
        torch.testing.assert_close(torch.kron(factors.S, factors.A), hessian)


def test_expand_counts_positions_as_samples():
    """A network that treats tokens alone has the same A for tokens and for samples, and S scaled by their number.

    The loss of a sample is the mean over its 7 tokens: every gradient is 1/7 of a sample's, and 7 squares add up.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs, targets = torch.randn(6, 7, 4).double(), torch.randn(6, 7, 3).double()
    options = {"fisher": "empirical", "loss": F.mse_loss}
    tokens = collect(model, [(inputs, targets)], {"kronecker"}, **options).kronecker
    samples = collect(model, [(inputs.flatten(0, 1), targets.flatten(0, 1))], {"kronecker"}, **options).kronecker
    for name, factors in tokens.items():
        torch.testing.assert_close(factors.A, samples[name].A)
        torch.testing.assert_close(factors.mean, samples[name].mean)
        torch.testing.assert_close(factors.S * 7, samples[name].S)


def test_slices_and_repeated_calls_of_a_weight():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    memory = torch.randn(5, 3, 8).double()

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.twice = attention, nn.Linear(8, 8).double()

        def forward(self, x: Tensor) -> Tensor:
            x = self.attention(x, self.twice(x), torch.tanh(self.twice(torch.cos(x))))[0]
            return x.mean(1)

    model, targets = Cross(), torch.arange(5)
    found = collect(model, [(memory, targets)], {"kronecker"}).kronecker
    assert sorted(found) == [
        "attention.in_proj_weight[0:8]",
        "attention.in_proj_weight[16:24]",
        "attention.in_proj_weight[8:16]",
        "attention.out_proj.weight",
        "twice.weight",
    ]
    rows = memory.flatten(0, 1)
    query = found["attention.in_proj_weight[0:8]"]
    torch.testing.assert_close(query.A, rows.T @ rows / 15)
    both = torch.cat([rows, torch.cos(rows)])
    torch.testing.assert_close(found["twice.weight"].A, both.T @ both / 30)
    assert query.rows == slice(0, 8) and query.bias == "attention.in_proj_bias"
    whole = attention.in_proj_weight.detach()
    torch.testing.assert_close(query.matrices(whole), whole[:8])


def ekfac_by_hand(model: nn.Module, weight: Tensor, factors: Factors, inputs: Tensor, targets: Tensor) -> Tensor:
    total = 0.0
    for n in range(len(inputs)):
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(inputs[n : n + 1]), targets[n : n + 1]), weight)
        total = total + factors.rotate(factors.matrices(gradient)) ** 2 / len(inputs)
    return total


@pytest.mark.parametrize("factor", ["channel", "full"])
@pytest.mark.parametrize("name", CONVS)
def test_ekfac_moments_are_those_of_rotated_gradients(name, factor):
    model, inputs, targets = build(name)
    batches = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    found = collect(model, batches, {"kronecker", "ekfac"}, factor=factor).kronecker["conv.weight"]
    wanted = ekfac_by_hand(model, model.conv.weight, found, inputs, targets)
    assert found.moments is not None and found.moments.shape == found.matrices(model.conv.weight).shape
    torch.testing.assert_close(found.moments, wanted, rtol=1e-9, atol=1e-16)


def test_ekfac_of_linear_layers_tokens_and_several_calls():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    net[2].weight = net[0].weight
    inputs, targets = torch.randn(15, 3, 4).double(), torch.arange(15) % 3
    found = collect(net, [(inputs, targets)], {"ekfac"}).kronecker
    for name, factors in found.items():
        wanted = ekfac_by_hand(net, net.get_parameter(name), factors, inputs, targets)
        torch.testing.assert_close(factors.moments, wanted, rtol=1e-9, atol=1e-16)
    assert found.keys() == {"0.weight", "5.weight"}


def test_ekfac_is_the_nearest_diagonal_in_its_basis():
    """Of all matrices that are diagonal in the eigenbasis, EKFAC is nearest to the Fisher; K-FAC is one of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs, targets = torch.randn(20, 4).double(), torch.arange(20) % 3
    factors = collect(model, [(inputs, targets)], {"kronecker", "ekfac"}).kronecker["0.weight"]
    basis, fisher = factors.eigen(), torch.zeros(20, 20, dtype=torch.float64)
    for n in range(20):
        (gradient,) = torch.autograd.grad(
            F.cross_entropy(model(inputs[n : n + 1]), targets[n : n + 1]), model[0].weight
        )
        fisher += gradient.flatten().outer(gradient.flatten()) / 20
    q = torch.kron(basis.Q_S, basis.Q_A)
    best = (q.T @ fisher @ q).diagonal()
    torch.testing.assert_close(factors.moments.flatten(), best)
    kfac = torch.kron(factors.S, factors.A)
    assert (fisher - q @ best.diag() @ q.T).norm() < 0.9 * (fisher - kfac).norm()


@pytest.mark.parametrize("factor", ["channel", "full"])
@pytest.mark.parametrize("name", CONVS)
def test_the_eigenbasis_rotates_and_back(name, factor):
    model, inputs, targets = build(name)
    factors = collect(model, [(inputs, targets)], {"kronecker"}, factor=factor).kronecker["conv.weight"]
    basis, weight = factors.eigen(), model.conv.weight.detach()
    for q, values, matrix in ((basis.Q_A, basis.lambda_A, factors.A), (basis.Q_S, basis.lambda_S, factors.S)):
        torch.testing.assert_close(q @ torch.diag_embed(values) @ q.mT, matrix)
        assert (values >= 0).all() and (values.diff() >= 0).all()
    assert torch.equal(factors.like_weight(factors.matrices(weight)), weight)
    back = factors.rotate_back(factors.rotate(factors.matrices(weight)))
    torch.testing.assert_close(factors.like_weight(back), weight)
    a, s = factors.damped(0.1)
    assert float(torch.linalg.eigvalsh(a).min()) > 0.09 * float(torch.linalg.eigvalsh(factors.A).mean(-1).min())
    torch.testing.assert_close(s - factors.S, torch.diag_embed((s - factors.S).diagonal(dim1=-2, dim2=-1)))


def test_eigendecompositions_fall_back_to_float64(monkeypatch):
    matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    true = torch.linalg.eigh

    def only_double(value: Tensor) -> tuple[Tensor, Tensor]:
        if value.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return true(value)

    monkeypatch.setattr(torch.linalg, "eigh", only_double)
    values, vectors = eigh(matrix)
    torch.testing.assert_close(values, torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(vectors @ values.diag() @ vectors.T, matrix)


def test_gram_by_blocks_is_the_whole_product():
    rows = torch.randn(11, 200, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(gram(rows), rows.T @ rows)


def test_too_few_samples_are_told_once_with_the_rank():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 2))
    found = collect(model, [(torch.randn(4, 6), torch.tensor([0, 1, 0, 1]))], {"kronecker"})
    with pytest.warns(
        UserWarning, match=r"4 samples are too few for 1 of 4 .* A of `0.weight`, \[6, 6\], has rank 4 at most"
    ):
        first = found.kronecker
    assert torch.linalg.matrix_rank(first["0.weight"].A) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found.kronecker is first
        assert collect(model, [(torch.randn(6, 6), torch.arange(6) % 2)], {"kronecker"}).kronecker


def test_a_factor_that_does_not_exist_is_refused():
    with pytest.raises(BudgetError, match="factor='reduce' is not one of channel, full"):
        collect(nn.Linear(2, 2), [], {"kronecker"}, factor="reduce")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["conv", "tokens"])
@pytest.mark.parametrize("fisher", ["empirical", "ggn"])
def test_curvlinops_finds_the_same(kind, fisher):
    lib = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    if kind == "conv":
        layers = [nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)]
        inputs = torch.randn(6, 2, 4, 4).double()
    else:
        layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), Mean()]
        inputs = torch.randn(6, 3, 4).double()
    model, targets = nn.Sequential(*layers).double().eval(), torch.arange(6) % 3
    data = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    found = collect(model, data, {"kronecker", "ekfac"}, fisher=fisher, factor="full").kronecker
    theirs = {"empirical": lib.FisherType.EMPIRICAL, "ggn": lib.FisherType.TYPE2}[fisher]
    for name, factors in found.items():
        weight = model.get_parameter(name)
        options = {"fisher_type": theirs, "check_deterministic": False}
        for operator, ours in (
            (lib.KFACLinearOperator, torch.kron(factors.S, factors.A)),
            (lib.EKFACLinearOperator, ekfac_matrix(factors)),
        ):
            dense = operator(model, nn.CrossEntropyLoss(), [weight], data, **options)
            dense = dense @ torch.eye(weight.numel(), dtype=torch.float64)
            torch.testing.assert_close(ours, dense, rtol=1e-6, atol=1e-12)


def ekfac_matrix(factors: Factors) -> Tensor:
    basis = factors.eigen()
    q = torch.kron(basis.Q_S, basis.Q_A)
    assert factors.moments is not None
    return q @ factors.moments.flatten().diag() @ q.T


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)

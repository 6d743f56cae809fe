"""The Kronecker family: each score is what its sentence says, against the dense Fisher S ⊗ A and brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab.criteria.blocks import block
from prunelab.curvature.statistics.kronecker import Factors
from prunelab.curvature.watching.weight_view import WeightView
from prunelab.tracing.axes import leaf
from prunelab.tracing.groups import Member
from tests.cases import Embedded

KINDS = {
    "linear": {"kind": "linear", "shape": (4, 3)},
    "conv": {"kind": "conv", "shape": (4, 3, 2, 1)},
    "conv in groups": {"kind": "conv", "shape": (4, 2, 2), "groups": 2},
    "depthwise": {"kind": "conv", "shape": (4, 1, 3), "groups": 4},
    "transposed": {"kind": "conv_transpose", "shape": (3, 4, 2)},
}


def spd(groups: int, size: int, seed: int) -> Tensor:
    root = torch.randn(groups, size, size + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = root @ root.mT / size
    return matrix[0] if groups == 1 else matrix


def factored(kind: str, shape: tuple[int, ...], groups: int = 1) -> tuple[Factors, Tensor]:
    """Return random factors and a weight for them."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out, into = (shape[0] // groups, shape[1]) if kind != "conv_transpose" else (shape[1], shape[0] // groups)
    a, s = spd(groups, into, 1), spd(groups, out, 2)
    mean = torch.zeros(a.shape[:-1], dtype=a.dtype)
    view = WeightView(int(kind == "conv_transpose"), groups, shape[2:])
    return Factors("w", slice(0, shape[0]), kind, view, a, s, mean), weight


def dense(factors: Factors, weight: Tensor) -> Tensor:
    """Return the Fisher of the whole weight, entry by entry: S_oo' A_ii' for one group and kernel position, else 0."""
    groups, kernel = factors.view.groups, weight.shape[2:]
    s, a = (factor if groups > 1 else factor[None] for factor in (factors.S, factors.A))

    def place(index: tuple[int, ...]) -> tuple:
        first, second, *at = index
        if factors.kind == "conv_transpose":
            return first // a.shape[1], second, first % a.shape[1], tuple(at)
        return first // s.shape[1], first % s.shape[1], second, tuple(at)

    places = [place(index) for index in itertools.product(*(range(size) for size in (*weight.shape[:2], *kernel)))]
    out = torch.zeros(len(places), len(places), dtype=torch.float64)
    for row, (g, o, i, k) in enumerate(places):
        for column, (g2, o2, i2, k2) in enumerate(places):
            if (g, k) == (g2, k2):
                out[row, column] = s[g, o, o2] * a[g, i, i2]
    return out


def member(name: str, dim: int, role: str, unit: Tensor) -> Member:
    """Return a member without axes, whose positions are given."""
    made = Member(name, dim, role, leaf(len(unit)), leaf(len(unit)))
    vars(made)["unit"] = unit
    return made


def owned(weight: Tensor, member: Member, unit: int) -> Tensor:
    """Return which entries of the flattened weight a unit owns."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask.index_fill_(member.dim, member.positions(unit), True)
    return mask.flatten()


def members(factors: Factors, weight: Tensor) -> dict[str, tuple[Member, int]]:
    """Return ways in which units may own rows (and, in one case, columns) of a weight, with their number."""
    rows = weight.shape[1 if factors.kind == "conv_transpose" else 0]
    dim = 1 if factors.kind == "conv_transpose" else 0
    found = {
        "one row each": (member("w", dim, "produces", torch.arange(rows)), rows),
        "two rows each": (member("w", dim, "produces", torch.arange(rows) % 2), 2),
        "some rows": (member("w", dim, "produces", torch.tensor([-1, 1, 0, 1])[:rows]), 2),
    }
    if factors.view.groups == 1:
        columns = weight.shape[1 - dim]
        found["columns"] = (member("w", 1 - dim, "consumes", torch.arange(columns)), columns)
    return found


CASES = [(kind, how) for kind, options in KINDS.items() for how in members(*factored(**options))]


def case(kind: str, how: str) -> tuple:
    factors, weight = factored(**KINDS[kind])
    member, size = members(factors, weight)[how]
    part = block(factors, member, weight)
    masks = [owned(weight, member, unit) for unit in range(size)]
    return part, size, dense(factors, weight), weight.flatten(), masks


def close(found: Tensor, wanted: list[Tensor]) -> None:
    torch.testing.assert_close(found.double(), torch.stack(wanted), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_kron_obd_is_the_quadratic_model_of_zeroing_a_unit(kind, how):
    part, size, fisher, weight, masks = case(kind, how)
    wanted = [0.5 * (weight * mask) @ fisher @ (weight * mask) for mask in masks]
    close(pl.criteria.KronOBD().score(part, size), wanted)


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_kron_obs_is_the_least_cost_when_all_other_weights_adapt(kind, how):
    """Minimise ½ δᵀFδ over all δ that equal −w on the unit: solve for the other entries."""
    part, size, fisher, weight, masks = case(kind, how)
    wanted = []
    for mask in masks:
        delta = -(weight * mask)
        if not mask.all():
            delta[~mask] = torch.linalg.solve(fisher[~mask][:, ~mask], -fisher[~mask][:, mask] @ delta[mask])
        wanted.append(0.5 * delta @ fisher @ delta)
    close(pl.criteria.KronOBS(damping=0).score(part, size), wanted)


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_the_channel_scores_add_up_what_single_weights_cost(kind, how):
    part, size, fisher, weight, masks = case(kind, how)
    single = 0.5 * weight**2 * fisher.diagonal()
    close(pl.criteria.COBD(curvature="kronecker").score(part, size), [single[mask].sum() for mask in masks])
    single = 0.5 * weight**2 / torch.linalg.inv(fisher).diagonal()
    close(pl.criteria.COBS(damping=0).score(part, size), [single[mask].sum() for mask in masks])


def test_damping_is_relative_to_the_mean_eigenvalue():
    factors, weight = factored(**KINDS["linear"])
    member, size = members(factors, weight)["one row each"]
    part = block(factors, member, weight)
    s = factors.S + 0.1 * factors.S.trace() / 4 * torch.eye(4, dtype=torch.float64)
    gram = weight @ factors.A @ weight.T
    close(pl.criteria.KronOBS(damping=0.1).score(part, size), list(0.5 * gram.diagonal() / s.inverse().diagonal()))
    a = factors.A + 0.1 * factors.A.trace() / 3 * torch.eye(3, dtype=torch.float64)
    inverse = torch.kron(s, a).inverse().diagonal().view(4, 3)
    close(pl.criteria.COBS(damping=0.1).score(part, size), list((0.5 * weight**2 / inverse).sum(1)))


def test_the_published_form_charges_squares_and_agrees_only_where_inputs_do_not_correlate():
    factors, weight = factored(**KINDS["linear"])
    member, size = members(factors, weight)["one row each"]
    part = block(factors, member, weight)
    published = pl.criteria.KronOBD(quadratic_form="published").score(part, size)
    close(published, list(0.5 * factors.S.diagonal() * (weight**2 @ factors.A).sum(1)))
    exact = pl.criteria.KronOBD().score(part, size)
    assert (published / exact - 1).abs().max() > 0.1
    factors.A.copy_(factors.A.diagonal().diag())
    for name in ("kron_obd", "kron_obs"):
        both = [pl.criteria.get(name, quadratic_form=form).score(part, size) for form in ("exact", "published")]
        torch.testing.assert_close(*both)


# ── on networks ───────────────────────────────────────────────────────────────────────────────────────────────────


class Heads(nn.Module):
    """Two attention heads of width 3 with a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(5, 18), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)


@pytest.fixture
def heads() -> tuple[pl.DependencyGraph, list]:
    torch.manual_seed(0)
    batches = [(torch.randn(7, 4, 5, dtype=torch.float64), torch.arange(7) % 4) for _ in range(2)]
    return pl.trace(Heads().double(), batches[0][0]), batches


def test_heads_and_widths_of_a_fused_projection_are_charged_as_a_whole(heads):
    graph, batches = heads
    factors = pl.collect(graph, batches, {"kronecker"}).kronecker["qkv.weight"]
    fisher, weight = torch.kron(factors.S, factors.A), graph.model.qkv.weight.detach()
    scores = pl.criteria.KronOBD()(graph, batches)
    assert [group.size for group in graph.groups] == [2, 3]  # a head has nine rows, a place of the width six
    for group in graph.groups:
        member = next(member for member in group.members if member.name == "qkv.weight")
        for unit in range(group.size):
            slices = weight.flatten() * owned(weight, member, unit)
            torch.testing.assert_close(scores[group][unit].double(), 0.5 * slices @ fisher @ slices, rtol=1e-5, atol=0)


def test_with_one_sample_and_one_position_kron_obd_is_the_squared_change_of_its_loss():
    """Then F = g gᵀ is exactly S ⊗ A, and ½ (gᵀ w_u)² is what zeroing row u does to first order, squared and halved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = torch.randn(1, 3, dtype=torch.float64), torch.tensor([1])
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    slopes = (model[0].weight * model[0].weight.grad).sum(1)
    with pytest.warns(UserWarning, match="too few"):
        found = pl.criteria.KronOBD()(pl.trace(model, batch[0]), [batch])["0"]
    torch.testing.assert_close(found, (0.5 * slopes**2).detach().float())


def test_c_obd_uses_the_moments_of_the_samples_gradients(small):
    model, inputs = small
    targets, wanted = torch.arange(6) % 4, torch.zeros(8)
    for x, y in zip(inputs, targets, strict=True):
        gradient = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), model[0].weight)[0]
        wanted += (0.5 * model[0].weight ** 2 * gradient**2).sum((1, 2, 3)).detach() / 6
    graph = pl.trace(model, inputs)
    torch.testing.assert_close(pl.criteria.COBD()(graph, [(inputs, targets)])["0"], wanted)
    torch.testing.assert_close(
        pl.criteria.COBD()(graph, [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])])["0"], wanted
    )


class Residual(nn.Module):
    """Two layers that produce the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.block(F.relu(x)))


@pytest.mark.parametrize("name", ["c_obd", "c_obs", "kron_obd", "kron_obs", "eigendamage"])
def test_layers_that_produce_the_same_units_add_up(name):
    torch.manual_seed(0)
    graph, batch = pl.trace(Residual(), torch.randn(1, 3)), (torch.randn(9, 3), torch.arange(9) % 4)
    assert len(graph.groups) == 1
    statistics = pl.collect(graph, [batch], {"moments", "kronecker"})
    found = {
        how: pl.criteria.get(name, group_reduction=how)(graph, statistics)["stem"] for how in ("first", "max", "sum")
    }
    second = found["sum"] - found["first"]
    torch.testing.assert_close(found["max"], torch.maximum(found["first"], second))
    assert (second > 0).all()
    mean = pl.criteria.get(name, normalizer="standarization")(graph, statistics)["stem"]
    assert mean.min() == 0 and mean.max() == 1


def test_units_that_only_an_embedding_produces_are_charged_where_they_are_consumed():
    torch.manual_seed(0)
    model, tokens = Embedded(), torch.randint(0, 11, (3, 5))
    model.out = nn.Identity()
    model.value = nn.Linear(12, 12)
    graph = pl.trace(model, tokens)
    group = graph.group_of("embedding.weight", 1)
    batches = [(tokens, torch.randint(0, 11, (3, 5)))]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    statistics = pl.collect(graph, batches, {"moments", "kronecker"}, loss=loss)
    for name in ("c_obd", "kron_obd", "kron_obs", "c_obs", "eigendamage"):
        scores = pl.criteria.get(name, loss=loss)(graph, statistics)
        assert scores[group].isfinite().all() and (scores[group] > 0).all()


class Scaled(nn.Module):
    """A vector that is multiplied by another: no layer makes or reads its entries."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + (self.left * self.right).sum()


def test_units_without_any_layer_are_no_group():
    graph = pl.trace(Scaled(), torch.randn(1, 3))
    assert not graph.groups and "no layer makes or reads it" in graph.frozen["left", 0]


def test_bad_options_are_errors():
    for options in ({"damping": -1}, {"damping": float("nan")}, {"quadratic_form": "wrong"}, {"normalizer": "l2"}):
        with pytest.raises(pl.BudgetError, match=next(iter(options))):
            pl.criteria.KronOBS(**options)
    with pytest.raises(pl.BudgetError, match="curvature"):
        pl.criteria.COBD(curvature="hessian")
    assert [str(pl.criteria.get(name)) for name in ("c_obd", "kron_obs")] == ["c_obd", "kron_obs"]


def test_statistics_of_another_kind_are_refused(heads):
    graph, batches = heads
    with pytest.raises(pl.PruneLabError, match="kronecker"):
        pl.criteria.KronOBD()(graph, pl.collect(graph, batches, {"grad"}))
    with pytest.raises(pl.PruneLabError, match="fisher"):
        pl.criteria.KronOBD(fisher="ggn")(graph, pl.collect(graph, batches, {"kronecker"}))
    with pytest.raises(pl.PruneLabError, match="batches"):
        pl.criteria.KronOBD()(graph)


def test_a_model_without_any_layer_is_an_error():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    graph = pl.trace(Scale(), torch.ones(1, 4))
    with pytest.raises(pl.BatchError, match="`kron_obd` found no linear or convolution layer"):
        pl.criteria.KronOBD()(graph, [(torch.ones(3, 4), torch.arange(3))])


def test_slices_of_a_fused_projection_add_up():
    """Attention to something else uses its projection in three slices, each with factors of its own."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x.flip(1), x * 2, need_weights=False)[0]).mean(1)

    torch.manual_seed(0)
    model, inputs = Cross().double(), torch.randn(30, 4, 6, dtype=torch.float64)
    graph, batches = pl.trace(model, inputs[:1]), [(inputs, torch.arange(30) % 4)]
    factors = pl.collect(graph, batches, {"kronecker"}).kronecker
    slices = [found for found in factors.values() if found.weight == "attention.in_proj_weight"]
    assert sorted(found.rows.start for found in slices) == [0, 6, 12]
    fisher = torch.block_diag(*(torch.kron(f.S, f.A) for f in sorted(slices, key=lambda found: found.rows.start)))
    weight, scores = model.attention.in_proj_weight.detach(), pl.criteria.KronOBD()(graph, batches)
    groups = [group for group in graph.groups if any(m.name == "attention.in_proj_weight" for m in group.members)]
    for group in groups:
        member = next(m for m in group.members if m.name == "attention.in_proj_weight" and m.dim == 0)
        for unit in range(group.size):
            change = weight.flatten() * owned(weight, member, unit)
            torch.testing.assert_close(scores[group][unit].double(), 0.5 * change @ fisher @ change, rtol=1e-5, atol=0)
    assert groups

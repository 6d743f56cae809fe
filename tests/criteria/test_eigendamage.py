"""EigenDamage: scores are the diagonal of the quadratic model in the rotated basis, and exact where F is S ⊗ A."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab.criteria.blocks import block
from tests.criteria.test_kron import KINDS, close, dense, factored, members, owned
from tests.criteria.test_kron import member as fake_member


def direction(factors, side: str, group: int, index: int, weight: Tensor) -> Tensor:
    """Return the part of a weight along one eigenvector of one factor, like the weight."""
    basis = factors.eigen()
    vectors = basis.Q_S if side == "rows" else basis.Q_A
    vector = (vectors[None] if factors.view.groups == 1 else vectors)[group, :, index]
    matrices = factors.matrices(weight)
    matrices = matrices[None] if factors.view.groups == 1 else matrices
    part = torch.zeros_like(matrices)
    contraction = "o,p,pi...->oi..." if side == "rows" else "i,j,oj...->oi..."
    part[group] = torch.einsum(contraction, vector, vector, matrices[group])
    return factors.like_weight(part[0] if factors.view.groups == 1 else part)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_columns_are_the_quadratic_model_of_removing_a_direction(kind):
    factors, weight = factored(**KINDS[kind])
    fisher = dense(factors, weight)
    scores = pl.criteria.EigenDamage().layer(factors, weight)
    for side in ("rows", "columns"):
        found = getattr(scores, side).reshape(factors.view.groups, -1)
        for group, index in itertools.product(*map(range, found.shape)):
            change = direction(factors, side, group, index, weight).flatten()
            torch.testing.assert_close(found[group, index], 0.5 * change @ fisher @ change)


def test_importance_is_the_diagonal_of_the_fisher_in_the_rotated_basis():
    factors, weight = factored(**KINDS["linear"])
    basis, fisher = factors.eigen(), dense(factors, weight)
    turn = torch.kron(basis.Q_S, basis.Q_A)
    rotated = turn.T @ fisher @ turn
    torch.testing.assert_close(rotated, rotated.diagonal().diag())  # weights do not interact there
    wanted = 0.5 * (turn.T @ weight.flatten()) ** 2 * rotated.diagonal()
    torch.testing.assert_close(pl.criteria.EigenDamage().layer(factors, weight).importance.flatten(), wanted)
    assert (fisher - fisher.diagonal().diag()).abs().max() > 0.1  # here they do


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_lowest_directions_are_the_best_of_all_that_could_go(kind):
    """With F = S ⊗ A, over every set of directions of one side: costs add up, and the lowest scores win."""
    factors, weight = factored(**KINDS[kind])
    fisher, scores = dense(factors, weight), pl.criteria.EigenDamage().layer(factors, weight)
    for side in ("rows", "columns"):
        alone = getattr(scores, side)
        for number in range(1, len(alone)):
            costs = {}
            for chosen in itertools.combinations(range(len(alone)), number):
                change = sum(direction(factors, side, 0, index, weight) for index in chosen).flatten()
                costs[chosen] = float(0.5 * change @ fisher @ change)
                assert costs[chosen] == pytest.approx(float(alone[list(chosen)].sum()))
            assert set(min(costs, key=costs.__getitem__)) == set(alone.argsort()[:number].tolist())


@pytest.mark.parametrize("correction", ["none", "ekfac"])
@pytest.mark.parametrize("kind", KINDS)
def test_units_are_charged_under_the_same_curvature(kind, correction):
    """½ δᵀ T diag(Λ) Tᵀ δ with T the eigenbasis of the whole weight, for units of one row, of several, of columns."""
    factors, weight = factored(**KINDS[kind])
    criterion = pl.criteria.EigenDamage(correction=correction)
    if correction == "ekfac":
        moments = torch.rand(factors.matrices(weight).shape, dtype=torch.float64)
        factors = dataclasses.replace(factors, moments=moments)
    spectrum = criterion.spectrum(factors, factors.matrices(weight)).expand_as(factors.matrices(weight))
    for member, size in members(factors, weight).values():
        wanted = []
        for unit in range(size):
            slices = weight * owned(weight, member, unit).view_as(weight)
            rotated = factors.rotate(factors.matrices(slices))
            wanted.append(0.5 * (rotated**2 * spectrum).sum())
        close(criterion.score(block(factors, member, weight), size), wanted)


def test_without_correction_units_are_those_of_kron_obd(small):
    graph = pl.trace(*small)
    batches = [(small[1], torch.arange(6) % 4), (small[1].flip(2), torch.arange(6) % 4)]
    pair = [pl.criteria.get(name)(graph, batches)["0"] for name in ("eigendamage", "kron_obd")]
    torch.testing.assert_close(*pair)


@pytest.fixture
def convolutional() -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(54, 4),
    )
    batches = [(torch.randn(6, 2, 3, 3, dtype=torch.float64), torch.arange(6) % 4) for _ in range(9)]
    return model.double(), batches


def test_the_correction_takes_the_samples_gradients_in_that_basis(convolutional):
    model, batches = convolutional
    graph = pl.trace(model, batches[0][0])
    statistics = pl.collect(graph, batches, {"kronecker", "ekfac"})
    scores = pl.criteria.EigenDamage(correction="ekfac")(graph, statistics)
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    for name, factors in statistics.kronecker.items():
        weight = dict(model.named_parameters())[name]
        moments: Tensor | float = 0.0
        for x, y in zip(inputs, targets, strict=True):
            gradient = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), weight)[0]
            moments = moments + factors.rotate(factors.matrices(gradient)) ** 2 / len(targets)
        wanted = 0.5 * factors.rotate(factors.matrices(weight.detach())) ** 2 * moments
        layer = scores.layers[name]
        found = layer.importance.flatten()
        torch.testing.assert_close(found, wanted.reshape(*layer.importance.shape, -1).sum(-1).flatten())
    plain = pl.criteria.EigenDamage()(graph, statistics)
    assert not torch.allclose(plain.layers["0.weight"].importance, scores.layers["0.weight"].importance, rtol=0.1)


def test_the_batch_size_does_not_matter(convolutional):
    model, batches = convolutional
    graph, once = pl.trace(model, batches[0][0]), [tuple(torch.cat(part) for part in zip(*batches, strict=True))]
    found = [pl.criteria.EigenDamage()(graph, data) for data in (batches, once)]
    for name, layer in found[0].layers.items():
        torch.testing.assert_close(layer.importance, found[1].layers[name].importance)
    assert set(found[0].layers) == {"0.weight", "2.weight", "4.weight"}
    assert found[0].layers["2.weight"].rows.shape == (2, 3) and found[0].layers["2.weight"].columns.shape == (2, 2)


def test_bad_options_and_bad_numbers_are_errors():
    with pytest.raises(pl.BudgetError, match="correction='kfac'"):
        pl.criteria.EigenDamage(correction="kfac")
    factors, weight = factored(**KINDS["linear"])
    weight[1, 1] = torch.nan
    with pytest.raises(pl.PlanError, match="no number for some directions of `w`"):
        pl.criteria.EigenDamage().layer(factors, weight)
    assert block(factors, fake_member("w", 2, "carries", torch.arange(2)), weight) is None

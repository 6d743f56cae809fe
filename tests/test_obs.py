"""OBS: against brute force, constrained minimisation of the quadratic and search over all sets of weights."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

import prunelab as pl
from prunelab.criteria.surgeon import (
    damped_inverse,
    downdate,
    greedy,
    joint_saliency,
    joint_update,
    saliency,
)


def bowl(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return weights and a positive definite matrix with strong correlations."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator).double()
    common = torch.randn(n, 1, generator=generator).double()
    return torch.randn(n, generator=generator).double(), root @ root.T / n + 3 * common @ common.T + 0.05 * torch.eye(n)


def constrained_minimum(weights: Tensor, matrix: Tensor, index: list[int]) -> tuple[Tensor, float]:
    """Return the δ of least ½ δᵀHδ with δ_S = −w_S, and that value: the KKT system, solved as it stands."""
    n, s = len(weights), len(index)
    constraint = torch.zeros(s, n).double()
    constraint[range(s), index] = 1
    system = torch.cat([torch.cat([matrix, constraint.T], 1), torch.cat([constraint, torch.zeros(s, s).double()], 1)])
    solution = torch.linalg.solve(system, torch.cat([torch.zeros(n).double(), -weights[index]]))
    delta = solution[:n]
    return delta, float(delta @ matrix @ delta / 2)


# ── the algebra ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(3))
def test_a_weights_saliency_is_the_constrained_minimum(seed):
    weights, matrix = bowl(7, seed)
    found = saliency(weights, damped_inverse(matrix))
    wanted = [constrained_minimum(weights, matrix, [q])[1] for q in range(7)]
    torch.testing.assert_close(found, torch.tensor(wanted).double())


@pytest.mark.parametrize("index", [[2], [0, 5], [1, 3, 4, 6], list(range(7))])
def test_sets_are_removed_at_the_constrained_minimum(index):
    weights, matrix = bowl(7)
    inverse, where = damped_inverse(matrix), torch.tensor(index)
    delta, cost = constrained_minimum(weights, matrix, index)
    torch.testing.assert_close(joint_update(weights, inverse, where), delta)
    assert float(joint_saliency(weights, inverse, where)) == pytest.approx(cost)
    assert not (weights + joint_update(weights, inverse, where))[where].any()


@pytest.mark.parametrize("index", [[2], [0, 5, 6]])
def test_the_downdated_inverse_is_the_inverse_of_the_submatrix(index):
    _, matrix = bowl(7)
    rest = torch.tensor([place for place in range(7) if place not in index])
    found = downdate(damped_inverse(matrix), torch.tensor(index))
    torch.testing.assert_close(found[rest][:, rest], torch.linalg.inv(matrix[rest][:, rest]))
    assert not found[index].any() and not found[:, index].any()


def test_damping_is_relative_to_the_mean_eigenvalue():
    _, matrix = bowl(5)
    level = torch.linalg.eigvalsh(matrix).mean()
    wanted = torch.linalg.inv(matrix + 0.1 * level * torch.eye(5))
    torch.testing.assert_close(damped_inverse(matrix, 0.1), wanted)
    torch.testing.assert_close(damped_inverse(1000 * matrix, 0.1), wanted / 1000)
    both = torch.stack([matrix, 7 * matrix])
    torch.testing.assert_close(damped_inverse(both, 0.1), torch.stack([wanted, wanted / 7]))


def test_on_a_diagonal_matrix_obs_is_obd():
    weights, diagonal = torch.tensor([1.0, -2, 3]).double(), torch.tensor([4.0, 1, 0.1]).double()
    torch.testing.assert_close(saliency(weights, damped_inverse(torch.diag(diagonal))), weights**2 * diagonal / 2)


# ── greedy removal ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", range(8))
def test_the_steps_of_greedy_removal_cost_what_all_of_them_cost_at_once(count):
    weights, matrix = bowl(7)
    removal = greedy(weights, damped_inverse(matrix), count)
    delta, cost = constrained_minimum(weights, matrix, list(removal.order))
    torch.testing.assert_close(removal.weights, weights + delta)
    assert float(removal.costs.sum()) == pytest.approx(cost)
    assert len(set(removal.order)) == count and removal.kept.sum() == 7 - count
    assert not removal.weights[~removal.kept].any()
    if count < 7:
        rest = removal.kept.nonzero().flatten()
        torch.testing.assert_close(removal.inverse[rest][:, rest], torch.linalg.inv(matrix[rest][:, rest]))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 2, 4])
def test_greedy_removal_is_close_to_the_best_of_all_sets(seed, count):
    """Each step is the cheapest of all that are left; the set may cost more than the best one, never less."""
    weights, matrix = bowl(8, seed)
    inverse = damped_inverse(matrix)
    removal = greedy(weights, inverse, count)
    costs = {s: constrained_minimum(weights, matrix, list(s))[1] for s in combinations(range(8), count)}
    best, mean = min(costs.values()), sum(costs.values()) / len(costs)
    found = float(removal.costs.sum())
    assert found >= best - 1e-12
    assert found == pytest.approx(best) if count == 1 else found < best + 0.25 * (mean - best)
    previous = removal.order[:-1]
    last = min(costs[tuple(sorted((*previous, q)))] for q in range(8) if q not in previous)
    assert found == pytest.approx(last)


def test_only_the_weights_that_may_go_do_and_all_others_compensate():
    weights, matrix = bowl(8)
    among = torch.arange(8) >= 5
    removal = greedy(weights, damped_inverse(matrix), 2, among=among)
    assert min(removal.order) >= 5
    torch.testing.assert_close(removal.weights - weights, constrained_minimum(weights, matrix, list(removal.order))[0])
    with pytest.raises(pl.BudgetError, match="4 were to go, of 3"):
        greedy(weights, damped_inverse(matrix), 4, among=among)


def test_sets_are_removed_greedily_too():
    """Sets may share weights: what is gone is gone."""
    weights, matrix = bowl(8)
    sets = [torch.tensor(part) for part in ([0, 1], [1, 2, 3], [4], [5, 6, 7])]
    removal = greedy(weights, damped_inverse(matrix), 2, sets=sets)
    first = min(range(4), key=lambda place: constrained_minimum(weights, matrix, sets[place].tolist())[1])
    pairs = {p: sorted({*sets[first].tolist(), *sets[p].tolist()}) for p in range(4) if p != first}
    second = min(pairs, key=lambda place: constrained_minimum(weights, matrix, pairs[place])[1])
    assert removal.order == (first, second)
    assert float(removal.costs.sum()) == pytest.approx(constrained_minimum(weights, matrix, pairs[second])[1])


# ── no diagonal score is right ────────────────────────────────────────────────────────────────────────────────────

TWINS = torch.tensor([[1, 0.99, 0, 0], [0.99, 1, 0, 0], [0, 0, 0.3, 0], [0, 0, 0, 0.3]]).double()


@pytest.mark.parametrize(("sign", "cost"), [(1, 1.99), (-1, 0.01)])
def test_two_weights_that_stand_in_for_each_other(sign, cost):
    """Scores see squares and cannot tell a pair that adds up from one that cancels; greedy removal can."""
    weights = torch.tensor([1.0, sign, 1, 1]).double()
    inverse = damped_inverse(TWINS)

    def of_pair(scores: Tensor) -> tuple[list[int], float]:
        pair = sorted(scores.argsort(stable=True)[:2].tolist())
        removed = torch.zeros(4).double()
        removed[pair] = weights[pair]
        return pair, float(removed @ TWINS @ removed / 2)

    obd, obs = TWINS.diagonal() * weights**2 / 2, saliency(weights, inverse)
    assert of_pair(obd) == ([2, 3], pytest.approx(0.30))
    assert of_pair(obs) == ([0, 1], pytest.approx(cost))
    torch.testing.assert_close(obs[:2], torch.full((2,), (1 - 0.99**2) / 2).double())

    removal = greedy(weights, inverse, 2)
    best = min(constrained_minimum(weights, TWINS, list(pair))[1] for pair in combinations(range(4), 2))
    assert float(removal.costs.sum()) == pytest.approx(best)
    assert best == pytest.approx(0.01 if sign < 0 else 0.15995)


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_matrix_without_an_inverse_is_an_error():
    with pytest.raises(pl.BudgetError, match="not positive definite.*raise the damping"):
        damped_inverse(torch.diag(torch.tensor([1.0, -1, 5])))
    with pytest.raises(pl.BudgetError, match="not positive definite"):
        damped_inverse(torch.full((2, 2), torch.nan))
    with pytest.raises(pl.BudgetError, match="damping=-1"):
        damped_inverse(torch.eye(2), -1)
    singular = torch.ones(3, 3).double()
    with pytest.raises(pl.BudgetError, match="not positive definite"):
        damped_inverse(singular - 1e-9 * torch.eye(3))
    assert damped_inverse(singular, 1e-3).isfinite().all()

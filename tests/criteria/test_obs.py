"""OBS: against brute force, constrained minimisation of the quadratic and search over all sets of weights."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab.criteria.obs import prune_weights
from prunelab.curvature.statistics.kronecker import Factors
from prunelab.sparsity.masks import density
from prunelab.sparsity.surgeon import (
    damped_inverse,
    downdate,
    greedy,
    joint_saliency,
    joint_update,
    saliency,
)
from tests.cases import perturb


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
    with pytest.raises(pl.BudgetError, match="4 should go, but only 3 may"):
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


# ── units, with a block per layer ─────────────────────────────────────────────────────────────────────────────────


class Flat(nn.Module):
    """Units with several rows or columns: images that are flattened, and the heads of fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 2, stride=2)
        self.table = nn.Linear(16, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(F.relu(self.conv(x)).flatten(1)).unsqueeze(1)
        x = torch.cat([x, x.tanh()], 1)
        return self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Convolutions(nn.Module):
    """A grouped, a depthwise and a transposed convolution, with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 2, groups=2)
        self.depthwise = nn.Conv2d(4, 4, 2, groups=4)
        self.transposed = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.last = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(F.relu(self.norm(self.first(x))))
        return self.last(F.silu(self.transposed(F.relu(self.depthwise(x)))).mean((2, 3)))


NETS = {"flat": Flat, "convolutions": Convolutions}


def setting(name: str) -> tuple[nn.Module, list, pl.DependencyGraph]:
    torch.manual_seed(0)
    model = perturb(NETS[name]()).double().eval()
    batches = [(torch.randn(40, 2, 4, 4).double(), torch.randint(0, 3, (40,))) for _ in range(2)]
    return model, batches, pl.trace(model, batches[0][0])


def dense_block(factors: Factors, damping: float, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return S ⊗ A ⊗ I over the rows that the factors are of, and where each of its places stands in the weight."""
    places = factors.matrices(torch.arange(weight.numel()).view_as(weight))
    places = places if factors.view.groups > 1 else places[None]
    kernel = places[0, 0, 0].numel()
    blocks = []
    for group in range(factors.view.groups):
        S, A = (m if factors.view.groups == 1 else m[group] for m in (factors.S, factors.A))
        S, A = (m + damping * m.trace() / len(m) * torch.eye(len(m)) for m in (S, A))
        blocks.append(torch.kron(torch.kron(S, A), torch.eye(kernel).double()))
    return torch.block_diag(*blocks), places.flatten()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("options", [{}, {"factor": "full"}, {"curvature": "layer", "factor": "full", "damping": 0.2}])
def test_a_units_score_is_the_constrained_minimum_of_every_layer(name, options):
    model, batches, graph = setting(name)
    criterion = pl.criteria.OBS(**options)
    scores = criterion(graph, batches)
    known = pl.collect(graph, batches, {"kronecker"}, factor=criterion.factor).kronecker.values()
    several = 0
    for group in graph.groups:
        for unit in (0, group.size - 1):
            wanted = 0.0
            for member in group.members:
                for factors in (one for one in known if one.weight == member.name):
                    weight = model.get_parameter(member.name).detach()
                    if criterion.curvature == "layer":
                        factors = replace(factors, S=torch.eye(factors.S.shape[-1]).expand_as(factors.S) / 1.2)
                    matrix, places = dense_block(factors, criterion.damping, weight)
                    owned = torch.zeros_like(weight, dtype=torch.bool)
                    owned.index_fill_(member.dim, member.positions(unit), True)
                    index = owned.flatten()[places].nonzero().flatten().tolist()
                    several += len(member.positions(unit)) > 1
                    wanted += constrained_minimum(weight.flatten()[places], matrix, index)[1]
            assert scores[group][unit].item() == pytest.approx(wanted, rel=1e-5)
    assert several or name != "flat"


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("options", [{}, {"factor": "full", "fisher": "ggn"}, {"curvature": "layer"}])
def test_a_weights_score_is_the_constrained_minimum_of_its_layer(name, options):
    model, batches, graph = setting(name)
    criterion = pl.criteria.OBS(**options)
    found = criterion.elementwise(model, batches)
    statistics = pl.collect(graph, batches, {"kronecker"}, factor=criterion.factor, fisher=criterion.fisher)
    for factors in statistics.kronecker.values():
        weight = model.get_parameter(factors.weight).detach()
        if criterion.curvature == "layer":
            level = 1 + criterion.damping
            factors = replace(factors, S=torch.eye(factors.S.shape[-1]).expand_as(factors.S) / level)
        matrix, places = dense_block(factors, criterion.damping, weight)
        wanted = saliency(weight.flatten()[places], torch.linalg.inv(matrix))
        assert found[factors.weight].shape == weight.shape
        torch.testing.assert_close(found[factors.weight].flatten()[places], wanted)
    assert found.keys() == {factors.weight for factors in statistics.kronecker.values()}


def test_statistics_can_be_shared():
    _, batches, graph = setting("convolutions")
    statistics = pl.collect(graph, batches, {"kronecker"}, factor="full")
    direct, shared = (pl.criteria.OBS(factor="full")(graph, given) for given in (batches, statistics))
    assert all(torch.equal(direct[group], shared[group]) for group in graph.groups)
    with pytest.raises(pl.BatchError, match='of factor="full", needed is "channel"'):
        pl.criteria.OBS()(graph, statistics)
    with pytest.raises(pl.BatchError, match='fisher="ggn"'):
        pl.criteria.OBS(factor="full", fisher="ggn")(graph, statistics)
    assert pl.criteria.OBS(curvature="layer", factor="full", fisher="ggn")(graph, statistics)


def test_the_size_and_order_of_batches_do_not_matter():
    _, batches, graph = setting("flat")
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    order = torch.randperm(len(targets))
    parts = [(inputs[place], targets[place]) for place in order.split([1, 30, 49])]
    criterion = pl.criteria.OBS()
    found, wanted = criterion(graph, parts), criterion(graph, batches)
    for group in graph.groups:
        torch.testing.assert_close(found[group], wanted[group])


def test_a_layer_without_gradients_costs_nothing():
    model, batches, graph = setting("convolutions")
    model.last.weight.data.zero_()
    scores = pl.criteria.OBS()(graph, batches)
    assert float(scores[graph.group_of("first.weight")].abs().max()) < 1e-25


# ── small networks, with the whole matrix ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def trained() -> tuple[nn.Module, list]:
    """A small network close to a minimum of its loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 3)).double().eval()
    inputs, targets = torch.randn(60, 3).double(), torch.randint(0, 3, (60,))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=400, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(model(inputs), targets) + 1e-3 * sum((p**2).sum() for p in model.parameters())
        value.backward()
        return value

    optimizer.step(closure)
    return model, [(inputs[:25], targets[:25]), (inputs[25:], targets[25:])]


def loss_of(model: nn.Module, batches: list) -> float:
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    with torch.no_grad():
        return float(F.cross_entropy(model(inputs), targets))


def vector(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def ggn(model: nn.Module, batches: list) -> Tensor:
    """Return the Gauss-Newton matrix: Jacobians of the outputs around the softmax's covariance."""
    inputs, _ = (torch.cat(part) for part in zip(*batches, strict=True))
    rows = []
    for output in model(inputs).flatten():
        rows.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(output, model.parameters(), retain_graph=True)])
        )
    jacobian = torch.stack(rows).view(len(inputs), -1, len(rows[0]))
    p = model(inputs).detach().softmax(1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("nci,ncd,ndj->ij", jacobian, middle, jacobian) / len(inputs)


def dense_hessian(model: nn.Module, batches: list, damping: float) -> Tensor:
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    parameters = dict(model.named_parameters())

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([value.numel() for value in parameters.values()])
        given = {name: part.view_as(parameters[name]) for name, part in zip(parameters, parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, given, inputs), targets)

    matrix = torch.autograd.functional.hessian(loss, vector(model))
    return matrix + damping * matrix.trace() / len(matrix) * torch.eye(len(matrix))


def test_with_the_whole_matrix_a_unit_costs_the_constrained_minimum(trained):
    model, batches = trained
    graph = pl.trace(model, batches[0][0])
    found = pl.criteria.OBS(curvature="dense", fisher="hessian", damping=0.5)(graph, batches)["0"]
    matrix, weights = dense_hessian(model, batches, 0.5), vector(model)
    for unit in range(5):
        gone = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            gone[name][unit] = 1
        gone["3.weight"][:, unit] = 1
        index = torch.cat([value.flatten() for value in gone.values()]).nonzero().flatten().tolist()
        assert found[unit].item() == pytest.approx(constrained_minimum(weights, matrix, index)[1], rel=1e-5)


def test_with_the_whole_matrix_a_weight_costs_the_constrained_minimum(trained):
    model, batches = trained
    found = pl.criteria.OBS(curvature="dense", fisher="hessian", damping=0.5).elementwise(model, batches)
    matrix, weights = dense_hessian(model, batches, 0.5), vector(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    flat = torch.cat([value.flatten() for value in found.values()])
    wanted = [constrained_minimum(weights, matrix, [q])[1] for q in range(len(weights))]
    torch.testing.assert_close(flat, torch.tensor(wanted).double())


@pytest.mark.parametrize("fisher", ["hessian", "ggn"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_in_a_linear_model_the_surgeon_refits_by_least_squares(fisher, density):
    """The loss is a quadratic here, so what is left is the least-squares fit on the inputs that are left."""
    torch.manual_seed(0)
    inputs = (torch.randn(50, 10) @ (torch.eye(10) + 0.5 * torch.rand(10, 10))).double()
    targets = inputs @ torch.randn(10, 1).double() + torch.randn(50, 1).double()
    design = torch.cat([inputs, torch.ones(50, 1).double()], 1)
    best = torch.linalg.lstsq(design, targets).solution
    model = nn.Linear(10, 1).double()
    model.weight.data, model.bias.data = best[:-1].T.clone(), best[-1].clone()
    sparse = prune_weights(
        model,
        [(inputs[:20], targets[:20]), (inputs[20:], targets[20:])],
        density,
        fisher=fisher,
        damping=0,
        loss=F.mse_loss,
    )
    kept = sparse.weight[0] != 0
    assert kept.sum() == round(10 * density) and torch.equal(model.weight.data, best[:-1].T)
    refit = torch.linalg.lstsq(design[:, [*kept.nonzero().flatten().tolist(), 10]], targets).solution.flatten()
    torch.testing.assert_close(torch.cat([sparse.weight[0][kept], sparse.bias]), refit)


def test_the_surgeon_hurts_less_than_removing_as_many_without_care(trained):
    model, batches = trained
    magnitude = pl.criteria.Magnitude().elementwise(model)
    parts = dense_hessian(model, batches, 0).diagonal().split([score.numel() for score in magnitude.values()])
    obd = {name: magnitude[name] * part.view_as(magnitude[name]) for name, part in zip(magnitude, parts, strict=True)}
    for share in (0.8, 0.7):
        surgeon = prune_weights(model, batches, share)
        others = [pl.sparsify(model, scores, share) for scores in (magnitude, obd)]
        assert loss_of(surgeon, batches) < min(loss_of(other, batches) for other in others) - 0.05
        assert density(surgeon) == density(others[0])


def test_every_step_starts_from_where_the_last_one_ended(trained):
    """Two steps are one step, and another with what that removed left out of the matrix."""
    model, batches = trained
    once = prune_weights(model, batches, 0.8)
    twice = prune_weights(model, batches, 0.6, steps=2)
    kept = torch.cat(
        [once[0].weight.flatten() != 0, torch.ones(15).bool(), once[3].weight.flatten() != 0, torch.ones(3).bool()]
    )
    plain = pl.bake(once)
    matrix = ggn(plain, batches)[kept][:, kept]
    matrix += 1e-2 * matrix.trace() / len(matrix) * torch.eye(len(matrix))
    weights = vector(plain)[kept]
    among = torch.cat([torch.ones(15), torch.zeros(15), torch.ones(15), torch.zeros(3)]).bool()[kept]
    wanted = torch.zeros(48).double()
    wanted[kept] = greedy(weights, torch.linalg.inv(matrix), 6, among=among).weights
    torch.testing.assert_close(vector(pl.bake(twice)), wanted)


def test_what_the_surgeon_removed_stays_zero(trained):
    model, batches = trained
    sparse = prune_weights(model, batches, 0.5, names=["0.weight"])
    assert (sparse[0].weight == 0).sum() == 7 and (sparse[3].weight != 0).all()
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1)
    zeros = sparse[0].weight == 0
    F.cross_entropy(sparse(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    assert torch.equal(sparse[0].weight == 0, zeros)


def test_what_is_too_large_or_sparse_already_is_an_error(trained):
    model, batches = trained
    with pytest.raises(pl.BudgetError, match="density=0"):
        prune_weights(model, batches, 0)
    with pytest.raises(pl.BudgetError, match="steps=0"):
        prune_weights(model, batches, 0.5, steps=0)
    with pytest.raises(pl.PlanError, match="has no parameter `5.weight`"):
        prune_weights(model, batches, 0.5, names=["5.weight"])
    with pytest.raises(pl.PlanError, match="bake it first"):
        prune_weights(prune_weights(model, batches, 0.5), batches, 0.25)
    with pytest.raises(pl.BatchError, match="needs batches"):
        prune_weights(model, None, 0.5)
    resnet = pl.zoo.resnet20()
    graph = pl.trace(resnet, torch.randn(1, 3, 32, 32))
    with pytest.raises(pl.BudgetError, match="ResNet has .* weights, and a dense matrix.*at most 5000"):
        pl.criteria.OBS(curvature="dense")(graph, batches)


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


@pytest.mark.parametrize("options", [{"curvature": "block"}, {"factor": "patch"}, {"fisher": "true"}, {"damping": -1}])
def test_options_that_do_not_exist_are_errors(options):
    with pytest.raises(pl.BudgetError, match=next(iter(options))):
        pl.criteria.get("obs", **options)


def test_a_hessian_has_no_kronecker_factors():
    with pytest.raises(pl.BudgetError, match='needs curvature="dense"'):
        pl.criteria.OBS(fisher="hessian")

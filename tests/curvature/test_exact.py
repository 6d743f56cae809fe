"""Dense curvature matrices: against torch.func, against each other, and on problems with a known answer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab.curvature import exact


@pytest.fixture
def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, generator=generator).double(), torch.arange(n) % 3) for n in (4, 1, 3)]


def together(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def by_torch_func(mlp: nn.Module, inputs: Tensor, targets: Tensor, loss=F.cross_entropy) -> Tensor:
    """The Hessian by forward over reverse mode, over all samples at once."""
    names, values = zip(*mlp.named_parameters(), strict=True)
    sizes = [value.numel() for value in values]

    def of(theta: Tensor) -> Tensor:
        parts = [part.view_as(value) for part, value in zip(theta.split(sizes), values, strict=True)]
        return loss(torch.func.functional_call(mlp, dict(zip(names, parts, strict=True)), (inputs,)), targets)

    return torch.func.jacrev(torch.func.jacrev(of))(exact.flat(values).detach())


def test_the_hessian_is_that_of_torch_func_whatever_the_batches(mlp, batches):
    found = exact.hessian(mlp, batches)
    torch.testing.assert_close(found, by_torch_func(mlp, *together(batches)))
    torch.testing.assert_close(found, found.T)


def test_a_model_linear_in_its_parameters_has_no_functional_part(batches):
    torch.manual_seed(0)
    linear = nn.Linear(3, 3).double()
    torch.testing.assert_close(exact.hessian(linear, batches), exact.ggn(linear, batches))


def test_the_hessian_is_gauss_newton_plus_the_curvature_of_the_network(mlp, batches):
    """H − G = Σ_k E[r_k ∂²f_k/∂θ²], here with the slopes r of the cross-entropy written down: softmax − one-hot."""
    inputs, targets = together(batches)
    slopes = (mlp(inputs).softmax(1) - F.one_hot(targets, 3)).detach() / len(targets)
    functional = by_torch_func(mlp, inputs, targets, lambda outputs, _: (slopes * outputs).sum())
    torch.testing.assert_close(exact.hessian(mlp, batches) - exact.ggn(mlp, batches), functional)


def test_for_cross_entropy_the_exact_fisher_is_gauss_newton(mlp, batches):
    torch.testing.assert_close(exact.fisher(mlp, batches), exact.ggn(mlp, batches))


def test_sampled_labels_estimate_the_exact_fisher(mlp, batches):
    wanted = exact.fisher(mlp, batches)
    draws = [exact.fisher(mlp, batches, kind="mc", seed=seed) for seed in range(60)]
    gap = (torch.stack(draws).mean(0) - wanted).norm() / wanted.norm()
    assert gap < 0.3 and gap < (draws[0] - wanted).norm() / wanted.norm() / 2
    assert torch.equal(draws[3], exact.fisher(mlp, batches, kind="mc", seed=3))


def test_the_empirical_fisher_is_the_second_moment_of_single_gradients(mlp, batches):
    rows = []
    for x, y in zip(*together(batches), strict=True):
        mlp.zero_grad()
        F.cross_entropy(mlp(x[None]), y[None]).backward()
        rows.append(exact.flat([p.grad for p in mlp.parameters()]))
    wanted = torch.stack(rows).T @ torch.stack(rows) / len(rows)
    torch.testing.assert_close(exact.fisher(mlp, batches, kind="empirical"), wanted)


def test_least_squares_gives_twice_the_second_moment_of_the_inputs():
    inputs = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)).double()
    model, batch = nn.Linear(2, 1, bias=False).double(), [(inputs, torch.zeros(9, 1).double())]
    for matrix in (exact.hessian, exact.ggn):
        torch.testing.assert_close(matrix(model, batch, F.mse_loss), 2 * inputs.T @ inputs / 9)


def test_some_names_give_the_block_of_these_parameters(mlp, batches):
    whole, names = exact.hessian(mlp, batches), ["2.bias", "0.weight"]
    places = torch.cat([torch.arange(28, 31), torch.arange(12)])
    torch.testing.assert_close(exact.hessian(mlp, batches, names=names), whole[places][:, places])


def test_the_model_stays_as_it_was_and_runs_in_eval_mode(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 3)).double().train()
    model[0].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = exact.hessian(model, batches)
    assert model.training and model[2].training and not model[0].bias.requires_grad and model[0].weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(found, by_torch_func(model.eval(), *together(batches)))


def test_what_cannot_be_is_refused(mlp, batches):
    with pytest.raises(pl.BudgetError, match="31 parameters has 961 entries; 30 .*max_parameters="):
        exact.hessian(mlp, batches, max_parameters=30)
    with pytest.raises(pl.PruneLabError, match="`1.weight` is not a parameter of Sequential"):
        exact.hessian(mlp, batches, names=["1.weight"])
    with pytest.raises(pl.BudgetError, match="kind='true'"):
        exact.fisher(mlp, batches, kind="true")
    with pytest.raises(pl.BatchError, match="not finite in batch 1"):
        exact.ggn(mlp, [batches[0], (batches[1][0] * float("nan"), batches[1][1])])
    with pytest.raises(pl.BatchError, match="empty loader"):
        exact.hessian(mlp, [])
    with pytest.raises(pl.BatchError, match="labels"):
        exact.fisher(mlp, [(batches[0][0], torch.zeros(4, 3).double())], F.mse_loss)

"""Curvature against the code of others, in float64 on a small network: curvlinops and BackPACK."""

from __future__ import annotations

import backpack
import curvlinops
import pytest
import torch
from backpack.extensions import BatchGrad, DiagGGNExact
from torch import Tensor, nn

import prunelab as pl
from prunelab.curvature.exact import fisher, ggn, hessian
from prunelab.curvature.second.hvp import ggn_product, hessian_product


@pytest.fixture
def problem() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    batches = [(torch.randn(n, 2, 6, 6).double(), torch.randint(0, 3, (n,))) for n in (5, 3)]
    return model.double(), batches


def flat(vectors: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in vectors.values()])


@pytest.mark.parametrize(
    ("product", "operator"),
    [(hessian_product, curvlinops.HessianLinearOperator), (ggn_product, curvlinops.GGNLinearOperator)],
)
def test_products_are_those_of_curvlinops(problem, product, operator):
    model, batches = problem
    vectors = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    theirs = operator(model, nn.CrossEntropyLoss(), list(model.parameters()), batches) @ flat(vectors)
    torch.testing.assert_close(flat(product(model, batches, vectors)), theirs)


def test_dense_matrices_are_those_of_curvlinops(problem):
    model, batches = problem
    identity = torch.eye(sum(parameter.numel() for parameter in model.parameters())).double()
    for ours, operator in (
        (hessian(model, batches), curvlinops.HessianLinearOperator),
        (ggn(model, batches), curvlinops.GGNLinearOperator),
        (fisher(model, batches, kind="empirical"), curvlinops.EFLinearOperator),
    ):
        theirs = operator(model, nn.CrossEntropyLoss(), list(model.parameters()), batches) @ identity
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # BackPACK's hooks
def test_moments_are_the_diagonals_of_backpack(problem):
    model, batches = problem
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    ours = {kind: pl.collect(model, batches, {"moments"}, fisher=kind).moments for kind in ("empirical", "ggn")}
    extended, loss = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(BatchGrad(), DiagGGNExact()):
        loss(extended(images), labels).backward()
    for name, parameter in model.named_parameters():
        squares = (parameter.grad_batch * len(images)).square().mean(0)
        torch.testing.assert_close(ours["empirical"][name], squares)
        torch.testing.assert_close(ours["ggn"][name], parameter.diag_ggn_exact)

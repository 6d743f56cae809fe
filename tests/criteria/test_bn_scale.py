"""BN scale: |γ| of the norms that a group passes, and a clear word where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunelab as pl
from tests.cases import perturb


@pytest.fixture
def resnet() -> tuple[nn.Module, pl.DependencyGraph]:
    torch.manual_seed(0)
    model = perturb(pl.zoo.resnet20()).eval()
    return model, pl.trace(model, torch.randn(1, 3, 32, 32))


def test_the_score_is_the_size_of_the_scale(small):
    model, inputs = small
    model[1].weight.data = torch.linspace(-2, 1, 8)
    found = pl.criteria.get("bn_scale")(pl.trace(model, inputs))["0"]
    assert torch.equal(found, model[1].weight.detach().abs())


def test_a_channel_that_passes_several_norms_is_reduced_over_them(resnet):
    model, graph = resnet
    trunk = graph.group_of("conv1.weight")
    norms = [model.bn1, *(block.bn2 for block in model.layer1)]
    rows = torch.stack([norm.weight.detach().abs() for norm in norms])
    torch.testing.assert_close(pl.criteria.BNScale()(graph)[trunk], rows.mean(0))
    torch.testing.assert_close(pl.criteria.BNScale(group_reduction="max")(graph)[trunk], rows.amax(0))


def test_it_ranks_channels_as_the_loss_does_when_norms_are_all_that_differs():
    """Consumers that treat all channels alike: what |γ| says is then all there is to say."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 1, bias=False)).double()
    x = torch.randn(400, 4).double()
    model[1].momentum = 1.0
    model(x)  # running statistics of these inputs: every channel has unit variance
    model.eval()
    model[1].weight.data = torch.rand(6).double()
    model[2].weight.data.fill_(1.0)
    with torch.no_grad():
        whole = model(x)
        change = []
        for unit in range(6):
            cut = torch.ones(6).double()
            cut[unit] = 0
            change.append(float(((model[2](model[1](model[0](x)) * cut) - whole) ** 2).mean()))
    scores = pl.criteria.BNScale()(pl.trace(model, x[:2]))["0"]
    torch.testing.assert_close(scores**2, torch.tensor(change), rtol=0.01, atol=0)


def test_elementwise_holds_the_scales_of_norms_alone(resnet):
    model, _ = resnet
    values = pl.criteria.BNScale().elementwise(model)
    assert values.keys() == {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(torch.equal(value, model.get_parameter(name).abs()) for name, value in values.items())


def test_groups_without_a_norm_are_named():
    torch.manual_seed(0)
    model = pl.zoo.vit_small()
    graph = pl.trace(model, torch.randn(1, 3, 32, 32))
    with pytest.raises(pl.PruneLabError, match=r"No norm with a scale.*`blocks.0.*of 21 groups.*fallback="):
        pl.criteria.BNScale()(graph)
    with pytest.raises(pl.BudgetError, match="fallback='ignore'"):
        pl.criteria.BNScale(fallback="ignore")
    kept = pl.criteria.BNScale(fallback="keep")(graph)
    magnitude = pl.criteria.Magnitude()
    other, mixed = magnitude(graph), pl.criteria.BNScale(fallback=magnitude)(graph)
    without = [group for group in graph.groups if kept[group].isinf().all()]
    assert 0 < len(without) < len(graph.groups)
    for group in graph.groups:
        assert torch.equal(mixed[group], other[group] if group in without else kept[group])


def test_only_norms_of_the_asked_types_count():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).eval()
    graph = pl.trace(model, torch.randn(2, 3))
    options = {"target_types": [nn.BatchNorm1d], "fallback": "keep"}
    scores = pl.criteria.BNScale(**options)(graph)
    assert scores["0"].isinf().all() and torch.equal(scores["2"], model[3].weight.detach().abs())


def test_a_norm_without_a_scale_counts_as_none(small):
    model, inputs = small
    model[1] = nn.BatchNorm2d(8, affine=False)
    with pytest.raises(pl.PruneLabError, match="through group `0`"):
        pl.criteria.BNScale()(pl.trace(model.eval(), inputs))

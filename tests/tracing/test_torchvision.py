"""Models as others wrote them: traced without a hint, cut exactly, and ordinary modules afterwards.

The whole of torchvision is measured by `make zoo`; this is a spread over its families.
"""

from __future__ import annotations

import io
import warnings

import pytest
import torch
import torchvision.models as tv
from torch import nn

import prunelab as pl
from bench.zoo import build, disturb, inputs_for, measure
from tests.cases import error, random_plan

SPREAD = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "lraspp_mobilenet_v3_large",
    "maxvit_t",
    "mnasnet0_5",
    "r3d_18",
    "regnet_y_400mf",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_v2_t",
    "vit_b_32",
]


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize("name", SPREAD)
def test_permuted_and_cut_networks_compute_the_same(name: str):
    row = measure(name)
    assert row["outcome"] == "exact", row
    assert float(str(row["parameters in groups"]).rstrip("%")) > 95


def test_the_spread_is_of_models_that_torchvision_has():
    known = [name for part in (tv, tv.segmentation, tv.video) for name in tv.list_models(module=part)]
    assert set(SPREAD) <= set(known)


def cut(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = disturb(build(name)).eval()
    inputs = inputs_for(name, model)
    return pl.apply(model, random_plan(model, inputs)), inputs


@pytest.mark.parametrize("name", ["resnet18", "vit_b_32", "swin_t", "mobilenet_v3_small"])
def test_a_cut_model_is_an_ordinary_module(name: str):
    model, inputs = cut(name)
    assert type(model) is type(build(name))
    with torch.no_grad():
        wanted = model(inputs)
        exported = torch.export.export(model, (inputs,)).module()
        assert error(exported(inputs), wanted) < 1e-5
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler's own
            assert error(torch.compile(model, backend="aot_eager")(inputs), wanted) < 1e-5
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(inputs).square().mean().backward()
    assert all(
        parameter.grad is not None and parameter.grad.shape == parameter.shape for parameter in model.parameters()
    )
    optimizer.step()
    with torch.no_grad():
        assert error(model.eval()(inputs), wanted) > 1e-6


@pytest.mark.parametrize("name", ["vit_b_32", "resnext50_32x4d", "swin_t"])
def test_what_is_kept_is_a_multiple_for_heads_widths_and_channels_alike(name: str):
    model = build(name).eval()
    graph = pl.trace(model, inputs_for(name, model))
    plan = pl.plan(pl.criteria.Random()(graph), flops=0.6, round_to=4)
    groups = {group.name: group for group in graph.groups}
    assert plan.removed
    for group, removed in plan.removed.items():
        assert (groups[group].size - len(removed)) % 4 == 0, group
    small = pl.apply(model, plan)
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.in_channels % module.groups == module.out_channels % module.groups == 0

"""Nothing assumes a device: models are traced on a GPU as on the CPU, and cut without any memory.

There need be no GPU for that: tensors without data know which device they would be on, and mixing two is an error.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import prunelab as pl
from prunelab.kept import open_plan
from tests.cases import imagined_gpu


@imagined_gpu
@pytest.mark.parametrize("name", ["resnet20", "vit_small"])
def test_a_model_on_a_gpu_is_traced_there(name: str):
    with FakeTensorMode(), torch.device("cuda"):
        model, images = pl.zoo.build(name), torch.empty(2, 3, 32, 32)
    graph = pl.trace(model, images)
    assert {tensor.device.type for op in graph.tape for tensor in op.outputs} == {"cuda"}
    on_cpu = pl.trace(pl.zoo.build(name), torch.empty(2, 3, 32, 32))
    assert [(g.name, g.size, g.members) for g in graph.groups] == [(g.name, g.size, g.members) for g in on_cpu.groups]
    assert pl.count(model, images) == pl.count(pl.zoo.build(name), torch.empty(2, 3, 32, 32))


@imagined_gpu
def test_a_plan_is_opened_where_the_model_lies():
    plan = pl.plan(pl.criteria.Random()(pl.trace(pl.zoo.resnet20(), torch.empty(2, 3, 32, 32))), flops=0.5)
    with FakeTensorMode(), torch.device("cuda"):
        model = pl.zoo.resnet20()
    graph, kept = open_plan(model, plan)
    assert {tensor.device.type for op in graph.tape for tensor in op.outputs} == {"cuda"}
    assert sum(kept.sizes.values()) == sum(cut.size - len(cut.removed) for cut in plan.cuts)


def test_a_model_without_memory_is_cut_without_any():
    with torch.device("meta"):
        model = pl.zoo.resnet20()
    plan = pl.plan(pl.criteria.Random()(pl.trace(model, torch.empty(1, 3, 32, 32))), flops=0.5)
    small = pl.apply(model, plan, check=False)
    assert all(parameter.is_meta for parameter in small.parameters())
    assert pl.count(small, torch.empty(1, 3, 32, 32)).flops == pytest.approx(
        plan.budget["kept"]["flops"] * 81.6e6, rel=0.02
    )

"""The tracer: permuting a group changes nothing, and what cannot be cut says why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import prunelab as pl
from tests.cases import CASES, Case, error, permuted


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_permuting_all_groups_changes_nothing(case: Case):
    model, inputs = case.make()
    graph = pl.trace(model, inputs)
    assert graph.groups
    moved = model
    for number, group in enumerate(graph.groups):
        order = torch.randperm(group.size, generator=torch.Generator().manual_seed(number))
        moved = permuted(moved, group, order)
    with torch.no_grad():
        assert error(moved(inputs), model(inputs)) < 1e-9


@pytest.mark.parametrize("name", ["resnet20", "vit_small", "grouped", "embedded"])
def test_permuting_one_group_changes_nothing_and_one_member_alone_does(name: str):
    case = next(case for case in CASES if case.name == name)
    model, inputs = case.make()
    for group in pl.trace(model, inputs).groups:
        order = torch.arange(group.size).roll(1)
        alone = pl.Group(group.name, group.size, group.members[:1], group.axis)
        with torch.no_grad():
            wanted = model(inputs)
            assert error(permuted(model, group, order)(inputs), wanted) < 1e-9, group
            assert len(group.members) == 1 or error(permuted(model, alone, order)(inputs), wanted) > 1e-6, group


def test_the_groups_of_a_resnet_are_its_blocks_and_its_residual_streams():
    graph = pl.trace(pl.zoo.resnet20(), torch.ones(1, 3, 32, 32))
    assert [(group.name, group.size) for group in graph.groups][:3] == [
        ("conv1", 16),
        ("layer1.0.conv1", 16),
        ("layer1.1.conv1", 16),
    ]
    block = graph.group_of("layer1.0.conv1.weight", dim=0)
    assert {(member.name, member.dim, member.role) for member in block.members} == {
        ("layer1.0.conv1.weight", 0, "produces"),
        ("layer1.0.bn1.weight", 0, "carries"),
        ("layer1.0.bn1.bias", 0, "carries"),
        ("layer1.0.bn1.running_mean", 0, "carries"),
        ("layer1.0.bn1.running_var", 0, "carries"),
        ("layer1.0.conv2.weight", 1, "consumes"),
    }
    stream = graph.group_of("layer3.2.conv2.weight", dim=0)
    assert stream is graph.group_of("fc.weight", dim=1) is graph.group_of("layer3.0.shortcut.0.weight")


def test_heads_and_head_width_are_groups_of_their_own():
    graph = pl.trace(pl.zoo.vit_small(), torch.ones(1, 3, 32, 32))
    heads, width = graph.groups_of("blocks.2.attention.qkv.weight", 0)
    assert (heads.name, heads.size) == ("blocks.2.attention.qkv:heads", 4)
    assert (width.name, width.size) == ("blocks.2.attention.qkv:head_width", 24)
    rows = next(member for member in heads.members if member.name.endswith("qkv.weight")).positions(1)
    assert rows.tolist() == [96 * part + 24 + row for part in range(3) for row in range(24)]


def test_a_flattened_image_gives_every_channel_its_positions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    group = pl.trace(model, torch.ones(1, 3, 4, 4)).groups[0]
    assert group.members[-1].positions(2).tolist() == [8, 9, 10, 11]


def test_inputs_and_outputs_are_frozen_with_a_reason(small):
    graph = pl.trace(*small)
    assert graph.group_of("0.weight", dim=1) is None and graph.frozen["0.weight", 1] == "the model's input"
    assert graph.frozen["5.weight", 0] == graph.frozen["5.bias", 0] == "the model's output"
    assert "0.weight" in str(graph.groups[0].members) and "8 prunable units" in str(graph)
    assert "<table>" in graph._repr_html_()


def test_parameters_that_nothing_used_are_not_prunable():
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    graph = pl.trace(Spare(), torch.ones(2, 4))
    assert graph.groups == () and "no operator" in graph.frozen["spare.weight", 0]


def test_tied_parameters_are_one_member():
    model, tokens = next(case for case in CASES if case.name == "embedded").make()
    names = [member.name for group in pl.trace(model, tokens).groups for member in group.members]
    assert names.count("embedding.weight") == 1


def test_tracing_leaves_the_model_as_it_was(small):
    model, inputs = small
    model.train()
    before = copy.deepcopy(model.state_dict())
    pl.trace(model, inputs)
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_without_memory_is_traced_too():
    with torch.device("meta"):
        model = pl.zoo.vgg19()
    found = pl.trace(model, torch.empty(1, 3, 32, 32, device="meta"))
    assert [group.size for group in found.groups] == [
        group.size for group in pl.trace(pl.zoo.vgg19(), torch.ones(1, 3, 32, 32)).groups
    ]


def test_two_traces_give_the_same_groups(small):
    names = [[(group.name, group.members) for group in pl.trace(*small).groups] for _ in range(2)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    "inputs", [(torch.ones(2, 4), torch.ones(2, 4)), {"x": torch.ones(2, 4), "y": torch.ones(2, 4)}]
)
def test_tuples_and_dicts_of_inputs(inputs):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"logits": self.out(self.a(x) * self.b(y))}

    group = pl.trace(Two(), inputs).groups[0]
    assert [member.name for member in group.members if member.role == "produces"] == ["a.weight", "b.weight"]


def test_code_that_looks_at_values_is_an_error_that_names_the_module():
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if x.sum() > 0 else x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.peeks = Peeks()

        def forward(self, x: Tensor) -> Tensor:
            return self.peeks(x)

    model = Outer()
    with pytest.raises(pl.TraceError, match="peeks"):
        pl.trace(model, torch.ones(2, 4))
    assert torch.isfinite(model(torch.ones(2, 4))).all()


def test_a_wrong_shape_is_an_error_that_names_operator_and_module(small):
    with pytest.raises(pl.TraceError, match="convolution.*`0`"):
        pl.trace(small[0], torch.ones(1, 5, 8, 8))


@pytest.mark.parametrize("wrong", ["text", 3])
def test_inputs_of_no_use_are_an_error(small, wrong):
    with pytest.raises(pl.PruneLabError, match="example_inputs"):
        pl.trace(small[0], wrong)


def test_a_lazy_model_is_an_error():
    with pytest.raises(pl.TraceError, match="no shape yet"):
        pl.trace(nn.LazyLinear(3), torch.ones(1, 2))

"""The tracer: permuting a group changes nothing, and what cannot be cut says why."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from matplotlib.collections import PolyCollection
from torch import Tensor, nn

import prunelab as pl
from prunelab.drawing.network import network
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


def test_what_is_ignored_stays_with_all_that_is_coupled_to_it():
    model, images = pl.zoo.resnet20(), torch.ones(1, 3, 32, 32)
    graph = pl.trace(model, images, ignore=["layer1.0.conv1", model.fc])
    names = {group.name for group in pl.trace(model, images).groups} - {group.name for group in graph.groups}
    assert names == {"conv1", "layer1.0.conv1", "layer3.0.conv2"}  # what the two layers read, too
    assert graph.group_of("layer1.0.conv1.weight", 0) is None
    assert graph.frozen["layer1.0.conv2.weight", 1] == "`layer1.0.conv1` is ignored, as asked"
    plan = pl.plan(pl.criteria.Random()(graph), ratio=0.5)
    assert pl.apply(model, plan).fc.in_features == 64


@pytest.mark.parametrize("wrong", ["layer9", nn.Linear(2, 2)])
def test_ignoring_what_is_not_there_is_an_error(wrong):
    with pytest.raises(pl.TraceError, match=r"ignore holds .*(layer9|Linear)"):
        pl.trace(pl.zoo.resnet20(), torch.ones(1, 3, 32, 32), ignore=[wrong])


def test_an_operator_that_cannot_run_without_data_is_named_with_its_module():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            self.cache["seen"] = x
            return torch.ops.prunelab_tests.no_fake(x)

    with torch.library._scoped_library("prunelab_tests", "DEF") as library:
        library.define("no_fake(Tensor x) -> Tensor")
        library.impl("no_fake", lambda x: x + 1, "CPU")
        model = nn.Sequential(nn.Linear(4, 4), Own())
        with pytest.raises(pl.TraceError, match="no_fake.*`1`"):
            pl.trace(model, torch.ones(2, 4))
        assert model[1].cache == {}
        assert model(torch.ones(2, 4)).isfinite().all()


def test_an_output_without_tensors_is_an_error():
    class Words(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "a cat"

    with pytest.raises(pl.TraceError, match="returned no tensor but str"):
        pl.trace(Words(), torch.ones(1, 2))


def test_a_sparse_model_is_to_be_baked_first(small):
    model, inputs = small
    sparse = pl.sparsify(model, pl.criteria.Magnitude().elementwise(model), density=0.5)
    with pytest.raises(pl.TraceError, match="`0` has a mask.*bake"):
        pl.trace(sparse, inputs)
    assert len(pl.trace(pl.bake(sparse), inputs).groups) == 1


class Remembers(nn.Module):
    """Keeps what it computed from its parameters until it is trained again, as LeViT's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias, self.last = nn.Linear(3, 6), nn.Parameter(torch.randn(6, 2)), nn.Linear(6, 2)
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Remembers:
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias.sum(1)
        return self.last(self.first(x) + self.cache["bias"])


def test_what_a_model_keeps_of_its_parameters_does_not_get_in_the_way():
    model, x = Remembers().double().eval(), torch.randn(4, 3).double()
    with torch.no_grad():
        whole = model(x)
        kept = model.cache["bias"]
        graph = pl.trace(model, x)
        assert {member.name for member in graph.groups[0].members} >= {"bias", "first.weight", "last.weight"}
        plan = pl.plan(pl.criteria.Random()(graph), ratio=0.5)
        assert error(pl.apply(model, plan)(x), pl.masked(model, plan)(x)) < 1e-12
        assert model.cache["bias"] is kept and torch.equal(model(x), whole)


def test_a_drawing_has_a_box_per_layer_in_the_colour_of_its_group():
    graph = pl.trace(pl.zoo.resnet20(), torch.ones(1, 3, 32, 32))
    figure = graph.draw()
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert labels[0] == "input" and labels[-1] == "output" and labels.count("+") == 9
    assert {name for name, module in graph.model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))} <= {
        *labels
    }
    boxes = {text.get_text(): tuple(colour) for text, colour in _boxes(figure)}
    assert boxes["conv1"] == boxes["layer1.2.conv2"] != boxes["layer1.0.conv1"]
    assert boxes["fc"] == boxes["input"]
    numbers = [text.get_text() for text in figure.axes[0].texts if text.get_gid() == "number"]
    assert numbers[:4] == ["1", "2", "1", "1"], "conv1, layer1.0.conv1, layer1.0.conv2 and their sum"
    with pytest.raises(pl.PlanError, match="conv99"):
        graph.draw(["conv99"])


def test_a_drawing_of_joined_channels_has_their_colours_side_by_side():
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 2), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.cat([self.a(x), self.b(x)], 1))

    graph = pl.trace(Joined(), torch.ones(1, 4))
    join = next(node for node in network(graph) if node.label == "joined")
    assert [(share, group.name) for share, group in join.parts] == [(0.75, "a"), (0.25, "b")]
    assert [source.label for source in join.sources] == ["a", "b"]


def _boxes(figure):
    """Yield the label and the colour of every box."""
    axes = figure.axes[0]
    (boxes,) = [one for one in axes.collections if isinstance(one, PolyCollection)]
    return zip([text for text in axes.texts if text.get_gid() != "number"], boxes.get_facecolors(), strict=True)


def test_a_graph_is_gone_when_nobody_holds_it():
    """With the model's copy and all that was recorded, at once: nothing waits for the garbage collector."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    gc.collect()
    gc.disable()
    try:
        graph = pl.trace(model, torch.ones(1, 3, 4, 4))
        held = [weakref.ref(graph), *(weakref.ref(op.outputs[0]) for op in graph.tape)]
        assert len(held) > 5 and all(ref() is not None for ref in held)
        del graph
        assert all(ref() is None for ref in held)
    finally:
        gc.enable()

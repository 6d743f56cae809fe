"""The graph back end: a model rebuilt from its operators is the silenced one, whatever sizes its code bakes in."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import prunelab as pl
from prunelab.surgery.rebuilt import ops as replay_ops
from tests.cases import OWN, Case, error, images, perturb, random_plan

SOME = [
    Case("resnet", lambda: pl.zoo.ResNet(8), images(16)),
    Case("vit", lambda: pl.zoo.VisionTransformer(depth=1), images(32)),
    *OWN,
]


def rebuilt(model: nn.Module, plan: pl.Plan) -> fx.GraphModule:
    return pl.apply(model, plan, backend="graph")


def close(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and error(found, wanted) < 1e-9


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_the_graph_equals_the_silenced_network_and_the_cut_class(case: Case):
    model, inputs = case.make()
    plan = random_plan(model, inputs, share=0.4)
    graph, module, silent = rebuilt(model, plan), pl.apply(model, plan, backend="module"), pl.masked(model, plan)
    assert isinstance(graph, fx.GraphModule) and list(graph.state_dict()) == list(model.state_dict())
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    assert {name: value.shape for name, value in graph.state_dict().items()} == shapes
    with torch.no_grad():
        assert error(graph(inputs), model(inputs)) > 1e-4, "a cut that changes nothing tests nothing"
        for batch in (inputs, inputs[:1], torch.cat([inputs, inputs[:1], inputs])):
            assert close(graph(batch), silent(batch)) and close(graph(batch), module(batch))


# ── code that bakes in sizes ──────────────────────────────────────────────────────────────────────────────────────


class Attention(nn.Module):
    """Every size written out: four heads of eight, one fused projection, slices with bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.qkv, self.out = (
            nn.Linear(3, 24),
            nn.LayerNorm(24),
            nn.Linear(24, 96),
            nn.Linear(32, 24),
        )
        self.last = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.into(x))
        qkv = self.qkv(x)
        query, key, value = qkv[..., :32], qkv[..., 32:64], qkv[..., -32:]
        query, key, value = (part.reshape(x.shape[0], 5, 4, 8).transpose(1, 2) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.last(x + self.out(attended.transpose(1, 2).reshape(-1, 5, 32)))


class Split(nn.Module):
    """Chunks of written-out sizes, an expanded and a repeated tensor, a norm over a written-out width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 16), nn.Linear(4, 6), nn.Linear(22, 3)
        self.scale = nn.Parameter(torch.rand(1, 10))

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(self.first(x), [10, 6], dim=1)
        left = left * self.scale.expand(x.shape[0], 10)
        right = F.layer_norm(right, [6]) + self.second(x).view(-1, 2, 3).flatten(1)
        return self.last(torch.cat([left, right, self.second(x)], 1))


class Pictures(nn.Module):
    """Grouped convolutions, group norm and a channel shuffle by hand, with sizes written out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.groups = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2, groups=2)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.group_norm(self.groups(self.first(x)), 4)
        x = x.view(x.shape[0], 16, x.shape[2], x.shape[3]).relu_()
        return self.last(self.up(x).view(-1, 8, 4 * x.shape[2] * x.shape[3]).mean(2))


class Centred(nn.Module):
    """Computes with a width, which in the silenced network stays what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.second(x - x.sum(-1, keepdim=True) / x.shape[-1]).relu())


BAKED = [
    Case("attention", Attention, lambda: torch.randn(2, 5, 3)),
    Case("split", Split, lambda: torch.randn(2, 4)),
    Case("pictures", Pictures, images(6)),
    Case("centred", Centred, lambda: torch.randn(2, 4)),
]


@pytest.mark.parametrize("case", BAKED, ids=lambda case: case.name)
def test_sizes_in_the_code_follow_the_cut(case: Case):
    model, inputs = case.make()
    plan = random_plan(model, inputs, 0.4)
    assert len(plan.cuts) == len(pl.trace(model, inputs).groups) > 1
    with pytest.raises(pl.PlanError):
        pl.apply(model, plan, backend="module")
    graph, silent = rebuilt(model, plan), pl.masked(model, plan)
    with torch.no_grad():
        assert error(graph(inputs), model(inputs)) > 1e-4
        for batch in (inputs, inputs[:1], torch.cat([inputs, inputs[:1]])):
            assert close(graph(batch), silent(batch))
    assert type(model)().load_state_dict(model.state_dict()), "the model is unchanged"


def test_auto_cuts_the_class_where_it_can_and_says_why_where_not():
    model, x = BAKED[0].make()
    plan = random_plan(model, x)
    with pytest.warns(UserWarning, match=r"Attention was rebuilt .* GraphModule, .* cannot be cut: .*reshape|view"):
        graph = pl.apply(model, plan)
    assert isinstance(graph, fx.GraphModule)
    other, inputs = OWN[0].make()
    assert type(pl.apply(other, random_plan(other, inputs))) is type(other)
    with pytest.raises(pl.PlanError, match="nothing was cut"):
        pl.apply(model, plan, inplace=True)
    with pytest.raises(pl.PlanError, match="inplace"):
        pl.apply(model, plan, inplace=True, backend="graph")
    split, x = BAKED[1].make()
    with pytest.raises(pl.PlanError, match="group"):
        pl.apply(Fixed().double(), random_plan(split, x), backend="graph")


@pytest.mark.parametrize("traced", [1, 2, 5])
def test_the_batch_is_free_whatever_it_was_traced_with(traced: int):
    model, _ = BAKED[0].make()
    plan = random_plan(model, torch.randn(traced, 5, 3).double())
    graph, silent = rebuilt(model, plan), pl.masked(model, plan)
    assert graph.input_sizes == {"x": (None, 5, 3)}
    for batch in (1, 2, 7):
        x = torch.randn(batch, 5, 3).double()
        assert close(graph(x), silent(x))


@pytest.mark.parametrize(("height", "width"), [(6, 6), (9, 4), (5, 8)])
def test_image_sizes_are_free_where_the_code_takes_them_from_tensors(height: int, width: int):
    model, inputs = BAKED[2].make()
    plan = random_plan(model, inputs)
    graph, x = rebuilt(model, plan), torch.randn(3, 3, height, width).double()
    assert graph.input_sizes == {"x": (None, 3, None, None)}
    assert close(graph(x), pl.masked(model, plan)(x))


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).reshape(2, 6))


def test_a_batch_size_in_the_code_is_fixed_with_a_warning():
    model, x = Fixed(), torch.randn(2, 4)
    with pytest.warns(UserWarning, match=r"exactly the sizes \{'x': \(2, 4\)\}"):
        graph = rebuilt(model, random_plan(model, x))
    assert graph(x).shape == (2, 2)
    with pytest.raises(pl.BatchError, match=r"`x` has the sizes \[3, 4\].*\[2, 4\]"):
        graph(torch.randn(3, 4))


class Counted(nn.Module):
    """Makes a tensor of the height, and of the batch size if asked to."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.last, self.dim = nn.Conv2d(3, 6, 2), nn.Linear(6, 2), dim

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).mean((2, 3))) * torch.tensor([1.0, 1.0 / x.shape[self.dim]])


def test_a_tensor_made_of_a_size_fixes_that_size():
    high, number, x = Counted(2), Counted(0), torch.randn(2, 3, 8, 8)
    assert rebuilt(high, random_plan(high, x)).input_sizes == {"x": (None, 3, 8, 8)}
    with pytest.warns(UserWarning, match="exactly the sizes"):
        rebuilt(number, random_plan(number, x))


class Padded(nn.Module):
    """Pads by parity of the height, so that other heights call other operators."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 2, stride=2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(F.pad(x, (0, 0, 0, x.shape[2] % 2))).mean((2, 3)))


def test_an_image_size_that_steers_the_code_is_not_free():
    model = Padded()
    graph = rebuilt(model, random_plan(model, torch.randn(2, 3, 8, 8)))
    assert graph.input_sizes == {"x": (None, 3, 8, 8)}
    with pytest.raises(pl.BatchError, match=r"\[2, 3, 9, 8\]"):
        graph(torch.randn(2, 3, 9, 8))


# ── what goes in and comes out ────────────────────────────────────────────────────────────────────────────────────

Pair = namedtuple("Pair", ["first", "second"])


class Structured(nn.Module):
    """Inputs by name, one of them no tensor, and a structure of outputs; constants of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.plain = torch.randn(2)
        self.register_buffer("saved", torch.randn(4))
        self.register_buffer("unsaved", torch.randn(4), persistent=False)
        self.tied = self.first.weight

    def forward(self, x: Tensor, mask: Tensor, flip: bool = False) -> OrderedDict:
        kept = self.first((x + self.saved - self.unsaved) * mask.to(x.dtype)).view(-1, 6)
        place = torch.arange(2, device=x.device) + torch.tensor([0.5, 2.0], device=x.device)
        out = self.last(kept) * self.plain.to(x) + place.to(x)
        out = out.flip(1) if flip else out
        return OrderedDict(out=out, more=[Pair(out.sum(1), None), {"x": x, "number": 3}])


def test_structures_of_inputs_and_outputs_stay():
    torch.manual_seed(0)
    model = Structured().double().eval()
    inputs = {"x": torch.randn(3, 4).double(), "mask": torch.rand(3, 4) > 0.3, "flip": True}
    plan = pl.plan(pl.criteria.Random()(pl.trace(model, inputs)), ratio=0.5)
    graph, silent = rebuilt(model, plan), pl.masked(model, plan)
    inputs = {name: value[:2] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    found, wanted = graph(**inputs), silent(**inputs)
    assert type(found) is OrderedDict and type(found["more"][0]) is Pair and found["more"][0].second is None
    assert close(found["out"], wanted["out"]) and close(found["more"][0].first, wanted["more"][0].first)
    assert found["more"][1]["number"] == 3 and found["more"][1]["x"] is inputs["x"]
    assert list(graph.state_dict()) == list(model.state_dict()) and "unsaved" not in graph.state_dict()
    assert graph.tied is graph.first.weight and graph.tied.shape == (3, 4)
    assert close(graph(inputs["x"], inputs["mask"], True)["out"], wanted["out"]), "by position, in the code's order"
    with pytest.raises(pl.BatchError, match="`flip` is False"):
        graph(**(inputs | {"flip": False}))


def test_the_graph_moves_to_other_types_and_devices_with_its_constants():
    torch.manual_seed(0)
    model = Structured().eval()
    inputs = {"x": torch.randn(3, 4), "mask": torch.rand(3, 4) > 0.3, "flip": True}
    plan = pl.plan(pl.criteria.Random()(pl.trace(model, inputs)), ratio=0.5)
    graph, silent = rebuilt(model, plan).double(), pl.masked(model, plan).double()
    inputs["x"] = inputs["x"].double()
    assert graph(**inputs)["out"].dtype == torch.float64
    assert error(graph(**inputs)["out"], silent(**inputs)["out"]) < 1e-6, "the constants were rounded to float32"
    inputs = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}
    assert graph.to("meta")(**inputs)["out"].device.type == "meta", "meta stands for any other device"


class InPlace(nn.Module):
    """Writes through views, into its activations and into a tensor made by the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x[:, :8].mul_(2).relu_()
        x.unsqueeze(1).add_(0.5)
        extra = torch.tensor([1.0, 2.0, 3.0])
        extra[0] += 1
        return self.last(x) + extra


def test_calls_in_place_and_through_views_stay():
    torch.manual_seed(0)
    model, x = InPlace().double().eval(), torch.randn(3, 4).double()
    graph = pl.trace(model, x)
    plan = pl.plan(pl.criteria.Random()(graph), ratio=0.5, overrides={group.name: 0.5 for group in graph.groups})
    assert plan.cuts
    small, silent = rebuilt(model, plan), pl.masked(model, plan)
    for _ in range(2):
        assert close(small(x), silent(x)), "a second call starts from the same constants"


# ── an ordinary module ────────────────────────────────────────────────────────────────────────────────────────────


def trained(model: nn.Module, x: Tensor) -> Tensor:
    """Return the loss after two steps, in training mode."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        loss = F.cross_entropy(model(x), torch.arange(len(x)) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return F.cross_entropy(model(x), torch.arange(len(x)) % 3)


def test_it_trains_as_the_cut_class_does_batch_norm_included():
    torch.manual_seed(0)
    model, x = perturb(pl.zoo.ResNet(8)).double(), torch.randn(6, 3, 16, 16).double()
    plan = random_plan(model, x)
    graph, module = rebuilt(model, plan), pl.apply(model, plan, backend="module")
    assert graph.training and close(trained(graph, x), trained(module, x))
    for name, value in module.state_dict().items():
        assert error(graph.state_dict()[name].double(), value.double()) < 1e-9, name
    assert int(graph.state_dict()["bn1.num_batches_tracked"]) == 3


def test_a_batch_norm_that_is_frozen_stays_so():
    torch.manual_seed(0)
    model, x = perturb(pl.zoo.ResNet(8)).double(), torch.randn(4, 3, 16, 16).double()
    model.bn1.eval()
    graph = rebuilt(model, random_plan(model, x))
    before = copy.deepcopy(graph.state_dict())
    graph(x)
    changed = {name for name, value in graph.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any(name.startswith("bn1") for name in changed)


def test_compensation_is_that_of_the_cut_class():
    model, x = OWN[0].make()
    plan, batches = random_plan(model, x), [(torch.randn(8, 3, 8, 8).double(), torch.arange(8) % 4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which layers cannot be refitted
        graph = pl.apply(model, plan, backend="graph", compensate=batches)
        module = pl.apply(model, plan, backend="module", compensate=batches)
    assert close(graph(x), module(x)) and not close(graph(x), rebuilt(model, plan)(x))


def test_dropout_follows_the_mode():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 2)).eval(), torch.randn(3, 4)
    graph = rebuilt(model, random_plan(model, x))
    assert torch.equal(graph(x), graph(x)) and not torch.equal(graph.train()(x), graph(x))


def test_a_copy_is_whole_and_apart():
    model, inputs = OWN[0].make()
    graph = rebuilt(model, random_plan(model, inputs))
    twin = copy.deepcopy(graph)
    assert list(twin.state_dict()) == list(graph.state_dict()) and twin.input_sizes == graph.input_sizes
    assert close(twin(inputs), graph(inputs))
    with torch.no_grad():
        twin.last.bias += 1
    assert close(twin(inputs), graph(inputs) + 1)
    structured, x = Structured(), {"x": torch.randn(3, 4), "mask": torch.ones(3, 4)}
    plan = pl.plan(pl.criteria.Random()(pl.trace(structured, x)), ratio=0.5)
    twin = copy.deepcopy(rebuilt(structured, plan))
    assert list(twin.state_dict()) == list(structured.state_dict()) and twin.tied is twin.first.weight
    with pytest.raises(pl.PlanError, match=r"pl\.save"):
        pickle.dumps(twin)


def test_it_is_exported_and_compiled():
    model, x = BAKED[0].make()
    plan = random_plan(model, x)
    graph = rebuilt(model, plan)
    wanted = graph(x)
    exported = torch.export.export(graph, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}})
    compiled = torch.compile(graph, backend="aot_eager")
    assert close(exported.module()(x), wanted) and close(compiled(x), wanted)
    more = torch.cat([x, x, x])
    assert close(exported.module()(more), graph(more)) and close(compiled(more), graph(more))


def test_it_is_traced_silenced_scored_and_cut_again():
    model, x = BAKED[0].make()
    once = rebuilt(model, random_plan(model, x, 0.3))
    batches = [(x, torch.randn(2, 5, 2).double())]
    plan = pl.plan(pl.criteria.get("taylor", loss=F.mse_loss)(pl.trace(once, x), batches), ratio=0.4)
    twice = pl.apply(once, plan)
    assert isinstance(twice, fx.GraphModule) and len(twice.prunelab_plans) == 2
    assert close(twice(x), pl.masked(once, plan)(x))


def test_it_is_saved_and_loaded(tmp_path):
    model, x = BAKED[0].make()
    graph = rebuilt(model, random_plan(model, x))
    with torch.no_grad():
        graph.last.bias += 1
    pl.save(graph, tmp_path / "graph.safetensors")
    again = pl.load(model, tmp_path / "graph.safetensors")
    assert isinstance(again, fx.GraphModule) and close(again(x), graph(x))


def test_default_attention_scales_need_no_scaled_rows_and_are_saved_as_such(tmp_path):
    torch.manual_seed(0)
    model = pl.zoo.VisionTransformer(depth=1).double().eval()
    x = torch.randn(2, 3, 32, 32).double()
    graph = rebuilt(model, random_plan(model, x))
    pl.save(graph, tmp_path / "vit.safetensors")
    assert close(pl.load(model, tmp_path / "vit.safetensors")(x), graph(x)), "loaded by the back end that cut it"


# ── never wrong in silence ────────────────────────────────────────────────────────────────────────────────────────


def test_a_rule_that_forgets_the_cut_is_found_out(monkeypatch):
    model, x = BAKED[0].make()
    plan = random_plan(model, x)

    def forgetful(step: replay_ops.Step) -> None:
        step.give(torch.ops.aten.reshape.default, step.builder.node(step["self"]), list(step.was(step.out())))

    monkeypatch.setitem(replay_ops._BY_NAME, "view", forgetful)
    with pytest.raises(pl.PlanError, match=r"goes wrong at `view` in `(qkv|into)`, so nothing was cut"):
        rebuilt(model, plan)


def test_integers_that_nobody_understands_are_an_error(monkeypatch):
    model, x = BAKED[1].make()
    monkeypatch.setitem(replay_ops._BY_NAME, "native_layer_norm", replay_ops.plain)
    with pytest.raises(pl.PlanError, match="`native_layer_norm` in `Split` takes an integer `normalized_shape`"):
        rebuilt(model, random_plan(model, x))


class Hidden(nn.Module):
    """Returns a thing of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict:
        return {"x": self.last(self.first(x)), "what": object()}


def test_an_output_that_is_no_structure_of_tensors_is_an_error():
    model, x = Hidden(), torch.randn(3, 4)
    with pytest.raises(pl.PlanError, match="Hidden returns a object"):
        rebuilt(model, random_plan(model, x))

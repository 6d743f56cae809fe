"""Compensation: what is left is refitted by least squares, whatever the layer, and never makes a layer worse."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import prunelab as pl
from prunelab.surgery.refit.options import Compensation
from tests.cases import Case, error, images, perturb, random_plan

EXACT = {"damping": 0.0, "sequential": False}


def batches(x: Tensor, size: int = 1000) -> list[tuple[Tensor, Tensor]]:
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(size)]


def same_shapes(one: nn.Module, other: nn.Module) -> bool:
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (one, other)]
    return type(one) is type(other) and shapes[0] == shapes[1]


def stays(model: nn.Module, plan: pl.Plan) -> dict[str, Tensor]:
    """Return, for every parameter, which of its entries the cut keeps: silence a network of ones."""
    ones = copy.deepcopy(model)
    for parameter in ones.parameters():
        parameter.data.fill_(1)
    return {name: value.detach() != 0 for name, value in pl.masked(ones, plan).named_parameters()}


def put_back(cut: nn.Module, keep: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of a cut network in the shapes of the whole one, with zeros where entries went."""
    return {
        name: torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, dict(cut.named_parameters())[name])
        for name, mask in keep.items()
    }


def inputs_of(model: nn.Module, layers: list[str], x: Tensor) -> dict[str, tuple]:
    """Return what the named modules are called with, by hooks."""
    found: dict[str, tuple] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found.update({name: args}))
        for name in layers
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def least_squares(layer: nn.Module, args: tuple, free: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters for which a layer, linear in them, is nearest to its output; only ``free`` entries not 0.

    The design matrix is the derivative of the layer's output, by autograd: nothing is said about how a layer works.
    """
    whole = dict(layer.named_parameters())
    names = list(free)
    zeros = {name: torch.zeros_like(value) for name, value in whole.items()}
    design = jacrev(lambda values: functional_call(layer, values, args))(zeros)
    output = layer(*args).detach().flatten()
    columns = [design[name].detach().reshape(len(output), -1)[:, free[name].flatten()] for name in names]
    solution = torch.linalg.lstsq(torch.cat(columns, 1), output, driver="gelsd").solution
    parts = solution.split([part.shape[1] for part in columns])
    return {
        name: torch.zeros_like(whole[name]).masked_scatter(free[name], part).detach()
        for name, part in zip(names, parts, strict=True)
    }


def conv(**options: object) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, **options), nn.Tanh(), nn.Conv2d(4, 2, 1)
    )


def transposed() -> nn.Module:
    up = nn.ConvTranspose2d(6, 3, 3, stride=2, padding=1, output_padding=1, dilation=1)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), up, nn.ReLU(), nn.Conv2d(3, 2, 1))


class Grouping(nn.Module):
    """The consumer has groups: the same channels go from each."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.second = kind(8, 4, 3, stride=2, padding=1, groups=2)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).sigmoid())


class Joined(nn.Module):
    """Two producers are concatenated into one consumer, and the first also goes elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 6), nn.Linear(5, 4)
        self.both, self.own = nn.Linear(10, 3), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x).relu()
        return self.both(torch.cat([left, self.right(x).tanh()], 1)) * self.own(left)


class Normed(nn.Module):
    """A convolution without bias between batch norms, and a shortcut: all that read the trunk lose its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.body, self.body_norm = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.next, self.last_norm = nn.Conv2d(6, 4, 1, stride=2, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        x = F.silu(x + self.body_norm(self.body(x)))
        return self.head(F.silu(self.last_norm(self.next(x))).mean((2, 3)))


class Attending(nn.Module):
    """PyTorch's attention: fused rows, read as a whole for one input and slice by slice for two."""

    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.cross = cross
        self.embed, self.other = nn.Linear(5, 8), nn.Linear(5, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        trunk = self.embed(x).tanh()
        memory = self.other(x).relu() if self.cross else trunk
        return self.head(self.attention(trunk, memory, memory, need_weights=False)[0])


def rows(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


LAYERS = [
    (Case("linear", lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), rows(40, 5)), ["2"]),
    (Case("tokens", lambda: nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)), rows(6, 8, 5)), ["2"]),
    (Case("padded", conv(padding=1), images(6, 4)), ["2"]),
    (Case("strided", conv(padding=(2, 0), stride=(2, 1), dilation=(1, 2)), images(7, 6)), ["2"]),
    (Case("same", conv(padding="same", bias=False), images(5, 6)), ["2"]),
    (Case("flattened", lambda: nn.Sequential(conv()()[0], nn.Flatten(), nn.LazyLinear(3)), images(2, 60)), ["2"]),
    (Case("transposed", transposed, images(5, 9)), ["2"]),
    (Case("groups", lambda: Grouping(False), images(7, 7)), ["second", "last"]),
    (Case("transposed groups", lambda: Grouping(True), images(4, 9)), ["second", "last"]),
    (Case("concatenation", Joined, rows(50, 5)), ["both", "own"]),
    (Case("batch norm", Normed, images(6, 8)), ["body", "next", "head"]),
]


def make(case: Case) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = case.build().eval(), case.inputs()
    with torch.no_grad():
        model(x)  # gives lazy layers their shape
    return perturb(model).double(), x.double()


@pytest.mark.parametrize(("case", "layers"), LAYERS, ids=[case.name for case, _ in LAYERS])
def test_refitted_weights_are_those_of_least_squares(case: Case, layers: list[str]):
    model, x = make(case)
    plan = random_plan(model, x)
    cut = pl.apply(model, plan, compensate=Compensation(batches(x, 7), **EXACT))
    assert same_shapes(cut, pl.apply(model, plan))
    keep = stays(model, plan)
    found, args = put_back(cut, keep), inputs_of(model, layers, x)
    for name in layers:
        layer = model.get_submodule(name)
        free = {part: keep[f"{name}.{part}"] for part, _ in layer.named_parameters()}
        columns = free["weight"].any(0 if not isinstance(layer, nn.ConvTranspose2d) else 1, keepdim=True)
        free["weight"] = columns.expand_as(layer.weight)  # rows that go change nothing for those that stay
        free |= {"bias": torch.ones_like(layer.bias, dtype=torch.bool)} if layer.bias is not None else {}
        assert not columns.all(), "this layer loses nothing"
        wanted = least_squares(layer, args[name], free)
        for part, values in wanted.items():
            stayed = keep[f"{name}.{part}"]
            assert error(found[f"{name}.{part}"][stayed], values[stayed]) < 1e-8, part
            assert error(found[f"{name}.{part}"][stayed], model.get_parameter(f"{name}.{part}")[stayed]) > 1e-3


def fit(u: Tensor, y: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the map from the kept columns of u ``[rows, in]`` nearest to y ``[rows, out]``."""
    u, y = u.flatten(0, -2), y.flatten(0, -2)
    solution = torch.linalg.lstsq(torch.cat([u[:, keep], torch.ones(len(u), 1)], 1).double(), y).solution
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("cross", [False, True])
def test_fused_projections_are_refitted_slice_by_slice(cross: bool):
    torch.manual_seed(0)
    model, x = perturb(Attending(cross)).double().eval(), torch.randn(20, 6, 5).double()
    plan = random_plan(model, x)
    cut = pl.apply(model, plan, compensate=Compensation(batches(x, 7), **EXACT))
    keep, layer = stays(model, plan), model.attention
    with torch.no_grad():
        trunk = model.embed(x).tanh()
        memory = model.other(x).relu() if cross else trunk
        given = [trunk, memory, memory]
        parts = list(zip(given, layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True))
        query, key, value = (F.linear(u, w, b).unflatten(-1, (2, 4)).transpose(1, 2) for u, w, b in parts)
        mixed = ((query @ key.mT / 2).softmax(-1) @ value).transpose(1, 2).flatten(2)
        columns, inner = keep["attention.in_proj_weight"].any(0), keep["attention.out_proj.weight"].any(0)
        assert not columns.all() and not inner.all()
        wanted = [fit(u, F.linear(u, w, b), columns) for u, w, b in parts]
        out, shift = fit(mixed, layer.out_proj(mixed), inner)
    found = put_back(cut, keep)
    rows = keep["attention.in_proj_bias"]
    weight = torch.cat([w for w, _ in wanted])[rows]
    assert error(found["attention.in_proj_weight"][rows][:, columns], weight) < 1e-8
    assert error(found["attention.in_proj_bias"][rows], torch.cat([b for _, b in wanted])[rows]) < 1e-8
    rows = keep["attention.out_proj.bias"]
    assert error(found["attention.out_proj.weight"][rows][:, inner], out[rows]) < 1e-8
    assert error(cut.attention.out_proj.bias, shift[rows]) < 1e-8


@pytest.mark.parametrize("damping", [0.01, 0.5, None])
def test_damping_holds_the_weights_that_stay(damping: float | None):
    model, x = make(LAYERS[0][0])
    plan = random_plan(model, x)
    cut = pl.apply(model, plan, compensate=Compensation(batches(x), damping=damping, sequential=False))
    keep = stays(model, plan)["2.weight"][0]
    u, last = model[:2](x).detach(), model[2]
    design = torch.cat([u[:, keep], torch.ones(len(u), 1)], 1).double()
    now = torch.cat([last.weight[:, keep], last.bias[:, None]], 1).T.detach()
    damping = 0.01 + design.shape[1] / (2 * len(u)) if damping is None else damping
    level = design.square().sum(0)
    level[:-1] = level[:-1].clamp(min=level[:-1].quantile(0.75))
    root = (damping * level).sqrt().diag()
    rows, wanted = torch.cat([design, root]), torch.cat([last(u).detach(), root @ now])
    solution = torch.linalg.lstsq(rows, wanted).solution
    assert error(cut[2].weight, solution[:-1].T) < 1e-8 and error(cut[2].bias, solution[-1]) < 1e-8


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("flattened", [False, True])
def test_channels_are_refitted_where_patches_need_too_much_memory(flattened: bool, sequential: bool):
    """Removed channels are told from the kept ones pixel by pixel, each as often as some patch sees it."""
    name = "flattened" if flattened else "padded"
    model, x = make(next(case for case, _ in LAYERS if case.name == name))
    plan = random_plan(model, x)
    options = {"damping": 0.0, "sequential": sequential, "memory": 8 * 8 * 8}
    cut = pl.apply(model, plan, compensate=Compensation(batches(x, 7), **options))
    keep = stays(model, plan)
    layer, place = model[2], 0 if flattened else 2
    images = model[:2][:1](x).detach() if flattened else model[:2](x).detach()
    channels = keep[f"{place}.weight"].flatten(1)[:, 0] if flattened else keep["2.weight"].any(0)[:, 0, 0]
    weight = layer.weight.detach().unflatten(1, (6, -1)) if flattened else layer.weight.detach().flatten(2)
    if flattened:
        seen = images.flatten(2).movedim(1, -1).flatten(0, 1)
    else:
        seen = F.unfold(images, 3, padding=1).unflatten(1, (6, 9)).movedim(1, -1).flatten(0, 2)
    design = torch.cat([seen[:, channels], torch.ones(len(seen), int(flattened))], 1).double()
    told = torch.linalg.lstsq(design, seen[:, ~channels]).solution  # what stays -> what goes
    wanted = weight[:, channels] + torch.einsum("ort,kr->okt", weight[:, ~channels], told[: int(channels.sum())])
    found = put_back(cut, keep)["2.weight"].view(weight.shape)[:, channels]
    stayed = slice(None) if flattened else keep["2.bias"]
    assert error(found[stayed], wanted[stayed]) < 1e-8
    if flattened:
        shift = torch.einsum("ort,r->o", weight[:, ~channels], told[-1])
        assert error(cut[2].bias, layer.bias + shift) < 1e-8


def test_an_input_that_is_hardly_ever_there_gets_no_large_weight():
    """One sample in which a unit is just above zero says little about what it could tell."""
    model, x = make(LAYERS[0][0])
    plan = pl.plan(pl.criteria.Random()(pl.trace(model, x)), ratio=0.4)
    unit = next(unit for unit in range(7) if unit not in plan.removed["0"])
    with torch.no_grad():
        model[0].bias[unit] -= model[0](x)[:, unit].max() - 1e-6
    cut = pl.apply(model, plan, compensate=Compensation(batches(x), sequential=False))
    column = [u for u in range(7) if u not in plan.removed["0"]].index(unit)
    assert error(cut[2].weight[:, column], model[2].weight[:, unit]) < 1e-3
    assert error(cut[2].weight, pl.apply(model, plan)[2].weight) > 0.05


def test_a_layer_used_twice_is_refitted_for_both():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.both = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.both(self.one(x).relu()) * self.both(self.two(x).tanh())

    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(50, 4).double()
    plan = random_plan(model, x)
    cut = pl.apply(model, plan, compensate=Compensation(batches(x, 7), **EXACT))
    u = torch.cat([model.one(x).relu(), model.two(x).tanh()]).detach()
    weight, bias = fit(u, model.both(u).detach(), stays(model, plan)["both.weight"][0])
    assert error(cut.both.weight, weight) < 1e-8 and error(cut.both.bias, bias) < 1e-8

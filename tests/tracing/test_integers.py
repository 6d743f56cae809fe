"""Integers in a model's code: each is followed by where it comes from, and one integer stays one integer."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab.surgery.sizes import layer_sizes
from prunelab.tracing.integers import Attribute, Notes, Observed, observe, show
from tests.attention import HEADS, REPLICAS, WIDTH, Bert, Configured, Gpt2, Llama, Projections, Shaped, Sizes, attend
from tests.cases import error, perturb


def network(*blocks: nn.Module) -> tuple[nn.Module, Tensor]:
    """Return a network around blocks, in float64, and a batch for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, WIDTH), *blocks, nn.Linear(WIDTH, 5))
    return perturb(model).double().eval(), torch.randn(2, 7, 6).double()


def half(model: nn.Module, inputs: Any, seed: int = 0, **budget: Any) -> pl.Plan:
    """Return a plan that takes half of every group, or what a budget says, at random."""
    scores = pl.criteria.Random(seed)(pl.trace(model, inputs))
    return pl.plan(scores, **(budget or {"ratio": 0.5, "scope": "layer"}))


def output(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out if isinstance(out, Tensor) else out[0]


def check_cut(model: nn.Module, inputs: Any, plan: pl.Plan, tolerance: float = 1e-9) -> nn.Module:
    """Cut a model in its own class, hold it against the silenced one, and return it."""
    cut = pl.apply(model, plan, backend="module")
    assert type(cut) is type(model)
    assert error(output(cut, inputs), output(pl.masked(model, plan), inputs)) < tolerance
    assert error(output(cut, inputs), output(model, inputs)) > 1e-4, "a cut that changes nothing tests nothing"
    return cut


# ── what libraries do ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("block", REPLICAS, ids=lambda block: block.__name__)
def test_heads_and_widths_are_cut_in_the_models_own_class(block: type[nn.Module]):
    model, inputs = network(block())
    cut = check_cut(model, inputs, half(model, inputs))
    again = check_cut(cut, inputs, half(cut, inputs, ratio=0.3, scope="layer"))
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in cut.parameters())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", REPLICAS, ids=lambda block: block.__name__)
def test_a_plan_for_a_budget_never_asks_for_what_the_class_cannot_do(block: type[nn.Module], seed: int):
    model, inputs = network(block())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flops=0.6: the plan", category=UserWarning)  # few, large units
        plan = half(model, inputs, seed, flops=0.6)
    check_cut(model, inputs, plan)


def test_an_integer_that_gave_no_size_stays():
    model, inputs = network(Bert())
    cut: Any = check_cut(model, inputs, half(model, inputs))
    block = cut[1]
    assert (block.num_attention_heads, block.attention_head_size, block.all_head_size) == (2, 4, 8)
    assert (block.warmup_epochs, block.window, block.pair, block.hidden_size) == (4, 8, (4, 8), 32)


def test_integers_in_containers_are_followed_one_by_one():
    model, inputs = network(Shaped())
    block: Any = check_cut(model, inputs, half(model, inputs))[1]  # type: ignore[index]
    assert block.shape == (2, 4) and block.other == (4, 8)
    assert block.sizes == {"inner": [8, 4], "epochs": 4} and block.epochs == {"epochs": 4}


def test_a_frozen_configuration_is_copied_with_the_model_and_followed():
    model, inputs = network(Configured())
    cut: Any = check_cut(model, inputs, half(model, inputs))
    assert cut[1].config == Sizes(hidden=8, heads=2, epochs=4)
    assert model[1].config == Sizes()  # type: ignore[index, union-attr]


def test_in_place_the_models_own_configuration_follows():
    model, inputs = network(Configured())
    plan = half(model, inputs)
    wanted = output(pl.masked(model, plan), inputs)
    assert pl.apply(model, plan, inplace=True) is model
    assert error(output(model, inputs), wanted) < 1e-9
    assert model[1].config == Sizes(hidden=8, heads=2, epochs=4)  # type: ignore[index, union-attr]


def test_tracing_leaves_the_models_integers_alone():
    model, inputs = network(Llama(), Shaped(), Configured())
    before = [{key: value for key, value in vars(module).items() if key[0] != "_"} for module in model]
    pl.trace(model, inputs)
    for module, attributes in zip(model, before, strict=True):
        assert all(vars(module)[name] is value for name, value in attributes.items())
    assert type(model[1].config.hidden_size) is int  # type: ignore[index, union-attr]


# ── one integer, one size ─────────────────────────────────────────────────────────────────────────────────────────


class Reader(Projections):
    """Attention that reads its sizes from a configuration, in forward."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(self.several(x, self.config.heads, self.config.width).flatten(2))


def test_layers_that_read_one_integer_lose_equal_numbers():
    config = SimpleNamespace(heads=HEADS, width=8, layers=8)
    model, inputs = network(Reader(config), Reader(config))
    bundles = {tuple(group.name for group in bundle) for bundle in pl.trace(model, inputs).bundles}
    assert ("1.q:heads", "2.q:heads") in bundles
    assert ("1.q:head_width", "1.v:1", "2.q:head_width", "2.v:1") in bundles
    cut: Any = check_cut(model, inputs, half(model, inputs))
    assert vars(cut[1].config) == {"heads": 2, "width": 4, "layers": 8} and cut[1].config is cut[2].config


class Phi(nn.Module):
    """Queries, keys and values cut out at products of a shared integer and one of its own; nothing past the end."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config, self.head_dim, self.num_key_value_heads = config, 8, 2
        self.qkv, self.o = nn.Linear(WIDTH, WIDTH + 32), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out = self.qkv(x)
        first = self.config.num_attention_heads * self.head_dim
        second = first + self.num_key_value_heads * self.head_dim
        shape = (*x.shape[:-1], -1, self.head_dim)
        parts = out[..., :first], out[..., first:second], out[..., second:]
        query, key, value = (part.view(shape).transpose(1, 2) for part in parts)
        query = torch.cat([query[..., : key.shape[-1]], query[..., key.shape[-1] :]], dim=-1)
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        return x + self.o(attend(query, key, value).flatten(2))


def test_products_with_a_shared_integer_are_tied_factor_by_factor():
    config = SimpleNamespace(num_attention_heads=HEADS)
    model, inputs = network(Phi(config), Phi(config))
    graph = pl.trace(model, inputs)
    assert sorted(len(bundle) for bundle in graph.bundles) == [1, 2, 2, 2, 2]
    assert [[group.name for group in bundle] for bundle in graph.bundles] == [
        [group.name for group in bundle] for bundle in pl.trace(model, inputs).bundles
    ]
    cut: Any = check_cut(model, inputs, half(model, inputs))
    assert (cut[1].config.num_attention_heads, cut[1].num_key_value_heads, cut[1].head_dim) == (1, 1, 4)


def test_layers_with_integers_of_their_own_are_cut_on_their_own():
    model, inputs = network(Bert(), Bert())
    graph = pl.trace(model, inputs)
    assert all(len({group.name.split(".")[0] for group in bundle}) == 1 for bundle in graph.bundles)
    others = {group.name: 0.0 for group in graph.groups if group.name != "1.q:heads"}
    plan = pl.plan(pl.criteria.Random()(graph), ratio=0.5, overrides={**others, "1.q:heads": 0.5})
    cut: Any = check_cut(model, inputs, plan)
    assert (cut[1].num_attention_heads, cut[2].num_attention_heads) == (2, 4)


def test_rotary_halves_and_values_lose_equal_numbers():
    model, inputs = network(Llama())
    sizes = {tuple(group.size for group in bundle) for bundle in pl.trace(model, inputs).bundles}
    assert (4, 4, 4) in sizes  # the pairs of queries and keys, and both halves of the values


class Wide(nn.Module):
    """Two layers whose widths the code takes from one integer."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.first, self.last, self.size = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), WIDTH
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        if self.keep:
            x = x.cumsum(-1)  # every entry of the input matters
        return self.last(self.first(x.view(*x.shape[:2], self.size)).view(*x.shape[:2], self.size).relu())


def test_two_axes_of_one_integer_lose_equal_numbers():
    model, inputs = network(Wide(keep=False))
    assert ("0", "1.first") in {tuple(group.name for group in bundle) for bundle in pl.trace(model, inputs).bundles}
    assert check_cut(model, inputs, half(model, inputs))[1].size == 16  # type: ignore[index]


def test_an_axis_that_shares_its_integer_with_a_frozen_one_is_frozen():
    model, inputs = network(Wide(keep=True))
    assert "must stay as large as another axis" in pl.trace(model, inputs).frozen["1.first.weight", 0]


class Offset(nn.Module):
    """Sizes from integers that are negative, zero and one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
        self.ten, self.minus, self.zero, self.one, self.eight = 10, -2, 0, 1, 8

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).flatten(0, 1)
        x = x.view(-1, self.ten + self.minus).relu().view(-1, self.one * self.eight).view(-1, self.zero + self.eight)
        x = x.view(-1, self.one, self.eight // self.one).view(-1, 2 * self.eight - self.eight)
        return self.last(x).unflatten(0, (2, -1))


def test_integers_below_two_are_constants():
    model, inputs = network(Offset())
    block: Any = check_cut(model, inputs, half(model, inputs))[1]  # type: ignore[index]
    assert (block.ten, block.minus, block.zero, block.one, block.eight) == (6, -2, 0, 1, 4)


def test_repeats_that_a_cut_leaves_out_are_no_obstacle():
    model, inputs = network(Llama())
    graph = pl.trace(model, inputs)
    repeats = graph.groups_of("1.q.weight")[1]
    others = {group.name: 0.0 for group in graph.groups if group is not repeats}
    plan = pl.plan(pl.criteria.Random()(graph), ratio=0.5, overrides={**others, repeats.name: 0.5})
    block: Any = check_cut(model, inputs, plan)[1]  # type: ignore[index]
    assert block.num_key_value_groups == 1 and block.head_dim == 8


class Torn(nn.Module):
    """One integer for axes that can never have one size again: a square, and a side of it."""

    def __init__(self) -> None:
        super().__init__()
        self.side = 4
        self.first, self.second, self.last = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 8), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.first(x).view(*x.shape[:2], self.side * self.side).relu()
        pairs = self.second(x).view(*x.shape[:2], -1, self.side).roll(1, -1).flatten(2)
        return self.last(torch.cat([grid, pairs], dim=-1))


def test_what_one_integer_cannot_follow_is_frozen_by_its_name():
    model, inputs = network(Torn())
    graph = pl.trace(model, inputs)
    assert "1.side" in graph.frozen["1.first.weight", 0]
    check_cut(model, inputs, half(model, inputs))  # the rest


def test_a_plan_that_would_make_one_integer_two_is_an_error():
    model, inputs = network(Bert())
    scores = pl.criteria.Random()(pl.trace(model, inputs))
    plan = pl.plan(scores, ratio=0.5, scope="layer")
    text = json.loads(plan.to_json())
    cut = next(cut for cut in text["cuts"] if cut["group"] == "1.v:1")
    cut["removed"] = cut["removed"][:-1]
    with pytest.raises(pl.PlanError, match=r"would make `1\.attention_head_size` two numbers, 4 and 5"):
        pl.apply(model, pl.Plan.from_json(json.dumps(text)), backend="module")


# ── functions that take sizes ─────────────────────────────────────────────────────────────────────────────────────


class Calls(nn.Module):
    """A layer of 24 units, what is done with them, and a layer after it."""

    def __init__(self, out: int = 24) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 24), nn.Linear(out, WIDTH)
        self.four, self.six, self.half, self.all, self.epochs, self.shape = 4, 6, 12, 24, 24, (24,)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Normed(Calls):
    def between(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape) + F.layer_norm(x, (self.all,))


class Grouped(Calls):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(24, 6, 1))

    def between(self, x: Tensor) -> Tensor:
        return F.group_norm(F.conv1d(x.transpose(1, 2), self.kernel, groups=self.four), self.four).transpose(1, 2)


class Halved(Calls):
    def between(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., self.all // 2 :].sigmoid() * x[..., : self.all // 2], x[..., : self.half]], dim=-1)


class Narrowed(Calls):
    def between(self, x: Tensor) -> Tensor:
        left, right = x.narrow(-1, 0, self.half), torch.narrow(x, dim=-1, start=self.half, length=self.half)
        return torch.cat([right.tanh(), left.sigmoid()], dim=-1)


class SplitUp(Calls):
    def between(self, x: Tensor) -> Tensor:
        parts = [*torch.split(x, [self.six, self.all - self.six], dim=-1), *x.split(self.half, dim=-1)]
        return torch.cat([parts[1].tanh(), parts[0]], dim=-1) * torch.cat([parts[3], parts[2]], dim=-1)


class Repeated(Calls):
    def __init__(self) -> None:
        super().__init__(out=96)

    def between(self, x: Tensor) -> Tensor:
        return x.relu().repeat(1, 1, self.four).view(*x.shape[:-1], self.four * self.all)


class Interleaved(Calls):
    def __init__(self) -> None:
        super().__init__(out=96)

    def between(self, x: Tensor) -> Tensor:
        x = x.relu().unflatten(-1, (self.four, self.six))
        return x.repeat_interleave(self.four, dim=-2).reshape(*x.shape[:2], -1)


class Expanded(Calls):
    def __init__(self) -> None:
        super().__init__(out=48)
        self.token = nn.Parameter(torch.randn(1, 1, 24))

    def between(self, x: Tensor) -> Tensor:
        return torch.cat([x.relu(), self.token.expand(x.shape[0], x.shape[1], self.all)], dim=-1)


class Unflattened(Calls):
    def __init__(self) -> None:
        super().__init__()
        self.open = nn.Unflatten(-1, (4, 6))

    def between(self, x: Tensor) -> Tensor:
        return self.open(x).transpose(-2, -1).relu().flatten(-2)


class Shuffled(Calls):
    def between(self, x: Tensor) -> Tensor:
        return F.channel_shuffle(x.transpose(1, 2), self.four).transpose(1, 2).relu()


class ShuffledByLayer(Calls):
    def __init__(self) -> None:
        super().__init__()
        self.shuffle = nn.ChannelShuffle(4)

    def between(self, x: Tensor) -> Tensor:
        return self.shuffle(x.transpose(1, 2)).transpose(1, 2).relu()


class NormedWithoutWeights(Calls):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24, elementwise_affine=False)

    def between(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Powers(Calls):
    def __init__(self) -> None:
        super().__init__(out=16)
        self.first = nn.Linear(WIDTH, 16)

    def between(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.four, self.four).relu().reshape(*x.shape[:2], self.four**2)


class Summed(Calls):
    def __init__(self) -> None:
        super().__init__(out=36)
        self.other = nn.Linear(24, 12)

    def between(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.other(x)], dim=-1).relu().reshape(*x.shape[:2], self.all + self.half)


class OfLayers(Calls):
    def between(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.four, self.first.out_features // self.four).relu().flatten(2)


class Turned(nn.Module):
    """A layer for channels in second place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


CALLS = (Normed, Grouped, Halved, Narrowed, SplitUp, Repeated, Interleaved, Expanded, Unflattened, Shuffled, Powers)
CALLS += (Summed, OfLayers, ShuffledByLayer, NormedWithoutWeights)


@pytest.mark.parametrize("block", CALLS, ids=lambda block: block.__name__)
def test_sizes_are_followed_through_whatever_takes_them(block: type[nn.Module]):
    model, inputs = network(block())
    graph = pl.trace(model, inputs)
    assert any(group.name.startswith("1.first") for group in graph.groups)
    cut: Any = check_cut(model, inputs, half(model, inputs))
    assert cut[1].epochs == 24


def test_layers_say_their_new_sizes():
    model, inputs = network(Gpt2(), Turned(nn.PReLU(WIDTH)))
    cut: Any = check_cut(model, inputs, half(model, inputs))
    assert (cut[1].c_attn.nx, cut[1].c_attn.nf) == tuple(cut[1].c_attn.weight.shape) == (16, 24)
    assert cut[2].layer.num_parameters == 16 and cut[3].in_features == 16


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (nn.RMSNorm(6), {"normalized_shape": (6,)}),
        (nn.Bilinear(2, 3, 4), {"in1_features": 2, "in2_features": 3, "out_features": 4}),
        (nn.EmbeddingBag(5, 6), {"embedding_dim": 6}),
        (nn.Identity(), {}),
    ],
)
def test_sizes_of_layers_are_read_off_their_parameters(layer: nn.Module, sizes: dict[str, Any]):
    assert layer_sizes(layer, None) == sizes
    assert {name: getattr(layer, name) for name in sizes} == sizes


def test_an_integer_that_picks_a_place_stays():
    class Rolled(Calls):
        def between(self, x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], self.four, self.six).roll(self.four - 1, dims=1).relu().flatten(2)

    model, inputs = network(Rolled())
    graph = pl.trace(model, inputs)
    assert [group.size for group in graph.groups if group.name.startswith("1.first")] == [6]
    assert check_cut(model, inputs, half(model, inputs))[1].four == 4  # type: ignore[index]


def test_einops_is_followed_block_by_block():
    einops = pytest.importorskip("einops")

    class Rearranged(Projections):
        def keep(self) -> None:
            self.heads, self.epochs = HEADS, HEADS

        def forward(self, x: Tensor) -> Tensor:
            parts = (layer(x) for layer in (self.q, self.k, self.v))
            query, key, value = (einops.rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in parts)
            return x + self.o(einops.rearrange(attend(query, key, value), "b n h d -> b n (h d)"))

    model, inputs = network(Rearranged(), Rearranged())
    output(model, inputs)  # einops remembers shapes
    graph = pl.trace(model, inputs)
    assert {len(bundle) for bundle in graph.bundles} == {1}
    others = {group.name: 0.0 for group in graph.groups if group.name != "2.q:heads"}
    plan = pl.plan(pl.criteria.Random()(graph), ratio=0.5, overrides={**others, "2.q:heads": 0.5})
    cut: Any = check_cut(model, inputs, plan)
    assert (cut[1].heads, cut[2].heads, cut[2].epochs) == (4, 2, 4)


# ── what cannot be watched ────────────────────────────────────────────────────────────────────────────────────────


class Strict(Projections):
    """Refuses what only behaves like an integer."""

    def keep(self) -> None:
        self.heads = HEADS

    def forward(self, x: Tensor) -> Tensor:
        if type(self.heads) is not int:
            raise TypeError("heads must be an int")
        return self.o(self.several(x, self.heads, -1).flatten(2))


class Enclosed(Projections):
    """Keeps a size where nobody sees it."""

    def keep(self) -> None:
        def opened(x: Tensor, heads: int = HEADS) -> Tensor:
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)

        self.opened = opened

    def forward(self, x: Tensor) -> Tensor:
        return self.o(attend(*(self.opened(layer(x)) for layer in (self.q, self.k, self.v))).flatten(2))


@pytest.mark.parametrize("block", [Strict, Enclosed])
def test_code_that_hides_its_integers_is_refused_or_rebuilt(block: type[nn.Module]):
    model, inputs = network(block())
    plan = half(model, inputs)
    assert plan.removed["1.q:heads"]
    with pytest.raises(pl.PlanError, match="nothing was cut"):
        pl.apply(model, plan, backend="module")
    with pytest.warns(UserWarning, match="rebuilt from its operators"):
        rebuilt = pl.apply(model, plan)
    assert error(output(rebuilt, inputs), output(pl.masked(model, plan), inputs)) < 1e-9


def test_a_failure_is_that_of_the_model_with_plain_integers():
    class Broken(Strict):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[..., 99]

    model, inputs = network(Broken())
    with pytest.raises(pl.TraceError, match="index 99 is out of bounds"):
        pl.trace(model, inputs)


def test_a_configuration_that_copies_itself_is_left_alone():
    class Single(SimpleNamespace):
        def __deepcopy__(self, memo: dict) -> Single:
            return self

    config = Single(heads=HEADS, width=8)
    model, inputs = network(Reader(config))
    plan = half(model, inputs)
    with pytest.raises(pl.PlanError, match="nothing was cut"):
        pl.apply(model, plan, backend="module")
    assert (config.heads, config.width) == (4, 8)


# ── an integer in every respect ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def eight() -> Observed:
    return observe(8, Attribute("block", ("heads",)), Notes([]))


def test_an_observed_integer_behaves_as_an_integer(eight: Observed):
    assert isinstance(eight, int) and eight == 8 and hash(eight) == hash(8) and {8: "a"}[eight] == "a"
    assert f"{eight}" == str(eight) == repr(eight) == "8" and f"{eight:03d}" == "008" and json.dumps([eight]) == "[8]"
    assert list(range(eight)) == list(range(8)) and [0] * eight == [0] * 8 and "abcdefghi"[eight] == "i"
    assert eight % 3 == 2 and eight << 1 == 16 and eight / 3 == 8 / 3 and 2**eight == 256 and eight**-1 == 0.125
    assert divmod(eight, 3) == (2, 2) and divmod(20, eight) == (2, 4) and math.sqrt(eight) == 8**0.5
    assert eight * 1.5 == 12.0 and not eight - 8 and eight > 7 and -eight == -8 and abs(-eight) == 8
    assert math.floor(eight / 4) == 2 and round(eight / 4) == 2 and int(eight / 4) == 2
    with pytest.raises(ZeroDivisionError):
        eight // 0
    with pytest.raises(TypeError):
        eight + "a"  # type: ignore[operator]


def test_a_copy_of_an_observed_integer_is_plain(eight: Observed):
    for copied in (copy.deepcopy(eight), copy.copy(eight), pickle.loads(pickle.dumps(eight)), int(eight)):
        assert type(copied) is int and copied == 8
    assert type(copy.copy(eight / 2)) is float


@pytest.mark.parametrize(
    ("compute", "formula"),
    [
        (lambda n: 3 * n, "3 * block.heads"),
        (lambda n: n * n, "block.heads * block.heads"),
        (lambda n: n // 2 + 1, "(block.heads // 2) + 1"),
        (lambda n: 10 - n, "10 - block.heads"),
        (lambda n: 64 // n, "64 // block.heads"),
        (lambda n: math.prod((2, n)), "2 * block.heads"),
        (lambda n: math.floor(n / 2), "block.heads // 2"),
        (lambda n: n**2, "block.heads * block.heads"),
    ],
)
def test_what_is_computed_from_an_observed_integer_says_how(compute: Any, formula: str, eight: Observed):
    assert show(compute(eight).source) == formula and compute(eight) == compute(8)


def test_a_division_with_a_remainder_is_not_followed(eight: Observed):
    assert type(eight // 3) is int and type(eight / 3) is float and type(eight % 3) is int


# ── the classes of transformers ───────────────────────────────────────────────────────────────────────────────────


def hugging_face(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a tiny model with random weights, and a batch for it."""
    hf = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    mlp = {"intermediate_size": 48}
    tokens = {"input_ids": torch.randint(5, 60, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    torch.manual_seed(0)
    match name:
        case "gpt2":
            model = hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=32, n_embd=32, n_layer=2, n_head=4, **sizes))
        case "llama":
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **mlp, num_key_value_heads=2))
        case "qwen2":
            model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes, **mlp, num_key_value_heads=2))
        case "neox":
            model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**sizes, **mlp, rotary_pct=0.5))
        case "bert":
            model = hf.BertModel(hf.BertConfig(**sizes, **mlp))
        case "opt":
            config = hf.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32)
            model = hf.OPTForCausalLM(config)
        case "vit":
            vit = {key: sizes[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
            model = hf.ViTModel(hf.ViTConfig(image_size=16, patch_size=4, **vit, **mlp))
            tokens = {"pixel_values": torch.randn(2, 3, 16, 16).double()}
        case _:
            config = hf.T5Config(vocab_size=60, d_model=48, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
            model = hf.T5EncoderModel(config)  # 32 buckets, and heads as wide as that together
    return perturb(model).double().eval(), tokens


NAMES = ("gpt2", "llama", "qwen2", "neox", "bert", "opt", "vit", "t5")


@pytest.mark.parametrize("name", NAMES)
def test_the_classes_of_transformers_are_cut_as_they_are(name: str):
    model, inputs = hugging_face(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flops=0.5: the plan", category=UserWarning)  # few, large units
        plan = half(model, inputs, flops=0.5)
    assert any("head" in group for group in plan.removed)
    cut: Any = check_cut(model, inputs, plan, tolerance=1e-6)
    if name in ("gpt2", "llama", "qwen2", "neox", "opt"):
        words = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        cached = cut.generate(**words, max_new_tokens=4, do_sample=False)
        assert torch.equal(cached, cut.generate(**words, max_new_tokens=4, do_sample=False, use_cache=False))

"""Factorising: exact at full rank, the projected weights otherwise, at the budget that ``pl.count`` measures."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import prunelab as pl
from prunelab.criteria.eigendamage import EigenScores, LayerScores
from prunelab.factorization.bottleneck import Bottleneck, BottleneckAttention, parts_of, shell
from prunelab.factorization.factorize import _candidates, _layer
from prunelab.factorization.factorized import Factorized, Narrowed, build
from prunelab.factorization.ranks import Layer, choose
from prunelab.factorization.sites import find
from prunelab.plans import PLANS
from prunelab.surgery.layers import free
from tests.cases import CASES, Embedded, Grouped, error, perturb, random_plan


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def random_scores(model: nn.Module, inputs: Tensor, seed: int = 0) -> EigenScores:
    """Return scores with random directions and importance for every layer that can be factorised."""
    generator, layers = torch.Generator().manual_seed(seed), {}
    freed = free(copy.deepcopy(model), {name for name, _ in model.named_parameters()})
    for name, site in find(freed)[0].items():
        groups, out, into = site.shape[:3]
        left, right = (torch.stack([orthogonal(size, generator) for _ in range(groups)]) for size in (out, into))
        importance = torch.rand(groups, out, into, generator=generator, dtype=torch.float64) ** 4
        parts = (importance, left, right)
        layers[name] = LayerScores(name, *(parts if groups > 1 else (part[0] for part in parts)))
    graph = pl.trace(model, inputs)
    units = {group.name: torch.ones(group.size) for group in graph.groups}
    return EigenScores(graph, units, "random", layers=layers)


def note_of(model: nn.Module) -> Factorized:
    return getattr(model, PLANS)[-1]


def multiplied_out(model: nn.Module, factorized: nn.Module) -> nn.Module:
    """Return ``model`` with the weights that the bottlenecks of ``factorized`` multiply out to."""
    out = copy.deepcopy(model)
    parameters, before = dict(out.named_parameters()), dict(model.named_parameters())
    for path, module in factorized.named_modules():
        if isinstance(module, Bottleneck):
            name = f"{path}.weight" if f"{path}.weight" in parameters else f"{path}_weight"
            parameters[name].data = module.weight.detach()
            assert not torch.equal(parameters[name], before[name])
    return out


def forward(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs)


# ── exact at full rank ────────────────────────────────────────────────────────────────────────────────────────────


class Encoder(nn.Module):
    """PyTorch's own encoder layers."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 4, 20, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "encoder":
        return perturb(Encoder()).double().eval(), torch.randn(2, 7, 12, dtype=torch.float64)
    return next(case for case in CASES if case.name == name).make()


@pytest.mark.parametrize("name", ["resnet20", "vit_small", "grouped", "encoder"])
def test_at_full_rank_a_network_stays_the_same_function(name):
    model, inputs = network(name)
    scores = random_scores(model, inputs)
    sites = find(free(copy.deepcopy(model), set(scores.layers)))[0]
    layers = tuple(Narrowed(name, site.shape, site.shape[2], site.shape[1]) for name, site in sites.items())
    whole = build(copy.deepcopy(model), Factorized(layers), scores.layers)
    assert sum(isinstance(module, Bottleneck) for module in whole.modules()) == len(layers) > 3
    assert error(forward(whole, inputs), forward(model, inputs)) < 1e-10
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float64}


# ── narrowed to a budget ──────────────────────────────────────────────────────────────────────────────────────────


BUDGETS = [("resnet20", "flops", per) for per in ("auto", "flops", "params", "unit")]
BUDGETS += [(name, "params", per) for name in ("vgg13_narrow", "vit_small", "encoder") for per in ("auto", "unit")]
BUDGETS += [("vit_small", "flops", "auto"), ("encoder", "flops", "params")]


@pytest.mark.parametrize(("name", "kind", "per"), BUDGETS)
def test_the_budget_is_what_count_measures(name, kind, per):
    model, inputs = network(name)
    scores = random_scores(model, inputs)
    small = pl.factorize(model, scores, **{kind: 0.6}, per=per)
    kept = _count(small, inputs)[kind] / _count(model, inputs)[kind]
    assert note_of(small).budget["kept"][kind] == kept
    assert 0.594 < kept <= 0.6


def _count(model: nn.Module, inputs: Tensor) -> dict[str, int]:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return pl.count(model, inputs).to_dict()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", ["resnet20", "vit_small", "grouped", "encoder"])
def test_what_is_left_is_the_weight_on_its_most_important_directions(name):
    model, inputs = network(name)
    scores = random_scores(model, inputs)
    small = pl.factorize(model, scores, params=0.7)
    plain = multiplied_out(model, small)
    names = {layer.weight for layer in note_of(small).layers}
    before, after = (find(free(copy.deepcopy(m), names))[0] for m in (model, plain))
    assert names
    for layer in note_of(small).layers:
        basis, matrices = scores.layers[layer.weight], parts_of(before[layer.weight].layer).core
        left, right = (vectors.reshape(len(matrices), *vectors.shape[-2:]) for vectors in (basis.Q_S, basis.Q_A))
        rows, columns = (found.reshape(len(matrices), -1) for found in (basis.rows, basis.columns))
        for group, wanted in enumerate(parts_of(after[layer.weight].layer).core):
            kept = matrices[group]
            if layer.outward:
                best = left[group][:, rows[group].topk(layer.outward).indices]
                kept = torch.einsum("op,pi...->oi...", best @ best.T, kept)
            if layer.inward:
                best = right[group][:, columns[group].topk(layer.inward).indices]
                kept = torch.einsum("ij,oj...->oi...", best @ best.T, kept)
            torch.testing.assert_close(wanted, kept, rtol=0, atol=1e-10)
    assert error(forward(small, inputs), forward(plain, inputs)) < 1e-10


def test_the_predicted_damage_is_the_quadratic_model_of_all_changes_of_weights():
    """Σ over layers of ½ δᵀ(S ⊗ A ⊗ I)δ, with δ read off the bottlenecks."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.Flatten(), nn.Linear(32, 4)
    )
    model = model.double()
    batches = [(torch.randn(40, 3, 4, 4, dtype=torch.float64), torch.arange(40) % 4)]
    graph = pl.trace(model, batches[0][0])
    statistics = pl.collect(graph, batches, {"kronecker"})
    small = pl.factorize(model, pl.criteria.EigenDamage()(graph, statistics), params=0.6)
    damage = 0.0
    for name, weight in multiplied_out(model, small).named_parameters():
        if name in statistics.kronecker:
            factors = statistics.kronecker[name]
            change = (
                (weight - dict(model.named_parameters())[name]).detach().flatten(1).unflatten(1, (weight.shape[1], -1))
            )
            damage += 0.5 * float(torch.einsum("oik,op,ij,pjk->", change, factors.S, factors.A, change))
    assert damage > 0 and note_of(small).budget["damage"] == pytest.approx(damage)


def test_every_bottleneck_is_cheaper_than_its_layer_and_linear_ones_keep_a_side():
    model, inputs = network("vit_small")
    small = pl.factorize(model, random_scores(model, inputs), params=0.7)
    found = {path: module for path, module in small.named_modules() if isinstance(module, Bottleneck)}
    linear = [module for module in found.values() if isinstance(module.core, nn.Linear)]
    assert linear and all(len(module) == 2 for module in linear)
    for path, module in found.items():
        dense = sum(parameter.numel() for parameter in model.get_submodule(path).parameters())
        assert sum(parameter.numel() for parameter in module.parameters()) < dense
    untouched = [m for m in small.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert len(untouched) > sum(len(module) for module in found.values())  # some layers stayed as they were


# ── choosing ranks ────────────────────────────────────────────────────────────────────────────────────────────────

SHAPES = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), (1, 4, 8, 8)),
    "groups": (lambda: nn.Conv2d(6, 9, (1, 3), groups=3), (2, 6, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 5, 3, stride=2), (1, 3, 4, 4)),
    "linear": (lambda: nn.Linear(5, 4), (7, 2, 5)),
}


@pytest.mark.parametrize("inner", [(None, None), (2, None), (None, 2), (2, 2)])
@pytest.mark.parametrize("name", SHAPES)
def test_the_cost_of_every_choice_is_what_count_measures(name, inner):
    """Also for layers that are bottlenecks already: ``inner`` are the ranks that they have."""
    build_layer, shape = SHAPES[name]
    layer, inputs = build_layer(), torch.empty(shape)
    layer = shell(layer, *inner) if any(inner) else layer
    model = nn.Sequential(nn.Identity(), layer)
    whole, scores = pl.count(model, inputs), random_scores(model, inputs)
    for kind in ("flops", "params"):
        sites, used, _ = _candidates(model, scores, inputs, ())
        for weight, site in sites.items():
            found = _layer(site, scores.layers[weight], used[weight], whole, kind, "auto")
            for index in range(len(found.options[1])):
                choice = found.pick(index)
                note = Factorized((Narrowed(weight, site.shape, choice.inward, choice.outward),))
                made = build(copy.deepcopy(model), note) if choice.inward or choice.outward else model
                cost = pl.count(made, inputs)
                bias = sum(parameter.numel() for n, parameter in model.named_parameters() if n.endswith("bias"))
                rest = bias / whole.params if kind == "params" else 0
                assert choice.cost + rest == pytest.approx(getattr(cost, kind) / getattr(whole, kind))


def toy(seed: int, price: float = 1.0, kernel: int = 9) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(2, 4, 3, generator=generator, dtype=torch.float64) ** 3
    return Layer(f"layer {seed}", importance, kernel, (None, None), (price, price, price))


def test_damage_is_all_that_lies_outside_the_kept_rows_and_columns():
    layer = toy(0)
    for index in range(len(layer.options[1])):
        choice, wanted = layer.pick(index), 0.0
        for matrix in layer.importance:
            rows = set(matrix.sum(1).topk(choice.outward or 4).indices.tolist())
            columns = set(matrix.sum(0).topk(choice.inward or 3).indices.tolist())
            wanted += sum(float(matrix[i, j]) for i in range(4) for j in range(3) if i not in rows or j not in columns)
        assert choice.damage == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("price", [1e-4, 1e-3, 1e-2, 0.1])
def test_at_a_price_no_other_choice_is_better_for_its_cost(price):
    layers = [toy(0), toy(1, 2.0), toy(2, 0.5)]
    chosen = [layer.at_price(price) for layer in layers]
    cost, damage = (sum(getattr(choice, what) for choice in chosen) for what in ("cost", "damage"))
    for other in itertools.product(*(map(layer.pick, range(len(layer.options[1]))) for layer in layers)):
        if sum(choice.cost for choice in other) <= cost + 1e-12:
            assert sum(choice.damage for choice in other) >= damage - 1e-12


def test_what_a_price_leaves_of_the_budget_is_spent_as_well_as_two_layers_at_a_time_can():
    layers = [toy(0), toy(1), toy(2, kernel=4)]
    options = [[layer.pick(index) for index in range(len(layer.options[1]))] for layer in layers]
    whole = sum(layer.pick(0).cost for layer in layers)
    for share in (0.5, 0.6, 0.7, 0.8, 0.9):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a few ranks are large steps
            chosen = list(choose(layers, share * whole, by_price=True, slack=0.0, asked="test").values())
        cost, damage = (sum(getattr(choice, what) for choice in chosen) for what in ("cost", "damage"))
        assert cost <= share * whole
        for place in range(3):
            others = [options[n] if n != place else [chosen[n]] for n in range(3)]
            for trial in itertools.product(*others):
                if sum(choice.cost for choice in trial) <= share * whole:
                    assert sum(choice.damage for choice in trial) >= damage - 1e-9


def test_a_threshold_keeps_what_is_above_it():
    layer = toy(0, kernel=10**6)  # the rotations cost nothing beside the core
    for level in (0.3, 0.6, 1.0):
        choice = layer.above(level)
        assert (choice.inward or 3) == max(int((layer.columns > level).sum()), 1)
        assert (choice.outward or 4) == max(int((layer.rows > level).sum()), 1)
    assert layer.above(-1.0)[:2] == (None, None)
    flat = toy(0, kernel=1).above(1e9)
    assert None in (flat.inward, flat.outward)  # one side is enough there, and cheaper


def test_budgets_that_cannot_be_met_and_steps_that_are_too_large():
    with pytest.raises(pl.BudgetError, match=r"flops=0.1 cannot be met.*rank one"):
        choose([toy(0)], 1.0, by_price=True, slack=0.1, asked="flops=0.1")
    whole = toy(0).pick(0).cost
    with pytest.warns(UserWarning, match="flops=0.9.*no ranks that use more"):
        choose([toy(0)], 0.99 * whole, by_price=True, slack=1e-6, asked="flops=0.9")


# ── layers of all kinds ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # what the plain model uses
def test_pytorchs_attention_is_factorised_on_and_off_its_fused_path():
    model, inputs = network("encoder")
    small = pl.factorize(model, random_scores(model, inputs), params=0.5)
    attention = small.encoder.layers[0].self_attn
    assert type(attention) is BottleneckAttention and isinstance(attention.in_proj, Bottleneck)
    assert isinstance(attention.out_proj, Bottleneck) and attention.in_proj_weight is None
    plain = multiplied_out(model, small)
    wanted = forward(plain, inputs)  # on the fused path
    assert error(forward(small, inputs), wanted) < 1e-10
    assert error(small(inputs), wanted) < 1e-10
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[:, 5:] = True
    with torch.no_grad():
        found, masked = (m.encoder(inputs, src_key_padding_mask=mask)[:, :5] for m in (small, plain))
    assert error(found, masked) < 1e-10


class Cross(nn.Module):
    """Attention to something else: the fused projection is used in slices."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attention(x, x.flip(1), x, need_weights=False)[0])


def test_projections_that_are_used_in_slices_stay_dense_and_the_note_says_why():
    torch.manual_seed(0)
    model, inputs = Cross().double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    small = pl.factorize(model, random_scores(model, inputs), params=0.8)
    assert "not projected from one tensor" in note_of(small).dense["attention.in_proj_weight"]
    assert error(forward(small, inputs), forward(multiplied_out(model, small), inputs)) < 1e-10


def test_attention_that_was_factorised_for_itself_also_attends_to_others():
    torch.manual_seed(0)
    inputs = torch.randn(2, 5, 8, dtype=torch.float64)
    model = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    bases = random_scores(nn.Sequential(nn.Linear(8, 24, dtype=torch.float64)), inputs).layers
    note = Factorized((Narrowed("in_proj_weight", (1, 24, 8), 8, None),))
    made = build(copy.deepcopy(model), note, {"in_proj_weight": bases["0.weight"]})
    query, key, value = torch.randn(3, 2, 5, 8, dtype=torch.float64)
    for given in ((query, key, value), (query, query, query)):
        torch.testing.assert_close(made(*given)[0], model(*given)[0])


class Odd(nn.Module):
    """Layers that cannot be bottlenecks, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.tied, self.twin = nn.Linear(16, 16), nn.Linear(16, 16)
        self.twin.weight = self.tied.weight
        self.normed = parametrizations.weight_norm(nn.Linear(16, 16))
        self.hooked = nn.Linear(16, 16)
        self.hooked.register_forward_hook(lambda module, args, output: output)
        self.read = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.good(x))).mean((2, 3))
        x = self.hooked(self.normed(self.twin(self.tied(x))))
        return nn.functional.linear(x, self.read.weight) + self.read.bias


@pytest.mark.filterwarnings("ignore:.*the layers end at")  # a few ranks are large steps here
def test_layers_that_cannot_be_bottlenecks_stay_and_the_note_says_why():
    torch.manual_seed(0)
    model, inputs = Odd().eval(), torch.randn(2, 3, 6, 6)
    small = pl.factorize(model, random_scores(model, inputs), flops=0.9)
    assert [layer.weight for layer in note_of(small).layers] == ["good.weight"]
    reasons = {
        "depthwise.weight": "one channel per group",
        "tied.weight": "shares its weight",
        "twin.weight": "shares its weight",
        "hooked.weight": "hooks",
        "read.weight": "code other than its own",
        "unused.weight": "do not reach it",
    }
    for name, words in reasons.items():
        assert words in note_of(small).dense[name], name
    assert any(name.startswith("normed") and "parametrized" in why for name, why in note_of(small).dense.items())
    assert isinstance(small.good, Bottleneck)
    assert error(forward(small, inputs), forward(multiplied_out(model, small), inputs)) < 1e-5


class Twice(nn.Module):
    """One layer that runs twice, once on a smaller image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.same = nn.Conv2d(8, 8, 3, padding=1)
        self.alias = self.same

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(nn.functional.max_pool2d(self.same(self.stem(x)), 2)).mean((2, 3))


@pytest.mark.filterwarnings("ignore:.*the layers end at")  # a few ranks are large steps here
def test_a_layer_that_runs_twice_is_counted_twice_and_replaced_everywhere():
    torch.manual_seed(0)
    model, inputs = Twice().double(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    small = pl.factorize(model, random_scores(model, inputs), flops=0.6)
    assert isinstance(small.same, Bottleneck) and small.alias is small.same
    assert 0.5 < pl.count(small, inputs).flops / pl.count(model, inputs).flops <= 0.6
    assert error(forward(small, inputs), forward(multiplied_out(model, small), inputs)) < 1e-10


# ── again, and with everything else ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["resnet20", "encoder"])
def test_factorising_again_merges_rotations_and_keeps_at_most_three_layers(name):
    model, inputs = network(name)
    once = pl.factorize(model, random_scores(model, inputs), flops=0.7)
    twice = pl.factorize(once, random_scores(once, inputs, 1), flops=0.7)
    share = _count(twice, inputs)["flops"] / _count(model, inputs)["flops"]
    assert 0.48 < share <= 0.49 and len(getattr(twice, PLANS)) == 2
    again = [layer.weight for layer in note_of(twice).layers if layer.weight.endswith("core.weight")]
    assert again
    for module in twice.modules():
        if isinstance(module, Bottleneck):
            assert [name for name, _ in module.named_children()] in (
                ["inward", "core"],
                ["core", "outward"],
                ["inward", "core", "outward"],
            )
            assert not any(isinstance(part, Bottleneck) for part in module.children())
    assert error(forward(twice, inputs), forward(multiplied_out(model, twice), inputs)) < 1e-10


def test_ranks_are_units_like_any_others():
    model, inputs = network("resnet20")
    small = pl.factorize(model, random_scores(model, inputs), flops=0.6)
    graph = pl.trace(small, inputs)
    assert any(group.name.endswith("inward") for group in graph.groups)
    plan = random_plan(small, inputs, 0.3)
    assert error(forward(pl.apply(small, plan), inputs), forward(pl.masked(small, plan), inputs)) < 1e-9


@pytest.mark.parametrize("train", [True, False])
def test_rotations_are_in_the_state_and_trained_by_choice(train):
    model, inputs = network("resnet20")
    model.train()
    small = pl.factorize(model, random_scores(model, inputs), flops=0.6, train_rotations=train)
    assert small.training and all(module.training for module in small.modules())
    small(inputs).sum().backward()
    for name, parameter in small.named_parameters():
        rotation = name.endswith(("inward.weight", "outward.weight"))
        assert name in small.state_dict() and parameter.requires_grad == (train or not rotation)
        assert (parameter.grad is not None) == (train or not rotation)


def test_the_model_is_left_alone_unless_it_is_asked_for():
    model, inputs = network("encoder")
    before, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    scores = random_scores(model, inputs)
    small = pl.factorize(model, scores, flops=0.6)
    assert [type(module) for module in model.modules()] == classes and not hasattr(model, PLANS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (
        model.encoder.layers[0].activation_relu_or_gelu
        and model.encoder.use_nested_tensor == Encoder().encoder.use_nested_tensor
    )
    same = pl.factorize(model, scores, flops=0.6, inplace=True)
    assert same is model and error(forward(model, inputs), forward(small, inputs)) < 1e-12


def test_what_is_ignored_stays():
    model, inputs = network("resnet20")
    scores = random_scores(model, inputs)
    small = pl.factorize(model, scores, flops=0.8, ignore=["layer1", model.layer2[0].conv1, "fc.weight"])
    touched = {layer.weight for layer in note_of(small).layers}
    assert touched and not any(name.startswith(("layer1.", "layer2.0.conv1", "fc")) for name in touched)
    assert note_of(small).dense["layer1.0.conv1.weight"] == "it is to be ignored"
    with pytest.raises(pl.PlanError, match="no_such_layer"):
        pl.factorize(model, scores, flops=0.8, ignore=["no_such_layer"])
    with pytest.raises(pl.PlanError, match="not part of the model"):
        pl.factorize(model, scores, flops=0.8, ignore=[nn.Linear(2, 2)])


def test_bad_input_is_an_error_and_the_model_stays(small):
    model, inputs = small
    scores = random_scores(model, inputs)
    before, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    for budget in ({}, {"flops": 0.5, "params": 0.5}, {"flops": 1.5}, {"flops": 0}, {"params": True}):
        with pytest.raises(pl.BudgetError):
            pl.factorize(model, scores, **budget, inplace=True)
    with pytest.raises(pl.BudgetError, match="per='layer'"):
        pl.factorize(model, scores, flops=0.5, per="layer", inplace=True)
    with pytest.raises(pl.BudgetError, match="cannot be met"):
        pl.factorize(model, scores, flops=0.01, inplace=True)
    with pytest.raises(pl.PlanError, match="of `magnitude`"):
        pl.factorize(model, pl.criteria.Magnitude()(scores.graph), flops=0.5, inplace=True)
    other = nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), *copy.deepcopy(model)[1:])
    other[1], other[5] = nn.BatchNorm2d(9), nn.Linear(9, 4)
    with pytest.raises(pl.PlanError, match="made for another model"):
        pl.factorize(other, scores, flops=0.5)
    with pytest.raises(pl.PlanError, match=r"No layer of Sequential can be factorised.*no score"):
        pl.factorize(nn.Sequential(nn.Identity(), model), scores, flops=0.5)
    with pytest.raises(pl.PlanError, match="No layer of Conv2d.*whole model"):
        pl.factorize(nn.Conv2d(3, 8, 3), scores, flops=0.5)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_note_that_does_not_fit_is_refused_and_the_model_stays():
    model, inputs = network("encoder")
    scores, classes = random_scores(model, inputs), [type(module) for module in model.modules()]
    good = note_of(pl.factorize(model, scores, flops=0.6))
    assert Factorized.from_json(good.to_json()) == good
    layer = good.layers[0]
    for wrong, message in (
        (Narrowed("nothing.weight", layer.shape, 1, 1), "no such linear or convolution layer"),
        (Narrowed(layer.weight, (1, 2, 3), 1, 1), "is expected"),
        (Narrowed(layer.weight, layer.shape, 99, None), "ranks 99"),
        (Narrowed(layer.weight, layer.shape, None, 0), "ranks None and 0"),
        (layer, "at ranks"),  # twice the same
    ):
        with pytest.raises(pl.PlanError, match=message):
            build(model, Factorized((*good.layers, wrong)))
    for text in ("{}", "[]", '{"action": "factorize"}', "nonsense"):
        with pytest.raises(pl.PlanError, match="not a factorisation"):
            Factorized.from_json(text)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.filterwarnings("ignore:.*the layers end at")  # a few ranks are large steps here
def test_tokens_and_tied_embeddings():
    torch.manual_seed(0)
    model, tokens = Embedded().double(), torch.randint(0, 11, (3, 5))
    small = pl.factorize(model, random_scores(model, tokens), params=0.95)
    assert error(forward(small, tokens), forward(multiplied_out(model, small), tokens)) < 1e-10


@pytest.mark.filterwarnings("ignore:.*the layers end at")  # a few ranks are large steps here
def test_grouped_convolutions_lose_as_many_directions_in_every_group():
    model, inputs = network("grouped")
    small = pl.factorize(model, random_scores(model, inputs), flops=0.8)
    names = {layer.weight for layer in note_of(small).layers}
    assert isinstance(model, Grouped) and "grouped.weight" in names and "depthwise.weight" not in names

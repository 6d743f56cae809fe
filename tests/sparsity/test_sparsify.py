"""Sparse models: the right weights are zero, stay zero through training, and survive copies and files."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import prunelab as pl
from prunelab.sparsity.masks import densities, density, mask_of, value_of
from tests.cases import Embedded
from tests.files import forge, header_of


def magnitudes(model: nn.Module) -> dict[str, torch.Tensor]:
    return pl.criteria.Magnitude(p=1).elementwise(model)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


class Attentive(nn.Module):
    """Attention with a fused projection, a free parameter and a norm over two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(5, 8))
        self.norm = nn.LayerNorm([5, 8])
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x + self.position)
        return x + self.attention(x, x, x, need_weights=False)[0]


# ── which weights stay ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("share", [0.07, 0.5, 1.0])
def test_the_weights_of_highest_score_stay_as_they_are(net, share):
    sparse = pl.sparsify(net, magnitudes(net), share)
    before = torch.cat([net[place].weight.flatten() for place in (0, 3, 4, 7)])
    after = torch.cat([sparse[place].weight.flatten() for place in (0, 3, 4, 7)])
    count = round(share * len(before))
    wanted = before.abs().argsort(descending=True)[:count].sort().values
    assert torch.equal(after.nonzero().flatten(), wanted)
    assert torch.equal(after[wanted], before[wanted])
    assert density(sparse) == pytest.approx(count / len(before))


def test_per_layer_every_tensor_keeps_the_same_share(net):
    sparse = pl.sparsify(net, magnitudes(net), 0.5, scope="layer")
    assert densities(sparse) == dict.fromkeys(["0.weight", "3.weight", "4.weight", "7.weight"], 0.5)
    assert len(set(densities(pl.sparsify(net, magnitudes(net), 0.5)).values())) > 1


def test_of_equal_scores_exactly_as_many_stay_as_were_asked_for(net):
    scores = {name: torch.ones_like(parameter) for name, parameter in net.named_parameters()}
    sparse = pl.sparsify(net, scores, 0.3)
    total = sum(net[place].weight.numel() for place in (0, 3, 4, 7))
    assert round(density(sparse) * total) == round(0.3 * total)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (1, 2)])
def test_a_pattern_holds_in_every_block_of_inputs(net, pattern):
    n, m = pattern
    sparse = pl.sparsify(net, magnitudes(net), pattern=pattern)
    for place, dim in [(3, 0), (7, 1)]:
        weight = net[place].weight.movedim(dim, -1)
        if weight.shape[-1] % m:
            assert mask_of(sparse, f"{place}.weight") is None
            continue
        blocks = sparse[place].weight.movedim(dim, -1).reshape(-1, m)
        assert (blocks.count_nonzero(1) == n).all()
        best = weight.abs().reshape(-1, m).topk(n).values.sum(1)
        torch.testing.assert_close(blocks.abs().sum(1), best)
    assert mask_of(sparse, "0.weight") is None and mask_of(sparse, "4.weight") is None  # 3 and 1 inputs


def test_biases_norms_and_free_parameters_stay_unless_they_are_named():
    torch.manual_seed(0)
    model = Attentive()
    sparse = pl.sparsify(model, magnitudes(model), 0.25)
    assert set(densities(sparse)) == {"attention.in_proj_weight", "attention.out_proj.weight"}
    for name in ("position", "norm.weight", "attention.in_proj_bias", "attention.bias_k"):
        assert torch.equal(sparse.get_parameter(name), model.get_parameter(name))
    named = pl.sparsify(model, magnitudes(model), 0.5, names=["position", "norm.bias"])
    assert named.position.count_nonzero() + named.norm.bias.count_nonzero() == 40
    assert not parametrize.is_parametrized(named.attention)


def test_the_model_itself_stays_unless_asked_for(net):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    sparse = pl.sparsify(net.eval(), magnitudes(net), 0.5)
    assert not sparse.training and type(sparse) is nn.Sequential and isinstance(sparse[0], nn.Conv2d)
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    parameter = net[0].weight
    assert pl.sparsify(net, magnitudes(net), 0.5, inplace=True) is net
    assert any(found is parameter for found in net.parameters())  # optimizers go on


# ── what masks do ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sparse_layer_computes_with_zeros(net):
    x = torch.randn(2, 3, 8, 8)
    sparse = pl.sparsify(net.eval(), magnitudes(net), 0.4)
    with torch.no_grad():
        for place in (0, 3, 4, 7):
            net[place].weight.copy_(sparse[place].weight)
    assert torch.equal(sparse(x), net(x))


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_uses_the_masked_projection(need_weights):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    sparse = pl.sparsify(attention, magnitudes(attention), 0.4)
    assert isinstance(sparse, nn.MultiheadAttention) and (sparse.in_proj_weight == 0).any()
    plain = pl.bake(sparse)
    for context in (torch.no_grad(), torch.enable_grad()):  # the first takes the fast path
        with context:
            found, wanted = (m(x, x, x, need_weights=need_weights)[0] for m in (sparse, plain))
        torch.testing.assert_close(found, wanted)
        assert not torch.allclose(found, attention(x, x, x)[0])


def test_a_recurrent_layer_uses_its_masks():
    torch.manual_seed(0)
    lstm, x = nn.LSTM(3, 4), torch.randn(2, 5, 3)
    sparse = pl.sparsify(lstm, magnitudes(lstm), 0.5)
    with torch.no_grad():
        for name in densities(sparse):
            lstm.get_parameter(name).copy_(getattr(sparse, name))
    assert torch.equal(sparse(x)[0], lstm(x)[0])


def test_tied_weights_share_one_mask():
    torch.manual_seed(0)
    model = Embedded()
    model.table = model.embedding.weight
    sparse = pl.sparsify(model, magnitudes(model), 0.5)
    assert (sparse.embedding.weight == 0).any() and torch.equal(sparse.table, sparse.embedding.weight)
    assert len({"table", "embedding.weight"} & densities(sparse).keys()) == 1  # counted once
    F.cross_entropy(sparse(torch.randint(0, 11, (2, 5))).flatten(0, 1), torch.zeros(10).long()).backward()
    assert len(list(sparse.parameters())) == len(list(model.parameters()))
    baked = pl.bake(sparse)
    assert baked.table is baked.embedding.weight and (baked.table == 0).any()


def test_a_layer_that_is_used_under_two_names_gets_one_mask():
    shared = nn.Linear(4, 4)
    sparse = pl.sparsify(nn.Sequential(shared, nn.ReLU(), shared), {"0.weight": shared.weight.abs()}, 0.5)
    assert sparse[0] is sparse[2] and len(sparse[0].parametrizations.weight) == 1


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    ],
)
def test_zeros_stay_zero_and_the_rest_learns(net, optimizer):
    torch.manual_seed(0)
    sparse = pl.sparsify(net, magnitudes(net), 0.5)
    before = {name: mask_of(sparse, name).mask.clone() for name in densities(sparse)}
    start = {name: sparse.get_submodule(name[0]).weight.detach().clone() for name in before}
    steps = optimizer(sparse.parameters())
    for _ in range(3):
        steps.zero_grad()
        F.cross_entropy(sparse(torch.randn(8, 3, 8, 8)), torch.randint(0, 5, (8,))).backward()
        steps.step()
    for name, mask in before.items():
        weight = sparse.get_submodule(name[0]).weight
        assert not weight[~mask].any()
        assert (weight[mask] != start[name][mask]).any()


def test_a_masked_weight_that_is_not_finite_is_zero():
    layer = nn.Linear(2, 1)
    layer.weight.data = torch.tensor([[float("nan"), 1.0]])
    sparse = pl.sparsify(layer, {"weight": torch.tensor([[0.0, 1.0]])}, 0.5)
    assert torch.equal(sparse.weight, torch.tensor([[0.0, 1.0]]))


def test_a_sparse_model_can_be_made_sparser_but_not_denser(net):
    half = pl.sparsify(net, magnitudes(net), 0.5)
    quarter = pl.sparsify(half, magnitudes(half), 0.25)  # scores by the names that the sparse model has
    once = pl.sparsify(net, magnitudes(net), 0.25)
    for name in densities(net):
        assert torch.equal(mask_of(quarter, name).mask, mask_of(once, name).mask)
    assert density(half) == pytest.approx(0.5, abs=1e-3)  # untouched
    with pytest.raises(pl.BudgetError, match="only .* are left"):
        pl.sparsify(quarter, magnitudes(net), 0.5)
    other = pl.sparsify(half, {name: -score for name, score in magnitudes(net).items()}, 0.25)
    for name in densities(net):
        assert not (mask_of(other, name).mask & ~mask_of(half, name).mask).any()


ELEMENTWISE = {"magnitude": {"p": 1}, "taylor": {}, "obd": {}, "obs": {"damping": 0.1}, "oba": {}, "random": {}}


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("how", [{"density": 0.3}, {"density": 0.3, "scope": "layer"}, {"pattern": (1, 2)}])
def test_every_elementwise_score_makes_dense_and_sparse_models_sparse(name, how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)).eval()
    batches = [(torch.randn(80, 4, 4, 4), torch.arange(80) % 4)]
    criterion = pl.criteria.get(name, **ELEMENTWISE[name])
    first = pl.sparsify(model, criterion.elementwise(model, batches), 0.8, scope="layer")
    for start in (model, first):
        scores = criterion.elementwise(start, batches)
        sparse = pl.sparsify(start, scores, **how)
        share = how.get("density", 0.5)
        assert density(sparse) <= share + 0.01 and torch.isfinite(sparse(batches[0][0])).all()
        for parameter in ("0.weight", "4.weight"):
            assert not (mask_of(sparse, parameter).mask & (value_of(start, parameter) == 0)).any()


def test_which_criteria_have_elementwise_scores():
    having = {name for name in pl.criteria.names() if hasattr(pl.criteria.get(name), "elementwise")}
    assert having == ELEMENTWISE.keys() | {"bn_scale"}  # that one is about norms, which have to be named


@pytest.mark.filterwarnings("ignore:.*the layers end at")
def test_baking_comes_before_whatever_would_lose_the_zeros(net):
    inputs = torch.randn(40, 3, 8, 8)
    sparse = pl.sparsify(net, magnitudes(net), 0.5, names=["7.weight"])
    scores = pl.criteria.EigenDamage()(pl.trace(net, inputs), [(inputs, torch.arange(40) % 5)])
    with pytest.raises(pl.PlanError, match=r"`7.weight` has a mask.*bake first, with pl.bake"):
        pl.factorize(sparse, scores, params=0.8)
    with pytest.raises(pl.TraceError, match="`7` has a mask on its weights.*pl.bake"):
        pl.trace(sparse, inputs)
    assert (pl.bake(sparse)[7].weight == 0).sum() == 15
    pl.factorize(pl.bake(sparse), scores, params=0.8)


def test_a_model_rebuilt_from_its_operators_is_made_sparse_like_the_original(net):
    inputs = torch.randn(2, 3, 8, 8)
    plan = pl.plan(pl.criteria.Random()(pl.trace(net, inputs)), ratio=0.3)
    whole, graph = (pl.apply(net.eval(), plan, backend=backend) for backend in ("module", "graph"))
    for options in ({"density": 0.4}, {"pattern": (1, 2)}):
        wanted, found = (pl.sparsify(model, magnitudes(model), **options) for model in (whole, graph))
        assert densities(found) == densities(wanted)
        torch.testing.assert_close(found(inputs), wanted(inputs))
        torch.testing.assert_close(pl.bake(found)(inputs), wanted(inputs))


# ── copies, baking, files ─────────────────────────────────────────────────────────────────────────────────────────


def test_copies_are_independent(net):
    x = torch.randn(2, 3, 8, 8)
    sparse = pl.sparsify(net.eval(), magnitudes(net), 0.5, names=["0.weight"])
    twin = copy.deepcopy(sparse)
    wanted = sparse(x)
    with torch.no_grad():
        twin[0].parametrizations.weight.original.zero_()
    pl.bake(twin, inplace=True)
    pl.sparsify(twin, magnitudes(twin), 0.5, names=["0.bias", "7.weight"], inplace=True)
    assert torch.equal(sparse(x), wanted) and not parametrize.is_parametrized(sparse[7])
    assert "bias" not in sparse[0].parametrizations


def test_more_masks_on_a_copy_leave_the_other_alone():
    attention = nn.MultiheadAttention(4, 1)
    first = pl.sparsify(attention, magnitudes(attention), 0.5, names=["in_proj_weight"])
    second = pl.sparsify(first, magnitudes(first), 0.5, names=["in_proj_bias"])
    assert list(pl.bake(second).state_dict()) == list(attention.state_dict())
    assert "in_proj_bias" in second.parametrizations and first.in_proj_bias is not None
    assert set(first.parametrizations) == {"in_proj_weight"}


def test_baking_makes_plain_layers_with_the_zeros_in_them(net):
    x = torch.randn(2, 3, 8, 8)
    sparse = pl.sparsify(net.eval(), magnitudes(net), 0.3)
    baked = pl.bake(sparse)
    assert torch.equal(baked(x), sparse(x)) and density(baked) == density(sparse)
    assert list(baked.state_dict()) == list(net.state_dict()) and type(baked[0]) is nn.Conv2d  # optimizers count on it
    assert vars(baked[0]).keys() == vars(net[0]).keys()
    assert parametrize.is_parametrized(sparse[0])  # the copy was baked
    assert len(pl.trace(baked, x).groups) == len(pl.trace(net, x).groups)
    assert pl.bake(sparse, inplace=True) is sparse and type(sparse[0]) is nn.Conv2d


def test_other_parametrizations_are_kept_and_named(net):
    parametrizations.weight_norm(net[7])
    with_norm = net[7].weight.detach()
    sparse = pl.sparsify(net, {"7.weight": with_norm.abs()}, 0.5)
    assert (sparse[7].weight != 0).sum() == 15
    torch.testing.assert_close(sparse[7].weight[sparse[7].weight != 0], with_norm[sparse[7].weight != 0])
    with pytest.raises(pl.PlanError, match="`weight` of a ParametrizedLinear has a mask and another"):
        pl.bake(sparse)


def test_the_state_dict_carries_the_masks(net):
    sparse = pl.sparsify(net, magnitudes(net), 0.3)
    other = pl.sparsify(copy.deepcopy(net), {name: -s for name, s in magnitudes(net).items()}, 0.3)
    other.load_state_dict(sparse.state_dict())
    assert all(torch.equal(other[place].weight, sparse[place].weight) for place in (0, 3, 4, 7))


@pytest.mark.parametrize("name", ["resnet20", "vit_small"])
def test_a_sparse_model_is_saved_and_loaded(name, tmp_path):
    torch.manual_seed(0)
    model, inputs = pl.zoo.build(name).eval(), torch.randn(2, 3, 32, 32)
    sparse = pl.sparsify(model, magnitudes(model), 0.2)
    pl.save(sparse, tmp_path / "sparse.safetensors")
    again = pl.load(pl.zoo.build(name), tmp_path / "sparse.safetensors").eval()
    assert torch.equal(again(inputs), sparse(inputs)) and densities(again) == densities(sparse)
    pl.save(pl.bake(again), tmp_path / "baked.safetensors")
    baked = pl.load(pl.zoo.build(name), tmp_path / "baked.safetensors").eval()
    assert torch.equal(baked(inputs), sparse(inputs)) and not any("mask" in key for key in baked.state_dict())


def test_a_model_that_was_cut_then_made_sparse_twice_is_saved_and_loaded(small, tmp_path):
    model, inputs = small
    cut = pl.apply(model, pl.plan(pl.criteria.Random()(pl.trace(model, inputs)), ratio=0.5))
    sparse = pl.sparsify(cut, magnitudes(cut), 0.5, names=["0.weight"])
    sparse = pl.sparsify(sparse, magnitudes(sparse), 0.25)
    pl.save(sparse, tmp_path / "sparse.safetensors")
    again = pl.load(model, tmp_path / "sparse.safetensors").eval()
    assert torch.equal(again(inputs), sparse(inputs))
    pl.save(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "sparse.safetensors").read_bytes()


def test_a_factorised_model_is_made_sparse_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model, inputs = pl.zoo.resnet20().eval(), torch.randn(64, 3, 32, 32)
    graph = pl.trace(model, inputs[:1])
    scores = pl.criteria.get("eigendamage")(graph, [(inputs, torch.arange(64) % 10)])
    small = pl.factorize(model, scores, flops=0.5)
    sparse = pl.sparsify(small, magnitudes(small), 0.5)
    pl.save(sparse, tmp_path / "both.safetensors")
    again = pl.load(pl.zoo.resnet20(), tmp_path / "both.safetensors").eval()
    assert torch.equal(again(inputs), sparse(inputs)) and densities(again) == densities(sparse)


def test_tied_masks_and_a_root_with_masks_are_saved(tmp_path):
    torch.manual_seed(0)
    model = Embedded()
    model.table = model.embedding.weight
    sparse = pl.sparsify(model, magnitudes(model), 0.5)
    pl.save(sparse, tmp_path / "tied.safetensors")
    fresh = Embedded()
    fresh.table = fresh.embedding.weight
    again, tokens = pl.load(fresh, tmp_path / "tied.safetensors"), torch.randint(0, 11, (2, 5))
    assert torch.equal(again(tokens), sparse(tokens)) and torch.equal(again.table, again.embedding.weight)
    with pytest.raises(pl.DataError, match="saved from a Embedded, this is a Linear"):
        pl.load(nn.Linear(2, 2), tmp_path / "tied.safetensors")


def test_edited_files_of_sparse_models_are_errors(net, tmp_path):
    path, wrong = tmp_path / "sparse.safetensors", tmp_path / "wrong.safetensors"
    pl.save(pl.sparsify(net, magnitudes(net), 0.5), path)

    def rewrite(step: object) -> None:
        forge(wrong, path, header_of(path) | {"plans": [step]})

    for step in ({"action": "sparsify", "names": 3}, {"action": "sparsify"}, ["sparsify"], {"action": "run"}):
        rewrite(step)
        with pytest.raises(pl.DataError, match="damaged"):
            pl.load(net, wrong)
    for names in (["nothing.weight"], ["0.weight"]):
        rewrite({"action": "sparsify", "names": names})
        with pytest.raises(pl.DataError, match="does not fit"):
            pl.load(net, wrong)


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("share", [0, -0.5, 1.5, None, True, float("nan"), "half"])
def test_a_density_outside_its_range_is_an_error(net, share):
    with pytest.raises(pl.BudgetError, match="density=.*outside"):
        pl.sparsify(net, magnitudes(net), share)


@pytest.mark.parametrize("pattern", [(0, 4), (5, 4), (2,), (1.5, 4), "24"])
def test_a_pattern_that_is_none_is_an_error(net, pattern):
    with pytest.raises(pl.BudgetError, match="pattern="):
        pl.sparsify(net, magnitudes(net), pattern=pattern)


def test_what_does_not_fit_the_model_is_an_error_and_the_model_stays(net):
    before = list(net.state_dict())
    scores = magnitudes(net)
    with pytest.raises(pl.BudgetError, match="contradicts pattern"):
        pl.sparsify(net, scores, 0.25, pattern=(2, 4))
    with pytest.raises(pl.BudgetError, match="scope='all'"):
        pl.sparsify(net, scores, 0.25, scope="all")
    with pytest.raises(pl.PlanError, match="score for `9.weight`, but Sequential has no such parameter"):
        pl.sparsify(net, scores | {"9.weight": torch.ones(2)}, 0.5)
    with pytest.raises(pl.PlanError, match=r"`7.weight` has shape \[6\], the parameter \[5, 6\]"):
        pl.sparsify(net, scores | {"7.weight": torch.ones(6)}, 0.5)
    with pytest.raises(pl.PlanError, match="`7.weight` is not a number"):
        pl.sparsify(net, scores | {"7.weight": torch.full((5, 6), torch.nan)}, 0.5)
    with pytest.raises(pl.PlanError, match="asks for `7.scale`, which has no score"):
        pl.sparsify(net, scores, 0.5, names=["7.scale"])
    with pytest.raises(pl.PlanError, match="Nothing to prune"):
        pl.sparsify(net, {"1.weight": torch.ones(8)}, 0.5)
    with pytest.raises(pl.PlanError, match="do not split into 4s"):
        pl.sparsify(net, scores, pattern=(2, 4), names=["0.weight"])
    with pytest.raises(pl.PlanError, match="multiple of 64"):
        pl.sparsify(net, scores, pattern=(2, 64), inplace=True)
    assert list(net.state_dict()) == before

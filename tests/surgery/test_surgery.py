"""Surgery: the cut network is the silenced one, and a cut that would be wrong is not made."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from tests.cases import CASES, OWN, Case, error, images, random_plan


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_cut_network_equals_the_silenced_one(case: Case):
    model, inputs = case.make()
    plan = random_plan(model, inputs, share=0.4)
    with torch.no_grad():
        cut, silent = pl.apply(model, plan)(inputs), pl.masked(model, plan)(inputs)
        assert error(cut, silent) < 1e-9
        assert error(cut, model(inputs)) > 1e-4, "a cut that changes nothing tests nothing"


ALONE = [
    Case("vit", lambda: pl.zoo.VisionTransformer(depth=1), images(32)),
    Case("resnet", lambda: pl.zoo.ResNet(8), images(32)),
]


@pytest.mark.parametrize("case", [*ALONE, *OWN], ids=lambda case: case.name)
def test_every_group_can_be_cut_alone(case: Case):
    model, inputs = case.make()
    graph = pl.trace(model, inputs)
    scores = pl.criteria.Random()(graph)
    for group in graph.groups:
        others = [other.name for other in graph.groups if other is not group]
        plan = pl.plan(scores, ratio=0.5, overrides={group.name: 0.5} | dict.fromkeys(others, 0.0))
        assert list(plan.removed) == [group.name]
        with torch.no_grad():
            assert error(pl.apply(model, plan)(inputs), pl.masked(model, plan)(inputs)) < 1e-9, group


def test_silencing_zeroes_what_goes_and_nothing_else(small):
    model, inputs = small
    plan = pl.plan(pl.criteria.Random()(pl.trace(model, inputs)), ratio=0.5)
    removed = list(plan.removed["0"])
    silent, kept = pl.masked(model, plan), [unit for unit in range(8) if unit not in removed]
    assert silent[0].weight[removed].abs().sum() == 0 and silent[5].weight[:, removed].abs().sum() == 0
    assert torch.equal(silent[0].weight[kept], model[0].weight[kept])


def test_the_model_stays_and_the_copy_is_of_its_class(small):
    model, inputs = small
    before = copy.deepcopy(model.state_dict())
    plan = random_plan(model, inputs)
    cut = pl.apply(model.train(), plan)
    assert type(cut) is type(model) and cut.training
    assert cut[0].out_channels == cut[1].num_features == cut[5].in_features == 4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert pl.apply(model, plan, inplace=True) is model and model[0].out_channels == 4


def test_a_cut_network_trains(small):
    model, inputs = small
    cut = pl.apply(model, random_plan(model, inputs)).train()
    optimizer = torch.optim.SGD(cut.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(cut(inputs), torch.arange(6) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_tied_weights_stay_tied():
    model, tokens = next(case for case in CASES if case.name == "embedded").make()
    model.out_table = model.embedding.weight
    cut = pl.apply(model, random_plan(model, tokens))
    assert cut.out_table is cut.embedding.weight and cut.embedding.embedding_dim == cut.embedding.weight.shape[1] < 12


class DefaultScale(nn.Module):
    """Attention with the default scale, queries normed and projected apart from keys."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(6, 16)
        self.norm = nn.LayerNorm(8) if normed else nn.Identity()
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        out = F.scaled_dot_product_attention(self.norm(query), key, value)
        return self.out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("normed", [False, True])
def test_a_narrower_head_keeps_its_scale(normed: bool):
    torch.manual_seed(0)
    model, x = DefaultScale(normed).double().eval(), torch.randn(2, 5, 6).double()
    graph = pl.trace(model, x)
    width = graph.groups_of("query.weight")[-1]
    plan = pl.plan(pl.criteria.Random()(graph), ratio=0.5, ignore=["value"], overrides={width.name: 0.5})
    assert plan.removed.keys() == {width.name} == {"query:head_width"}
    with torch.no_grad():
        assert error(pl.apply(model, plan)(x), pl.masked(model, plan)(x)) < 1e-9


class OneProjection(nn.Module):
    """Attention whose queries, keys and values are rows of one weight, with a learned bias that it may keep."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)
        self.bias = nn.Parameter(torch.randn(2, 9))
        self.register_buffer("places", torch.arange(25).reshape(5, 5) % 9)
        self.heads, self.width, self.keeps = 2, 4, keeps
        self.kept: dict[str, Tensor] = {}

    def biases(self) -> Tensor:
        if not self.keeps:
            return self.bias[:, self.places]
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias[:, self.places]
        return self.kept["bias"]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 5, self.heads, -1).transpose(1, 2).split([self.width] * 3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v, self.biases())
        return self.head(self.out(attended.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("keeps", [False, True])
def test_queries_and_keys_of_one_weight_are_both_scaled(keeps: bool):
    """PyTorch scales both by the root of the scale where a bias is learned, so both need the same factor."""
    torch.manual_seed(0)
    model, x = OneProjection(keeps).double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    graph = pl.trace(model, x)
    assert {"qkv:heads", "qkv:head_width"} <= {group.name for group in graph.groups}
    overrides = {group.name: 0.5 for group in graph.groups}
    plan = pl.plan(pl.criteria.get("magnitude")(graph), ratio=0.5, overrides=overrides)
    with torch.no_grad():
        cut, silent = pl.apply(model, plan, backend="module", check=False), pl.masked(model, plan)
        for inputs in (x, torch.randn(2, 5, 8, dtype=torch.float64)):  # the second finds what the first has left
            assert error(cut(inputs), silent(inputs)) < 1e-12


class OwnScale(DefaultScale):
    """Attention written out, with a scale that its code takes from the width at hand."""

    def __init__(self, early: bool) -> None:
        super().__init__(normed=False)
        self.early = early

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        width = query.shape[-1]
        if self.early:
            scores = query * width**-0.5 @ key.transpose(-2, -1)
        else:
            scores = query @ key.transpose(-2, -1) / width**0.5
        return self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("early", [False, True])
def test_a_scale_in_the_code_is_kept_too(early: bool):
    torch.manual_seed(0)
    model, x = OwnScale(early).double().eval(), torch.randn(2, 5, 6).double()
    graph = pl.trace(model, x)
    width = graph.groups_of("query.weight")[-1]
    plan = pl.plan(pl.criteria.Random()(graph), ratio=0.5, ignore=["value"], overrides={width.name: 0.5})
    with torch.no_grad():
        assert error(pl.apply(model, plan)(x), pl.masked(model, plan)(x)) < 1e-9


def test_a_constant_that_cannot_be_made_up_for_is_an_error():
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x - x.sum(-1, keepdim=True) / x.shape[-1])

    model, x = Mean(), torch.randn(3, 4)
    with pytest.raises(pl.PlanError, match=r"`div`.*computes with \[6\], which the cut makes \[3\]"):
        pl.apply(model, random_plan(model, x), backend="module")


class Halves(nn.Module):
    """Code that asks for two halves, each of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.left, self.right = nn.Linear(4, 12), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.both(x).chunk(2, dim=-1)
        return self.left(left) + self.right(right.tanh())


def test_halves_lose_equal_numbers():
    torch.manual_seed(0)
    model, x = Halves().double(), torch.randn(3, 4).double()
    graph = pl.trace(model, x)
    assert [len(bundle) for bundle in graph.bundles] == [2]
    for options in ({"flops": 0.5}, {"ratio": 0.5}, {"ratio": 0.5, "overrides": {graph.groups[1].name: 0.5}}):
        plan = pl.plan(pl.criteria.Random()(graph), **options)
        assert len({len(cut.removed) for cut in plan.cuts}) == 1 and len(plan.cuts) == 2
        assert plan.cuts[0].removed != plan.cuts[1].removed
        with torch.no_grad():
            assert error(pl.apply(model, plan)(x), pl.masked(model, plan)(x)) < 1e-9


class Auxiliary(nn.Module):
    """A head that only runs in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.body(x).relu()
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def test_heads_that_only_run_in_training_are_cut_too():
    model, x = Auxiliary(), torch.randn(3, 4)
    plan = random_plan(model, x)
    cut, silent = pl.apply(model, plan).train(), pl.masked(model, plan).train()
    assert cut.aux.in_features == 3
    for found, wanted in zip(cut(x), silent(x), strict=True):
        assert error(found, wanted) < 1e-5


class Baked(nn.Module):
    """A model whose code holds a size that no attribute tells."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).reshape(-1, 6))


def test_a_size_in_the_code_is_an_error_and_the_model_stays():
    model, x = Baked(), torch.randn(3, 4)
    plan = random_plan(model, x)
    with pytest.raises(pl.PlanError, match="nothing was cut"):
        pl.apply(model, plan, inplace=True)
    assert model.first.out_features == 6 and model(x).shape == (3, 2)


def test_a_plan_for_another_model_is_an_error(small):
    model, inputs = small
    plan = random_plan(model, inputs)
    with pytest.raises(pl.PlanError, match="group"):
        pl.apply(pl.zoo.resnet20(), plan)
    with pytest.raises(pl.PlanError, match="8 units, this model has 4"):
        pl.apply(pl.apply(model, plan), plan)
    for removed, message in (((70,), "unit 70"), (tuple(range(8)), "none would be left")):
        wrong = dataclasses.replace(plan, cuts=(dataclasses.replace(plan.cuts[0], removed=removed),))
        with pytest.raises(pl.PlanError, match=f"Cannot cut `0`.*{message}"):
            pl.apply(model, wrong)


def test_an_unknown_backend_is_an_error(small):
    with pytest.raises(pl.OptionError, match="backend"):
        pl.apply(small[0], random_plan(*small), backend="magic")

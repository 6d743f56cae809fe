"""A cut is checked by value: in eval mode, without gradients, with everything on that users have on."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

import prunelab as pl
from prunelab.surgery import agreement
from prunelab.surgery.layers import FreeEncoder
from tests.cases import error, random_plan


def test_values_that_differ_are_refused_by_the_first_call_that_differs(monkeypatch):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    plan = random_plan(model, x)
    before = copy.deepcopy(model.state_dict())

    def spoilt(target: nn.Module, *args: object, **kwargs: object) -> None:
        cut(target, *args, **kwargs)
        if not target[2].weight.is_meta and type(target[2].weight) is nn.Parameter:
            target[2].weight.data.mul_(1.5)

    module = sys.modules["prunelab.surgery.cut"]
    cut = module.cut_down  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "cut_down", spoilt)
    with pytest.raises(pl.PlanError, match=r"first in `linear` in `2`.*differs from that of pl.masked"):
        pl.apply(model, plan, backend="module")
    with pytest.raises(pl.PlanError, match="nothing was cut"):
        pl.apply(model, plan, backend="module", inplace=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert pl.apply(model, plan, backend="module", check=False)[2].out_features == 4


def test_without_data_there_is_a_word():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = random_plan(model, torch.empty(3, 4))
    with pytest.warns(UserWarning, match="was not compared with pl.masked: its weights have no data"):
        pl.apply(model, plan)
    pl.apply(model, plan, check=False)


class Noisy(nn.Module):
    """Random in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + torch.randn_like(x))


def test_random_outputs_cannot_be_compared_and_are_not_refused():
    model, x = Noisy(), torch.randn(3, 4)
    plan = random_plan(model, x)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="its outputs are random"):
        cut = pl.apply(model, plan)
    assert cut.first.out_features == 4 and torch.equal(torch.get_rng_state(), state)


def test_whole_numbers_are_checked_with_the_values_of_the_example():
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(50, 8), nn.Linear(8, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.last(self.table(tokens - 1000))

    model, tokens = Lookup(), torch.randint(1000, 1050, (2, 5))
    plan = random_plan(model, tokens)
    assert pl.apply(model, plan).last.in_features == 4
    again = pl.Plan.from_json(plan.to_json())
    assert again == plan and pl.apply(model, again).last.in_features == 4


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("what", ["heads and all", "feed-forward"])
def test_an_encoder_with_a_padding_mask_runs_as_its_users_run_it(norm: bool, what: str):
    torch.manual_seed(0)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
            self.embedding, self.last = nn.Embedding(30, 16), nn.Linear(16, 5)
            self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16) if norm else None)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.encoder(self.embedding(tokens), src_key_padding_mask=tokens == 0)
            return self.last(x)

    model, tokens = Classifier().eval(), torch.randint(1, 30, (3, 6))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tokens[0, 4:], tokens[1, 5:] = 0, 0
    graph = pl.trace(model, tokens)
    ignored = [g.name for g in graph.groups if what == "feed-forward" and "linear1" not in g.name]
    plan = pl.plan(pl.criteria.Random(1)(graph), ratio=0.5, scope="layer", ignore=ignored)
    cut, silent = pl.apply(model, plan, backend="module"), pl.masked(model, plan)
    assert (type(cut.encoder) is FreeEncoder) == (what != "feed-forward")
    loose = torch.randint(1, 30, (3, 6))
    loose[0, 1:3] = 0  # not at its end: PyTorch does not pack such a batch
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        for inputs in (tokens, loose, tokens[:, :5]):
            with torch.no_grad():
                assert error(cut(inputs), silent(inputs)) < 1e-5
            assert error(cut(inputs), silent(inputs)) < 1e-5  # with gradients PyTorch computes all places
        whole = pl.apply(model, pl.Plan((), plan.inputs))
        with torch.no_grad():
            assert error(whole(tokens), model(tokens)) < 1e-6


def test_half_precision_is_compared_with_a_wider_tolerance():
    model, x = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).bfloat16(), torch.randn(3, 16).bfloat16()
    assert pl.apply(model, random_plan(model, x))[0].out_features == 16
    assert agreement.TOLERANCE[torch.float32] < agreement.TOLERANCE[torch.bfloat16]

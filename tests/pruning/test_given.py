"""What `prune` is given: batches to compensate on, and fine-tuning that returns its model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunelab as pl


@pytest.fixture
def setting() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)).eval()
    return model, [(torch.randn(30, 6), torch.arange(30) % 5)]


def cut(setting: Any, **options: Any) -> nn.Module:
    model, batches = setting
    return pl.prune(model, batches[0][0], "magnitude", ratio=0.5, progress=False, **options)[0]


@pytest.mark.parametrize("given", [lambda b: b, lambda b: iter(b), lambda b: pl.Compensation(b), lambda b: pl.Task(b)])
def test_compensation_takes_batches_as_apply_does(given, setting):
    model, batches = setting
    graph = pl.trace(model, batches[0][0])
    plan = pl.plan(pl.criteria.Magnitude()(graph), ratio=0.5)
    wanted = pl.apply(model, plan, compensate=batches).state_dict()
    torch.testing.assert_close(cut(setting, compensate=given(batches)).state_dict(), wanted)
    torch.testing.assert_close(cut(setting, compensate=True, data=batches).state_dict(), wanted)


def test_compensation_takes_statistics(setting):
    model, batches = setting
    statistics = pl.collect(pl.trace(model, batches[0][0]), batches, {"inputs"})
    plain, found = cut(setting), cut(setting, compensate=statistics)
    assert not torch.equal(plain[3].weight, found[3].weight)


@pytest.mark.parametrize("given", [3, "batches", 0.5])
def test_what_is_nothing_to_compensate_on_is_named(given, setting):
    with pytest.raises(pl.BudgetError, match="`compensate` must be True, False, batches, statistics"):
        cut(setting, compensate=given)


def test_no_batches_to_compensate_on_are_an_error(setting):
    with pytest.raises(pl.BatchError, match="empty loader"):
        cut(setting, compensate=[])
    assert torch.equal(cut(setting, compensate=False)[0].weight, cut(setting, compensate=None)[0].weight)


def trained(model: nn.Module) -> nn.Module:
    model.train()
    with torch.no_grad():
        model[0].weight.fill_(7)
        model[1].running_mean.fill_(3)
    return model


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    "finetune",
    [
        lambda m: trained(m),
        lambda m: trained(copy.deepcopy(m)),
        lambda m: Wrapper(trained(copy.deepcopy(m))),
        lambda m: (trained(m), {"accuracy": 1.0})[1],
        lambda m: trained(m) and None,
    ],
    ids=["in place", "a copy", "a wrapper", "metrics", "None"],
)
def test_what_finetune_returns_is_used(finetune, setting, tmp_path):
    small = cut(setting, finetune=finetune)
    assert (small[0].weight == 7).all() and (small[1].running_mean == 3).all() and not small.training
    pl.save(small, tmp_path / "small.safetensors")
    again = pl.load(copy.deepcopy(setting[0]), tmp_path / "small.safetensors")
    assert torch.equal(again[0].weight, small[0].weight)


def test_a_model_of_another_structure_is_refused(setting):
    with pytest.raises(pl.PruneLabError, match=r"`finetune` returned a Sequential of another structure: `0.weight` is"):
        cut(setting, finetune=lambda model: copy.deepcopy(setting[0]))
    with pytest.raises(pl.PruneLabError, match=r"`0.weight` is missing there and \[8, 6\]"):
        cut(setting, finetune=lambda model: nn.Flatten())

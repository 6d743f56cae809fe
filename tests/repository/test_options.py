"""Numbers, flags and words that users pass: what counts as one, and what is said of the rest."""

from __future__ import annotations

import inspect
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

import prunelab as pl
from prunelab.criteria.base import NORMALIZERS, REDUCTIONS, Normalizer, Reduction
from prunelab.planning.options import Options, PlanOptions
from prunelab.pruning.schedule import SCHEDULES, ScheduleName

INPUTS = torch.ones(1, 3, 32, 32)


@pytest.fixture(scope="module")
def scores() -> pl.Scores:
    torch.manual_seed(0)
    return pl.criteria.Random()(pl.trace(pl.zoo.build("resnet20"), INPUTS))


def test_prune_passes_on_every_keyword_of_plan_but_the_budget():
    budgets = {"flops", "params", "bytes", "latency", "ratio"}
    known = inspect.signature(pl.plan).parameters.keys() - {"scores"} - budgets
    assert known == PlanOptions.__annotations__.keys() == PlanOptions.__optional_keys__
    assert known == {field.name for field in fields(Options)} - {"since"}
    assert budgets <= inspect.signature(pl.prune).parameters.keys() and known.isdisjoint(
        inspect.signature(pl.prune).parameters
    )


@pytest.mark.parametrize(
    ("words", "table"), [(Reduction, REDUCTIONS), (Normalizer, NORMALIZERS), (ScheduleName, SCHEDULES)]
)
def test_a_table_has_an_entry_for_every_word_that_its_type_allows(words, table):
    assert tuple(table) == get_args(words)


def test_obd_says_all_that_its_fisher_may_be():
    with pytest.raises(pl.OptionError, match="fisher='exact' is not one of empirical, mc, ggn, hessian"):
        pl.criteria.OBD(fisher="exact")


HOSTILE = (-0.5, 1.5, 2, 10**400, "half", "0.5", b"1", float("nan"), float("inf"), -float("inf"), True, False)
HOSTILE += (np.True_, np.nan, 1j, [0.5], {}, torch.ones(2), torch.tensor(True), torch.tensor(float("nan")), object())


@pytest.mark.parametrize("share", HOSTILE, ids=lambda share: repr(share)[:12])
@pytest.mark.parametrize("kind", ["flops", "params", "bytes", "latency", "ratio"])
def test_a_budget_outside_its_range_is_an_error_that_names_it(scores, kind, share):
    with pytest.raises(pl.OptionError, match=rf"`{kind}` must be a number in .*1.*, got {kind}="):
        pl.plan(scores, **{kind: share})


@pytest.mark.parametrize(("kind", "share"), [("flops", 0), ("params", 0.0), ("bytes", 0), ("latency", 0), ("ratio", 1)])
def test_nothing_can_be_kept_by_no_budget(scores, kind, share):
    with pytest.raises(pl.OptionError, match=f"`{kind}` must be"):
        pl.plan(scores, **{kind: share})


@pytest.mark.parametrize(
    "half",
    [
        Fraction(1, 2),
        Decimal("0.5"),
        np.float16(0.5),
        np.float32(0.5),
        np.float64(0.5),
        np.array(0.5),
        torch.tensor(0.5),
    ],
    ids=lambda half: type(half).__name__,
)
def test_numbers_of_any_library_are_numbers(scores, half):
    for kind in ("flops", "params", "bytes", "ratio"):
        assert pl.plan(scores, **{kind: half}) == pl.plan(scores, **{kind: 0.5})
    name = scores.graph.groups[2].name
    assert pl.plan(scores, flops=0.8, max_ratio=half, overrides={name: half}) == pl.plan(
        scores, flops=0.8, max_ratio=0.5, overrides={name: 0.5}
    )
    assert pl.plan(scores, flops=0.8, round_to=np.int64(4)) == pl.plan(scores, flops=0.8, round_to=4)


@pytest.mark.parametrize("whole", [1, 1.0, np.float32(1), Fraction(1)])
@pytest.mark.parametrize("kind", ["flops", "params", "bytes", "latency"])
@pytest.mark.parametrize("options", [{}, {"round_to": 8}, {"scope": "layer"}, {"scope": "isomorphic", "per": "params"}])
def test_to_keep_everything_removes_nothing(scores, kind, whole, options):
    plan = pl.plan(scores, **{kind: whole}, **options)
    assert plan.cuts == () and plan.budget["kept"][kind] == 1 and "why" not in plan.budget
    assert pl.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("scope", ["global", "layer", "isomorphic"])
def test_a_ratio_of_nothing_removes_nothing(scores, scope):
    assert pl.plan(scores, ratio=0, scope=scope).cuts == pl.plan(scores, ratio=0.0, round_to=8, scope=scope).cuts == ()


def test_an_empty_plan_cuts_nothing_and_can_be_kept(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    plan = pl.plan(pl.criteria.Magnitude()(pl.trace(model, x)), flops=1.0)
    for backend in ("auto", "module", "graph"):
        copy = pl.apply(model, plan, backend=backend)
        assert copy is not model and torch.equal(copy(x), model(x))
    assert torch.equal(pl.masked(model, plan)(x), model(x))
    pl.save(pl.apply(model, plan), tmp_path / "whole.safetensors")
    assert torch.equal(pl.load(model, tmp_path / "whole.safetensors")(x), model(x))


def test_a_budget_of_what_the_model_has_not_is_an_error_that_says_so():
    frozen = pl.criteria.Random()(pl.trace(nn.Linear(4, 2), torch.ones(1, 4)))
    for budget in ({"flops": 0.5}, {"ratio": 0.5}):
        with pytest.raises(pl.PlanError, match="Linear has no units to remove, since all its parameters"):
            pl.plan(frozen, **budget)
    assert pl.plan(frozen, flops=1.0).cuts == pl.plan(frozen, ratio=0).cuts == ()


class Lookup(nn.Module):
    """A network without a single multiply-add that counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(5, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.table(x) * self.scale).sum(-1)


def test_a_share_of_no_flops_is_an_error():
    scores = pl.criteria.Random()(pl.trace(Lookup(), torch.zeros(1, 3, dtype=torch.long)))
    with pytest.raises(pl.BudgetError, match="Lookup has no flops to take a share of: give another budget"):
        pl.plan(scores, flops=0.5)
    with pytest.raises(pl.BudgetError, match="Lookup has no flops to take a share of: give another `per`"):
        pl.plan(scores, params=0.5, per="flops")
    plan = pl.plan(scores, params=0.5)
    assert plan.budget["kept"] == {"flops": 1.0, "params": 0.5, "bytes": 0.5}
    assert pl.plan(scores, flops=1.0, per="flops").cuts == ()
    _, report = pl.prune(Lookup(), torch.zeros(1, 3, dtype=torch.long), "random", params=0.5)
    assert report.rows[-1]["flops_kept"] == 1 and report.rows[-1]["params_kept"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round_to": 2.5}, "`round_to` must be a positive integer, got round_to=2.5"),
        ({"round_to": True}, "`round_to` must be a positive integer"),
        ({"max_ratio": "all"}, r"`max_ratio` must be a number in \(0, 1\], got max_ratio='all'"),
        ({"max_ratio": {"layer1": 2}}, r"`max_ratio\['layer1'\]` must be a number in \[0, 1\]"),
        ({"max_ratio": {3: 0.5}}, "`max_ratio` takes names and modules as keys; 3 is neither"),
        ({"scope": ["global"]}, r"scope=\['global'\] is not one of global, layer"),
        ({"per": None}, "per=None is not one of unit, flops"),
        ({"timing": 0.1}, "`timing` must be a pl.Timing, got 0.1"),
        ({"ignore": 3}, "`ignore` takes names and modules, one or a list of them; 3 is neither"),
        ({"ignore": ["layer1", None]}, "None is neither"),
        ({"overrides": ["layer1"]}, "`overrides` must map names or modules to shares"),
        ({"overrides": {"layer1": 1}}, r"`overrides\['layer1'\]` must be a number in \[0, 1\)"),
        ({"overrides": {"layer1": "half"}}, r"got overrides\['layer1'\]='half'"),
        ({"overrides": {("layer1",): 0.5}}, r"\('layer1',\) is neither"),
    ],
)
def test_options_of_a_wrong_type_are_errors_that_say_what_was_expected(scores, options, message):
    with pytest.raises(pl.OptionError, match=message):
        pl.plan(scores, flops=0.5, **options)


def test_modules_are_as_good_as_their_names():
    model = pl.zoo.resnet20()
    scores = pl.criteria.Random()(pl.trace(model, INPUTS))
    by_module = pl.plan(scores, flops=0.6, overrides={model.layer2: 0.25}, max_ratio={model.layer3: 0.5})
    assert by_module == pl.plan(scores, flops=0.6, overrides={"layer2": 0.25}, max_ratio={"layer3": 0.5})
    everywhere = pl.plan(scores, ratio=0.5, overrides={model: 0.25})
    assert [len(cut.removed) / cut.size for cut in everywhere.cuts] == [0.25] * len(scores.graph.groups)
    with pytest.raises(pl.PlanError, match="`overrides` names a Linear that is not part of the model ResNet"):
        pl.plan(scores, flops=0.6, overrides={nn.Linear(1, 1): 0.5})


@pytest.mark.parametrize("wrong", [None, {}, "magnitude", 0.5])
def test_only_scores_can_be_planned_from(scores, wrong):
    for given in (wrong, scores.graph, pl.criteria.Random()):
        with pytest.raises(pl.PlanError, match="`scores` must be what a criterion returns, .*got a "):
            pl.plan(given, flops=0.5)


# ── prune ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


X = torch.ones(1, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1.5}, "`steps` must be a positive integer, got steps=1.5"),
        ({"steps": True}, "`steps` must be a positive integer"),
        ({"seed": -1}, "`seed` must be an integer of at least 0, got seed=-1"),
        ({"seed": "1"}, "`seed` must be an integer"),
        ({"schedule": 0.5}, "schedule=0.5 is not one of linear, geometric, cubic, nor a function"),
        (
            {"schedule": lambda progress, final: "half"},
            "must return the share that is left, a number; it returned 'half'",
        ),
        ({"finetune": "sgd"}, r"`finetune` must be a function, called as finetune\(model\), got finetune='sgd'"),
        ({"evaluate": 0.5}, "`evaluate` must be a function"),
        (
            {"evaluate": lambda model: None},
            "`evaluate` must return metrics by name, .* or one number; it returned None",
        ),
        ({"evaluate": lambda model: {"accuracy": [1]}}, r"its metric 'accuracy' is \[1\]"),
        ({"criterion": 3}, "There is no criterion 3; there are bn_scale"),
        ({"criterion": nn.Linear}, "There is no criterion <class"),
        ({"state": 3}, "`state` must be the path of a folder, got 3"),
        ({"progress": "yes"}, "`progress` must be True or False"),
        ({"overrides": {"0": 1.0}}, r"`overrides\['0'\]` must be a number in \[0, 1\)"),
        ({"ignore": 0.5}, "`ignore` takes names and modules"),
        ({"max_ratio": "all"}, "`max_ratio` must be a number"),
        ({"flops": 1.5}, "`flops` must be a number"),
    ],
)
def test_bad_options_of_prune_are_named(options, message):
    with pytest.raises(pl.OptionError, match=message):
        pl.prune(small(), X, **{"flops": 0.6, "progress": False, **options})


@pytest.mark.parametrize("score", [0.5, np.float32(0.5), torch.tensor(0.5), Fraction(1, 2)])
def test_one_number_from_evaluate_is_the_score(score):
    _, report = pl.prune(small(), X, ratio=0.5, evaluate=lambda model: score)
    assert [row["score"] for row in report.rows] == [0.5, 0.5]
    assert pl.Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    "budget", [{"flops": 1.0}, {"params": 1}, {"bytes": np.float32(1)}, {"latency": 1.0}, {"ratio": 0}]
)
@pytest.mark.parametrize("steps", [1, 3])
def test_to_prune_nothing_returns_a_copy(budget, steps, tmp_path):
    model = small()
    same, report = pl.prune(model, X, steps=steps, state=tmp_path / "run", progress=False, **budget)
    assert same is not model and torch.equal(same(X), model(X))
    assert [plan.cuts for plan in report.plans] == [()] * steps and report.rows[-1]["flops_kept"] == 1
    again, other = pl.prune(model, X, steps=steps, state=tmp_path / "run", progress=False, **budget)
    assert torch.equal(again(X), model(X)) and other == report
    pl.save(same, tmp_path / "same.safetensors")
    assert torch.equal(pl.load(small(), tmp_path / "same.safetensors")(X), model(X))


def test_a_run_goes_on_whatever_the_numbers_are_made_of(tmp_path):
    one, two = (
        {"ratio": kind(0.5), "max_ratio": kind(0.75), "overrides": {"2": kind(0.25)}} for kind in (float, np.float64)
    )
    _, first = pl.prune(small(), X, state=tmp_path, seed=1, **one)
    _, second = pl.prune(small(), X, state=tmp_path, seed=np.int64(1), **two)
    assert first == second

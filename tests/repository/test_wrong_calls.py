"""Arguments of a wrong type, at every public function: an error of prunelab's that says what was expected."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch

import prunelab as pl
from prunelab.criteria import memory
from tests.repository.test_options import HOSTILE, X, small


@pytest.fixture(scope="module")
def scores() -> pl.Scores:
    return pl.criteria.Random()(pl.trace(pl.zoo.build("resnet20"), torch.ones(1, 3, 32, 32)))


# ── criteria ──────────────────────────────────────────────────────────────────────────────────────────────────────

OTHERS = {
    "obd": {"fisher": "mc"},
    "bn_scale": {"fallback": "keep"},
    "gate": {"interactions": True},
    "obs": {"damping": 1},
}


@pytest.mark.parametrize("name", pl.criteria.names())
def test_a_criterion_in_words_is_its_name(name):
    for criterion in (pl.criteria.get(name), pl.criteria.get(name, **OTHERS.get(name, {}))):
        assert str(criterion) == name == criterion.name and pl.criteria.get(criterion) is criterion
        assert type(pl.criteria.get(str(criterion))) is type(criterion)


def test_a_criterion_of_ones_own_has_its_own_name():
    class Mine(pl.criteria.OBD):
        pass

    assert str(Mine()) == "mine" and str(pl.criteria.OBD()) == "obd"


def test_scores_and_plans_name_their_criterion(scores):
    graph = scores.graph
    found = pl.criteria.BNScale(fallback="keep")(graph)
    assert found.criterion == pl.plan(found, flops=0.9).budget["criterion"] == "bn_scale"


WRONG: dict[type, tuple] = {
    bool: (None, 0, 1, "yes", 0.5),
    int: (True, 0.5, "1", None, float("nan"), [1], 10**400),
    float: (True, "1", None, float("nan"), float("inf"), -1, [1.0]),
    str: (True, 1, None, "none of these", ["ggn"], b"ggn"),
}


@pytest.mark.parametrize("name", pl.criteria.names())
def test_every_option_of_every_criterion_is_checked(name):
    tried = 0
    for field in dataclasses.fields(pl.criteria.CRITERIA[name]):
        for value in WRONG.get(type(field.default), ("all", 3)):
            if field.default is not None or value is not None:
                tried += 1
                with pytest.raises(pl.OptionError, match=field.name):
                    pl.criteria.get(name, **{field.name: value})
    assert tried


@pytest.mark.parametrize("name", pl.criteria.names())
def test_only_graphs_can_be_scored(name):
    for wrong in (small(), None, "graph", 3):
        with pytest.raises(
            pl.OptionError, match="`graph` must be a pl.DependencyGraph, got a .*: trace the model first"
        ):
            pl.criteria.get(name)(wrong, [(X, torch.tensor([0]))])


def test_unknown_criteria_and_options_list_what_there_is():
    with pytest.raises(pl.OptionError, match="There is no criterion 'bnscale'; there are bn_scale, eigendamage"):
        pl.criteria.get("bnscale")
    with pytest.raises(pl.OptionError, match="'obd' has no option 'fishr'; its options are .*fisher"):
        pl.criteria.get("obd", fishr="mc")


def test_a_matrix_that_does_not_fit_is_refused_before_it_is_measured(monkeypatch):
    graph = pl.trace(small(), X)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8 * 24**2 - 1)

    def batches():
        raise AssertionError("the batches were read")
        yield

    with pytest.raises(pl.OptionError, match="interactions between 24 units needs .* GB free: .*interactions=True"):
        pl.criteria.Gate(interactions=True)(graph, batches())


# ── the rest ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_not_a_plan_is_an_error_that_says_how_to_make_one():
    model = small()
    scores = pl.criteria.Magnitude()(pl.trace(model, X))
    for call in (pl.apply, pl.masked):
        with pytest.raises(
            pl.PlanError, match="A pl.Plan was expected, got a Scores: make one of these scores, with pl.plan"
        ):
            call(model, scores)
        for wrong in (None, "plan", 0.5, {}):
            with pytest.raises(pl.PlanError, match="A pl.Plan was expected, got a "):
                call(model, wrong)
    plan = pl.plan(scores, ratio=0.5)
    with pytest.raises(pl.PlanError, match="A pl.Plan was expected"):
        plan + "plan"
    with pytest.raises(pl.OptionError, match="backend='fx' is not one of auto, module, graph"):
        pl.apply(model, plan, backend="fx")
    with pytest.raises(pl.OptionError, match="`inplace` must be True or False"):
        pl.apply(model, plan, inplace="no")


@pytest.mark.parametrize("wrong", [None, "model", 0.5, [], object()])
def test_what_is_not_a_model_is_an_error_that_says_so(wrong, tmp_path):
    model = small()
    plan = pl.plan(pl.criteria.Magnitude()(pl.trace(model, X)), ratio=0.5)
    path = tmp_path / "small.safetensors"
    pl.save(pl.apply(model, plan), path)
    calls = [
        lambda: pl.trace(wrong, X), lambda: pl.apply(wrong, plan), lambda: pl.masked(wrong, plan),
        lambda: pl.count(wrong, X), lambda: pl.latency(wrong, X), lambda: pl.save(wrong, path),
        lambda: pl.load(wrong, path), lambda: pl.bake(wrong), lambda: pl.sparsify(wrong, {}, 0.5),
        lambda: pl.prune(wrong, X, flops=0.5), lambda: pl.collect(wrong, [], "grad"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(pl.PruneLabError, match=r"torch\.nn\.Module"):
            call()


@pytest.mark.parametrize("wrong", [None, 3, 0.5, b"path", []])
def test_what_is_not_a_path_is_an_error_that_says_so(wrong):
    for call in (lambda: pl.save(small(), wrong), lambda: pl.load(small(), wrong), lambda: pl.data.cifar10(wrong)):
        with pytest.raises(pl.OptionError, match="must be a path, got "):
            call()
    with pytest.raises(pl.PruneLabError, match="`name` must be"):
        pl.data.get(wrong)
    with pytest.raises(pl.DataError, match="`name` must be the name of a network"):
        pl.zoo.load(wrong)


def test_units_and_groups_that_do_not_exist_are_named(scores):
    group = scores.graph.groups[0]
    for unit in (-1, group.size, 0.5, "0", None, True):
        with pytest.raises(pl.PlanError, match="has no unit"):
            group.members[0].positions(unit)
    assert group.members[0].positions(np.int64(1)).tolist() == [1]
    for name in ("layer9", None, 3, []):
        with pytest.raises(pl.PlanError, match="There are no scores for"):
            scores[name]
        assert name not in scores
    for removed in ({"layer9": [0]}, {group.name: [group.size]}, {group.name: [-1]}, [0]):
        with pytest.raises(pl.PlanError, match="units"):
            scores.together(removed)
    for name, dim in (("conv1.weight", 9), ("conv1.weight", "0"), (None, 0), ([], 0)):
        with pytest.raises(pl.TraceError, match="has no dimension"):
            scores.graph.group_of(name, dim)


COMPENSATION: dict[str, tuple] = {
    "damping": (-1, True, "1", float("nan"), float("inf")),
    "memory": (0, -1, 1.5, True, "1"),
    "sequential": (1, "yes", 0.5),
    "side": ("both", None, 1),
}


@pytest.mark.filterwarnings("ignore:4 samples are too few")
def test_densities_and_other_shares_are_checked_everywhere():
    model = small()
    graph, batches = pl.trace(model, X), [(torch.randn(4, 6), torch.arange(4) % 3)]
    magnitudes, directions = pl.criteria.Magnitude().elementwise(model), pl.criteria.EigenDamage()(graph, batches)
    assert pl.count(pl.factorize(model, directions, flops=1.0), X) == pl.count(model, X)
    assert torch.equal(pl.sparsify(model, magnitudes, np.float32(1))(X), model(X))
    half = pl.bake(pl.sparsify(model, magnitudes, 0.5)).state_dict()
    for number in (np.float32(0.5), torch.tensor(0.5), Fraction(1, 2)):
        found = pl.bake(pl.sparsify(model, magnitudes, number)).state_dict()
        assert all(torch.equal(found[name], half[name]) for name in half)
    for share in HOSTILE:
        for kind in ("flops", "params"):
            with pytest.raises(pl.OptionError, match=f"`{kind}` must be a number in"):
                pl.factorize(model, directions, **{kind: share})
        with pytest.raises(pl.OptionError, match="`density` must be a number in"):
            pl.sparsify(model, magnitudes, share)
    for option, values in COMPENSATION.items():
        for value in values:
            with pytest.raises(pl.OptionError, match=option):
                pl.Compensation(**{option: value})
    with pytest.raises(pl.PlanError, match="must map names of parameters to tensors like them"):
        pl.sparsify(model, directions, 0.5)
    with pytest.raises(pl.PlanError, match="The score of '0.weight' must be a tensor"):
        pl.sparsify(model, {"0.weight": 1.0}, 0.5)

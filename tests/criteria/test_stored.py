"""Scores that are saved are the same again, in another process and for the right model only."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import prunelab as pl
from prunelab.criteria.stored import KEY

LAYERS = {"random": {}, "magnitude": {}, "taylor": {}, "obd": {"fisher": "mc"}, "gate": {"interactions": True}}
LAYERS |= {"kron_obs": {}, "eigendamage": {"correction": "ekfac"}, "oracle": {"progress": False}, "bn_scale": {}}


def net(width: int = 8, classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 2, 7, 7, generator=generator), torch.arange(8) % 3)]


@pytest.fixture(scope="module")
def graph(batches) -> pl.DependencyGraph:
    return pl.trace(net(), batches[0][0])


@pytest.mark.parametrize("name", LAYERS)
def test_saved_scores_are_the_same_again(graph, batches, tmp_path, name):
    scores = pl.criteria.get(name, **LAYERS[name])(graph, batches)
    scores.save(tmp_path / "scores.safetensors")
    for target in (graph, pl.trace(net(), batches[0][0]), net()):
        again = pl.Scores.load(tmp_path / "scores.safetensors", target)
        assert type(again) is type(scores) and again.criterion == name == str(pl.criteria.get(again.criterion))
        assert all(torch.equal(again[group], scores[group.name]) for group in again)
        assert (again.matrix is None) == (scores.matrix is None)
        assert scores.matrix is None or torch.equal(again.matrix, scores.matrix)
        assert pl.plan(again, ratio=0.4, per="flops") == pl.plan(scores, ratio=0.4, per="flops")


@pytest.mark.filterwarnings("ignore:params=0.9")  # so small a network ends below its budget
def test_saved_directions_can_be_factorized(graph, batches, tmp_path):
    scores = pl.criteria.EigenDamage()(graph, batches)
    scores.save(tmp_path / "scores.safetensors")
    again = pl.Scores.load(tmp_path / "scores.safetensors", graph.model)
    one, two = (pl.factorize(graph.model, found, params=0.9) for found in (scores, again))
    assert torch.equal(one(batches[0][0]), two(batches[0][0]))


def test_another_process_plans_the_same(graph, batches, tmp_path):
    scores = pl.criteria.Gate(interactions=True)(graph, batches)
    scores.save(tmp_path / "scores.safetensors")
    torch.save(graph.model.state_dict(), tmp_path / "weights.pt")
    code = (
        "import sys, prunelab as pl\nfrom tests.criteria.test_stored import net\n"
        "print(pl.plan(pl.Scores.load(sys.argv[1], net()), flops=0.5).to_json())"
    )
    here = Path(__file__).parents[2]
    run = [sys.executable, "-c", code, str(tmp_path / "scores.safetensors")]
    found = subprocess.run(run, cwd=here, capture_output=True, text=True, check=True).stdout
    assert pl.Plan.from_json(found) == pl.plan(scores, flops=0.5)


def test_infinite_scores_and_parts_that_are_ignored_come_back(batches, tmp_path):
    graph = pl.trace(net(), batches[0][0], ignore=["8"])
    scores = pl.criteria.Magnitude()(graph)
    scores = pl.Scores(
        graph, {name: torch.where(value > 1, torch.inf, value) for name, value in scores.by_name.items()}, "mine"
    )
    scores.save(tmp_path / "scores")
    again = pl.Scores.load(str(tmp_path / "scores"), net())
    assert [group.name for group in again] == [group.name for group in graph.groups] == ["0"]
    assert torch.equal(again["0"], scores["0"]) and again["0"].isinf().any() and again.criterion == "mine"
    with pytest.raises(pl.PlanError, match="its group `3` has no scores in the file"):
        pl.Scores.load(tmp_path / "scores", pl.trace(net(), batches[0][0]))


@pytest.mark.parametrize(
    ("other", "inputs", "message"),
    [
        (lambda: net(width=9), (1, 2, 7, 7), "group `0` has 8 units in the file and 9 in the model"),
        (lambda: net(classes=4), (1, 2, 7, 7), r"`8.bias` has the shape \[3\] in the file and \[4\] in the model"),
        (lambda: nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), (1, 2), "group `0` has 8 units in the file and 4 in"),
        (lambda: nn.Sequential(nn.Identity(), *net()), (1, 2, 7, 7), "it has no group `0`"),
        (lambda: nn.Linear(2, 2), (1, 2), "a Sequential, this is a Linear.*it has no group `0`"),
    ],
)
def test_scores_of_another_model_are_refused_with_what_differs(graph, tmp_path, other, inputs, message):
    pl.criteria.Random()(graph).save(tmp_path / "scores")
    with pytest.raises(pl.PlanError, match=message):
        pl.Scores.load(tmp_path / "scores", pl.trace(other(), torch.ones(inputs)))


def test_a_model_that_cannot_take_the_inputs_is_refused(graph, tmp_path):
    pl.criteria.Random()(graph).save(tmp_path / "scores")
    with pytest.raises(
        pl.TraceError, match="holds scores of a Sequential, and this model cannot be traced as that one"
    ):
        pl.Scores.load(tmp_path / "scores", nn.LSTM(3, 4))
    with pytest.raises(pl.PlanError, match="loaded for a graph, or for a model, not for None"):
        pl.Scores.load(tmp_path / "scores", None)


def test_damaged_files_are_refused(graph, tmp_path):
    path, wrong = tmp_path / "scores", tmp_path / "wrong"
    pl.criteria.Random()(graph).save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:200], whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1]), b"scores", pickle.dumps({})):
        wrong.write_bytes(damaged)
        with pytest.raises(pl.DataError, match="wrong is not a file of scores, or is damaged or edited"):
            pl.Scores.load(wrong, graph)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[KEY])
    edits = ({"format": 2}, {"kind": "Model"}, {"groups": 3}, {"groups": [[]]}, {"inputs": "x"}, {"criterion": "obd"})
    edits += ({"shapes": None}, {"layers": [[]]}, {"ignored": None})
    for edit in edits:
        save_file(tensors, wrong, metadata={KEY: json.dumps(header | edit)})
        with pytest.raises(pl.DataError, match="wrong is not a file of scores"):
            pl.Scores.load(wrong, graph)
    save_file(tensors, wrong)
    with pytest.raises(pl.DataError, match="it has no header of scores"):
        pl.Scores.load(wrong, graph)
    pl.save(graph.model, wrong)
    with pytest.raises(pl.DataError, match="it has no header of scores"):
        pl.Scores.load(wrong, graph)
    with pytest.raises(pl.DataError, match="There are no scores at .*nowhere"):
        pl.Scores.load(tmp_path / "nowhere", graph)


def test_what_cannot_be_written_is_an_error_and_leaves_the_old_file(graph, tmp_path):
    scores = pl.criteria.Random()(graph)
    with pytest.raises(pl.DataError, match="cannot be written"):
        scores.save(tmp_path / "no" / "folder")
    with pytest.raises(pl.OptionError, match="`path` must be a path, got 3"):
        scores.save(3)

    class Mine(pl.Scores):
        pass

    scores.save(tmp_path / "scores")
    before = (tmp_path / "scores").read_bytes()
    with pytest.raises(pl.DataError, match="only Scores and EigenScores can be kept, not a Mine"):
        Mine(graph, scores.by_name, "mine").save(tmp_path / "scores")
    assert (tmp_path / "scores").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_graphs_and_scores_can_be_copied_and_pickled(batches, again):
    graph = pl.trace(net(), batches[0][0], ignore=["8"])
    scores = pl.criteria.Gate(interactions=True)(graph, batches)
    twin = again(graph)
    assert [(g.name, g.size, g.members) for g in twin.groups] == [(g.name, g.size, g.members) for g in graph.groups]
    assert twin.frozen == graph.frozen and twin.model is not graph.model
    copied = again(scores)
    assert copied.graph.model is not graph.model and torch.equal(copied.matrix, scores.matrix)
    plan = pl.plan(copied, ratio=0.5)
    assert plan == pl.plan(scores, ratio=0.5)
    inputs = batches[0][0]
    assert torch.equal(pl.apply(copied.graph.model, plan)(inputs), pl.apply(graph.model, plan)(inputs))


def test_scores_of_a_model_of_tokens_are_kept_without_the_tokens(tmp_path):
    torch.manual_seed(0)
    model, tokens = (
        nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 9)),
        torch.arange(4)[None],
    )
    scores = pl.criteria.get("magnitude")(pl.trace(model, tokens))
    scores.save(tmp_path / "scores.safetensors")
    assert b"values" not in (tmp_path / "scores.safetensors").read_bytes()
    for of in (pl.trace(model, tokens), model):
        again = pl.Scores.load(tmp_path / "scores.safetensors", of)
        assert list(again.by_name) == list(scores.by_name) == ["0", "1"]
        assert all(torch.equal(again.by_name[name], scores.by_name[name]) for name in scores.by_name)

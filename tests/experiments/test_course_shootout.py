"""Notebook ``15_shootout``: its protocol does what it says, contradictions are refused, mistakes are explained."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch

import prunelab as pl
from prunelab.course.exercises import shootout as exercises
from prunelab.course.notebook import validate
from prunelab.experiments import shootout
from prunelab.experiments.figures import shootout as figures

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "15_shootout.ipynb"
SMALL = {"scoring": 48, "test_images": 60, "images": 64, "batch_size": 32, "epochs": 1.0, "latency_images": 0}


def defaults() -> dict:
    """Return the parameters as the notebook has them."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    own: dict = {}
    exec(next(cell.source for cell in cells if cell.id == "parameters"), own)
    return {name: value for name, value in own.items() if not name.startswith("__")}


def settings(**given) -> shootout.Settings:
    parameters = defaults() | SMALL | given
    return shootout.Settings.of(validate(parameters, **shootout.KINDS))


def done(**given) -> shootout.Run:
    """Do what the notebook's cell `protocol` does."""
    run = shootout.Run(settings(**given))
    run.measure("before")
    for share in run.shares:
        run.cut(run.score(), share)
        run.measure("cut")
        if run.settings.epochs:
            run.finetune()
            run.measure("fine-tuned")
    return run


# ── settings ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_parameter_of_the_notebook_is_checked():
    assert set(defaults()) == set(shootout.KINDS)
    settings()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"criterion": "obdd"}, "`criterion` is 'obdd', but should be one of"),
        ({"share": 1.0}, "`share` is 1.0, but should be a number from"),
        ({"method": "weights"}, "`budget` is 'flops', but method='weights' knows budget density"),
        ({"budget": "density"}, "`budget` is 'density', but method='channels' knows"),
        ({"method": "weights", "budget": "density", "scope": "isomorphic"}, "knows scope global, layer"),
        ({"method": "weights", "budget": "density", "per": "flops"}, "method='weights' has no `per`"),
        ({"method": "weights", "budget": "density", "criterion": "gate"}, "`gate` scores no single weights"),
        ({"method": "factorize"}, "needs criterion='eigendamage', not 'obd'"),
        ({"method": "factorize", "criterion": "eigendamage", "compensate": True}, "`compensate` refits layers"),
        ({"options": "{fisher: mc}"}, "`options` is '{fisher: mc}', which is not JSON"),
        ({"options": "[1]"}, "should be a JSON object"),
        ({"options": '{"fishr": "mc"}'}, "its options are"),
        ({"schedule": "cubik"}, "`schedule` is 'cubik', but should be one of"),
        ({"schedule": "0.5 0.6"}, "or falling shares"),
        ({"device": "tpu"}, "`device` is 'tpu', which is not available here"),
    ],
)
def test_what_does_not_go_together_is_named(given, words):
    with pytest.raises(pl.PruneLabError) as refused:
        settings(**given)
    assert words in str(refused.value)


def test_a_schedule_is_a_name_or_shares_in_text():
    assert settings(schedule="linear", steps=2, share=0.5).shares() == [0.75, 0.5]
    made = settings(schedule="0.8 0.6 0.3", epochs=1.5)
    assert made.shares() == [0.8, 0.6, 0.3]
    assert made.recipe().epochs == 0.5, "the epochs are divided among the steps"


# ── the protocol ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_reports_its_last_stage_and_everything_that_it_took():
    run = done(evaluate_every=1, seed=3, latency_images=2, share=0.5)
    row = run.row()
    assert [entry["stage"] for entry in run.history] == ["before", "cut", "epoch", "fine-tuned"]
    assert row["accuracy"] == run.history[-1]["accuracy"] == run.history[-2]["accuracy"], "the epoch is the last"
    assert (row["accuracy_before"], row["accuracy_cut"]) == (run.history[0]["accuracy"], run.history[1]["accuracy"])
    by_hand = [(run.model(x).argmax(1) == y).double() for x, y in run.test]
    assert row["accuracy"] == pytest.approx(float(torch.cat(by_hand).mean()))
    assert row["flops"] == pl.count(run.model, run.inputs).flops
    assert 0.45 < row["flops_kept"] <= 0.5
    assert row["weights_kept"] == pytest.approx(row["params_kept"], abs=0.01)
    assert row["latency_kept"] == pytest.approx(row["latency_ms"] / row["latency_ms_before"])
    for part in ("load", "score", "cut", "finetune", "evaluate", "latency"):
        assert row[f"seconds_{part}"] >= 0 and row[f"memory_{part}_gb"] > 0.05
    assert (row["test_images_used"], row["scoring_images_used"], row["training_images_used"]) == (60, 48, 64)
    assert json.dumps(row), "plain data"
    again = done(evaluate_every=1, seed=3, share=0.5).row()
    assert (again["accuracy"], again["loss"]) == (row["accuracy"], row["loss"]), "the same seed, the same run"


def test_the_whole_model_stays_as_it_is_and_scores_see_no_test_image():
    run = done(epochs=0.0)
    whole = pl.zoo.load("resnet20")
    for name, value in run.whole.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name])
    seen = {x.numpy().tobytes() for inputs, _ in run.batches for x in inputs}
    assert not seen & {x.numpy().tobytes() for inputs, _ in run.test for x in inputs}
    assert [entry["stage"] for entry in run.history] == ["before", "cut"]
    assert run.row()["accuracy"] == run.row()["accuracy_cut"]


def test_steps_end_where_the_schedule_says_and_a_group_loses_no_more_than_max_ratio():
    run = done(criterion="magnitude", schedule="0.8 0.6 0.4", max_ratio=0.5, epochs=0.0)
    kept = [entry["flops_kept"] for entry in run.history[1:]]
    assert kept == pytest.approx([0.8, 0.6, 0.4], abs=0.02)
    left = {group.name: group.size for group in pl.trace(run.model, run.inputs).groups}
    assert all(size >= run.sizes[name] / 2 for name, size in left.items())


def test_compensation_and_new_statistics_help_a_bare_cut():
    bare, refit = (done(criterion="taylor", epochs=0.0, compensate=on, recalibrate=on).row() for on in (False, True))
    assert bare["flops_kept"] == refit["flops_kept"]
    assert refit["loss"] < bare["loss"]


def test_single_weights_and_bottlenecks_go_by_the_same_protocol():
    masked = done(method="weights", budget="density", criterion="magnitude", share=0.3, steps=2)
    row = masked.row()
    assert row["weights_kept"] == pytest.approx(0.3, abs=0.02)
    assert (row["flops_kept"], row["params_kept"], row["bytes_kept"]) == (1.0, 1.0, 1.0), "zeros save nothing"
    narrow = done(method="factorize", criterion="eigendamage", budget="params", share=0.6, epochs=0.0, scoring=96).row()
    assert 0.55 < narrow["params_kept"] <= 0.6


# ── exercises ─────────────────────────────────────────────────────────────────────────────────────────────────────


def spread(first, second):
    return (first.double() - second.double()).std(unbiased=False)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (
            lambda a, b: (sum(r.double().mean() * (1 - r.double().mean()) for r in (a, b)) / len(a)) ** 0.5,
            "independent",
        ),
        (lambda a, b: spread(a, b), "divide by √n"),
        (lambda a, b: spread(a, b) / len(a), "falls with √n"),
        (lambda a, b: spread(a, b) ** 2 / len(a), "take its root"),
        (lambda a, b: a.double().mean() - b.double().mean(), "difference itself"),
        (lambda a, b: (a.double().mean() * (1 - a.double().mean()) / len(a)) ** 0.5, "first accuracy alone"),
        (lambda a, b: ((a != b).double().mean() / len(a)) ** 0.5, "without taking off"),
        (lambda a, b: (a.double() - b.double()).std() / len(a) ** 0.5, "n − 1"),
        (lambda a, b: 1.0, "image by image"),
    ],
)
def test_mistakes_about_errors_are_explained(attempt, words):
    verdict = exercises.paired_error(attempt)
    assert not verdict
    assert words in verdict.message


def placed(values):
    return (values[:, None, :] > values[:, :, None]).sum(2) + 1.0


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda v: placed(-v).mean(0) + (v[:, None] == v[:, :, None]).sum(2).sub(1).div(2).mean(0), "lowest value"),
        (lambda v: placed(v).mean(0) + (v[:, None] == v[:, :, None]).sum(2).sub(1).div(2).mean(0) - 1, "from 0"),
        (lambda v: placed(v).mean(0), "the best of their ranks"),
        (lambda v: placed(v.mean(0, keepdim=True))[0], "means of the columns"),
        (lambda v: (placed(v) + (v[:, None] == v[:, :, None]).sum(2).sub(1).div(2)).mean(1), "of every block"),
        (lambda v: v.argsort(1, descending=True).double().mean(0) + 1, "sort twice"),
        (lambda v: v.argsort(dim=1, descending=True, stable=True).argsort(1).double().mean(0) + 1, "different ranks"),
        (lambda v: v.mean(0), "number of better methods"),
    ],
)
def test_mistakes_about_ranks_are_explained(attempt, words):
    verdict = exercises.mean_ranks(attempt)
    assert not verdict
    assert words in verdict.message


def less(a, b):
    return a[None] < b[:, None]


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda c, v: v == v.max(), "highest value alone"),
        (lambda c, v: torch.as_tensor(shootout.pareto_front(-c, v)), "high costs"),
        (lambda c, v: torch.as_tensor(shootout.pareto_front(c, -v)), "low values"),
        (lambda c, v: torch.as_tensor(~shootout.pareto_front(c, v)), "that are beaten"),
        (lambda c, v: ~(less(c, c) & less(-v, -v)).any(1), "better in both"),
        (lambda c, v: ~((c[None] <= c[:, None]) & (v[None] >= v[:, None])).any(1), "as good as itself"),
        (lambda c, v: c < 0.4, "Compare every point"),
    ],
)
def test_mistakes_about_fronts_are_explained(attempt, words):
    verdict = exercises.pareto_front(attempt)
    assert not verdict
    assert words in verdict.message


# ── figures ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_figure_to_remember_shows_stages_with_errors_and_what_is_left():
    history = pd.DataFrame(
        {
            "step": [0, 1, 2],
            "stage": ["before", "cut", "cut"],
            "accuracy": [0.9, 0.5, 0.4],
            "scoring_accuracy": [1, 0.6, 0.5],
        }
    )
    left, right = figures.stages(history, {"flops_kept": 0.5, "latency_kept": 1.2}, test_images=100).axes
    assert [text.get_text() for text in left.get_xticklabels()] == ["before", "cut", "cut, 2"]
    (bars,) = left.containers
    low, high = bars.lines[2][0].get_segments()[1][:, 1]
    assert (high - low) / 2 == pytest.approx(100 * (0.5 * 0.5 / 100) ** 0.5)
    assert [text.get_text() for text in right.get_yticklabels()] == ["FLOPs", "time of a forward pass"]
    assert [text.get_text() for text in right.texts] == ["50", "120"]


def test_luck_is_drawn_over_the_number_of_epochs():
    axes = figures.luck([1, 10], [0, 1.54], [0.01, 1.5]).axes[0]
    assert list(axes.lines[0].get_ydata()) == [0, 1.54]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "10"]

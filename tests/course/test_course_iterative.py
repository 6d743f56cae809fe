"""Notebook ``12_iterative``: its checkers know the mistakes, its figures show what they are given; its long run too."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_hex

from bench import finetuning
from prunelab.course.exercises import iterative as exercises
from prunelab.course.figures import iterative as figures
from prunelab.data import ImageSet


def loop(model, batches, lr, zero=True, train=True, cosine=True, momentum=0.9, steps=True, rest=True):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    model.train(train)
    for inputs, targets in batches:
        optimizer.zero_grad() if zero else None
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step() if steps else None
        schedule.step() if cosine and steps else None
    return model.eval() if rest else model


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"zero": False}, "zero_grad"),
        ({"train": False}, "model.train()"),
        ({"cosine": False}, "does not fall"),
        ({"momentum": 0.0}, "no momentum"),
        ({"momentum": 0.5}, "One pass"),
        ({"steps": False}, "optimizer.step()"),
        ({"rest": False}, "still in training mode"),
    ],
)
def test_mistakes_in_the_loop_are_explained(options, words):
    verdict = exercises.fine_tune(lambda model, batches, lr: loop(model, batches, lr, **options))
    assert not verdict
    assert words in verdict.message


@pytest.mark.parametrize(
    ("attempt", "words"), [(lambda m, b, lr: m.eval(), "unchanged"), (lambda m, b, lr: 0.5, "not float")]
)
def test_a_loop_returns_a_trained_model(attempt, words):
    verdict = exercises.fine_tune(attempt)
    assert not verdict
    assert words in verdict.message


def soft(student, teacher, T, factor=2.0, hot=None):
    q, p = F.log_softmax(student / T, 1), F.softmax(teacher / (hot or T), 1)
    return T**factor * (p * (p.log() - q)).sum(1).mean()


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda z, v, T: soft(z, v, T, factor=0), "T² is missing"),
        (lambda z, v, T: soft(z, v, T, factor=1), "one factor T"),
        (lambda z, v, T: soft(v, z, T), "comes first"),
        (lambda z, v, T: soft(z, v, T, hot=1.0), "not divided"),
        (lambda z, v, T: soft(z, v, T) / z.shape[1], "images and classes"),
        (lambda z, v, T: soft(z, v, T) * len(z), "sum over the batch"),
        (lambda z, v, T: T**4 * soft(z * T, v * T, 1.0) / T**2, "multiplied by the temperature"),
        (lambda z, v, T: T**2 * F.cross_entropy(z / T, F.softmax(v / T, 1)), "entropy of p"),
        (lambda z, v, T: F.mse_loss(z, v), "softmax of both"),
    ],
)
def test_mistakes_about_distillation_are_explained(attempt, words):
    verdict = exercises.distillation_loss(attempt)
    assert not verdict
    assert words in verdict.message


def way(*stages: tuple[str, float, float]) -> pd.DataFrame:
    return pd.DataFrame(stages, columns=["stage", "flops_kept", "accuracy"])


def test_schedules_are_lines_from_the_whole_down():
    axes = figures.schedules({"linear": [1, 0.75, 0.5], "geometric": [1, 0.7, 0.5]}).axes[0]
    assert [line.get_label() for line in axes.lines] == ["linear", "geometric"]
    assert list(axes.lines[0].get_ydata()) == [100, 75, 50]


def test_a_run_has_one_colour_in_every_panel_and_marks_its_stages():
    table = way(("before", 1, 0.9), ("cut", 0.5, 0.4), ("fine-tuned", 0.5, 0.8))
    figure = figures.trajectories({"a": {"one": table, "two": table}, "b": {"two": table}})
    left, right = figure.axes
    assert (left.get_title(loc="left"), right.get_title(loc="left")) == ("a", "b")
    tuned = {axes: [line for line in axes.lines if not line.get_label().startswith("_")] for axes in figure.axes}
    assert [line.get_label() for line in tuned[left]] == ["one", "two"]
    assert to_hex(tuned[left][1].get_color()) == to_hex(tuned[right][0].get_color())
    assert list(tuned[right][0].get_xydata()[0]) == [50, 80]
    assert left.xaxis_inverted()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]


def test_a_schedule_shows_what_each_step_takes_and_its_run_where_there_is_one():
    table = way(("before", 1, 0.9), ("cut", 0.5, 0.4))
    left, right = figures.schedule_view([1.0, 0.8, 0.5], table).axes
    assert [text.get_text() for text in left.texts] == ["−20", "−30"]
    assert list(right.lines[0].get_ydata()) == [90, 40]
    _, empty = figures.schedule_view([1.0, 0.5], None).axes
    assert "not run" in empty.texts[0].get_text()


def test_steps_share_the_images_of_one_shot():
    images = ImageSet(torch.arange(10).view(10, 1, 1, 1).byte(), torch.arange(10))
    found = finetuning.parts(images, 3)
    assert torch.equal(torch.cat([part.targets for part in found]), images.targets)
    assert [len(part) for part in found] == [3, 4, 3]


def test_the_table_says_what_was_run_and_leaves_a_dash_where_nothing_was():
    settings = ("resnet20", 50_000, 10_000, 500, 8000, 1, 0.02, 4)
    run = dict(zip(finetuning.SETTINGS, settings, strict=True)) | {"criterion": "obd", "share": 0.3, "cpu seconds": 60}
    measured = {"accuracy": 0.7, "after the cut": 0.2, "flops kept": 0.299, "params kept": 0.4}
    rows = [run | measured | {"seed": seed, "way": "at once"} for seed in (0, 1)]
    text = finetuning.markdown({"whole": {"10000": 0.92}, "torch": "2.6", "rows": rows})
    assert "| obd | 20.0 ± 0.0 | 70.0 ± 0.0 | – |" in text
    assert "all of CIFAR-10" in text
    assert "Seeds: 0, 1" in text
    assert "2 minutes of CPU time" in text


def test_runs_are_kept_in_one_piece(tmp_path):
    finetuning.keep(tmp_path / "found.json", {"whole": {}, "torch": "2.6", "rows": []}, finetuning.markdown)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "found.md"]

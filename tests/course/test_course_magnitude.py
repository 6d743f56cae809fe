"""02_magnitude: mistakes in its exercises are explained, its figures show what they are given."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import prunelab as pl
from prunelab.course.exercises import magnitude as exercises
from prunelab.course.figures import magnitude as figures


def rows_of(weight, dim, p):
    return (weight.abs() ** p).movedim(dim, 0).flatten(1)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda w, dim, p: (w.abs() ** p).sum(dim), "instead of over everything else"),
        (lambda w, dim, p: (w.abs() ** p).flatten(1).sum(1), "whatever dim is"),
        (lambda w, dim, p: rows_of(w, dim, p).sum(1) ** (1 / p), "root was not asked for"),
        (lambda w, dim, p: (w**p).movedim(dim, 0).flatten(1).sum(1), "leaves the absolute value out"),
        (lambda w, dim, p: rows_of(w, dim, p).mean(1), "the sum was asked for"),
        (lambda w, dim, p: torch.zeros(w.shape[dim]), "Bring dim to the front"),
    ],
)
def test_mistakes_about_norms_are_explained(attempt, words):
    verdict = exercises.unit_scores(attempt)
    assert not verdict
    assert words in verdict.message


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda s: s / s.sum(), "all smaller ones are gone"),
        (lambda s: s / s.sort().values.cumsum(0)[s.argsort().argsort()], "not smaller"),
        (lambda s: s.sort().values / s.sort().values.flip(0).cumsum(0).flip(0), "in the order of the units"),
        (lambda s: s / torch.stack([s[s > one].sum().clamp_min(1e-12) for one in s]), "the unit itself"),
        (lambda s: s / s.max(), "descending order"),
    ],
)
def test_mistakes_about_lamp_are_explained(attempt, words):
    verdict = exercises.lamp(attempt)
    assert not verdict
    assert words in verdict.message


def numbers(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_shares_are_shown_in_percent():
    table = pd.DataFrame({"first": [0.5], "second": [0.1]}, index=["mean"])
    assert numbers(figures.removed_by_group(table).axes[0]) == ["50", "10"]


def test_variants_stand_in_order_with_their_errors_and_the_random_range():
    table = pd.DataFrame({"variant": ["low", "high"], "accuracy": [0.2, 0.8], "error": [0.01, 0.02]})
    axes = figures.accuracy_of_variants(table, whole=0.9, draws=[0.1, 0.4, 0.3]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["high", "low"]
    points = axes.containers[0].lines[0]
    assert list(points.get_xdata()) == pytest.approx([80, 20])
    bars = [segment[:, 0] for segment in axes.containers[0].lines[2][0].get_segments()]
    assert np.allclose(bars, [[78, 82], [19, 21]])
    (band,) = axes.patches
    shown = band.get_extents().transformed(axes.transData.inverted())  # a polygon before matplotlib 3.9
    assert (shown.x0, shown.x1) == pytest.approx((10, 40))


def test_scores_show_what_a_plan_keeps_and_removes(small):
    model, inputs = small
    graph = pl.trace(model, inputs)
    scores = pl.criteria.get("magnitude")(graph)
    plan = pl.plan(scores, ratio=0.25)
    axes = figures.scores_view(scores, plan).axes[0]
    kept, gone = axes.lines
    assert (len(kept.get_xdata()), len(gone.get_xdata())) == (6, 2)
    assert max(gone.get_xdata()) <= min(kept.get_xdata())
    assert numbers(axes) == ["6/8"]

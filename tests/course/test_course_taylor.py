"""03_taylor: mistakes in its exercises are explained, its figures show what they are given."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from prunelab.course.exercises import taylor as exercises
from prunelab.course.figures import taylor as figures


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda w, g: (w * g).flatten(1).sum(1), "sign is turned around"),
        (lambda w, g: (w * g).flatten(1).abs().sum(1), "absolute values first"),
        (lambda w, g: (w * g).flatten(1).sum(1).abs(), "absolute value of the sum"),
        (lambda w, g: -g.flatten(1).sum(1), "gradient alone"),
        (lambda w, g: -(w * g).flatten(1).mean(1), "all of them go"),
        (lambda w, g: torch.zeros(len(w)), "What is gᵀδ"),
    ],
)
def test_mistakes_about_the_first_order_are_explained(attempt, words):
    verdict = exercises.predicted_change(attempt)
    assert not verdict
    assert words in verdict.message


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda p: (p**2).sum(2).mean(0), "squares before it sums"),
        (lambda p: p.mean(0).sum(1) ** 2, "the mean gradient"),
        (lambda p: (p.sum(2) ** 2).sum(0), "their mean is asked for"),
        (lambda p: p.sum(2).abs().mean(0), "absolute values"),
        (lambda p: p.sum(2).mean(0), "signs cancel"),
        (lambda p: (p.sum(1) ** 2).mean(0), "sums over the units"),
        (lambda p: torch.zeros(p.shape[1]), "square, average"),
    ],
)
def test_mistakes_about_squares_of_gates_are_explained(attempt, words):
    verdict = exercises.squared_gates(attempt)
    assert not verdict
    assert words in verdict.message


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda loss, w, e: (loss((1 + e) * w) - loss((1 - e) * w)) / (2 * e), "sign is turned around"),
        (lambda loss, w, e: (loss((1 - e) * w) - loss(w)) / e, "to one side"),
        (lambda loss, w, e: (loss((1 - e) * w) - loss((1 + e) * w)) / e, "2 eps apart"),
        (lambda loss, w, e: (loss(w - e) - loss(w + e)) / (2 * e), "scale them"),
        (lambda loss, w, e: float(loss(w)), "Evaluate the loss at"),
    ],
)
def test_mistakes_about_slopes_are_explained(attempt, words):
    verdict = exercises.slope(attempt)
    assert not verdict
    assert words in verdict.message


def test_a_tangent_ends_where_the_first_order_says():
    axes = figures.tangents({"unit": ([0, 0.5, 1], [0, 0.1, 0.6], -0.2)}).axes[0]
    measured, tangent = axes.lines[:2]
    assert list(measured.get_ydata()) == [0, 0.1, 0.6]
    assert list(tangent.get_ydata()) == [0, -0.2]


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {"group": ["a", "a", "b"], "measured": [0.1, 0.2, -0.1], "one": [0.3, 0.5, 0.1], "two": [-0.1, -0.3, 0.2]}
    )


def test_predictions_have_a_panel_per_form_with_its_rank_correlation(table):
    figure = figures.predictions(table, ["one", "two"], highlight="b")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Spearman 1.00", "Spearman -1.00"]
    _, others, pointed = figure.axes[0].lines
    assert (list(others.get_xdata()), list(pointed.get_xdata())) == ([0.3, 0.5], [0.1])
    assert list(pointed.get_ydata()) == [-0.1]


def test_noise_falls_with_the_root_of_the_images():
    table = pd.DataFrame({"network": ["n", "n"], "images": [100, 400], "norm": [2.0, 1.9]})
    measured, noise = figures.gradient_noise(table).axes[0].lines[:2]
    assert list(measured.get_ydata()) == [2.0, 1.9]
    assert list(noise.get_ydata()) == pytest.approx([2.0, 1.0])


def test_running_sums_begin_with_the_largest_product():
    absolute, signed = figures.cancellation({"row": np.array([0.1, -0.5, 0.2])}).axes[0].lines[:2]
    assert list(absolute.get_ydata()) == pytest.approx([0.5, 0.7, 0.8])
    assert list(signed.get_ydata()) == pytest.approx([-0.5, -0.3, -0.2])

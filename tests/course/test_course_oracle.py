"""Of ``10_oracle``: mistakes in its exercises are explained, and its figures show what they are given."""

from __future__ import annotations

import pytest
import torch

from prunelab.course.exercises import oracle as exercises
from prunelab.course.figures import oracle as figures


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda g, h: g + h / 2, "with a minus"),
        (lambda g, h: h - g, "factor ½"),
        (lambda g, h: h / 2, "first term is missing"),
        (lambda g, h: -g - h / 2, "counts with a plus"),
        (lambda g, h: g.abs() + h / 2, "absolute value"),
    ],
)
def test_mistakes_about_gates_are_explained(attempt, words):
    assert words in exercises.gate_score(attempt).message


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda scores, matrix, number: scores.argsort()[:number], "as if each unit went alone"),
        (exercises._forgetful, "forgets those before"),
        (lambda scores, matrix, number: exercises._greedy(scores, -matrix, number), "subtracted"),
        (lambda scores, matrix, number: exercises._greedy(-scores, -matrix, number), "cost most"),
        (
            lambda scores, matrix, number: sorted(exercises._greedy(scores, matrix, number).tolist()),
            "the order in which",
        ),
    ],
)
def test_mistakes_about_greedy_selection_are_explained(attempt, words):
    assert words in exercises.greedy_order(attempt).message


def test_units_stand_in_ascending_order():
    figure = figures.sorted_changes({"a": torch.tensor([0.3, -0.1, 0.2]), "b": torch.tensor([1.0, 0.0])})
    first, second, *_ = figure.axes[0].lines
    assert list(first.get_ydata()) == pytest.approx([-0.1, 0.2, 0.3])
    assert list(second.get_ydata()) == [0, 1]


def test_parabolas_touch_the_measured_path_at_one():
    paths = {"gate": ([0.5, 0.2, 0.0], -0.1, 0.6), "weights": ([0.5, 0.4, 0.0], -0.3, 2.0)}
    lines = figures.loss_along([0, 0.5, 1], paths).axes[0].lines
    for measured, parabola in (lines[0:2], lines[2:4]):
        assert measured.get_ydata()[-1] == parabola.get_ydata()[-1] == 0
    assert lines[1].get_ydata()[0] == pytest.approx(0.1 + 0.3)
    assert lines[3].get_ydata()[0] == pytest.approx(0.3 + 1.0)


def test_the_units_of_the_layer_stand_out():
    score, truth = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 1.0, 2.0])
    figure = figures.score_against_truth(score, truth, [True, False, False], name="obd", layer="conv1")
    _, others, chosen = figure.axes[0].lines
    assert list(others.get_xdata()) == pytest.approx([100 / 3, 200 / 3])
    assert (list(chosen.get_xdata()), list(chosen.get_ydata())) == ([100], [pytest.approx(100 / 3)])

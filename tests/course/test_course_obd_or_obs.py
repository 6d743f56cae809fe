"""Notebook 06_obd_or_obs: its checkers explain mistakes, its figures show what they are given."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from prunelab.course.exercises import obd_or_obs as exercises
from prunelab.course.figures import obd_or_obs as figures


def narrow(h):
    return 1 / h.diagonal()


def wide(h):
    return torch.linalg.inv(h).diagonal()


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda h, d: narrow(h) if d == "forward" else wide(h), "swapped"),
        (lambda h, d: 1 / wide(h) if d == "forward" else 1 / narrow(h), "these are precisions"),
        (lambda h, d: narrow(h), "both directions give the conditional"),
        (lambda h, d: wide(h), "both directions give the marginal"),
        (lambda h, d: (wide(h) if d == "forward" else narrow(h)).sqrt(), "standard deviations"),
        (lambda h, d: torch.ones(len(h)), "Set the derivative"),
    ],
)
def test_mistakes_about_the_two_gaussians_are_explained(attempt, words):
    verdict = exercises.factorial_variances(attempt)
    assert not verdict
    assert words in verdict.message


def singles(w, h, i, j):
    return (w[i] ** 2 * h[i, i] + w[j] ** 2 * h[j, j]) / 2


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (singles, "cannot see signs"),
        (lambda w, h, i, j: singles(w, h, i, j) + w[i] * w[j] * h[i, j] / 2, "its ½ cancels"),
        (lambda w, h, i, j: singles(w, h, i, j) + (w[i] * w[j]).abs() * h[i, j], "absolute values"),
        (lambda w, h, i, j: singles(w, h, i, j) - w[i] * w[j] * h[i, j], "the sign of the pair's term"),
        (lambda w, h, i, j: 2 * singles(w, h, i, j) + 2 * w[i] * w[j] * h[i, j], "factor ½ is missing"),
        (lambda w, h, i, j: 0.0, "two entries"),
    ],
)
def test_mistakes_about_a_pair_are_explained(attempt, words):
    verdict = exercises.pair_cost(attempt)
    assert not verdict
    assert words in verdict.message


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda loose: 1 - loose, "take its root"),
        (lambda loose: loose**0.5, "1 − ρ² and not ρ²"),
        (lambda loose: loose, "1 − ρ² and not 1 − ρ"),
        (lambda loose: (1 - loose / 2) ** 0.5, "the same ½ on both sides"),
        (lambda loose: (1 - loose**2) ** 0.5, "loose²"),
        (lambda loose: 0.5, "by hand"),
    ],
)
def test_mistakes_about_the_flip_are_explained(attempt, words):
    verdict = exercises.flipping_correlation(attempt)
    assert not verdict
    assert words in verdict.message


def test_the_ranking_flips_where_the_exercise_says():
    below, above = (figures.flip((1 - 0.3) ** 0.5 + step, 1)[1] for step in (-0.01, 0.01))
    assert "OBS removes 3 and 4" in below and "OBS removes 1 and 2" in above
    assert "OBD removes 3 and 4" in below and "OBD removes 3 and 4" in above


@pytest.mark.parametrize(("sign", "cost", "cheapest"), [(1, "1.99", "0.30"), (-1, "0.01", "0.01")])
def test_the_sign_turns_the_truth_and_no_score(sign, cost, cheapest):
    figure, caption = figures.flip(0.99, sign)
    assert f"OBS removes 1 and 2 at a cost of <b>{cost}</b>" in caption
    assert f"the cheapest pair costs {cheapest}" in caption
    scores = [bar.get_height() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(scores, [0.5, 0.5, 0.15, 0.15, 0.00995, 0.00995, 0.15, 0.15])


def test_the_two_gaussians_lie_inside_and_around():
    matrix = np.array([[2.0, 1.2], [1.2, 1.0]])
    lines = figures.two_gaussians(matrix, np.zeros((3, 2)), (0.0, 0.0)).axes[0].lines
    posterior, inside, around = (lines[place].get_xydata() for place in (1, 2, 3))
    np.testing.assert_allclose(np.einsum("ni,ij,nj->n", posterior, matrix, posterior), 4)
    np.testing.assert_allclose(abs(around).max(0), abs(posterior).max(0), rtol=1e-3)
    np.testing.assert_allclose(inside.max(0), 2 / np.sqrt([2.0, 1.0]), rtol=1e-3)


def test_pushed_draws_end_on_the_axis_or_on_the_ridge():
    matrix = np.array([[2.0, 1.2], [1.2, 1.0]])
    draws = np.array([[1.0, 0.5], [0.5, 1.0]])
    stay, move = figures.two_gaussians(matrix, draws, (0.0, 0.0)).axes[1].lines[2:4]
    np.testing.assert_allclose(stay.get_ydata(), [0.5, 1.0])
    np.testing.assert_allclose(move.get_ydata(), [0.5 + 1.2, 1.0 + 0.6])


def test_each_price_has_a_mark_for_each_way_in_each_layer():
    rows = [
        {"layer": layer, "order": order, "way": way, "lost": 0.1 * (place + 1) + draw / 100}
        for layer in ("one", "two")
        for order in ("magnitude", "OBD", "OBS")
        for place, way in enumerate(("once", "again"))
        for draw in (0, 1)
    ]
    figure = figures.three_ways(pd.DataFrame(rows))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one", "two"]
    marks = [line for line in figure.axes[0].lines if line.get_markersize() == 9]
    assert all(list(line.get_ydata()) == pytest.approx([10.5, 20.5]) for line in marks) and len(marks) == 3

"""Notebook 04_obd: its checkers explain mistakes, its figures show what they are given."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from prunelab.course.exercises import obd as exercises
from prunelab.course.figures import obd as figures
from prunelab.course.figures import png


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda w, h: h.diagonal() * w**2, "factor ½"),
        (lambda w, h: h.diagonal() * w / 2, "the square of the weight is missing"),
        (lambda w, h: h.diagonal() * w.abs() / 2, "|w| where"),
        (lambda w, h: w * (h @ w) / 2, "as if all weights went at once"),
        (lambda w, h: h.sum(1) * w**2 / 2, "sums rows"),
        (lambda w, h: w**2 / h.diagonal() / 2, "divides by h"),
        (lambda w, h: w**2 / torch.linalg.inv(h).diagonal() / 2, "that is OBS"),
        (lambda w, h: w @ h @ w / 2, "all weights together"),
        (lambda w, h: w, "½ δᵀHδ"),
    ],
)
def test_mistakes_about_the_saliency_are_explained(attempt, words):
    verdict = exercises.obd_saliency(attempt)
    assert not verdict
    assert words in verdict.message


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda a, s: ((s**2).mT @ a**2).mean(0), "squares before it sums"),
        (lambda a, s: (s.mT @ a).mean(0) ** 2, "square of the mean gradient"),
        (lambda a, s: (s.mT @ a).mean(0), "that is the mean gradient"),
        (lambda a, s: (s.mT @ a).square().sum(0), "their mean is asked for"),
        (lambda a, s: (a.mT @ s).square().mean(0), "transposed"),
        (lambda a, s: (s.mT @ a / a.shape[1]).square().mean(0), "number of tokens"),
        (lambda a, s: torch.einsum("no,ni->noi", s.sum(1), a.sum(1)).square().mean(0), "mixes every token"),
        (lambda a, s: 3 * (s.mT @ a).square().mean(0), "Σ_r"),
    ],
)
def test_mistakes_about_shared_weights_are_explained(attempt, words):
    verdict = exercises.squared_gradients(attempt)
    assert not verdict
    assert words in verdict.message


def each(signs, product):
    return torch.stack([product(z) for z in signs])


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda signs, product: each(signs, product).mean(0), "without multiplying by ε again"),
        (lambda signs, product: (signs * each(signs, product)).sum(1).mean(), "trace"),
        (lambda signs, product: (signs * each(signs, product)).sum(0), "their mean is asked for"),
        (lambda signs, product: signs[0] * product(signs[0]), "one sign vector only"),
        (lambda signs, product: (signs * each(signs, product)).abs().mean(0), "absolute values"),
        (lambda signs, product: product(signs), "one vector [4]"),
        (lambda signs, product: 7 * signs[0], "whose signs are random"),
    ],
)
def test_mistakes_about_hutchinson_are_explained(attempt, words):
    verdict = exercises.hutchinson_diagonal(attempt)
    assert not verdict
    assert words in verdict.message


def test_the_bowl_marks_the_trained_weights_and_what_removal_does_to_them():
    first, second = np.linspace(-1, 2, 7), np.linspace(-1, 2, 5)
    rise = (first[None] - 1) ** 2 + (second[:, None] - 0.5) ** 2
    axes = figures.bowl(first, second, rise, rise, (1.0, 0.5), ("a", "b")).axes[0]
    points = [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() in "oX"]
    assert points == [(1.0, 0.5), (0.0, 0.5), (1.0, 0.0), (0.0, 0.0)]
    assert axes.get_xlabel() == "value of a"


def test_predictions_stand_against_what_was_measured():
    measured = np.array([0.1, 0.2, 0.4])
    figure = figures.against_measured(measured, {"good": 2 * measured, "bad": -measured})
    points = [axes.lines[-1].get_xydata() for axes in figure.axes]
    np.testing.assert_allclose(points[0], np.stack([measured, 2 * measured], 1))
    assert [axes.get_title("left").split("\n")[1] for axes in figure.axes] == [
        "rank correlation 1.00",
        "rank correlation -1.00",
    ]


def test_units_that_a_logarithm_cannot_show_are_counted():
    scores = {"ggn": np.array([1.0, 2.0, 3.0]), "hessian": np.array([1.0, -2.0, 0.0])}
    figure = figures.four_ways(scores)
    assert "2 of 3 are ≤ 0" in figure.axes[0].texts[0].get_text()


def test_the_weight_of_the_widget_is_priced_and_placed_among_the_others():
    weights, curvatures = np.array([0.1, 1.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0, 1e-3])
    figure, caption = figures.weight_and_curvature(weights, curvatures, 3.0, 1.0)
    assert "<b>4.5 nats</b>" in caption
    assert "100% go before it by OBD, and 75% by magnitude" in caption
    removed = next(line for line in figure.axes[0].lines if line.get_label() == "removed")
    assert removed.get_xydata().tolist() == [[0.0, 4.5]]


def test_repeated_cuts_show_their_mean_and_range():
    table = pd.DataFrame(
        {"way": ["random", "random", "OBD"], "budget": [0.5] * 3, "flops_kept": [0.5] * 3, "accuracy": [0.2, 0.4, 0.6]}
    )
    lines = {line.get_label(): line for line in figures.budgets(table, whole=0.9, chance=0.1).axes[0].lines}
    np.testing.assert_allclose(lines["random: mean and range of 2"].get_ydata(), [30, 90])
    np.testing.assert_allclose(lines["OBD"].get_ydata(), [60, 90])


def test_the_sum_of_saliencies_stands_beside_the_truth():
    table = pd.DataFrame({"share": [0.1, 0.5], "sum": [1.0, 2.0], "quadratic": [2.0, 4.0], "measured": [3.0, 5.0]})
    lines = {line.get_label(): list(line.get_ydata()) for line in figures.sum_and_truth(table).axes[0].lines}
    assert lines["measured"] == [3, 5] and lines["sum of ½ h w², no pairs"] == [1, 2]


def test_a_palette_saves_bytes_and_changes_nothing_that_one_can_see():
    figure = figures.bowl(
        *2 * [np.linspace(-1, 1, 20)], *2 * [np.random.default_rng(0).random((20, 20))], (0, 0), ("a", "b")
    )
    plain, small = io.BytesIO(), png(figure)
    figure.savefig(plain, format="png")
    assert len(small) < len(plain.getvalue()) / 2
    pixels = [np.asarray(Image.open(data).convert("RGB")).astype(int) for data in (plain, io.BytesIO(small))]
    assert abs(pixels[0] - pixels[1]).max() <= 25  # a tenth of 255

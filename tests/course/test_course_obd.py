"""Notebook 04_obd: its checkers explain mistakes, its figures show what they are given."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from prunelab.course.exercises import obd as exercises
from prunelab.course.figures import obd as figures
from prunelab.course.figures import png


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda w, h: h * w**2, "factor ½"),
        (lambda w, h: h * w / 2, "the square of the weight is missing"),
        (lambda w, h: h * w.abs() / 2, "|w| where"),
        (lambda w, h: w**2 / h / 2, "divides by h"),
        (lambda w, h: (h * w) ** 2 / 2, "curvature is squared too"),
        (lambda w, h: w**2 / 2, "that is magnitude"),
        (lambda w, h: (h * w**2).sum() / 2, "all weights together"),
        (lambda w, h: -h * w**2 / 2, "sign is turned"),
        (lambda w, h: w, "½ δᵀHδ"),
    ],
)
def test_mistakes_about_the_saliency_are_explained(attempt, words):
    verdict = exercises.obd_saliency(attempt)
    assert not verdict
    assert words in verdict.message


def recursion(weights, inputs, slopes, top, *, w=2, f=2, x=2, mean=True):
    bend, found = top, []
    for place in reversed(range(len(weights))):
        found.insert(0, bend.T @ inputs[place] ** x / (len(top) if mean else 1))
        if place:
            bend = slopes[place - 1] ** f * (bend @ weights[place] ** w)
    return found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"w": 1}, "weights on the way back are squared"),
        ({"f": 1}, "f'(a) is squared"),
        ({"f": 0}, "f'(a) is left out"),
        ({"x": 1}, "its input squared"),
        ({"mean": False}, "their mean is asked for"),
        ({"x": 3}, "slopes² * (bend @ weights²)"),
    ],
)
def test_mistakes_about_the_recursion_are_explained(options, words):
    verdict = exercises.lecun_diagonal(lambda *given: recursion(*given, **options))
    assert not verdict
    assert words in verdict.message
    assert words not in exercises.lecun_diagonal(lambda *given: recursion(*given)[::-1]).message


def test_layers_in_the_wrong_order_are_named():
    assert "wrong order" in exercises.lecun_diagonal(lambda *given: recursion(*given)[::-1]).message


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


def test_units_that_a_logarithm_cannot_show_are_counted():
    scores = {"ggn": np.array([1.0, 2.0, 3.0]), "hutchinson": np.array([1.0, -2.0, 0.0])}
    figure = figures.four_ways(scores)
    assert "2 of 3 are ≤ 0" in figure.axes[0].texts[0].get_text()


def test_the_weight_of_the_widget_is_priced_and_placed_among_the_others():
    weights, curvatures = np.array([0.1, 1.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0, 1e-3])
    figure, caption = figures.weight_and_curvature(weights, curvatures, 3.0, 1.0)
    assert "<b>4.5 nats</b>" in caption
    assert "100% go before it by OBD, and 75% by magnitude" in caption
    removed = next(line for line in figure.axes[0].lines if line.get_label() == "removed")
    assert removed.get_xydata().tolist() == [[0.0, 4.5]]


def test_a_palette_saves_bytes_and_changes_nothing_that_one_can_see():
    scores = dict(zip(("ggn", "mc", "empirical"), 10 ** np.random.default_rng(0).random((3, 400)), strict=True))
    figure = figures.four_ways(scores)
    plain, small = io.BytesIO(), png(figure)
    figure.savefig(plain, format="png")
    assert len(small) < len(plain.getvalue()) / 2
    pixels = [np.asarray(Image.open(data).convert("RGB")).astype(int) for data in (plain, io.BytesIO(small))]
    assert abs(pixels[0] - pixels[1]).max() <= 25  # a tenth of 255

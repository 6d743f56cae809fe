"""Notebook 05_obs: its checkers explain mistakes, its figures show what they are given."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from prunelab.course.exercises import obs as exercises
from prunelab.course.figures import obs as figures

H = np.array([[2.0, 1.2], [1.2, 1.0]])


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda w, v: w / v.diagonal() / 2, "the square of the weight got lost"),
        (lambda w, v: w**2 / v.diagonal(), "the factor ½ is missing"),
        (lambda w, v: w**2 * v.diagonal() / 2, "so divide"),
        (lambda w, v: torch.linalg.inv(v).diagonal() * w**2 / 2, "which is OBD"),
        (lambda w, v: w, "Put the best δ"),
    ],
)
def test_mistakes_about_the_saliency_are_explained(attempt, words):
    verdict = exercises.obs_saliency(attempt)
    assert not verdict
    assert words in verdict.message


def right_move(w, v, q):
    return -w[q] / v[q, q] * v[:, q]


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda w, v, q: -right_move(w, v, q), "its sign is wrong"),
        (lambda w, v, q: torch.where(torch.arange(4) == q, -w, torch.zeros(4)), "the others should make up"),
        (lambda w, v, q: w + right_move(w, v, q), "their change δ"),
        (lambda w, v, q: -w[q] * v[:, q], "does not reach zero"),
        (lambda w, v, q: right_move(w, torch.linalg.inv(v), q), "a column of H where"),
        (lambda w, v, q: w, "which multiple"),
    ],
)
def test_mistakes_about_the_move_are_explained(attempt, words):
    verdict = exercises.obs_update(attempt)
    assert not verdict
    assert words in verdict.message


def blanked(v, q):
    out = v.clone()
    out[q], out[:, q] = 0, 0
    return out


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (blanked, "only blanks row and column"),
        (lambda v, q: v + v[:, q, None] * v[q] / v[q, q], "it adds where"),
        (lambda v, q: v - v[:, q, None] * v[q], "does not divide"),
        (lambda v, q: torch.linalg.pinv(blanked(v, q)), "before it inverts"),
        (lambda v, q: torch.eye(4), "Subtract a multiple"),
    ],
)
def test_mistakes_about_the_downdate_are_explained(attempt, words):
    verdict = exercises.downdate(attempt)
    assert not verdict
    assert words in verdict.message


def test_a_matrix_that_is_too_small_is_told_to_keep_its_size():
    def smaller(v, q):
        keep = torch.arange(len(v)) != q
        return (v - v[:, q, None] * v[q] / v[q, q])[keep][:, keep]

    assert "smaller matrix" in exercises.downdate(smaller).message


def test_both_ways_to_remove_a_weight_end_on_its_axis():
    """OBD goes straight across; OBS ends where the derivative of the cost along the axis is zero."""
    weights = np.array([1.0, 0.5])
    figure = figures.ellipse(weights, H, ("a", "b"))
    ends = [line.get_xydata()[0] for line in figure.axes[0].lines if line.get_marker() in "Dv"]
    np.testing.assert_allclose(ends[0], [0.0, 0.5])
    assert ends[1][0] == 0
    assert (H @ (ends[1] - weights))[1] == pytest.approx(0)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[1] == "OBD: 1 nats" and labels[2].startswith("OBS: 0.28")


def test_each_ellipse_has_the_cost_of_its_way_out():
    weights = np.array([1.0, 0.5])
    rings = [line.get_xydata() for line in figures.ellipse(weights, H, ("a", "b")).axes[0].lines[:2]]
    for ring, cost in zip(rings, (0.28, 1.0), strict=True):
        steps = ring - weights
        np.testing.assert_allclose(np.einsum("ni,ij,nj->n", steps, H, steps) / 2, cost)


def test_the_survivors_are_drawn_where_they_go():
    weights, inverse = np.array([1.0, 0.5]), np.linalg.inv(H)
    figure, caption = figures.survivors(weights, inverse, 0, ["a", "b"])
    after = next(line for line in figure.axes[0].lines if line.get_label() == "after")
    np.testing.assert_allclose(after.get_xdata(), [0.0, 0.5 + 1.2], atol=1e-12)
    assert "<b>a</b> costs 1 nats by OBD" in caption and "28% of it" in caption and "b moves most" in caption


def test_the_costs_of_the_survivors_are_on_a_logarithmic_axis():
    figure, _ = figures.survivors(np.array([1.0, 0.5]), np.linalg.inv(H), 1, ["a", "b"])
    assert figure.axes[1].get_xscale() == "log"


def test_orders_have_colours_and_moves_have_lines():
    rows = [("magnitude", "stay", 0.5), ("magnitude", "move", 0.2), ("magnitude", "move", 0.4), ("OBS", "move", 0.1)]
    table = pd.DataFrame([{"layer": "one", "removed": 0.8, "order": o, "others": m, "loss": x} for o, m, x in rows])
    figure = figures.order_or_move(table)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["magnitude, the others move"].get_ydata()) == pytest.approx([0.3])
    assert lines["magnitude, the others stay"].get_linestyle() == "--"
    assert lines["OBS, the others move"].get_linestyle() == "-"


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda v, x, n: v + torch.outer(v @ x, v @ x) / (n + x @ v @ x), "it adds where"),
        (lambda v, x, n: v - torch.outer(v @ x, v @ x) / (1 + x @ v @ x), "weight 1 instead of 1/N"),
        (lambda v, x, n: v - torch.outer(v @ x, v @ x) / n, "out of the denominator"),
        (lambda v, x, n: v - torch.outer(x, x) / n, "along V x"),
        (lambda v, x, n: torch.linalg.inv(v) + torch.outer(x, x) / n, "not its inverse"),
        (lambda v, x, n: v, "u = V x"),
    ],
)
def test_mistakes_about_the_recursion_are_explained(attempt, words):
    verdict = exercises.add_sample(attempt)
    assert not verdict
    assert words in verdict.message


def test_the_recursion_over_samples_ends_at_the_inverse():
    x = torch.randn(7, 4, dtype=torch.double)
    inverse = torch.eye(4, dtype=torch.double) / 0.1
    for sample in x:
        inverse = exercises.add_sample.solution(inverse, sample, 7)
    torch.testing.assert_close(inverse, torch.linalg.inv(x.T @ x / 7 + 0.1 * torch.eye(4, dtype=torch.double)))

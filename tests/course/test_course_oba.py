"""What belongs to 09_oba: checkers explain mistakes, figures show what they are given."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import hessian, jacobian

from prunelab.course.exercises import oba as exercises
from prunelab.course.figures import oba as figures


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda loss, theta: hessian(loss, theta) @ theta, "entry by entry"),
        (lambda loss, theta: theta * (jacobian(loss, theta) + hessian(loss, theta) @ theta), "held fixed"),
        (lambda loss, theta: theta * jacobian(loss, theta), "first-order"),
        (lambda loss, theta: theta**2 * hessian(loss, theta).diagonal(), "interactions between weights"),
        (lambda loss, theta: theta @ hessian(loss, theta) @ theta, "one number"),
        (lambda loss, theta: theta, "create_graph=True"),
    ],
)
def test_mistakes_about_the_product_are_explained(attempt, words):
    verdict = exercises.theta_h_theta(attempt)
    assert not verdict
    assert words in verdict.message


def delta_of(theta, unit):
    delta = torch.zeros_like(theta)
    delta[unit] = -theta[unit]
    return delta


def alone(H, g, theta, unit, *, first=1.0, second=0.5):
    delta = delta_of(theta, unit)
    return first * g @ delta + second * delta @ H @ delta


def row(H, theta, unit):
    return (theta * (H @ theta))[unit].sum()


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda *given: alone(*given, second=1), "½"),
        (lambda *given: alone(*given, first=-1), "with a minus"),
        (lambda *given: alone(*given, first=0), "first-order term is missing"),
        (lambda H, g, theta, unit: row(H, theta, unit), "weights that stay"),
        (lambda H, g, theta, unit: g @ delta_of(theta, unit) + row(H, theta, unit) / 2, "outside the unit"),
        (lambda H, g, theta, unit: alone(torch.diag(H.diagonal()), g, theta, unit), "go together"),
        (lambda H, g, theta, unit: 0.0, "Make δ"),
    ],
)
def test_mistakes_about_a_unit_alone_are_explained(attempt, words):
    verdict = exercises.unit_alone(attempt)
    assert not verdict
    assert words in verdict.message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"own": False}, "own motion is missing"),
        ({"before": False}, "is lost"),
        ({"closed": False}, "closed"),
        ({"last": True}, "last layer"),
        ({"start": 1}, "does not move"),
    ],
)
def test_mistakes_about_the_forward_pass_are_explained(options, words):
    def attempt(weights, x):
        return exercises._forward(weights, x, **({"start": x} if "start" in options else options))

    verdict = exercises.carried(attempt)
    assert not verdict
    assert words in verdict.message
    assert "should be a list" in exercises.carried(lambda weights, x: x).message


def together(paths, first, second):
    return any(first in path and second in path for path in paths)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda p, a, b: not exercises._zero(p, a, b), "reversed"),
        (lambda p, a, b: not together(p, a, b), "same layer is zero"),
        (lambda p, a, b: a == b or not any(exercises._neighbours(path, a, b) for path in p), "need not be neighbours"),
        (lambda p, a, b: a == b or not any(exercises._in_order(path, a, b) for path in p), "order of the two"),
        (lambda p, a, b: a == b or not all(a in path and b in path for path in p), "one path through both"),
        (lambda p, a, b: True, "Look for a path"),
        (lambda p, a, b: "yes", "True or False"),
    ],
)
def test_mistakes_about_paths_are_explained(attempt, words):
    verdict = exercises.functional_is_zero(attempt)
    assert not verdict
    assert words in verdict.message


LAYERS = ["conv1.weight", "layer1.0.conv1.weight", "fc.weight"]
FUNCTIONAL = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 3.0], [2.0, 3.0, 0.0]])
BENT = torch.eye(3) * 4
MAPS = {"functional": FUNCTIONAL, "gauss_newton": BENT, "exact": FUNCTIONAL + BENT}


def test_maps_of_all_parts_share_one_scale():
    axes = figures.pair_maps(LAYERS, MAPS).axes[:3]
    assert len({one.images[0].get_clim() for one in axes}) == 1
    assert [one.images[0].get_array().tolist() for one in axes] == [matrix.tolist() for matrix in MAPS.values()]
    assert axes[0].get_title(loc="left") == "functional part"


@pytest.mark.parametrize("parts", [["functional", "gauss_newton"], ["functional"]])
def test_the_widget_draws_the_row_of_a_layer(parts):
    figure, words = figures.row_view(LAYERS, MAPS, "conv1.weight", parts)
    heights = [bar.get_height() for bar in figure.axes[0].patches[: 3 * len(parts)]]
    assert heights == [value for part in parts for value in MAPS[part][0].tolist()]
    own = sum(float(MAPS[part][0, 0]) for part in parts)
    assert f"with itself {own:+.3g} nats" in words

"""Of ``11_compensation``: mistakes in its exercises are explained, and its figures show what they are given."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from prunelab.course.exercises import compensation as exercises
from prunelab.course.figures import compensation as figures


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda W, C, kept: W[:, kept], "old weights"),
        (exercises._update, "the change alone"),
        (lambda W, C, kept: W[:, kept] - exercises._update(W, C, kept), "wrong sign"),
        (lambda W, C, kept: W[:, kept] + W[:, ~kept] @ C[~kept][:, kept], "inverse of C_KK"),
        (lambda W, C, kept: W[:, kept] + W[:, ~kept] @ C[~kept][:, kept] / C.diagonal()[kept], "uncorrelated"),
        (
            lambda W, C, kept: W[:, kept] + W[:, ~kept] @ C[~kept][:, kept] @ C.inverse()[kept][:, kept],
            "block of the inverse",
        ),
        (exercises._summed, "remove all columns together"),
        (lambda W, C, kept: W, "a tensor of shape"),
    ],
)
def test_mistakes_about_the_refit_are_explained(attempt, words):
    assert words in exercises.refit(attempt).message


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda W, b, m, kept: W[:, ~kept] @ m[~kept], "add it to the old bias"),
        (lambda W, b, m, kept: b - W[:, ~kept] @ m[~kept], "sign is wrong"),
        (lambda W, b, m, kept: b + W[:, kept] @ m[kept], "still computes"),
        (lambda W, b, m, kept: b + W @ m, "whole layer"),
        (lambda W, b, m, kept: b, "old bias"),
    ],
)
def test_mistakes_about_the_bias_are_explained(attempt, words):
    assert words in exercises.new_bias(attempt).message


def restored(W, C, kept):
    return (exercises._update(W, C, kept) @ C[kept][:, ~kept] * W[:, ~kept]).sum()


def lost(W, C, kept):
    return (W[:, ~kept] @ C[~kept][:, ~kept] * W[:, ~kept]).sum()


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lost, "without a refit"),
        (restored, "brings back"),
        (lambda *case: (lost(*case) - restored(*case)) / 2, "a loss of ½"),
        (lambda *case: (lost(*case) - restored(*case)) / len(case[0]), "mean over the outputs"),
    ],
)
def test_mistakes_about_what_is_left_are_explained(attempt, words):
    assert words in exercises.unrestored(attempt).message


def test_what_is_left_is_the_error_on_the_inputs_themselves():
    inputs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    W, kept = torch.tensor([[1.0, 2.0, -1.0, 0.5]], dtype=torch.double), torch.tensor([True, False, True, False])
    solved = torch.linalg.lstsq(inputs[:, kept], inputs[:, ~kept] @ W[:, ~kept].T).solution.T
    error = (inputs[:, ~kept] @ W[:, ~kept].T - inputs[:, kept] @ solved.T).square().sum() / 50
    C = inputs.T @ inputs / 50
    torch.testing.assert_close(lost(W, C, kept) - restored(W, C, kept), error)


def test_each_way_has_a_panel_of_outputs_beside_the_diagonal():
    whole = torch.tensor([0.0, 1.0])
    figure = figures.outputs_against_whole(
        whole, {"cut": torch.tensor([1.0, 1.5]), "refitted": torch.tensor([0.1, 1.0])}
    )
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["cut", "refitted"]
    assert list(figure.axes[0].lines[1].get_ydata()) == [1, 1.5]


def test_every_criterion_has_a_panel_and_every_way_a_line():
    rows = [
        {"criterion": name, "way": way, "flops_kept": 0.5, "accuracy": 0.3 + 0.1 * place}
        for name in ("magnitude", "gate")
        for place, way in enumerate(figures.WAYS)
    ]
    figure = figures.with_and_without(pd.DataFrame(rows), 0.9)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["magnitude", "gate"]
    for axes in figure.axes:
        assert [tuple(line.get_ydata()) for line in axes.lines] == [
            pytest.approx((30 + 10 * place, 90)) for place in range(len(figures.WAYS))
        ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(figures.WAYS)


def test_what_is_left_over_is_shown_layer_by_layer():
    figure = figures.left_over(
        {"refit": {"a.weight": 0.2, "b.weight": 0.5}, "test": {"a.weight": 0.3, "b.weight": 1.2}}
    )
    first, second, _ = figure.axes[0].lines
    assert list(first.get_xdata()) == pytest.approx([20, 50])
    assert list(second.get_xdata()) == pytest.approx([30, 120])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]


def test_the_chosen_damping_is_circled():
    rows = [(value, number, value + number / 1000) for value in (0.01, 0.1) for number in (8, 64)]
    table = pd.DataFrame(rows, columns=["damping", "images", "accuracy"])
    axes = figures.damping_and_images(table, cut=0.05, whole=0.9, mark=(0.1, 64)).axes[0]
    circle = axes.lines[-1]
    assert (*circle.get_xdata(), *circle.get_ydata()) == pytest.approx((0.1, 16.4))
    assert axes.get_xscale() == "log"

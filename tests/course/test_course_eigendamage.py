"""What belongs to 08_eigendamage: checkers explain mistakes, figures show what they are given."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from prunelab.course.exercises import eigendamage as exercises
from prunelab.course.figures import eigendamage as figures


def scores(W, A, S):
    (a, q_a), (s, q_s) = torch.linalg.eigh(A), torch.linalg.eigh(S)
    return 0.5 * (q_s.T @ W @ q_a) ** 2 * torch.outer(s, a)


def rotated(W, A, S):
    return torch.linalg.eigh(S)[1].T @ W @ torch.linalg.eigh(A)[1]


def values(A, S):
    return torch.outer(torch.linalg.eigvalsh(S), torch.linalg.eigvalsh(A))


def backwards(W, A, S):
    return 0.5 * (torch.linalg.eigh(S)[1] @ W @ torch.linalg.eigh(A)[1].T) ** 2 * values(A, S)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda *given: 2 * scores(*given), "½"),
        (backwards, "columns of Q"),
        (lambda W, A, S: 0.5 * rotated(W, A, S) ** 2, "squares of the rotated weight"),
        (lambda W, A, S: 0.5 * W**2 * torch.outer(S.diagonal(), A.diagonal()), "plain basis"),
        (lambda W, A, S: 0.5 * W**2 * values(A, S), "has to be rotated too"),
        (lambda W, A, S: 0.5 * rotated(W, A, S).abs() * values(A, S), "a square is missing"),
        (lambda W, A, S: W, "torch.linalg.eigh"),
    ],
)
def test_mistakes_about_the_eigenbasis_are_explained(attempt, words):
    verdict = exercises.kfe_scores(attempt)
    assert not verdict
    assert words in verdict.message


def least(importance, K, price, rotations=1, sign=1):
    rows, columns = (importance.sum(dim).argsort(descending=sign > 0) for dim in (1, 0))
    n_out, n_in = importance.shape
    pairs = [(i, j) for i in range(1, n_out + 1) for j in range(1, n_in + 1)]

    def total(pair):
        i, j = pair
        macs = i * j * K + rotations * (n_in * j + n_out * i)
        return float(importance.sum() - importance[rows[:i]][:, columns[:j]].sum() + price * macs)

    return min(pairs, key=total)


def test_every_pair_of_ranks_is_tried():
    assert exercises.ranks_at(least)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda *given: least(*given, rotations=0), "leaves out the rotations"),
        (lambda *given: least(*given)[::-1], "other way round"),
        (lambda t, K, price: least(t, 1, price), "K entries"),
        (lambda *given: least(*given, sign=-1), "smallest sums"),
        (lambda t, K, price: (1, 1), "all pairs of ranks"),
    ],
)
def test_mistakes_about_ranks_are_explained(attempt, words):
    verdict = exercises.ranks_at(attempt)
    assert not verdict
    assert words in verdict.message


@pytest.fixture
def table() -> pd.DataFrame:
    rows = [
        {"basis": basis, "rank": rank, "macs": rank / 4, "scores": 0.1, "quadratic": 0.2, "measured": 0.5 / rank}
        for basis in ("channels", "KFE")
        for rank in (1, 2, 4)
    ]
    return pd.DataFrame(rows)


def test_correlations_have_ones_on_the_diagonal_and_lie_between_minus_one_and_one():
    figure = figures.before_and_after(*(torch.randn(9, 2, 3) for _ in range(3)))
    for axes in figure.axes[:3]:
        shown = torch.as_tensor(axes.images[0].get_array())
        torch.testing.assert_close(shown.diagonal(), torch.ones(6))
        assert shown.abs().max() <= 1 + 1e-6


def test_maps_are_sorted_by_rows_and_columns_and_share_a_scale():
    low, high = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    figure = figures.importance_maps(low, high)
    images = [axes.images[0] for axes in figure.axes[:2]]
    assert all(image.get_array().tolist() == [[4, 3], [2, 1]] for image in images)
    assert images[0].norm is images[1].norm


def test_curves_show_measured_and_predicted_changes(table):
    left, right = figures.layer_curves(table).axes
    assert list(left.lines[0].get_ydata()) == [0.5, 0.25, 0.125]
    assert list(left.lines[1].get_ydata()) == [0.2, 0.2, 0.2]
    assert list(right.lines[0].get_xdata()) == [25, 50, 100]
    dots = figures.spectra(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 3.0]])).axes[0].lines[0]
    assert (list(dots.get_xdata()), list(dots.get_ydata())) == ([1], [2])


def test_the_widget_frames_what_is_kept_and_says_what_it_costs(table):
    figure, words = figures.kept_view(torch.rand(4, 4), 2, "KFE", table)
    (frame,) = figure.axes[0].patches
    assert (frame.get_width(), frame.get_height()) == (2, 2)
    assert "KFE, rank 2" in words and "50% of its multiply-adds" in words and "measured were 0.25" in words

"""What belongs to 07_kfac: checkers explain mistakes, figures show what they are given."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from prunelab.course.exercises import kfac as exercises
from prunelab.course.figures import kfac as figures

SIZES = torch.arange(6)


def padded(size, kernel, stride, padding):
    return torch.full((size + 2 * padding,), 1.0)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda size, kernel, stride, padding: torch.full((size,), float(kernel)), "at the edge"),
        (lambda *given: exercises._coverage(*given).clamp_max(1), "not how often"),
        (lambda s, k, t, p: exercises._coverage(s + 2 * p, k, t, 0), "padding is not a pixel"),
        (lambda s, k, t, p: exercises._coverage(s, k, 1, p), "`stride` pixels later"),
        (padded, "Go through the positions"),
    ],
)
def test_mistakes_about_coverage_are_explained(attempt, words):
    verdict = exercises.coverage_of(attempt)
    assert not verdict
    assert words in verdict.message


def factors(a, s):
    return (s @ s.mT).mean(0), (a @ a.mT).mean(0) / a.shape[2]


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda a, s: factors(a, s)[::-1], "wrong order"),
        (lambda a, s: (factors(a, s)[0], factors(a, s)[1] * a.shape[2]), "counts them twice"),
        (lambda a, s: (factors(a, s)[0] / a.shape[2], factors(a, s)[1]), "S sums"),
        (lambda a, s: tuple(len(a) * one for one in factors(a, s)), "summed over images"),
        (lambda a, s: factors(a.mean(2, keepdim=True), s.sum(2, keepdim=True)), "added up before squaring"),
        (lambda a, s: factors(a - a.mean((0, 2))[:, None], s), "second moment"),
        (lambda a, s: (factors(a, s)[0] / 2, 2 * factors(a, s)[1]), "moved from S to A"),
        (lambda a, s: torch.kron(*factors(a, s)), "two matrices"),
        (lambda a, s: (factors(a, s)[0], factors(a, s)[0]), "S is the mean over images"),
    ],
)
def test_mistakes_about_the_factors_are_explained(attempt, words):
    verdict = exercises.kronecker_factors(attempt)
    assert not verdict
    assert words in verdict.message


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda z, s: (z * s).square().sum(2).mean(0) / 2, "add up first"),
        (lambda z, s: (z * s).sum(2).square().mean(0), "½"),
        (lambda z, s: (z * s).mean(2).square().mean(0) / 2, "averages over positions"),
        (lambda z, s: (z * s).sum(2).mean(0).square() / 2, "square of the mean"),
        (lambda z, s: (z * s).sum(2).square().sum(0) / 2, "summed over images"),
        (lambda z, s: s.square().sum(2).mean(0) * z.square().mean((0, 2)) / 2, "squared apart"),
        (lambda z, s: z[0, :, 0], "Square, take the mean"),
    ],
)
def test_mistakes_about_the_price_by_the_block_are_explained(attempt, words):
    verdict = exercises.block_price(attempt)
    assert not verdict
    assert words in verdict.message


def test_the_price_by_the_block_is_that_of_the_written_out_fisher():
    W, a, s = (torch.randn(shape, dtype=torch.double) for shape in ((2, 3), (5, 3, 4), (5, 2, 4)))
    rows = (s @ a.mT).flatten(1)
    fisher = rows.T @ rows / 5
    for channel, price in enumerate(exercises.block_price.solution(W @ a, s)):
        delta = torch.zeros_like(W)
        delta[channel] = W[channel]
        torch.testing.assert_close(delta.flatten() @ fisher @ delta.flatten() / 2, price)


def gram(W, A):
    return (W @ A * W).sum(1)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda W, A, S: gram(W, A) / torch.linalg.inv(S).diagonal(), "½"),
        (lambda W, A, S: 0.5 * gram(W, A) * S.diagonal(), "kron_obd"),
        (lambda W, A, S: 0.5 * gram(W, A) * torch.linalg.inv(S).diagonal(), "divide"),
        (lambda W, A, S: 0.5 * (W**2 @ A).sum(1) / torch.linalg.inv(S).diagonal(), "published"),
        (lambda W, A, S: 0.5 * (W**2 @ A.diagonal()) / torch.linalg.inv(S).diagonal(), "diagonal of A alone"),
        (lambda W, A, S: gram(W, A) ** 2, "(W @ A * W)"),
    ],
)
def test_mistakes_about_kron_obs_are_explained(attempt, words):
    verdict = exercises.kron_obs_score(attempt)
    assert not verdict
    assert words in verdict.message


def test_four_blocks_share_one_scale_of_colours_and_the_third_has_the_trace_of_the_first():
    block, product = torch.randn(6, 6), torch.randn(6, 6)
    block, product = block @ block.T, product @ product.T
    figure = figures.block_beside(block, product, ["cat", "dog"], title="a layer")
    images = [axes.images[0] for axes in figure.axes[:4]]
    assert len({image.get_clim() for image in images}) == 1
    shown = [torch.as_tensor(image.get_array()) for image in images]
    torch.testing.assert_close(shown[2].trace(), block.trace())
    torch.testing.assert_close(shown[3], block - shown[2])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["cat", "dog"]
    assert figure.get_suptitle() == "a layer"


def test_the_widget_says_error_and_rank():
    rows = torch.randn(4, 6, dtype=torch.double)
    block, product = rows.T @ rows / 4, torch.eye(6, dtype=torch.double)
    figure, words = figures.measured_block(block, product, "fc", 4)
    assert "fc" in words and "4 images" in words and "Rank of the true block: 4 of 6; of the product: 6" in words
    assert f"relative error {float((block - product).norm() / block.norm()):.2f}" in words
    assert figure.axes[0].images


def test_draws_and_counts_are_shown_as_given():
    axes = figures.label_draws([0.8, 0.6, 0.4], 0.5).axes[0]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([80, 60, 40])
    assert axes.lines[-1].get_ydata()[0] == pytest.approx(50)
    maps = figures.coverage_maps({"one": SIZES.view(2, 3), "two": SIZES.view(3, 2)})
    assert [text.get_text() for text in maps.axes[0].texts] == ["0", "1", "2", "3", "4", "5"]
    assert [axes.get_title(loc="left") for axes in maps.axes] == ["one", "two"]


def test_the_ladder_shows_means_over_layers():
    steps = [("block", 0.9, 1.0), ("product", 0.2, 0.1)]
    table = pd.DataFrame(
        [
            {"network": net, "draw": draw, "layer": layer, "assumed": step, "order": order + extra, "size": size}
            for net in ("a", "b")
            for draw in (0, 1)
            for layer, extra in (("one", 0.0), ("two", 0.1))
            for step, order, size in steps
        ]
    )
    figure = figures.ladder(table)
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")] == ["a", "b"]
    large = next(line for line in figure.axes[0].lines if line.get_markersize() == 10)
    assert list(large.get_ydata()) == pytest.approx([0.95, 0.25])

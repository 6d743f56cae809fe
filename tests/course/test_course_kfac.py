"""What belongs to 07_kfac: checkers explain mistakes, figures show what they are given."""

from __future__ import annotations

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
        (lambda s, k, t, p: exercises._coverage(s + 2 * p, k, t, 0), "the padding is no pixel"),
        (lambda s, k, t, p: exercises._coverage(s, k, 1, p), "`stride` pixels later"),
        (padded, "Go through the positions"),
    ],
)
def test_mistakes_about_coverage_are_explained(attempt, words):
    verdict = exercises.coverage_of(attempt)
    assert not verdict
    assert words in verdict.message


def factors(a, g):
    return torch.einsum("npo,npq->oq", g, g) / len(g), torch.einsum("npi,npj->ij", a, a) / (len(a) * a.shape[1])


def true_block(a, g):
    rows = torch.einsum("npo,npi->noi", g, a).flatten(1)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda a, g: torch.kron(*factors(a, g)[::-1]), "wrong order"),
        (lambda a, g: torch.kron(*factors(a, g)) * a.shape[1], "counts them twice"),
        (lambda a, g: torch.kron(*factors(a, g)) / a.shape[1], "S sums"),
        (lambda a, g: torch.kron(*factors(a, g)) * len(a) ** 2, "summed over samples"),
        (true_block, "true block"),
        (
            lambda a, g: torch.kron(*factors(a.mean(1, keepdim=True), g.sum(1, keepdim=True))),
            "added up before squaring",
        ),
        (lambda a, g: torch.kron(*factors(a - a.mean((0, 1)), g)), "second moment"),
        (lambda a, g: factors(a, g)[0], "is asked for"),
    ],
)
def test_mistakes_about_the_factors_are_explained(attempt, words):
    verdict = exercises.kronecker_fisher(attempt)
    assert not verdict
    assert words in verdict.message


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


def test_recorded_blocks_are_those_of_their_definition_over_the_first_images():
    g, a = torch.randn(5, 2, 4), torch.randn(5, 3, 4)
    block, product = figures.Recorded.of(g, a).blocks(3)
    rows = torch.einsum("nop,nip->noi", g, a).flatten(1)[:3]
    torch.testing.assert_close(block, rows.T @ rows / 3)
    S, A = factors(a[:3].mT, g[:3].mT)
    torch.testing.assert_close(product, torch.kron(S, A))


def test_three_blocks_share_one_scale_of_colours():
    block, product = torch.randn(6, 6), torch.randn(6, 6)
    figure = figures.block_beside(block, product, blocks=2, title="a layer")
    images = [axes.images[0] for axes in figure.axes[:3]]
    assert len({image.get_clim() for image in images}) == 1
    torch.testing.assert_close(torch.as_tensor(images[2].get_array()), block - product)
    assert figure.get_suptitle() == "a layer"


def test_the_widget_says_error_and_rank():
    recorded = figures.Recorded.of(torch.randn(8, 2, 1), torch.randn(8, 3, 1))
    figure, words = figures.recorded_block(recorded, "fc", 4, "sampled")
    assert "fc" in words and "4 images" in words and "at most 4 of 6" in words
    block, product = recorded.blocks(4)
    assert f"relative error {float((block - product).norm() / block.norm()):.2f}" in words
    assert figure.axes[0].images


def test_draws_counts_and_costs_are_shown_as_given():
    axes = figures.label_draws([0.8, 0.6, 0.4], 0.5).axes[0]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([80, 60, 40])
    assert axes.lines[-1].get_ydata()[0] == pytest.approx(50)
    maps = figures.coverage_maps({"one": SIZES.view(2, 3), "two": SIZES.view(3, 2)})
    assert [text.get_text() for text in maps.axes[0].texts] == ["0", "1", "2", "3", "4", "5"]
    assert [axes.get_title(loc="left") for axes in maps.axes] == ["one", "two"]
    truth, score = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0])
    line = figures.against_truth(truth, {"a score": score}).axes[0].lines[-1]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2], [1.5, 1])

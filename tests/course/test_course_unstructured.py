"""Notebook ``14_unstructured``: its checkers know the mistakes, its figures show what they are given."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from prunelab.course.exercises import unstructured as exercises
from prunelab.course.figures import unstructured as figures


def by_topk(weight, n, m, largest=True):
    parts = weight.unflatten(1, (-1, m))
    return torch.zeros_like(parts).scatter(-1, parts.topk(n, dim=-1, largest=largest).indices, 1.0).flatten(1).bool()


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda weight, n, m: by_topk(weight, n, m), "signed values"),
        (lambda weight, n, m: by_topk(weight.abs(), n, m, largest=False), "the smallest"),
        (lambda weight, n, m: ~by_topk(weight.abs(), n, m), "inverted"),
        (lambda weight, n, m: weight * by_topk(weight.abs(), n, m), "return the mask alone"),
        (lambda weight, n, m: by_topk(weight.abs(), n * 8 // m, 8), "whole rows"),
        (lambda weight, n, m: by_topk(weight.abs().T, n, m).T, "down the columns"),
        (lambda weight, n, m: torch.ones_like(weight), "third dimension"),
        (lambda weight, n, m: by_topk(weight.abs(), n, m)[:, :4], "shape [4, 8]"),
        (lambda weight, n, m: [1, 0], "not list"),
    ],
)
def test_mistakes_about_patterns_are_explained(attempt, words):
    verdict = exercises.n_m_mask(attempt)
    assert not verdict
    assert words in verdict.message


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda r, c, d, v, i: r * c * d * v, "values alone"),
        (lambda r, c, d, v, i: r * c * d * (v + i), "where every row begins"),
        (lambda r, c, d, v, i: r * c * d * (v + i) + r * i, "rows + 1"),
        (lambda r, c, d, v, i: r * c * d * (v + 2 * i), "COO"),
        (lambda r, c, d, v, i: r * c * (d * v + i) + (r + 1) * i, "zeros are not stored"),
        (lambda r, c, d, v, i: r * c * v, "three arrays"),
    ],
)
def test_mistakes_about_bytes_are_explained(attempt, words):
    verdict = exercises.csr_bytes(attempt)
    assert not verdict
    assert words in verdict.message


def published(p, w, sign=False, layer=True, own=False, plus=True):
    most, top = (max(v.abs().max() for v in parts.values()) for parts in (p, w))
    score = {n: (v if sign else v.abs()) / (v.abs().max() if layer else most) for n, v in p.items()}
    return {n: v + plus * w[n].abs() / (w[n].abs().max() if own else top) for n, v in score.items()}


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda p, w: published(p, w, sign=True), "keep their sign"),
        (lambda p, w: published(p, w, layer=False), "largest of the network; take"),
        (lambda p, w: published(p, w, own=True), "weights are divided by the largest of their layer"),
        (lambda p, w: published(p, w, plus=False), "second term"),
        (lambda p, w: {n: v.abs() / max(x.abs().max() for x in w.values()) for n, v in w.items()}, "magnitudes alone"),
        (lambda p, w: {n: v + 1 for n, v in p.items()}, "two terms"),
        (lambda p, w: p["first"], "a dict"),
    ],
)
def test_mistakes_about_the_published_score_are_explained(attempt, words):
    verdict = exercises.published_score(attempt)
    assert not verdict
    assert words in verdict.message


def surgeon(weight, factor, n, m, priced=True, move=1, early=False, power=2, largest=True, divide=True):
    first, weight = weight, weight.clone()
    for start in range(0, weight.shape[1], m):
        price = (first if early else weight)[:, start : start + m] ** 2
        price = price / factor.diagonal()[start : start + m] ** power if priced else price
        gone = torch.ones_like(price).scatter(1, price.topk(n, 1, largest=largest).indices, 0.0)
        for c in range(start, start + m):
            lost = weight[:, c] * gone[:, c - start] / (factor[c, c] if divide else 1)
            weight[:, c:] -= move * torch.outer(lost, factor[c, c:])
            weight[:, c] *= 1 - gone[:, c - start]
    return weight


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda *case: surgeon(*case, move=0), "nothing moves"),
        (lambda *case: surgeon(*case, move=-1), "wrong sign"),
        (lambda *case: surgeon(*case, early=True), "from the first weights"),
        (lambda *case: surgeon(*case, power=1), "U_cc once"),
        (lambda *case: surgeon(*case, largest=False), "cheapest go"),
        (lambda *case: surgeon(*case, divide=False), "not divided"),
        (lambda *case: surgeon(*case[:4], False), "even where `priced` is True"),
        (lambda *case: surgeon(*case[:4], True), "even where `priced` is False"),
        (lambda *case: case[0], "Choose once per block"),
    ],
)
def test_mistakes_of_the_masked_surgeon_are_explained(attempt, words):
    verdict = exercises.masked_surgeon(attempt)
    assert not verdict
    assert words in verdict.message


def test_every_layer_is_a_row_and_every_way_a_mark():
    shares = {"global": {"conv.weight": 0.9, "fc.weight": 0.2}, "layer": {"conv.weight": 0.5, "fc.weight": 0.5}}
    axes = figures.layer_densities(shares).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv", "fc"]
    assert [list(line.get_xdata()) for line in axes.lines] == [[90, 20], [50, 50]]


def test_masks_are_drawn_with_the_share_that_stays():
    mask = torch.tensor([[True, False], [True, True]])
    axes = figures.mask_patterns({"single": mask, "other": ~mask}).axes
    assert [one.get_title(loc="left") for one in axes] == ["single: 75% stay", "other: 25% stay"]
    assert axes[0].collections[0].get_array().reshape(2, 2).tolist() == mask.tolist()


def test_products_are_a_curve_beside_the_level_of_the_dense_one():
    rows = [("dense", 1.0, 2.0), ("CSR", 0.5, 4.0), ("CSR", 0.1, 1.0)]
    axes = figures.product_times(pd.DataFrame(rows, columns=["kind", "density", "milliseconds"])).axes[0]
    assert list(axes.lines[0].get_ydata()) == [2, 2]
    assert list(axes.lines[1].get_xdata()) == [50, 10]
    assert axes.get_yscale() == "log"


def test_latency_and_accuracy_stand_side_by_side_with_the_dense_network_in_both():
    rows = [("baked", 0.5, 2.0, 0.8), ("baked", 0.9, 2.0, 0.3), ("CSR", 0.5, 9.0, None), ("CSR", 0.9, 5.0, None)]
    table = pd.DataFrame(rows, columns=["network", "sparsity", "milliseconds", "accuracy"])
    figure = figures.sparsity_and_latency(table, {"dense": 1.9, "unfolded": 3.0}, 0.9)
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["baked", "CSR", "dense", "unfolded"]
    assert list(left.lines[1].get_ydata()) == [9, 5]
    assert len(right.lines) == 2, "what has no accuracy has no line"
    assert list(right.lines[1].get_ydata()) == [90, 90]


def test_a_threshold_splits_the_histogram_greys_the_filters_and_circles_its_accuracy():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3)
    curve = pd.DataFrame({"threshold": [0.0, 0.5], "accuracy": [0.9, 0.4]})
    histogram, filters, accuracy = figures.threshold_view(weight.flatten(), weight, 0.5, curve).axes
    every, gone = (patch.get_data().values for patch in histogram.patches)
    inside = weight.abs() <= weight.abs().quantile(0.999)
    assert gone.sum() == (weight.abs() <= 0.5).sum()
    assert every.sum() == inside.sum() and (every >= gone).all()
    shade = np.asarray(filters.images[1].get_array())
    assert shade.shape == (4 * 4 - 1, 3 * 4 - 1, 4)
    assert (shade[..., 3] == 1).sum() == (weight.abs() <= 0.5).sum()
    assert list(accuracy.lines[1].get_xydata()[0]) == [0.5, 40]

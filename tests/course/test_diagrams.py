"""Diagrams: what they say in numbers is right, everybody can read them, and notebooks show them as they are drawn."""

from __future__ import annotations

import base64
import io
import re
from functools import partial
from itertools import combinations, product
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

import prunelab as pl
from prunelab.course.figures import diagrams
from prunelab.course.figures.diagrams.factors import rotated_layer
from prunelab.course.figures.diagrams.sheet import SMALLEST, number

DRAW = {name: getattr(diagrams, name) for name in diagrams.__all__ if name != "Diagram"}
DRAW["cuts_and_training, two"] = partial(diagrams.cuts_and_training, 2, 0.9)
DRAW["cuts_and_training, six"] = partial(diagrams.cuts_and_training, 6, 0.15)
EVERY = pytest.mark.parametrize("draw", [pytest.param(draw, id=name) for name, draw in DRAW.items()])
NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def written(figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def words(figure) -> list[str]:
    return [text.get_text() for text in written(figure)]


# ── everybody can read them ───────────────────────────────────────────────────────────────────────────────────────


@EVERY
def test_no_words_leave_the_figure_or_cover_other_words(draw):
    figure = draw()
    figure._repr_png_()
    width, height = figure.canvas.get_width_height()
    places = [(text.get_text(), text.get_window_extent()) for text in written(figure)]
    for said, place in places:
        assert min(place.x0, place.y0, width - place.x1, height - place.y1) >= 0, f"{said!r} leaves the figure"
    for (said, one), (other, two) in combinations(places, 2):
        assert not one.overlaps(two), f"{said!r} and {other!r} overlap"


@EVERY
def test_words_are_large_enough_at_the_width_of_a_notebook(draw):
    figure = draw()
    assert 7 <= figure.get_figwidth() <= 8
    assert min(text.get_fontsize() for text in written(figure)) >= SMALLEST


@EVERY
def test_alt_text_says_what_is_seen_and_goes_wherever_the_image_goes(draw, monkeypatch):
    figure, shown = draw(), []
    assert 100 <= len(figure.alt) <= 700 and figure.alt.endswith(".")
    assert not re.search(r"[\\${}_]{2}|\bnan\b|\n", figure.alt)
    assert Image.open(io.BytesIO(figure._repr_png_())).info["Description"] == figure.alt
    monkeypatch.setattr("IPython.display.display", lambda data, **options: shown.append((data, options)))
    figure._ipython_display_()
    ((data, options),) = shown
    assert data == {"image/png": figure._repr_png_(), "text/plain": figure.alt}
    assert options == {"raw": True, "metadata": {"image/png": {"alt": figure.alt}}}


def test_notebooks_show_them_as_they_are_drawn_now():
    seen = set()
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type != "code" or not (call := re.search(r"^diagrams\.(\w+)\((.*)\)$", cell.source, re.M)):
                continue
            figure, (output,) = getattr(diagrams, call[1])(), cell.outputs
            assert output.metadata["image/png"]["alt"] == output.data["text/plain"] == figure.alt, cell.id
            image = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
            assert image.size == figure.canvas.get_width_height(), cell.id
            seen.add(call[1])
    assert seen == set(diagrams.__all__) - {"Diagram"}


# ── what they say in numbers ──────────────────────────────────────────────────────────────────────────────────────


def test_the_slices_are_those_that_the_tracer_finds():
    graph = pl.trace(pl.zoo.load("resnet20"), torch.zeros(1, 3, 32, 32))
    members = graph.group_of("layer1.0.conv1.weight", 0).members
    assert f"{len(members)} tensors lose a slice" in diagrams.group_slices().alt
    names = {member.name.split(".")[-1].replace("running_", "running\n") for member in members}
    assert names <= {*words(diagrams.group_slices()), "weight"}


def test_axes_that_meet_have_an_end_wherever_one_of_them_had_one():
    sums = sorted({6, 10} | {2, 10})
    named = "+".join(str(end - start) for start, end in zip([0, *sums], sums, strict=False))
    products = {4 * entry for entry in range(1, 7)} | {12, 24}
    outer, inner = 2, len([end for end in products if end <= 12])
    said = words(diagrams.axes_meet())
    assert {named, f"{outer}×{inner}×{24 // outer // inner}", "3×4+3×4+3×4"} <= set(said)


@pytest.mark.parametrize(("inputs", "weights"), [((1.0, 4.0), (0.4, 0.15)), ((1.5, 4.0), (0.4, 0.1))])
def test_the_bowl_says_what_removing_one_weight_and_both_costs(inputs, weights):
    def loss(first, second):
        return (first * inputs[0] + second * inputs[1] - 1) ** 2 / 2

    first, second, both = loss(0, weights[1]), loss(weights[0], 0), loss(0, 0)
    said = words(diagrams.bowl(inputs, weights))
    assert said.count(f"{first:.2f}") == said.count(f"{second:.2f}") == 2  # one at a time both bowls agree
    assert f"both cost {both:.2f} ≠ {first:.2f} + {second:.2f}" in said
    assert f"both cost {first + second:.2f} = {first:.2f} + {second:.2f}" in said


@pytest.mark.parametrize("cross", [0.8, 0.6, -0.4])
def test_the_surgeon_stops_at_the_lowest_point_of_the_constraint(cross):
    moves = np.linspace(-2, 2, 400001)
    costs = (1 - 2 * cross * moves + moves**2) / 2
    said = words(diagrams.surgeon(((1, cross), (cross, 1))))
    assert said.count("0.50") == said.count(f"{costs.min():.2f}") == 2
    assert f"{moves[costs.argmin()]:.1f}" in said


def test_the_gate_is_priced_by_the_derivatives_of_its_loss():
    z = torch.ones((), dtype=torch.double, requires_grad=True)
    (slope,) = torch.autograd.grad((2 * z - 1) ** 2 / 2, z, create_graph=True)
    (bend,) = torch.autograd.grad(slope, z)
    price = f"{-slope:.0f} + {bend / 2:.0f} = {-slope + bend / 2:.0f}"
    figure = diagrams.gate()
    assert price in figure.alt and any(price in said for said in words(figure))


def block(figure, left: float, top: float, cell: float = 0.44, size: int = 4) -> list[str]:
    """Return what is written in the cells of a matrix, row by row."""
    at = {tuple(np.round(text.get_position(), 6)): text.get_text() for text in written(figure)}
    places = [
        (left + (column + 0.5) * cell, top + (row + 0.5) * cell) for row, column in product(range(size), repeat=2)
    ]
    return [at[tuple(np.round(place, 6))] for place in places]


@pytest.mark.parametrize(("top", "images"), [(0.7, [((1, 2), (3, -1))]), (3.4, [((1, 0), (1, 0)), ((0, 1), (0, 1))])])
def test_kronecker_blocks_are_means_of_products_and_products_of_means(top, images):
    figure, many = diagrams.kronecker(), len(images)
    pairs = list(product(range(2), repeat=2))  # an output and an input: a weight
    fisher, factored = [], []
    for (i, k), (j, m) in product(pairs, repeat=2):
        fisher.append(sum(s[i] * a[k] * s[j] * a[m] for s, a in images) / many)
        factored.append(sum(s[i] * s[j] for s, _ in images) / many * sum(a[k] * a[m] for _, a in images) / many)
    assert block(figure, 5.4, top) == [number(value) for value in fisher]
    assert block(figure, 2.97, top) == [number(value) for value in factored]
    assert ("≠" in words(figure)) and (fisher == factored) == (len(images) == 1)


def test_the_bottleneck_loses_what_the_whole_block_says():
    layer, (rows, columns) = rotated_layer(), (6, 8)
    W, left, right = layer["W"], layer["Q_S"], layer["Q_A"]
    np.testing.assert_allclose(left @ layer["core"] @ right.T, W)
    cut = left[:, :rows] @ layer["core"][:rows, :columns] @ right[:, :columns].T
    delta = (cut - W).flatten()
    np.testing.assert_allclose(delta @ np.kron(layer["S"], layer["A"]) @ delta / 2, layer["damage"])
    thin = [(columns, 16, 1, 1), (rows, columns, 3, 3), (16, rows, 1, 1)]
    parts = [torch.empty(shape).numel() for shape in thin]
    total = f"{' + '.join(map(str, parts))} = {sum(parts)} instead of {torch.empty(16, 16, 3, 3).numel()}"
    assert f"multiply-adds: {total}" in words(diagrams.bottleneck())


def test_two_layers_interact_where_autograd_says_so():
    figure, scales = diagrams.two_layers(), torch.ones(2)
    ways = [lambda t: t[1] * t[0], lambda t: t[0] * t[1], lambda t: t[0] + t[1]]
    for place, way in enumerate(ways):
        hessian = torch.autograd.functional.hessian(way, scales)
        found = block(figure, 0.9 + 2.5 * place, 2.42, 0.42, 2)
        assert found == [number(value) for value in hessian.flatten().tolist()]


@pytest.mark.parametrize(("steps", "flops"), [(3, 0.3), (2, 0.9), (6, 0.15)])
def test_cuts_are_by_equal_factors_and_training_is_shared(steps, flops):
    said = words(diagrams.cuts_and_training(steps, flops))
    factor = flops ** (1 / steps)
    assert [word for word in said if word.endswith(" %")] == [
        f"{100 * share:.0f} %" for share in (flops, *(factor**step for step in range(1, steps + 1)))
    ]
    assert said.count("all") == 1 and said.count(f"1/{steps}") == steps

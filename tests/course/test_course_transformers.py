"""Of ``13_transformers``: its exercises explain mistakes, its figures show what they are given, its buttons work."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import prunelab as pl
from prunelab.course.exercises import transformers as exercises
from prunelab.course.figures import picture
from prunelab.course.figures import transformers as figures
from prunelab.course.widgets import ToggleGrid, explore
from prunelab.errors import PruneLabError


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda head, heads, d: head * 3 * d + torch.arange(3 * d), "neighbouring rows"),
        (lambda head, heads, d: range(head * d, head * d + d), "keys and values too"),
        (lambda head, heads, d: torch.arange(3 * d) * heads + head, "the middle one"),
        (lambda head, heads, d: [part * d + head * d + place for part in range(3) for place in range(d)], "apart"),
        (lambda head, heads, d: torch.zeros(3 * d), "Row i is part"),
    ],
)
def test_mistakes_about_the_rows_of_a_head_are_explained(attempt, words):
    assert words in exercises.head_rows(attempt).message


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda old, new: (old / new) ** 0.5, "inverted"),
        (lambda old, new: new / old, "square root"),
        (lambda old, new: new**-0.5, "new scale itself"),
        (lambda old, new: (new / old) ** 0.25, "queries alone"),
        (lambda old, new: 1.0, "equal to 1 / √old"),
    ],
)
def test_mistakes_about_the_scale_are_explained(attempt, words):
    assert words in exercises.query_factor(attempt).message


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda t, w, h, d: exercises._flops(t, w, h, d) / 2, "counts as two"),
        (lambda t, w, h, d: 8 * t * w * h * d, "products between tokens"),
        (lambda t, w, h, d: 2 * t * h * d * (3 * w + 2 * t), "projection back"),
        (lambda t, w, h, d: 2 * t * h * d * (4 * w + t), "weights times values are missing"),
        (lambda t, w, h, d: 8 * t * w * h * d + 4 * t * t * d, "for every head"),
        (lambda t, w, h, d: 2 * t * h * d * (2 * w + 2 * t), "three times as many rows"),
    ],
)
def test_mistakes_about_what_attention_costs_are_explained(attempt, words):
    assert words in exercises.attention_flops(attempt).message


def test_what_attention_costs_is_what_is_counted():
    attention = pl.zoo.build("vit_small").blocks[0].attention
    assert pl.count(attention, torch.zeros(1, 64, 96)).flops == exercises._flops(64, 96, 4, 24)


def test_the_marks_stand_at_the_rows_of_the_head():
    heads = torch.arange(24) // 2 % 4
    axes = figures.fused_rows(heads, [2, 3, 10, 11, 18, 19]).axes[0]
    assert list(axes.lines[0].get_xdata()) == [2, 3, 10, 11, 18, 19]
    assert [text.get_text() for text in axes.texts] == ["queries", "keys", "values"]


def test_removed_heads_are_crossed_out():
    values = torch.tensor([[0.1, -0.02], [0.0, 0.3]])
    axes = figures.head_map(values, [(1, 0)]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["+0.100", "-0.020", "+0.000", "+0.300"]
    assert [sorted(line.get_xdata()) for line in axes.lines] == [[-0.5, 0.5]] * 2
    assert [sorted(line.get_ydata()) for line in axes.lines] == [[0.5, 1.5]] * 2
    assert not figures.head_map(values).axes[0].lines


def test_random_orders_are_averaged_with_their_range():
    rows = [("random", 4, 0.5), ("random", 4, 0.7), ("oracle", 4, 0.8)]
    table = pd.DataFrame(rows, columns=["criterion", "heads", "accuracy"])
    random, oracle = figures.heads_removed(table, 0.9).axes[0].lines
    assert list(random.get_ydata()) == pytest.approx([90, 60])
    assert "range of 2" in random.get_label()
    assert list(oracle.get_ydata()) == pytest.approx([90, 80])


def test_each_way_has_a_panel_and_each_kind_a_line():
    rows = [(kind, way, 0.8, 0.6) for kind in ("heads", "MLP units") for way in ("as cut", "refitted")]
    figure = figures.kinds_at_equal_flops(pd.DataFrame(rows, columns=["kind", "way", "flops_kept", "accuracy"]), 0.9)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["as cut", "refitted"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert list(figure.axes[0].lines[0].get_xdata()) == [80, 100]


def test_pressed_buttons_are_the_value_of_the_grid_and_the_figure_follows():
    grid = ToggleGrid(2, 3, row="block", column="head")
    widget = explore(lambda removed: (picture(), f"without {removed}"), removed=grid)
    grid.buttons[1, 2].value = True
    grid.buttons[0, 1].value = True
    assert grid.value == ((0, 1), (1, 2))
    assert widget.caption.value == "without ((0, 1), (1, 2))"
    assert grid.buttons[1, 2].description == "head 2"


def test_a_value_that_is_set_presses_its_buttons_and_draws_once():
    drawn = []
    grid = ToggleGrid(2, 3)
    explore(lambda removed: drawn.append(removed) or (picture(), ""), removed=grid)
    grid.value = ((1, 0), (0, 2))
    assert [place for place, button in grid.buttons.items() if button.value] == [(0, 2), (1, 0)]
    assert drawn == [(), ((0, 2), (1, 0))]


def test_a_button_that_is_not_there_is_refused():
    with pytest.raises(PruneLabError, match=r"\(9, 9\)"):
        ToggleGrid(2, 3).value = ((9, 9),)

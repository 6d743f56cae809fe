"""01_tracing: mistakes in its exercises are explained, its figures show what they are given."""

from __future__ import annotations

import pytest
import torch
from matplotlib.colors import to_hex

import prunelab as pl
from prunelab.course.exercises import tracing as exercises
from prunelab.course.figures import tracing as figures
from prunelab.drawing.style import BLUE


def closure(pairs, start, *, back=True, passes=9):
    found = {start}
    for _ in range(passes):
        for first, second in pairs:
            if first in found or (back and second in found):
                found |= {first, second}
    return found


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda pairs, start: closure(pairs, start, back=False), "no direction"),
        (lambda pairs, start: closure(pairs, start, passes=1), "go on until nothing is new"),
        (lambda pairs, start: {start, *(n for pair in pairs if start in pair for n in pair)}, "direct neighbours"),
        (lambda pairs, start: closure(pairs, start) - {start}, "its own group"),
        (lambda pairs, start: {name for pair in pairs for name in pair}, "begin with the name"),
        (lambda pairs, start: start, "not str"),
        (lambda pairs, start: len(pairs), "not int"),
    ],
)
def test_mistakes_about_what_goes_together_are_explained(attempt, words):
    verdict = exercises.coupled(attempt)
    assert not verdict
    assert words in verdict.message


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda w, h, i: torch.arange(w).view(h, -1)[i], "queries alone"),
        (lambda w, h, i: torch.arange(3 * w).view(h, -1)[i], "the three comes first"),
        (lambda w, h, i: torch.arange(3 * w).view(3, -1, h)[..., i].flatten(), "outer factor"),
        (lambda w, h, i: torch.arange(3 * w).view(3, h, -1)[:, i].t().flatten(), "sort them"),
        (lambda w, h, i: torch.arange(3 * w), "Number the rows"),
    ],
)
def test_mistakes_about_heads_are_explained(attempt, words):
    verdict = exercises.head_rows(attempt)
    assert not verdict
    assert words in verdict.message


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda one, two: [2, 6, 10] if one == [6, 4] else one, "where a segment ends"),
        (lambda one, two: [2, 4], "last segment is missing"),
        (lambda one, two: one + two, "on top of each other"),
        (lambda one, two: [1, 2], "add up to 10"),
        (lambda one, two: [5, 5], "begins wherever"),
        (lambda one, two: torch.tensor([5, 5]), "begins wherever"),
        (lambda one, two: 10, "not int"),
    ],
)
def test_mistakes_about_sums_are_explained(attempt, words):
    verdict = exercises.breakpoints(attempt)
    assert not verdict
    assert words in verdict.message


def test_a_strip_has_a_number_for_every_run_that_is_wide_enough_and_none_where_no_unit_is():
    figure = figures.ownership({"heads": torch.tensor([0, 0, 1, 1, -1, -1])}, xlabel="row")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["0", "1"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("row", "heads")


def test_the_view_of_a_group_marks_where_its_unit_is(small):
    model, inputs = small
    graph = pl.trace(model, inputs)
    (group,) = graph.groups
    network, members = figures.group_view(graph, group, 2).axes
    assert [text.get_text() for text in network.texts if text.get_gid() == "number"] == ["1"]
    (blue,) = (c for c in members.collections if to_hex(c.get_facecolor()[0]).upper() == BLUE)
    assert len(blue.get_paths()) == len(group.members)
    low, high = blue.get_paths()[0].get_extents().intervalx
    assert (low, high) == pytest.approx((2 / 8, 3 / 8))
    assert members.get_title(loc="left") == f"unit 2 of 8, in its {len(group.members)} members"


def test_head_width_is_drawn_where_it_is_asked_for():
    graph = pl.trace(pl.zoo.vit_small(), torch.ones(1, 3, 32, 32))
    _, width = graph.groups_of("blocks.0.attention.qkv.weight", 0)
    number = str(graph.groups.index(width) + 1)
    numbers = [text.get_text() for text in graph.draw([width]).axes[0].texts if text.get_gid() == "number"]
    assert number in numbers
    assert number not in [text.get_text() for text in graph.draw().axes[0].texts if text.get_gid() == "number"]


def test_the_words_count_what_goes_with_a_unit():
    graph = pl.trace(pl.zoo.resnet20(), torch.ones(1, 3, 32, 32))
    _, words = figures.explained(graph, graph.groups[0], 99)
    assert "unit 15 of 16" in words
    assert "4 that produce it, 16 that carry it, 5 that consume it" in words

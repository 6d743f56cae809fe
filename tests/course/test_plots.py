"""Figures show what they are given: lines, labels, numbers; and they stand apart from pyplot."""

from __future__ import annotations

import sys

import matplotlib as mpl
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

import prunelab as pl
from prunelab.course import figures


@pytest.fixture
def curve() -> pd.DataFrame:
    rows = [
        {"criterion": name, "budget": budget, "flops_kept": budget - 0.001 * draw, "accuracy": value + 0.1 * draw}
        for name, value, draws in (("random", 0.2, 2), ("magnitude", 0.4, 1), ("a new one", 0.6, 1))
        for budget in (0.5, 0.8)
        for draw in range(draws)
    ]
    return pd.DataFrame(rows)


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_every_criterion_is_a_line_with_its_own_colour_and_marker(curve):
    lines = figures.accuracy_against_flops(curve).axes[0].lines
    assert [line.get_label() for line in lines] == ["random: mean and range of 2", "magnitude", "a new one"]
    assert len({to_hex(line.get_color()) for line in lines}) == len({line.get_marker() for line in lines}) == 3


def test_draws_are_averaged_at_each_budget_and_the_whole_network_is_the_last_point(curve):
    random = figures.accuracy_against_flops(curve, whole=0.9).axes[0].lines[0]
    assert random.get_xdata() == pytest.approx([49.95, 79.95, 100])
    assert random.get_ydata() == pytest.approx([25, 25, 90])


def test_axes_name_their_units(curve):
    table = pd.DataFrame(
        {"stage": ["before", "cut"], "flops_kept": [1, 0.5], "accuracy": [0.9, 0.4], "loss": [0.3, 2.0]}
    )
    for figure, y in (
        (figures.accuracy_against_flops(curve), "accuracy on test images (%)"),
        (figures.trajectory(table), "accuracy (%)"),
        (figures.trajectory(table, "loss"), "loss (nats)"),
    ):
        assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("FLOPs kept (%)", y)


def test_a_trajectory_has_one_kind_of_point_per_stage_and_keeps_the_order(small):
    model, inputs = small
    _, report = pl.prune(
        model, inputs, ratio=0.75, steps=2, finetune=lambda _: None, evaluate=lambda _: {"accuracy": 0.5}
    )
    path, *points = report.plot().axes[0].lines
    assert list(path.get_xdata()) == pytest.approx(list(100 * report.table()["flops_kept"]))
    assert [point.get_label() for point in points] == ["before", "cut", "fine-tuned"]
    assert [len(point.get_xdata()) for point in points] == [1, 2, 2]


def test_bars_say_how_many_units_of_each_group_stay(small):
    model, inputs = small
    graph = pl.trace(model, inputs)
    plan = pl.plan(pl.criteria.get("magnitude")(graph), ratio=0.25)
    axes = figures.kept_units(plan, graph.groups).axes[0]
    assert texts(axes) == ["6 of 8"]
    assert [bar.get_width() for bar in axes.patches] == [100, 75]


def test_the_grid_names_the_truth_where_the_network_errs():
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    figure = figures.image_grid(images, ["cat", "dog", "ship"], ["cat", "cat", "ship"], columns=2)
    assert [axes.get_title() for axes in figure.axes] == ["cat", "cat\n✗ it is: dog", "ship"]


def test_ranks_are_compared_over_all_units_and_one_group_is_pointed_out(small):
    model, inputs = small
    graph = pl.trace(model, inputs)
    scores = pl.criteria.get("magnitude")(graph)
    axes = figures.rank_comparison(scores, scores, graph.groups[0]).axes[0]
    assert axes.get_title(loc="left") == "Spearman correlation 1.00"
    assert sorted(axes.lines[-1].get_ydata()) == pytest.approx([12.5 * rank for rank in range(1, 9)])


def test_figures_show_themselves_and_change_no_global_setting(curve):
    before = dict(mpl.rcParams)
    had_pyplot = "matplotlib.pyplot" in sys.modules
    assert figures.accuracy_against_flops(curve, chance=0.1, mark=(0.5, 0.4))._repr_png_().startswith(b"\x89PNG")
    assert dict(mpl.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot

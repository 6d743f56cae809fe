"""The budget slider redraws its figure and says in words what it shows; no kernel is needed to test it."""

from __future__ import annotations

import ipywidgets
import pandas as pd
import pytest

import prunelab as pl
from prunelab.widgets import budget_slider


@pytest.fixture
def parts(small):
    model, inputs = small
    graph = pl.trace(model, inputs)
    scores = {name: pl.criteria.get(name)(graph) for name in ("random", "magnitude")}
    plans = {(name, budget): pl.plan(scores[name], ratio=1 - budget) for name in scores for budget in (0.5, 0.75)}
    rows = [
        {"criterion": name, "budget": budget, "accuracy": budget - (name == "random") / 4}
        | {f"{what}_kept": share for what, share in plan.budget["kept"].items()}
        for (name, budget), plan in plans.items()
    ]
    return graph.groups, plans, pd.DataFrame(rows)


def test_a_move_of_the_slider_changes_image_and_caption(parts):
    slider = budget_slider(*parts, whole=0.9)
    image, caption = bytes(slider.image.value), slider.caption.value
    assert image.startswith(b"\x89PNG")
    assert "4 of 8 units" in caption
    assert "accuracy without fine-tuning 50.0%" in caption
    slider.budget.value = 0.75
    assert "6 of 8 units" in slider.caption.value
    assert bytes(slider.image.value) != image


def test_another_criterion_shows_its_own_accuracy(parts):
    slider = budget_slider(*parts)
    slider.criterion.value = "random"
    assert "<b>random</b>" in slider.caption.value
    assert "25.0%" in slider.caption.value


def test_the_caption_is_published_after_the_figure(parts):
    slider = budget_slider(*parts)
    order: list[str] = []
    slider.image.observe(lambda _: order.append("image"), names="value")
    slider.caption.observe(lambda _: order.append("caption"), names="value")
    slider.budget.value = 0.75
    assert order == ["image", "caption"]


def test_no_output_widget_holds_up_nbclient(parts):
    assert not any(isinstance(child, ipywidgets.Output) for child in budget_slider(*parts).children)


def test_nothing_is_redrawn_while_the_slider_is_dragged(parts):
    assert budget_slider(*parts).budget.continuous_update is False


def test_a_missing_plan_or_column_is_named(parts):
    groups, plans, table = parts
    with pytest.raises(pl.PruneLabError, match="params_kept"):
        budget_slider(groups, plans, table.drop(columns="params_kept"))
    plans.pop(("random", 0.5))
    with pytest.raises(pl.PruneLabError, match=r"\('random', 0.5\)"):
        budget_slider(groups, plans, table)

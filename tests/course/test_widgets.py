"""The budget slider redraws its figure and says in words what it shows; no kernel is needed to test it."""

from __future__ import annotations

import asyncio
import gc
import time

import ipywidgets
import pandas as pd
import pytest

import prunelab as pl
from prunelab.course.figures import picture
from prunelab.course.widgets import LONG_PAUSE, PAUSE, budget_slider, explore
from prunelab.errors import PruneLabError


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
    slider.controls["budget"].value = 0.75
    assert "6 of 8 units" in slider.caption.value
    assert bytes(slider.image.value) != image


def test_another_criterion_shows_its_own_accuracy(parts):
    slider = budget_slider(*parts)
    slider.controls["criterion"].value = "random"
    assert "<b>random</b>" in slider.caption.value
    assert "25.0%" in slider.caption.value


def test_the_caption_is_published_after_the_figure(parts):
    slider = budget_slider(*parts)
    order: list[str] = []
    slider.image.observe(lambda _: order.append("image"), names="value")
    slider.caption.observe(lambda _: order.append("caption"), names="value")
    slider.controls["budget"].value = 0.75
    assert order == ["image", "caption"]


def test_no_output_widget_holds_up_nbclient(parts):
    assert not any(isinstance(child, ipywidgets.Output) for child in budget_slider(*parts).children)


def test_nothing_is_redrawn_while_the_slider_is_dragged(parts):
    assert budget_slider(*parts).controls["budget"].continuous_update is False


def test_a_missing_plan_or_column_is_named(parts):
    groups, plans, table = parts
    with pytest.raises(pl.PruneLabError, match="params_kept"):
        budget_slider(groups, plans, table.drop(columns="params_kept"))
    plans.pop(("random", 0.5))
    with pytest.raises(pl.PruneLabError, match=r"\('random', 0.5\)"):
        budget_slider(groups, plans, table)


def test_choices_become_buttons_lists_and_sliders():
    widget = explore(
        lambda **state: (picture(), str(state)), few=["a", "b"], many=list("abcdef"), number=range(3), share=[0.1, 0.5]
    )
    kinds = [type(control).__name__ for control in widget.controls.values()]
    assert kinds == ["ToggleButtons", "Dropdown", "IntSlider", "SelectionSlider"]
    assert widget.caption.value == "{'few': 'a', 'many': 'a', 'number': 0, 'share': 0.1}"


@pytest.mark.parametrize("nothing", [[], range(0), "words", 3])
def test_a_control_without_choices_is_refused(nothing):
    with pytest.raises(PruneLabError, match="`rank`"):
        explore(lambda rank: (picture(), ""), rank=nothing)


def test_of_a_queue_of_moves_the_last_alone_is_drawn():
    drawn = []

    def draw(number: int):
        drawn.append(number)
        return picture(), f"number {number}"

    async def drag() -> str:
        for number in (1, 2, 3):
            widget.controls["number"].value = number
        busy = widget.caption.value
        await asyncio.sleep(3 * PAUSE)
        return busy

    widget = explore(draw, number=range(5))
    assert asyncio.run(drag()) == "drawing …"
    assert drawn == [0, 3]
    assert widget.caption.value == "number 3"


def test_a_move_that_was_made_while_a_figure_was_drawn_waits_longer_for_the_next():
    def draw(number: int):
        time.sleep(2 * PAUSE * (number > 0))
        drawn.append(number)
        return picture(), f"number {number}"

    async def drag() -> None:
        loop = asyncio.get_running_loop()
        widget.controls["number"].value = 1
        loop.call_later(1.5 * PAUSE, setattr, widget.controls["number"], "value", 2)  # comes up after the first figure
        await asyncio.sleep(4 * PAUSE)
        widget.controls["number"].value = 3
        await asyncio.sleep(LONG_PAUSE + 4 * PAUSE)

    drawn: list[int] = []
    widget = explore(draw, number=range(5))
    asyncio.run(drag())
    assert drawn == [0, 1, 3]


def test_a_state_that_cannot_be_drawn_says_why():
    async def move() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: raised.append(context["exception"]))
        widget.controls["number"].value = 2
        await asyncio.sleep(3 * PAUSE)

    raised: list[Exception] = []
    widget = explore(lambda number: (picture(), str(1 / (number - 2))), number=range(3))
    asyncio.run(move())
    assert widget.caption.value.startswith("Not drawn: ZeroDivisionError: ")
    assert [type(error) for error in raised] == [ZeroDivisionError]


def test_python_looks_for_garbage_after_the_figure_was_shown_and_not_while_it_is_drawn():
    def draw(number: int):
        looking.append(gc.isenabled())
        return picture(), f"number {number}"

    looking: list[bool] = []
    widget = explore(draw, number=range(3))
    widget.controls["number"].value = 2
    assert looking == [False, False]
    assert gc.isenabled()


def test_a_figure_that_fails_leaves_the_garbage_collector_as_it_was():
    with pytest.raises(ZeroDivisionError):
        explore(lambda number: (picture(), str(1 / number)), number=range(3))
    assert gc.isenabled()

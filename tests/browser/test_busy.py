"""What a widget does while it draws and when it fails, with a figure slow enough to see it; that errors are seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Page

from tests.browser.lab import listen
from tests.browser.reader import ANSWER, BUSY, Widget, run_all

SLOW = """
import time
from prunelab.course.figures import picture
from prunelab.course.widgets import explore

drawn = []

def draw(number):
    drawn.append(number)
    time.sleep(0.4)
    figure = picture(4, 2)
    figure.text(0.5, 0.5, f"{12 / (13 - number):.2f}", fontsize=30)
    return figure, f"number {number}, figure {len(drawn)}"

explore(draw, number=range(20))
"""
DRAWING = 0.4
MOVES = 12
HURRY = """async ([box, moves]) => {
    const handle = box.querySelector(".noUi-handle"), start = performance.now();
    for (let move = 0; move < moves; move++) {
        handle.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
        await new Promise((done) => setTimeout(done, 40));
    }
    box.seen.hurry = performance.now() - start;
    const last = () => box.querySelector(".prunelab-caption").textContent.includes(`number ${moves}`);
    while (!last()) await new Promise((done) => setTimeout(done, 40));
}"""
"""Press an arrow key so many times, faster than figures are drawn, and wait for the figure after the last."""
RUN = 120


def written(folder: Path, name: str, *sources: str) -> str:
    cells = [nbformat.v4.new_code_cell(source.strip(), id=f"cell-{place}") for place, source in enumerate(sources)]
    book = nbformat.v4.new_notebook(cells=cells)
    book.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(book, folder / "notebooks" / f"{name}.ipynb")
    return f"{name}.ipynb"


@pytest.fixture
def slow(page: Page, address: Callable[[str], str], folder: Path) -> Widget:
    name = written(folder, "slow", SLOW)
    assert run_all(page, address(name), seconds=RUN) == []
    widget = Widget(page, "cell-0")
    assert widget.caption == "number 0, figure 1"
    return widget


def test_of_many_quick_moves_only_the_last_is_drawn_after_the_one_under_way(slow: Widget):
    answer = slow.does("slider", lambda: slow.page.evaluate(HURRY, [slow.box.element_handle(), MOVES]))
    said = [text for _, text in slow.box.evaluate("(box) => box.seen.captions")]
    assert said[0] == BUSY
    assert answer.caption == f"number {MOVES}, figure {1 + answer.drawn}"
    took = slow.box.evaluate("(box) => box.seen.hurry") / 1000  # at least half a second, more on a busy machine
    assert answer.drawn <= min(took / DRAWING + 3, MOVES - 4), (
        f"{answer.drawn} figures for {MOVES} moves in {took:.1f} s"
    )


def test_a_state_that_cannot_be_drawn_says_why_and_the_next_one_is_drawn(slow: Widget):
    handle = slow.box.locator(".noUi-handle")
    for _ in range(13):
        handle.press("ArrowRight")
    slow.box.get_by_text("ZeroDivisionError").wait_for(timeout=1000 * ANSWER)
    answer = slow.does("slider", lambda: handle.press("ArrowRight"))
    assert answer.caption.startswith("number 14")


def test_errors_in_cells_and_in_the_console_are_seen(page: Page, address: Callable[[str], str], folder: Path):
    name = written(folder, "wrong", "import sys\nprint('careful', file=sys.stderr)", "1 / 0", "2")
    found = run_all(page, address(name), seconds=RUN)
    assert [problem.partition(":")[0] for problem in found] == [
        "cell `cell-0` wrote to stderr",
        "cell `cell-1`",
        "cell `cell-2` was not run",
    ]
    other = page.context.new_page()
    heard = listen(other)
    other.evaluate("console.error('something broke')")
    other.evaluate("setTimeout(() => { throw new Error('thrown') })")
    other.wait_for_timeout(100)
    assert [line.partition(":")[0] for line in heard] == ["console", "page"]

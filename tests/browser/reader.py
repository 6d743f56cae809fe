"""What a reader does with an open notebook: runs it, moves a widget's controls, and waits for the answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import FloatRect, Locator, Page

from tests.browser.lab import START

BUSY = "drawing …"
ANSWER = 20
"""Seconds after which a widget counts as dead; how quick it should be is another matter."""
# A session may be ready while its kernel is still being connected; what is run then is dropped without a word.
READY = """(name) => {
    const widget = window.jupyterapp?.shell.currentWidget, session = widget?.sessionContext;
    const kernel = session?.session?.kernel;
    return widget?.context?.path === name && widget.context.isReady && session?.isReady
        && kernel?.connectionStatus === "connected" && kernel.status === "idle";
}"""
RUN = """() => {
    window.ran = false;
    window.jupyterapp.commands.execute("notebook:run-all-cells").finally(() => { window.ran = true; });
}"""
OUTPUTS = """() => window.jupyterapp.shell.currentWidget.content.widgets
    .filter((cell) => cell.model.type === "code")
    .map((cell) => [cell.model.sharedModel.getId(), cell.model.executionCount, cell.model.outputs.toJSON()])"""
REVEAL = """(id) => {
    const content = window.jupyterapp.shell.currentWidget.content;
    const place = content.widgets.findIndex((cell) => cell.model.sharedModel.getId() === id);
    content.activeCellIndex = place;
    return content.scrollToItem(place, "start");
}"""
# What happens to a widget, by the browser's own clock: when the reader did something, what the caption said, and when
# an image was on the screen.
WATCH = """(box) => {
    const caption = box.querySelector(".prunelab-caption"), image = box.querySelector("img");
    const seen = { input: 0, captions: [], images: [] };
    for (const kind of ["pointerup", "click", "change", "keydown"])
        box.addEventListener(kind, (event) => { seen.input = event.timeStamp; }, true);
    new MutationObserver(() => {
        const text = caption.textContent.trim();
        if (text && text !== seen.captions.at(-1)?.[1]) seen.captions.push([performance.now(), text]);
    }).observe(caption, { childList: true, subtree: true, characterData: true });
    image.addEventListener("load", () => seen.images.push(performance.now()));
    box.seen = seen;
}"""
DIGEST = """async (box) => {
    const data = await (await fetch(box.querySelector("img").src)).arrayBuffer();
    const digest = await crypto.subtle.digest("SHA-256", data);
    return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}"""
KINDS = {
    "widget-slider": "slider",
    "widget-dropdown": "list",
    "widget-toggle-buttons": "buttons",
    "widget-vbox": "grid",
}


@dataclass
class Answer:
    """What a widget did after a move.

    Attributes:
        control: what was moved: its kind and its label.
        caption: the words under the image; `before` those that were there.
        image: digest of its bytes; `image_before` that of the image before.
        seconds: from the reader's last input to the new caption and the new image, whichever came later.
        drawn: how many images were sent.
    """

    control: str
    before: str
    caption: str
    image_before: str
    image: str
    seconds: float
    drawn: int


def run_all(page: Page, address: str, *, seconds: float) -> list[str]:
    """Open a notebook, run all its cells as the menu does, and return what cells wrote to stderr or failed with."""
    page.goto(address)
    page.wait_for_function(READY, arg=Path(urlsplit(address).path).name, timeout=1000 * START)
    page.evaluate(RUN)
    page.wait_for_function("() => window.ran", timeout=1000 * seconds)
    problems = []
    for name, count, outputs in page.evaluate(OUTPUTS):
        if count is None:
            problems.append(f"cell `{name}` was not run")
        for output in outputs:
            if output["output_type"] == "error":
                problems.append(f"cell `{name}`: {output['ename']}: {output['evalue']}")
            if output.get("name") == "stderr":
                problems.append(f"cell `{name}` wrote to stderr: {output['text']}")
    return problems


class Widget:
    """An explorer on the page, with its controls."""

    def __init__(self, page: Page, cell: str = "widget") -> None:
        page.evaluate(REVEAL, cell)
        self.page = page
        self.box = page.locator(".prunelab-explorer")
        self.box.locator("img").wait_for(timeout=1000 * ANSWER)
        self.box.scroll_into_view_if_needed()
        self.box.evaluate(WATCH)

    @property
    def caption(self) -> str:
        """The words under the image."""
        return self.box.locator(".prunelab-caption").inner_text().strip()

    def controls(self) -> Iterator[tuple[str, Locator]]:
        """Yield the kind and the place of every control, from top to bottom."""
        for control in self.box.locator(":scope > *").all():
            classes = (control.get_attribute("class") or "").split()
            for known in KINDS.keys() & set(classes):
                yield KINDS[known], control

    def does(self, name: str, move: Callable[[], None]) -> Answer:
        """Make a move, wait until the widget has answered, and return its answer."""
        before, image = self.caption, self.box.evaluate(DIGEST)
        self.box.evaluate("(box) => { box.seen.captions = []; box.seen.images = []; }")
        move()
        self.page.wait_for_function(
            "([box, busy]) => box.seen.images.length && box.seen.captions.length"
            " && box.seen.captions.at(-1)[1] !== busy && box.querySelector('img').complete",
            arg=[self.box.element_handle(), BUSY],
            timeout=1000 * ANSWER,
        )
        seen = self.box.evaluate("(box) => box.seen")
        seconds = (max(seen["captions"][-1][0], seen["images"][-1]) - seen["input"]) / 1000
        return Answer(name, before, self.caption, image, self.box.evaluate(DIGEST), seconds, len(seen["images"]))


def label(kind: str, control: Locator) -> str:
    """Return what a control is called in the table: its kind and its own label, if it has one."""
    words = control.locator(".widget-label").first if kind != "grid" else None
    return f"{kind} {words.inner_text().strip()}" if words is not None else kind


def moves(kind: str, control: Locator) -> Iterator[Callable[[], None]]:
    """Yield a few moves that a reader would make with a control; each changes its value."""
    if kind == "slider":
        near, far, back = (0, 1, "ArrowRight") if place_of(control) < 0.5 else (1, 0, "ArrowLeft")
        yield lambda: drag(control, far)
        yield lambda: drag(control, near)
        yield lambda: control.locator(".noUi-handle").press(back)
    elif kind == "list":
        choices = control.locator("option").count()
        start = int(control.locator("select").evaluate("(list) => list.selectedIndex"))
        for place in [n for n in (choices - 1, 0, choices // 2) if n != start]:
            yield lambda place=place: control.locator("select").select_option(index=place)
    elif kind == "buttons":
        for button in reversed(control.locator("button").all()):
            if not re.search(r"\bmod-active\b", button.get_attribute("class") or ""):
                yield button.click
    elif kind == "grid":
        buttons = control.locator("button.widget-toggle-button")
        for place in (0, buttons.count() - 1, buttons.count() // 2, 0):
            yield buttons.nth(place).click


def boxes_of(slider: Locator) -> tuple[FloatRect, FloatRect]:
    """Return where a slider's handle is, and its rail."""
    handle, rail = slider.locator(".noUi-handle").bounding_box(), slider.locator(".noUi-target").bounding_box()
    assert handle and rail
    return handle, rail


def place_of(slider: Locator) -> float:
    """Return the share of its way at which a slider stands."""
    handle, rail = boxes_of(slider)
    return (handle["x"] + handle["width"] / 2 - rail["x"]) / rail["width"]


def drag(slider: Locator, share: float) -> None:
    """Drag the handle of a slider with the mouse to a share of its way, with stops in between."""
    page = slider.page
    handle, rail = boxes_of(slider)
    y = handle["y"] + handle["height"] / 2
    page.mouse.move(handle["x"] + handle["width"] / 2, y)
    page.mouse.down()
    page.mouse.move(rail["x"] + share * rail["width"], y, steps=8)
    page.mouse.up()

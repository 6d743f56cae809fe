"""Widgets: figures that a reader can move, for a notebook with a running kernel.

Flows in: a function from the state of some controls to a figure and a caption.  Flows out: an ipywidgets box that
redraws the figure when a control moves.  What is slow is computed before; a move answers at once.  The only module that
imports ipywidgets, which ``prunelab[notebooks]`` installs.

Figures are shown in an ``Image``, which changes in one piece, and not in an ``Output``: while nbclient (and with it
papermill and nbconvert) executes a cell that writes to an ``Output``, it misses the kernel's reply now and then, and
waits for it until the cell's time is up.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import html
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ipywidgets
import pandas as pd
import traitlets
from matplotlib.figure import Figure

from prunelab.course.figures.units import budget_view
from prunelab.drawing.style import png
from prunelab.errors import PruneLabError
from prunelab.plans import Plan
from prunelab.runtime.switches import uncollected
from prunelab.tracing.groups import Group

COLUMNS = ("criterion", "budget", "flops_kept", "params_kept", "accuracy")
BUTTONS = 4
"""Up to so many choices are buttons side by side; more are a list that drops down."""
PAUSE, LONG_PAUSE = 0.03, 0.15
"""Seconds for which a move waits for the next one, so that a queue of moves draws the last alone; the longer pause is
for a move that was made while a figure was being drawn, as then the reader is ahead of us and more are on their way."""

Choices = Sequence[Any] | Mapping[str, Any]


class Explorer(ipywidgets.VBox):
    """Controls above a figure, which follows them, and a caption in words below.

    Attributes:
        controls: the controls by name.
        image: the figure, as PNG.
        caption: what the figure shows; it says "drawing …" while a move waits, and is set after the figure was drawn.
    """

    def __init__(self, draw: Callable[..., tuple[Figure, str]], controls: Mapping[str, ipywidgets.Widget]) -> None:
        self._draw = draw
        self._waiting: asyncio.TimerHandle | None = None
        self._drawn = 0.0
        self.controls = dict(controls)
        as_it_is = ipywidgets.Layout(max_width="100%", align_self="flex-start", object_fit="contain")
        self.image = ipywidgets.Image(format="png", layout=as_it_is)  # never larger than it was drawn
        self.caption = ipywidgets.HTML()
        self.caption.add_class("prunelab-caption")
        _line_up(list(self.controls.values()))
        for control in self.controls.values():
            control.observe(self._moved, names="value")
        super().__init__([*self.controls.values(), self.image, self.caption])
        self.add_class("prunelab-explorer")
        self.redraw()

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """Show the widget, and beside it a picture of how it is now, for pages that have no kernel."""
        picture = base64.b64encode(png(self._figure)).decode("ascii")
        return {**(super()._repr_mimebundle_(**kwargs) or {}), "image/png": picture}

    def redraw(self) -> None:
        """Draw the figure for the current controls, then publish the caption."""
        self._waiting = None
        with collection_put_off():
            self._answer()

    def _follow(self) -> None:
        try:
            self.redraw()
            self._drawn = asyncio.get_running_loop().time()
        except Exception as error:  # else the caption would say for ever that it is drawing; the log has it all
            self.caption.value = f"Not drawn: {html.escape(f'{type(error).__name__}: {error}')}"
            raise

    def _answer(self) -> None:
        self._figure, caption = self._draw(**{name: control.value for name, control in self.controls.items()})
        self.image.value = png(self._figure, quick=True)
        self.caption.value = caption

    def _moved(self, change: object = None) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no kernel, as in tests
            return self.redraw()
        self.caption.value = "drawing …"
        if self._waiting is not None:
            self._waiting.cancel()
        behind = loop.time() - self._drawn < PAUSE  # nobody answers a figure that quickly: it waited in the queue
        self._waiting = loop.call_later(LONG_PAUSE if behind else PAUSE, self._follow)
        return None


@contextmanager
def collection_put_off() -> Iterator[None]:
    """Let Python look for garbage afterwards, and only among what was made meanwhile.

    Figures are garbage of the kind that it has to look for.  Every now and then one would set off a search through
    everything, which takes a third of a second once torch is loaded.
    """
    try:
        with uncollected:
            yield
    finally:
        if gc.isenabled():
            gc.collect(0)


class ToggleGrid(ipywidgets.VBox):
    """Buttons in rows and columns, each on or off: a control for ``explore`` whose value is those that are on.

    Attributes:
        value: pairs ``(row, column)`` of the buttons that are pressed, sorted; it may be set.

    >>> grid = ToggleGrid(2, 3, row="block", column="head")
    >>> grid.buttons[1, 2].value = True
    >>> grid.value
    ((1, 2),)
    """

    value = traitlets.Tuple()

    def __init__(self, rows: int, columns: int, *, row: str = "row", column: str = "column") -> None:
        wide = ipywidgets.Layout(width="6.5em")
        self.buttons = {
            place: ipywidgets.ToggleButton(description=f"{column} {place[1]}", layout=wide)
            for place in ((r, c) for r in range(rows) for c in range(columns))
        }
        for button in self.buttons.values():
            button.observe(self._pressed, names="value")
        lines = [
            ipywidgets.HBox(
                [ipywidgets.Label(f"{row} {r}", layout=wide), *(self.buttons[r, c] for c in range(columns))]
            )
            for r in range(rows)
        ]
        super().__init__(lines)

    def _pressed(self, change: object = None) -> None:
        self.value = tuple(place for place, button in self.buttons.items() if button.value)

    @traitlets.validate("value")
    def _known(self, proposal: Any) -> tuple[tuple[int, int], ...]:
        chosen = tuple(sorted(tuple(place) for place in proposal["value"]))
        if not set(chosen) <= self.buttons.keys():
            raise PruneLabError(f"The grid has no buttons at {sorted(set(chosen) - self.buttons.keys())}.")
        return chosen

    @traitlets.observe("value")
    def _show(self, change: Any) -> None:
        for place, button in self.buttons.items():
            button.unobserve(self._pressed, names="value")
            button.value = place in self.value
            button.observe(self._pressed, names="value")


def explore(draw: Callable[..., tuple[Figure, str]], **controls: Choices | ipywidgets.Widget) -> Explorer:
    """Return a widget that shows what ``draw`` makes of its controls.

    Args:
        draw: called with one keyword argument per control; returns the figure and what it shows, in words (HTML).
        **controls: by the name of ``draw``'s argument: a ``range`` of whole numbers for a slider, a list of values or a
            dict from labels to values to choose from (buttons up to four, else a list), or a widget with a ``value``.

    Raises:
        PruneLabError: a control is not one of these, or has nothing to choose from.

    >>> from prunelab.course.figures import picture
    >>> widget = explore(lambda bits: (picture(), f"{2**bits} levels"), bits=range(1, 9))
    >>> widget.controls["bits"].value = 3
    >>> widget.caption.value
    '8 levels'
    """
    return Explorer(draw, {name: _control(name, given) for name, given in controls.items()})


def _control(name: str, given: Any) -> ipywidgets.Widget:
    label = {"description": name.replace("_", " ")}
    if isinstance(given, ipywidgets.Widget):
        return given
    if isinstance(given, range) and len(given):
        low, high = given[0], given[-1]
        return ipywidgets.IntSlider(low, low, high, given.step, continuous_update=False, **label)
    if isinstance(given, Mapping):
        given = list(given.items())
    if not isinstance(given, Sequence) or isinstance(given, str) or not len(given):
        raise PruneLabError(
            f"The control `{name}` is {given!r}; give a range, a list or a dict of choices, or a widget with a value."
        )
    if all(isinstance(choice, (int, float)) and not isinstance(choice, bool) for choice in given):
        return ipywidgets.SelectionSlider(
            options=[(f"{choice:g}", choice) for choice in given], continuous_update=False, **label
        )
    kind = ipywidgets.ToggleButtons if len(given) <= BUTTONS else ipywidgets.Dropdown
    return kind(options=list(given), **label)


def _line_up(controls: Iterable[ipywidgets.Widget]) -> None:
    """Give labels one width, buttons and lists room for their words, and buttons a place beside their label."""
    labelled = [control for control in controls if getattr(control, "description", "")]
    longest = max((len(control.description) for control in labelled), default=0)
    for control in labelled:
        if not getattr(control.style, "description_width", "kept"):
            control.style.description_width = f"{0.6 * longest + 0.8:.1f}em"
        if isinstance(control, ipywidgets.ToggleButtons):
            control.style.button_width, control.layout.width = "auto", "auto"
            control.add_class("widget-inline-hbox")
        if isinstance(control, ipywidgets.Dropdown) and control.layout.width is None:
            control.layout = ipywidgets.Layout(
                width="auto", min_width="300px", max_width="100%", align_self="flex-start"
            )


def budget_slider(
    groups: Iterable[Group],
    plans: Mapping[tuple[str, float], Plan],
    table: pd.DataFrame,
    *,
    whole: float | None = None,
) -> Explorer:
    """Return a widget that shows plans by budget and criterion, with accuracies that were measured before.

    Args:
        groups: of the graph that the plans were made for.
        plans: one for every criterion and budget in ``table``.
        table: columns ``criterion``, ``budget`` (share of FLOPs asked for), ``flops_kept``, ``params_kept`` and
            ``accuracy`` (shares); several rows for one criterion and budget are averaged.
        whole: accuracy of the network before any cut.

    Raises:
        PruneLabError: a column or a plan is missing.
    """
    missing = [name for name in COLUMNS if name not in table]
    if missing or table.empty:
        what = f"lacks the columns {', '.join(missing)}" if missing else "is empty"
        raise PruneLabError(f"The table for the budget slider {what}; it needs {', '.join(COLUMNS)}.")
    for criterion, budget in table[["criterion", "budget"]].itertuples(index=False):
        if (criterion, budget) not in plans:
            raise PruneLabError(f"The budget slider has no plan for ({criterion!r}, {budget}), which its table names.")
    groups, units = list(groups), sum(group.size for group in groups)

    def draw(budget: float, criterion: str) -> tuple[Figure, str]:
        rows = table[(table["criterion"] == criterion) & (table["budget"] == budget)]
        flops, params, accuracy = (float(rows[name].mean()) for name in ("flops_kept", "params_kept", "accuracy"))
        plan = plans[criterion, budget]
        left = units - sum(len(removed) for removed in plan.removed.values())
        repeats = f" (means of {len(rows)} draws; the bars show the first)" if len(rows) > 1 else ""
        caption = (
            f"<b>{criterion}</b>, asked for {budget:.0%} of the FLOPs: {left} of {units} units stay, "
            f"with {flops:.1%} of the FLOPs and {params:.1%} of the parameters; "
            f"accuracy without fine-tuning {accuracy:.1%}{repeats}."
        )
        return budget_view(plan, groups, table, whole=whole, mark=(flops, accuracy)), caption

    budgets = sorted(set(table["budget"]))
    names = list(dict.fromkeys(table["criterion"]))
    slider = ipywidgets.SelectionSlider(
        options=[(f"{budget:.0%}", budget) for budget in budgets],
        value=min(budgets, key=lambda budget: abs(budget - 0.5)),
        description="FLOPs kept",
        continuous_update=False,
        layout=ipywidgets.Layout(width="26em"),
    )
    buttons = ipywidgets.ToggleButtons(options=names, value=names[-1], description="criterion")
    return explore(draw, budget=slider, criterion=buttons)


__all__ = ["Explorer", "ToggleGrid", "budget_slider", "explore"]

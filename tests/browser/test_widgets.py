"""Every widget of the course in a real browser: a reader runs the notebook, moves the controls, and sees an answer.

The copy that is opened has the text and the cells that the widget needs; ``make notebooks`` runs all of them, and
the first notebook is run to its end here too.
Parameters are smaller where the notebook has some that cost time and leave the widget as it is.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import nbformat
import pytest
from PIL import Image
from playwright.sync_api import Page

import prunelab as pl
from prunelab.experiments.sweeping.explore import EXAMPLE
from tests.browser.lab import copy
from tests.browser.needed import keep_needed
from tests.browser.reader import Answer, Widget, label, moves, run_all

RUN = 600
"""Seconds for a notebook."""
LARGEST = 150_000
"""Bytes of a screenshot."""


@dataclass
class Case:
    """A notebook, the kinds of its widget's controls from top to bottom, and parameters for a quicker run."""

    notebook: str
    controls: tuple[str, ...]
    parameters: dict[str, Any] = field(default_factory=dict)


COURSE = [
    Case("00_tour", ("slider", "buttons")),
    Case("01_tracing", ("list", "slider")),
    Case("02_magnitude", ("buttons", "list", "list"), {"test_images": 100}),
    Case("03_taylor", ("buttons", "list"), {"images": 50, "units": 2, "test_images": 100}),
    Case(
        "04_obd", ("slider", "slider"), {"layer_images": 200, "curvature_images": 50, "probes": 4, "test_images": 100}
    ),
    Case("05_obs", ("list",)),
    Case("06_obd_or_obs", ("slider", "buttons")),
    Case("07_kfac", ("buttons", "slider")),
    Case("08_eigendamage", ("buttons", "slider"), {"samples": 128, "curve_images": 100, "repeats": 2}),
    Case("09_oba", ("list", "buttons"), {"samples": 16, "epochs": 1}),
    Case("10_oracle", ("buttons", "buttons"), {"images": 16, "test_images": 100}),
    Case("11_compensation", ("slider", "slider"), {"images": 64, "test_images": 100}),
    Case("12_iterative", ("slider", "buttons"), {"scoring_images": 50, "finetune_images": 300, "test_images": 100}),
    Case("13_transformers", ("grid",), {"images": 64, "test_images": 100}),
    Case("14_unstructured", ("slider", "buttons"), {"scoring_images": 50, "test_images": 100}),
    Case("15_shootout", ("buttons", "buttons", "list"), {"epochs": 0.1, "test_images": 200, "scoring": 100}),
]

WHOLE = "00_tour"
"""The notebook that readers open first is run to its end."""


@pytest.mark.parametrize("case", COURSE, ids=lambda case: case.notebook)
def test_a_reader_moves_every_control(
    case: Case, page: Page, address: Callable[[str], str], folder: Path, request, record_property
):
    if case.notebook == "15_shootout" and not (pl.data.root() / EXAMPLE).is_file():
        pytest.skip("no sweep comes with prunelab yet, and a single run leaves nothing to choose")
    path = copy(case.notebook, folder / "notebooks", case.parameters)
    if case.notebook != WHOLE:
        book = nbformat.read(path, as_version=4)
        keep_needed(book, "widget")
        nbformat.write(book, path)
    problems = run_all(page, address(path.name), seconds=RUN)
    assert not problems, "\n".join(problems)
    widget = Widget(page)
    if pictures := request.config.getoption("--screenshots"):
        keep(widget.box.screenshot(), pictures / f"{case.notebook}.png")
    controls = list(widget.controls())
    assert tuple(kind for kind, _ in controls) == case.controls
    answers: dict[str, list[Answer]] = {}
    for kind, control in controls:
        name = label(kind, control)
        answers[name] = [widget.does(name, move) for move in moves(kind, control)]
    rows = [(case.notebook, name, [1000 * answer.seconds for answer in found]) for name, found in answers.items()]
    record_property("answers", rows)
    for answer in (answer for found in answers.values() for answer in found):
        assert answer.caption != answer.before, f"{answer.control}: the caption stayed “{answer.caption}”"
        assert answer.image != answer.image_before, f"{answer.control}: the image stayed as it was"
        assert answer.drawn == 1, f"{answer.control}: {answer.drawn} images were drawn for one move"
    # The aim on two free cores is 0.3 s; the limit is for a machine that does other things too.
    slowest = request.config.getoption("--slowest")
    for name, found in answers.items():
        seconds = median(answer.seconds for answer in found)
        assert seconds < slowest, f"{name} answered after {seconds:.2f} s"


def keep(picture: bytes, path: Path) -> None:
    """Write a screenshot; with 256 colours alone, where all of them take too many bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.save(path, optimize=True)
    if path.stat().st_size > LARGEST:
        image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size <= LARGEST, f"{path.name} has {path.stat().st_size:,} bytes"

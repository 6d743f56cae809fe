"""A server, a browser and a page for the browser tests, and the table of how quickly widgets answer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.lab import FLAGS, chromium, lab, listen

HELP = (
    "There is no chromium for the browser tests. Install it (on Debian and Ubuntu: apt-get install chromium), or set "
    "PRUNELAB_CHROMIUM to the path of a Chrome or Chromium."
)
SIZE = {"width": 1300, "height": 1900}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", type=Path, help="folder for a picture of every widget")
    parser.addoption("--slowest", type=float, default=1.0, help="seconds that a widget may take; 1.0 by default")


def pytest_configure(config: pytest.Config) -> None:
    path = chromium()
    if path is None or not os.access(path, os.X_OK):
        raise pytest.UsageError(HELP if path is None else f"PRUNELAB_CHROMIUM={path} cannot be run. {HELP}")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server keeps its files; it serves the notebooks in ``notebooks``."""
    place = tmp_path_factory.mktemp("lab")
    (place / "notebooks").mkdir()
    return place


@pytest.fixture(scope="session")
def address(folder: Path) -> Iterator[Callable[[str], str]]:
    """What makes an address of a notebook's name, on a running JupyterLab."""
    with lab(folder) as place:
        yield place


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of its own; what went wrong on it, by the end of the test, makes the test fail."""
    context = browser.new_context(viewport=SIZE)
    opened = context.new_page()
    heard = listen(opened)
    yield opened
    opened.evaluate("0")  # by its answer everything that was said before has arrived
    during = list(heard)  # what JupyterLab says of a kernel that goes away is no fault of a notebook
    # the kernel goes with its notebook: the next test has the memory
    opened.evaluate("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.shutdown()")
    context.close()
    assert not during, "\n".join(during)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows = [
        row
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
        for name, values in report.user_properties
        if name == "answers"
        for row in values
    ]
    if rows:
        terminalreporter.section("from a move to the new figure, in milliseconds")
        for notebook, control, milliseconds in sorted(rows):
            terminalreporter.write_line(f"{notebook:20}{control:28}{' '.join(f'{ms:5.0f}' for ms in milliseconds)}")

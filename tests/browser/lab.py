"""JupyterLab as its reader has it: a server of its own, a real browser, and one widget of an open notebook.

The server has a folder of its own for everything it keeps, so that neither the user's settings nor the notebooks of
the repository change.  Everything the browser complains about is collected: what the console says, what the page
throws, and what it asks for in vain.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from playwright.sync_api import ConsoleMessage, Page

from prunelab.course.notebook.kernel import prepare_kernel

REPOSITORY = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"] + [
    f"--disable-{what}" for what in ("background-networking", "component-update")
]
START = 60
"""Seconds that the server may take to start, and a page to load: the machine may be busy."""
QUIET = """{"fetchNews": "false", "checkForUpdates": false}"""
"""Settings of JupyterLab's notifications: it asks a new user whether it may fetch news, in front of everything."""


def chromium() -> str | None:
    """Return the path of a chromium: that of ``PRUNELAB_CHROMIUM``, or one that is installed."""
    named = os.environ.get("PRUNELAB_CHROMIUM")
    return named if named else next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def lab(folder: Path, **settings: Mapping[str, Any]) -> Iterator[Callable[[str], str]]:
    """Start JupyterLab and yield what makes an address of a notebook's name; stop it and its kernels afterwards.

    Every notebook has a workspace of its own: JupyterLab opens again what was open in the same one before.

    Args:
        folder: for the server's own files, and with the notebooks in ``notebooks``.
        **settings: of extensions of JupyterLab, by the name of the extension's plugin in ``apputils-extension``.
    """
    prepare_kernel()
    places = {f"JUPYTER_{name}_DIR": folder / name.lower() for name in ("CONFIG", "DATA", "RUNTIME")}
    places["IPYTHONDIR"] = folder / "ipython"
    own = places["JUPYTER_CONFIG_DIR"] / "lab/user-settings/@jupyterlab/apputils-extension"
    for place in (own, *places.values()):
        place.mkdir(parents=True, exist_ok=True)
    for name, values in {"notification": json.loads(QUIET), **settings}.items():
        (own / f"{name}.jupyterlab-settings").write_text(json.dumps(values))
    token = secrets.token_hex(16)
    options = {
        "ServerApp.root_dir": folder / "notebooks",
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": 0,  # any that is free
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "IdentityProvider.token": token,
        "LabApp.expose_app_in_browser": True,
    }
    command = [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())]
    environment = os.environ | {name: str(place) for name, place in places.items()}
    with (folder / "server.log").open("w+") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            home = _address(server, folder)
            yield lambda name: f"{home}lab/workspaces/{Path(name).stem}/tree/{name}?token={token}"
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def _address(server: subprocess.Popen, folder: Path) -> str:
    """Wait for the file in which a server that listens says where."""
    note = folder / "runtime" / f"jpserver-{server.pid}.json"
    until = time.monotonic() + START
    while time.monotonic() < until and server.poll() is None:
        if note.is_file() and (text := note.read_text()):
            return json.loads(text)["url"]
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{(folder / 'server.log').read_text()[-2000:]}")


def copy(name: str, folder: Path, parameters: Mapping[str, Any]) -> Path:
    """Copy a notebook without its outputs, with other parameters in a cell after its own, as papermill does."""
    book = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    if parameters:
        place = next(n for n, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", ()))
        assert not (strange := [key for key in parameters if f"\n{key}: " not in f"\n{book.cells[place].source}"]), (
            strange
        )
        lines = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
        book.cells.insert(place + 1, nbformat.v4.new_code_cell(lines, id="injected"))
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def listen(page: Page) -> list[str]:
    """Return a list that will hold everything that goes wrong on the page."""
    heard: list[str] = []

    def console(message: ConsoleMessage) -> None:
        if message.type == "error":
            heard.append(f"console: {message.text} ({message.location.get('url', '')})")

    page.on("console", console)
    page.on("pageerror", lambda error: heard.append(f"page: {error}"))
    return heard

"""A notebook on Colab: its setup cell adds what is missing, and PyTorch stays as it is.

The quick tests run the cell in a Python that has nothing but stand-ins, with a pip that only writes down what it is
asked.  The slow ones run whole notebooks from an empty folder, in an environment like Colab's that `make test-matrix`
builds and names in ``PRUNELAB_COLAB``: an older PyTorch and ipywidgets, a real wheel of prunelab and the real pip.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
CELLS = {cell.id: cell.source for cell in nbformat.read(ROOT / "notebooks" / "00_tour.ipynb", as_version=4).cells}
SETUP = CELLS["setup"]
OF_TORCHVISION = {"torch", "torchvision", "numpy", "pillow"}
"""What is there where torchvision is, and must not be replaced."""
PIP = """
import json, os, sys
with open(os.environ["ASKED"], "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
home = os.path.dirname(os.path.dirname(__file__))
for name in sys.argv[3:]:
    if not name.startswith("-"):
        open(os.path.join(home, "prunelab.py" if "prunelab" in name else name + ".py"), "w").close()
"""
COLAB = "import os\ndef enable_custom_widget_manager():\n    open(os.environ['ASKED'] + '.widgets', 'w').close()\n"


def names_in_setup() -> set[str]:
    """Return the names that the cell looks for, the longest tuple of texts in it."""
    tuples = [ast.literal_eval(node) for node in ast.walk(ast.parse(SETUP)) if is_names(node)]
    return set(max(tuples, key=len))


def is_names(node: ast.AST) -> bool:
    return isinstance(node, ast.Tuple) and all(isinstance(one, ast.Constant) for one in node.elts)


def write_colab(folder: Path) -> None:
    """Make a ``google.colab`` whose ``output`` notes that widgets were asked for."""
    (folder / "google" / "colab").mkdir(parents=True)
    (folder / "google" / "__init__.py").touch()
    (folder / "google" / "colab" / "__init__.py").touch()
    (folder / "google" / "colab" / "output.py").write_text(COLAB)


class Machine:
    """A Python without site-packages: stand-ins for what is installed, and a pip that writes down what it is asked."""

    def __init__(self, home: Path) -> None:
        self.site, self.asked = home / "site", home / "asked"
        self.folder = home / "content"
        self.folder.mkdir()
        (self.site / "pip").mkdir(parents=True)
        (self.site / "pip" / "__init__.py").touch()
        (self.site / "pip" / "__main__.py").write_text(PIP)

    def has(self, *names: str) -> None:
        for name in names:
            (self.site / f"{name}.py").touch()

    def setup(self, *, repository: str = "", colab: bool = True, source: str = "") -> subprocess.CompletedProcess[str]:
        """Run the cell as a kernel on Colab would, with ``google.colab`` imported already."""
        if colab and not (self.site / "google").exists():
            write_colab(self.site)
        code = SETUP.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")
        code = ("import google.colab\n" if colab else "") + code
        places = {"PYTHONPATH": str(self.site), "ASKED": str(self.asked), "PRUNELAB_SOURCE": source}
        command = [sys.executable, "-S", "-B", "-c", code]
        environment = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ} | places
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)

    @property
    def pip(self) -> list[list[str]]:
        """What pip was asked, call by call, without what stands in every call."""
        calls = [json.loads(line) for line in self.asked.read_text().splitlines()] if self.asked.exists() else []
        assert all(call[:2] == ["install", "--quiet"] for call in calls)
        return [call[2:] for call in calls]

    @property
    def widgets(self) -> bool:
        return self.asked.with_suffix(".widgets").exists()


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


NEEDED = sorted(names_in_setup())


def test_the_cell_looks_for_what_pyproject_asks_for():
    tomllib = pytest.importorskip("tomllib", reason="part of Python since 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in ("figures", "tables", "vision") for line in project["optional-dependencies"][extra]]
    needs = {Requirement(line).name for line in [*project["dependencies"], *extras]}
    assert set(NEEDED) == (needs - OF_TORCHVISION) | {"ipywidgets"}


def test_where_all_is_there_nothing_is_installed(machine):
    machine.has("prunelab", "torch", *NEEDED)
    done = machine.setup(colab=False)
    assert done.returncode == 0, done.stderr
    assert machine.pip == []
    assert not machine.widgets


def test_on_colab_prunelab_comes_alone_and_widgets_are_asked_for(machine):
    machine.has("torch", *NEEDED)
    done = machine.setup(repository="https://example.org/prunelab")
    assert done.returncode == 0, done.stderr
    assert machine.pip == [["--no-deps", "git+https://example.org/prunelab"]]
    assert machine.widgets


@pytest.mark.parametrize("gone", NEEDED)
def test_what_is_missing_is_installed_and_never_pytorch(machine, gone):
    machine.has("torch", *(name for name in NEEDED if name != gone))
    done = machine.setup(source="https://example.org/prunelab-0.1.0-py3-none-any.whl")
    assert done.returncode == 0, done.stderr
    assert machine.pip == [[gone], ["--no-deps", "https://example.org/prunelab-0.1.0-py3-none-any.whl"]]
    assert machine.setup().returncode == 0, "running the cell again"
    assert len(machine.pip) == 2, "asks for nothing more"


def test_without_an_address_it_says_where_to_write_one(machine):
    machine.has("torch", *NEEDED)
    done = machine.setup()
    assert done.returncode == 1
    assert "set REPOSITORY at the top of this cell" in done.stderr
    assert "Traceback" not in done.stderr
    assert machine.pip == []


def test_in_a_clone_the_clone_is_installed(machine):
    machine.has("torch", *NEEDED)
    (machine.folder / "prunelab").mkdir()
    (machine.folder / "prunelab" / "zoo.py").touch()
    clone, machine.folder = machine.folder, machine.folder / "notebooks"
    machine.folder.mkdir()
    # The stand-in for pip knows prunelab by its name, which a folder need not have: only what it is asked counts here.
    machine.setup(colab=False, repository="https://example.org/prunelab")
    assert machine.pip == [["--no-deps", str(clone.resolve())]]


# ── whole notebooks, in an environment that `make test-matrix` builds ─────────────────────────────────────────────

PYTHON = os.environ.get("PRUNELAB_COLAB", "")
slow = pytest.mark.skipif(not PYTHON, reason="needs the environment that `make test-matrix` builds")


def installed() -> dict[str, str]:
    command = [PYTHON, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {one["name"]: one["version"] for one in json.loads(listing)}


@pytest.fixture(scope="module")
def colab(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder on a machine like Colab, and the variables of its environment: a wheel of prunelab to install there."""
    home = tmp_path_factory.mktemp("colab")
    uv = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
    subprocess.run([uv, "build", "--quiet", "--wheel", "--out-dir", str(home), str(ROOT)], check=True)
    (wheel,) = home.glob("prunelab-*.whl")
    command = [PYTHON, "-m", "pip", "uninstall", "--quiet", "--yes", "prunelab", "safetensors"]
    subprocess.run(command, check=True)
    write_colab(home / "site")
    (home / "site" / "sitecustomize.py").write_text("import google.colab\n")
    places = {"PYTHONPATH": str(home / "site"), "ASKED": str(home / "asked"), "PRUNELAB_SOURCE": str(wheel)}
    unwanted = ("PRUNELAB_DATA", "VIRTUAL_ENV", "PYTHONHOME")
    return home, {name: value for name, value in os.environ.items() if name not in unwanted} | places


@slow
@pytest.mark.parametrize("name", ["00_tour", "04_obd", "13_transformers"])
def test_a_notebook_runs_from_an_empty_folder(name, colab):
    before, (home, variables) = installed(), colab
    folder = home / name
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", folder)
    command = [PYTHON, "-m", "papermill", "--no-progress-bar", "-k", "python3", f"{name}.ipynb", "done.ipynb"]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    now = installed()
    assert {package: now.get(package) for package in before} == before, "nothing was replaced"
    assert set(now) - set(before) <= {"prunelab", "safetensors"}
    assert {"prunelab", "safetensors"} <= set(now)
    assert (home / "asked.widgets").exists()
    book = nbformat.read(folder / "done.ipynb", as_version=4)
    views = [out for cell in book.cells for out in cell.get("outputs", ()) if "widget-view" in str(out.get("data", ""))]
    assert views, "its widget was made"
    assert {path.name for path in folder.iterdir()} == {"done.ipynb", f"{name}.ipynb"}, "nothing else was written"

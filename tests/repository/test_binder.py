"""Binder has what notebooks need and memory enough; where the repository is public stands in one place.

That Binder's versions are those of pyproject.toml is tested in ``test_repository.py``.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
GITHUB, ELSEWHERE = "https://github.com/someone/some.where", "https://git.example.org/group/prunelab"

MODULES = {"pillow": "PIL", "matplotlib-base": "matplotlib", "pytorch-cpu": "torch"}
LIMIT = 1500
"""Megabytes that a notebook may take on Binder, beside Jupyter's server, where the least that it gives is 2 GB."""

spec = importlib.util.spec_from_file_location("binder_address", ROOT / "binder" / "address.py")
address = importlib.util.module_from_spec(spec)
spec.loader.exec_module(address)


def setups(root: Path) -> set[str]:
    paths = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    books = [nbformat.read(path, as_version=4) for path in paths]
    return {
        re.search(r'^REPOSITORY = "(.*?)"', cell.source, re.M)[1]
        for b in books
        for cell in b.cells
        if cell.id == "setup"
    }


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def copy(tmp_path) -> Path:
    """The files that name the address, without one."""
    (tmp_path / "notebooks").mkdir()
    for name in (
        "pyproject.toml",
        "README.md",
        *(f"notebooks/{path.name}" for path in ROOT.glob("notebooks/0[0-2]_*")),
    ):
        shutil.copy(ROOT / name, tmp_path / name)
    address.publish("", tmp_path)
    return tmp_path


def test_badges_and_setup_cells_follow_from_pyproject():
    known = address.published()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = address.BADGES.search(readme)
    assert found, "README.md has lost the marks around the badges"
    assert found[0] == found[1] + address.badges(known) + found[2], "run `python binder/address.py ADDRESS`"
    assert setups(ROOT) == {known}


@pytest.mark.parametrize("where", [GITHUB, ELSEWHERE])
def test_an_address_is_written_everywhere_and_can_be_taken_back(copy, where):
    before = files(copy)
    address.publish(f"{where}.git", copy)
    assert address.published(copy) == where
    assert setups(copy) == {where}
    readme = (copy / "README.md").read_text(encoding="utf-8")
    assert address.binder(where) in readme
    assert ("colab.research" in readme) == (where == GITHUB)
    for path in (copy / "notebooks").glob("*.ipynb"):
        text = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.id == "setup-text")
        if "<!-- badges" in text:
            assert address.binder(where, f"notebooks/{path.name}") in text
            assert ("colab.research" in text) == (where == GITHUB)
    if sys.version_info >= (3, 11):
        import tomllib

        project = tomllib.loads((copy / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert project["urls"] == {"Repository": where}
        assert "notebooks" in project["optional-dependencies"]
    address.publish(where, copy)
    address.publish("", copy)
    assert files(copy) == before


def test_the_badges_open_the_tour_which_exists():
    assert address.binder(GITHUB) == (
        "https://mybinder.org/v2/gh/someone/some.where/HEAD?urlpath=lab/tree/notebooks/00_tour.ipynb"
    )
    assert "git/https%3A%2F%2Fgit.example.org%2Fgroup%2Fprunelab/HEAD?" in address.binder(ELSEWHERE)
    assert address.colab(GITHUB).endswith("/github/someone/some.where/blob/HEAD/notebooks/00_tour.ipynb")
    assert (ROOT / address.TOUR).is_file()


@pytest.mark.parametrize("wrong", ["prunelab", "git@github.com:someone/x", 'https://a.org/x"y', "https://a.org"])
def test_what_is_no_address_is_refused_and_nothing_is_written(copy, wrong):
    before = files(copy)
    with pytest.raises(SystemExit, match="is not the address of a repository"):
        address.publish(wrong, copy)
    assert files(copy) == before


# ── what runs there ───────────────────────────────────────────────────────────────────────────────────────────────


def test_notebooks_import_what_binder_installs():
    rows = re.findall(r"^  - ([a-z0-9-]+)", (ROOT / "binder" / "environment.yml").read_text(encoding="utf-8"), re.M)
    there = {MODULES.get(name, name) for name in rows} | set(sys.stdlib_module_names) | {"prunelab"}
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        nodes = [node for source in cells for node in ast.walk(ast.parse(source))]
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        assert {name.split(".")[0] for name in names} <= there, path.name


@pytest.mark.skipif(os.name == "nt", reason="a script for Linux")
def test_what_binder_starts_it_starts_with_memory_in_mind():
    assert all(os.access(ROOT / "binder" / name, os.X_OK) for name in ("start", "postBuild"))
    command = [str(ROOT / "binder" / "start"), sys.executable, "-c", "import os, sys; print(sys.argv[1:], *os.environ)"]
    done = subprocess.run([*command, "a b", "c"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("['a b', 'c'] ")
    assert "MALLOC_MMAP_THRESHOLD_" in done.stdout.split()


def test_every_notebook_was_measured_and_fits():
    rows = json.loads((ROOT / "docs" / "memory.json").read_text(encoding="utf-8"))["rows"]
    peaks = {row["notebook"]: row["peak"] for row in rows if row["torch"].endswith("+cpu")}
    names = {path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    assert set(peaks) == names, "run `binder/start python -m bench.memory` with PyTorch for the CPU"
    assert max(peaks.values()) < LIMIT
    from bench.memory import markdown

    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert page == markdown({"rows": rows})

"""The command behind `make test-matrix` tells what it did not find or run, and loses no failure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import matrix

ROOT = Path(__file__).resolve().parents[2]
NB = "notebooks/00_tour.ipynb"
REPORT = """<testsuites><testsuite>
<testcase file="tests/test_a.py" name="good"/>
<testcase file="tests/test_a.py" name="bad"><failure message="assert 1 == 2&#10;more"/></testcase>
<testcase file="tests/test_a.py" name="broken"><error message="no fixture"/></testcase>
<testcase file="tests/test_b.py" name="left"><skipped message="needs a GPU"/></testcase>
<testcase file="notebooks/00_tour.ipynb" name="Cell 0"/>
</testsuite></testsuites>"""


def test_a_report_is_read_by_file(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    files = matrix.read(tmp_path / "report.xml")
    failed = {"bad": "assert 1 == 2", "broken": "no fixture"}
    assert files["tests/test_a.py"] == {"passed": 1, "failed": failed, "skipped": {}}
    assert files["tests/test_b.py"] == {"passed": 0, "failed": {}, "skipped": {"needs a GPU": 1}}
    assert files[NB]["passed"] == 1


def test_the_page_has_every_environment_and_every_failure(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    have = {"python": "3.13.0", "torch": "9.9", "torchvision": "8.8", "files": matrix.read(tmp_path / "report.xml")}
    page = matrix.markdown({"3.13-newest": have, "3.10-oldest": {"missing": "no Python 3.10 was found"}})
    assert page.count("\n| 3.1") == len(matrix.ENVIRONMENTS)
    assert "| 3.13.0 | 9.9 | 8.8 | newest versions of everything | 2 files, 1 notebook | 2 | 1 | 2 |" in page
    assert "| 3.10 | – | – | lowest versions of everything | no Python 3.10 was found | – | – | – |" in page
    assert "- 3.13-newest: `tests/test_a.py::bad`: assert 1 == 2\n" in page
    assert "- 3.13-newest, skipped 1: needs a GPU\n" in page
    assert page.count("not run yet") == len(matrix.ENVIRONMENTS) - 2


def test_a_python_that_is_not_there_is_told(tmp_path, monkeypatch):
    if not matrix.UV.is_file():
        pytest.skip("without make, no uv")
    assert matrix.interpreter("3.99") is None
    odd = matrix.Environment("odd", "3.99", "nothing")
    monkeypatch.setattr(matrix, "HOME", tmp_path)
    assert matrix.build(odd) == (None, "no Python 3.99 was found")
    monkeypatch.setattr(matrix, "ENVIRONMENTS", (odd,))
    assert matrix.main(["--page", str(tmp_path / "page.md")]) == 0
    assert json.loads((tmp_path / "page.json").read_text()) == {"odd": {"missing": "no Python 3.99 was found"}}
    assert "no Python 3.99 was found" in (tmp_path / "page.md").read_text()


def test_a_run_that_dies_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "HOME", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    files = matrix.run(matrix.Environment("odd", "3.13", ""), Path(sys.executable), ["tests/test_a.py"], 1)
    assert list(files["tests/test_a.py"]["failed"]) == ["pytest"]


def test_the_committed_page_is_what_was_found():
    rows = json.loads((ROOT / "docs" / "matrix.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8") == matrix.markdown(rows)
    oldest = {f"{name}=={rows['3.10-oldest'][name].split('+')[0]}" for name in ("torch", "torchvision")}
    assert oldest == set(matrix.OLDEST)


def test_the_oldest_pair_is_the_lowest_that_pyproject_allows():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for pin in matrix.OLDEST:
        name, version = pin.split("==")
        assert f'"{name}>={version.removesuffix(".0")}"' in text

"""The repository keeps its promises: pins agree with bounds, pages with commands; files are free of machine paths."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib", reason="part of Python since 3.11")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PAGES = ("README.md", "CONTRIBUTING.md")
CONDA_NAMES = {"pytorch-cpu": "torch", "matplotlib-base": "matplotlib"}
# A folder of somebody's machine, at the beginning of a path.
MACHINE_PATH = re.compile(r"(?:(?<=file://)|(?<![\w.~$})/-]))/(?:root|home|Users|work|workspace|mnt|opt|tmp)/[\w.-]+")


def bounds(*extras: str) -> dict[str, SpecifierSet]:
    """Return what pyproject.toml asks for, with the named extras, and the extras that these name."""
    found = {}
    for line in [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]:
        need = Requirement(line)
        found |= bounds(*need.extras) if need.name == "prunelab" else {canonicalize_name(need.name): need.specifier}
    return found


def locked() -> list[Requirement]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [Requirement(text) for line in lines if (text := line.split("#")[0].strip())]


def repository_texts() -> dict[str, str]:
    """Return the text files that git tracks, or would if they were added."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("this is not a clone")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    texts = {}
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            content = (ROOT / name).read_bytes()
            if b"\0" not in content:
                texts[name] = content.decode("utf-8")
    return texts


def code_blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_the_lock_names_no_place_to_download_from():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*(-|.* @ )", text, flags=re.MULTILINE), "an option or a direct reference"
    assert not re.search(r"\b[\w-]+\.(org|com|net|io)\b", text), "a host name"


def test_every_direct_dependency_is_locked_within_its_bounds():
    pins = locked()
    for name, specifier in bounds("notebooks", "test").items():
        versions = [next(iter(pin.specifier)).version for pin in pins if canonicalize_name(pin.name) == name]
        assert versions, f"{name} is not in requirements.lock: run `make lock`"
        for version in versions:
            assert specifier.contains(version), f"{name} {version} is locked, but pyproject.toml asks for {specifier}"


def test_binder_installs_what_pyproject_asks_for():
    text = (ROOT / "binder" / "environment.yml").read_text(encoding="utf-8")
    rows = re.findall(r"^  - ([a-z0-9-]+)([<>=!]\S*)?$", text, flags=re.MULTILINE)
    conda = {CONDA_NAMES.get(name, name): version for name, version in rows}
    for name, specifier in bounds("notebooks").items():
        assert name in conda, f"binder/environment.yml lacks {name}"
        assert SpecifierSet(conda[name]) == specifier, f"{name}: Binder has {conda[name]}, pyproject.toml {specifier}"
    python = conda["python"].lstrip("=")
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)


def test_no_file_holds_a_path_of_the_machine_it_was_written_on():
    found = [f"{name}: {hit}" for name, text in repository_texts().items() for hit in MACHINE_PATH.findall(text)]
    assert not found


@pytest.mark.parametrize("page", PAGES)
def test_every_make_command_of_a_page_exists(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"\bmake ([a-z]+)", " ".join([*code_blocks(page, "sh"), *inline_code(page)]))
    assert named
    for target in named:
        assert re.search(rf"^{target}:.* ## ", makefile, flags=re.MULTILINE), f"{page} names `make {target}`"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_links_to_exists(page):
    links = re.findall(r"\]\((?!\w+:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    for link in links:
        assert (ROOT / link).exists(), f"{page} links to {link}"


def test_the_readme_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = code_blocks("README.md", "python")
    assert blocks
    for block in blocks:
        exec(compile(block, "<example of README.md>", "exec"), names)


def inline_code(page: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", (ROOT / page).read_text(encoding="utf-8"))


def test_the_readme_shows_the_criteria_as_they_were_measured():
    from bench.criteria import summary

    rows = json.loads((ROOT / "bench" / "criteria.json").read_text(encoding="utf-8"))["rows"]
    assert summary(rows).strip() in (ROOT / "README.md").read_text(encoding="utf-8")

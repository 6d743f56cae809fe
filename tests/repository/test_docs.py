"""The site's sources are whole: every notebook, public name and criterion has its place, and code on pages runs.

``make docs`` builds the site and checks its links; here is what takes no Sphinx.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import prunelab as pl

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(DOCS))
    return lambda name: importlib.import_module(f"sitetools.{name}")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


# ── everything has its place ──────────────────────────────────────────────────────────────────────────────────────


def reference() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "api").glob("*.md")))


def documented(text: str) -> set[str]:
    """Return the objects that autodoc is told to document, by dotted name."""
    found, module = set(), ""
    for kind, name in re.findall(r"^\.\. (currentmodule|automodule|auto\w+):: ([\w.]+)", text, re.MULTILINE):
        if kind == "currentmodule":
            module = name
        elif kind == "automodule":
            module = name
            found.add(name)
        else:
            found.add(name if name.startswith("prunelab.") else f"{module}.{name}")
    return found


@pytest.mark.parametrize(
    "module", [pl, pl.criteria, importlib.import_module("prunelab.curvature")], ids=lambda module: module.__name__
)
def test_every_public_name_is_in_the_reference(module):
    found = documented(reference())
    objects = {id(resolved(name)) for name in found}
    missing = []
    for name in module.__all__:
        value = getattr(module, name)
        inside = isinstance(value, ModuleType) and any(one.startswith(f"{value.__name__}") for one in found)
        if not inside and id(value) not in objects and name != "CRITERIA":
            missing.append(name)
    assert not missing


FUNCTIONS = [name for name in pl.__all__ if inspect.isfunction(getattr(pl, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_says_what_it_takes_returns_and_raises_and_shows_it(name):
    function = getattr(pl, name)
    lines = inspect.cleandoc(function.__doc__).splitlines()
    starts = [number for number, line in enumerate(lines) if line and not line.startswith(" ")]
    parts = {lines[a]: lines[a + 1 : b] for a, b in itertools.pairwise([*starts, len(lines)])}
    described = [line.split(":")[0].strip() for line in parts["Args:"] if re.match(r"    \w+:", line)]
    assert described == list(inspect.signature(function).parameters)
    raised = [line.split(":")[0].strip() for line in parts["Raises:"] if re.match(r"    \w+:", line)]
    assert raised and all(issubclass(getattr(pl, error, pl.PruneLabError), pl.PruneLabError) for error in raised)
    assert "Returns:" in parts or inspect.signature(function).return_annotation == "None"
    examples = doctest.DocTestParser().get_examples(function.__doc__)
    assert any(example.want for example in examples), "an example that could fail"
    assert not any(example.options for example in examples), "an example that is skipped proves nothing"


def test_modules_that_are_documented_whole_are_in_the_reference():
    rooms = ("course.notebook", "course.widgets", "experiments.sweeping")
    for name in ("data", "distributed", "regularizers", "training", "zoo", *rooms):
        assert f".. automodule:: prunelab.{name}\n   :members:" in reference()


def test_every_name_in_the_reference_exists():
    for name in documented(reference()):
        assert resolved(name) is not None, f"docs/api names {name}, which is not there"


def resolved(name: str) -> Any:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found
    return None


def test_what_notebooks_import_is_in_the_reference():
    found = documented(reference())
    modules = {name for name in found if name.count(".") and isinstance(resolved(name), ModuleType)}
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        for name in set(re.findall(r"\bpl\.(\w+(?:\.[a-z]\w+)?)\(", code)):
            place = f"prunelab.{name}"
            inside = any(place.startswith(f"{module}.") for module in modules)
            assert place in found or inside, f"{path.name} uses {place}, which is not in docs/api"


def test_the_course_has_every_notebook_and_what_it_proves(tool):
    page = tool("course").page(ROOT)
    for path in NOTEBOOKS:
        assert f"<notebooks/{path.stem}>" in page, "it is in no table of contents"
        assert f"(notebooks/{path.name})" in page
    assert page.count("What it proves") == len(NOTEBOOKS), "notebooks/CLAIMS.md lacks one"


def test_pages_that_are_written_by_hand_are_in_a_table_of_contents():
    texts = [path.read_text(encoding="utf-8") for path in DOCS.glob("*.md") if path.name not in copies()]
    trees = "\n".join(re.findall(r"```\{toctree\}(.*?)```", "\n".join(texts), re.DOTALL))
    entries = re.findall(r"^([\w/*\[\]-]+)$", trees, re.MULTILINE)
    for path in sorted(DOCS.glob("*.md")):
        if path.stem != "index" and path.name not in copies():
            assert any(path.match(f"{entry}.md") for entry in entries), f"docs/{path.name} is in no table of contents"


def copies() -> set[str]:
    return {line.strip("/\n") for line in (DOCS / ".gitignore").read_text().splitlines() if line.startswith("/")}


# ── copies of what the repository holds ───────────────────────────────────────────────────────────────────────────


def test_copies_follow_the_repository(tool, tmp_path):
    gather = tool("gather")
    (tmp_path / ".gitignore").write_bytes((DOCS / ".gitignore").read_bytes())
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "gone.ipynb").write_text("{}")
    gather.gather(ROOT, tmp_path)
    assert {path.name for path in (tmp_path / "notebooks").glob("*.ipynb")} == {path.name for path in NOTEBOOKS}
    for path in sorted(tmp_path.rglob("*.md")):
        for link in re.findall(r"\]\((?!\w+:)([^)#\s]+)", path.read_text(encoding="utf-8")):
            places = (path.parent, DOCS / path.parent.relative_to(tmp_path))
            written = [Path(os.path.normpath(place / link)) for place in places]
            assert any(place.exists() for place in written), f"{path.relative_to(tmp_path)} links to {link}"


def test_a_widget_is_shown_as_its_picture_or_as_a_note(tool):
    gather = tool("gather")

    def shown(**data):
        output = {"data": {"text/plain": ["(interactive: run this cell in Jupyter to move it)\n"]} | data}
        book = {"cells": [{"cell_type": "code", "source": "", "outputs": [output]}]}
        return json.loads(gather.notebook(json.dumps(book)))["cells"][0]["outputs"]

    with_picture = shown(**{"image/png": "YSBwaWN0dXJl"})
    assert with_picture[0]["data"]["image/png"] == "YSBwaWN0dXJl"
    assert "to move it" in with_picture[1]["data"]["text/html"]
    (without,) = shown()
    assert "run it" in without["data"]["text/html"]


def test_alt_text_saved_with_an_image_is_where_the_site_reads_it(tool):
    output = {"data": {"image/png": "YSBwaWN0dXJl"}, "metadata": {"image/png": {"alt": "two bowls"}}}
    book = {"cells": [{"cell_type": "code", "metadata": {}, "source": "", "outputs": [output]}]}
    (cell,) = json.loads(tool("gather").notebook(json.dumps(book)))["cells"]
    assert cell["metadata"] == {"mystnb": {"image": {"alt": "two bowls"}}}
    assert cell["outputs"] == [output]


def test_links_into_docs_are_links_within_the_site(tool):
    page = tool("gather").page
    assert page("[a](docs/matrix.md), ![b](../docs/widgets/x.png)", "x") == "[a](matrix.md), ![b](../widgets/x.png)"


# ── the page of criteria ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", pl.criteria.names())
def test_docstrings_of_criteria_say_what_the_page_compares(tool, name):
    entry = tool("criteria").entry(name)
    assert entry.keeps and entry.cost and entry.source
    assert name in ("random",) or "``" in entry.headline, "the first sentence has the formula"
    assert all(text for _, text in entry.options.values()), "an option that no docstring explains"


def test_the_page_of_criteria_shows_what_was_measured(tool):
    criteria = tool("criteria")
    page = criteria.page(ROOT)
    rows = json.loads((ROOT / "bench" / "criteria.json").read_text())["rows"]
    for name in pl.criteria.names():
        assert f"### {name}\n" in page
        for label in criteria.measured(rows, name):
            assert f"| {label} |" in page
    best = criteria.rank_correlation(criteria.measured(rows, "gate")["gate"], "resnet20")
    assert re.fullmatch(r"0\.\d\d( ± 0\.\d\d)?", best)
    assert f"| {best} |" in page


# ── code on pages runs ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_guide_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "guide"}
    for number, block in enumerate(blocks("prune.md"), 1):
        exec(compile(block, f"<block {number} of docs/prune.md>", "exec"), names)


@pytest.mark.filterwarnings("ignore:.*samples are too few")
def test_the_page_about_batches_runs():
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "batches"}
    for number, block in enumerate(blocks("batches.md"), 1):
        exec(compile(block, f"<block {number} of docs/batches.md>", "exec"), names)


def pairs() -> list[tuple[str, str, str]]:
    text = (DOCS / "torch_pruning.md").read_text(encoding="utf-8")
    found = re.findall(r"^```\{beside\}([^\n]*)\n(.*?)\n===\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(about.strip(), left, right) for about, left, right in found]


PAIRS = {about: (left, right) for about, left, right in pairs()}
SAME = {  # both sides cut as much, unit for unit or nearly
    "cut named channels": 0.0,
    "a pruner": 0.0,
    "global_pruning": 0.01,
    "pruning_ratio_dict": 0.0,
    "max_pruning_ratio": 0.02,
    "ignored_layers": 0.0,
    "round_to": 0.0,
    "isomorphic": 0.02,
    "iterative_steps": 0.0,
    "heads": 0.0,
    "TaylorImportance": 0.0,
    "HessianImportance": 0.0,
}


SIZES: dict[str, int] = {}  # what the right side left, if that ran before


def size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def ran(about: str, side: int) -> dict[str, Any]:
    """Run one side of a block after what the page begins with."""
    (common,) = blocks("torch_pruning.md")
    names: dict[str, Any] = {"__name__": about, "vit": pl.zoo.build("vit_small")}
    torch.manual_seed(0)
    for block in (common, PAIRS["setup"][side], PAIRS[about][side]):
        exec(compile(block, f"<{about!r} of docs/torch_pruning.md>", "exec"), names)
    return names


def test_the_page_for_users_of_torch_pruning_was_read():
    assert len(PAIRS) == len(pairs()) > 30, "blocks have the same name, or none"
    assert PAIRS.keys() >= SAME.keys()


@pytest.mark.parametrize("about", [about for about in PAIRS if about != "setup"])
def test_what_stands_at_the_right_runs(about, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ran(about, 1)
    if "small" in names:
        SIZES[about] = size(names["small"])
        inputs = torch.randn(2, 3, 32, 32) if about == "heads" else torch.randn(2, 3, 64, 64)
        assert names["small"](inputs).shape == (2, 10)


@pytest.mark.filterwarnings("ignore")  # theirs to mend
@pytest.mark.parametrize("about", [about for about in PAIRS if about != "setup"])
def test_what_stands_at_the_left_runs_and_cuts_as_much(about, tmp_path, monkeypatch):
    pytest.importorskip("torch_pruning", reason="it is installed for the benches only")
    if about == "benchmark" and not torch.cuda.is_available():
        pytest.skip("it measures on a GPU")
    monkeypatch.chdir(tmp_path)
    theirs = ran(about, 0)["model"]
    if about in SAME:
        ours = SIZES[about] if about in SIZES else size(ran(about, 1)["small"])
        assert ours == pytest.approx(size(theirs), rel=SAME[about])

"""The notebooks as they are committed: order, size, outputs, captions; what they need beside them is there."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

from prunelab.course.notebook.save import LARGEST, MACHINE_PATH

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
PATHS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
BOOKS = {path.stem: nbformat.read(path, as_version=4) for path in PATHS}
ORDER = ["title", "learn", "setup-text", "setup", "parameters", "validate"]
LAST = ["publish", "exercises", "surprises", "references"]
NB = pytest.mark.parametrize("name", list(BOOKS))


def code(name: str) -> list:
    return [cell for cell in BOOKS[name].cells if cell.cell_type == "code"]


def headings(name: str) -> list[tuple[int, str]]:
    text = "\n".join(cell.source for cell in BOOKS[name].cells if cell.cell_type == "markdown")
    return [(len(marks), words) for marks, words in re.findall(r"^(#+) (.*)$", text, re.MULTILINE)]


@NB
def test_the_order_of_the_cells_is_that_of_the_course(name):
    ids = [cell.id for cell in BOOKS[name].cells]
    first = [one for one in ids if one != "bet"]  # a bet may come before everything else
    assert first[: len(ORDER)] == ORDER
    assert [one for one in ids if one in LAST] == LAST
    assert len(set(ids)) == len(ids)
    assert 30 <= len(ids) <= 95


@NB
def test_setup_is_the_same_everywhere(name):
    first, here = (next(cell.source for cell in BOOKS[book].cells if cell.id == "setup") for book in ("00_tour", name))
    assert here == first


@NB
def test_headings_go_down_one_level_at_a_time(name):
    levels = [level for level, _ in headings(name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))


@NB
def test_numbered_sections_count_up(name):
    numbers = [int(found[1]) for _, words in headings(name) if (found := re.match(r"(\d+) · ", words))]
    assert numbers == list(range(1, len(numbers) + 1))


@NB
def test_cells_are_short_enough_to_read(name):
    for cell in code(name):
        limit = {"setup": 22, "parameters": 40, "validate": 24}.get(cell.id, 16)
        assert len(cell.source.splitlines()) <= limit, f"{cell.id} has {len(cell.source.splitlines())} lines"


@NB
def test_every_parameter_has_a_type_and_a_remark(name):
    (cell,) = [cell for cell in code(name) if "parameters" in cell.metadata.get("tags", ())]
    lines = cell.source.splitlines()
    assert all(re.fullmatch(r"\w+: \w+ = [^=]+  # [^=]+", line) for line in lines), lines
    assert {"device", "scale", "seed", "result_path"} <= {line.split(":")[0] for line in lines}


@NB
def test_it_was_saved_with_outputs_and_without_errors(name):
    counts = [cell.execution_count for cell in code(name)]
    assert counts == list(range(1, len(counts) + 1)), "run `python -m prunelab.course.notebook save` on it"
    outputs = [output for cell in code(name) for output in cell.outputs]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert "widgets" not in BOOKS[name].metadata
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text.encode()) <= LARGEST
    assert not MACHINE_PATH.search("".join(cell.source for cell in BOOKS[name].cells))


def is_figure(output) -> bool:
    return "image/png" in output.get("data", {}) and "interactive" not in output.data.get("text/plain", "")


@NB
def test_every_figure_has_a_caption_in_words(name):
    cells = BOOKS[name].cells
    for number, cell in enumerate(cells):
        if any(is_figure(output) for output in cell.get("outputs", ())):
            after = cells[number + 1]
            assert after.cell_type == "markdown" and after.source.startswith("*"), f"{cell.id} has no caption"


@NB
def test_it_has_a_widget_a_figure_before_it_and_an_assert(name):
    cells = code(name)
    widget = next(number for number, cell in enumerate(cells) if any("interactive" in str(o) for o in cell.outputs))
    assert any("image/png" in output.get("data", {}) for cell in cells[:widget] for output in cell.outputs)
    (shown,) = [o for o in cells[widget].outputs if "interactive" in str(o)]
    assert "image/png" in shown.data, "run `python -m prunelab.course.notebook save` on it"
    assert any(re.search(r"^\s*(assert |torch.testing.assert_close)", cell.source, re.MULTILINE) for cell in cells)


@NB
def test_what_belongs_to_it_is_there(name):
    assert f"({name}.ipynb)" in (FOLDER / "README.md").read_text(encoding="utf-8")
    other = json.loads((FOLDER / "parameters" / f"{name}.json").read_text(encoding="utf-8"))
    (cell,) = [cell for cell in code(name) if "parameters" in cell.metadata.get("tags", ())]
    own: dict = {}
    exec(cell.source, own)
    assert other and set(other) <= set(own)
    assert all(own[parameter] != value for parameter, value in other.items()), "other than the notebook's own"


@NB
def test_the_page_of_claims_has_a_section_for_it(name):
    assert f"## [{name}]({name}.ipynb)\n\n- " in (FOLDER / "CLAIMS.md").read_text(encoding="utf-8")

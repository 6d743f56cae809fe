"""Notebooks: parameters are checked, results are handed on, the runner says what failed; each run starts a kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import prunelab as pl
from prunelab.course.notebook import RESULT, Between, clean, publish_result, readable, validate
from prunelab.course.notebook.__main__ import main


def cell(source: str, *tags: str):
    return new_code_cell(source, metadata={"tags": list(tags)})


def write(path: Path, *cells) -> Path:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=list(cells), metadata=kernel), path)
    return path


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Run the command line in an empty folder; return its status, and what it writes to stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        status = main(list(arguments))
        return status, *capfd.readouterr()

    return call


# ── parameters ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_good_parameters_come_back():
    given = {"flops": 0.5, "epochs": 2, "scope": "layer", "path": "", "verbose": False}
    kinds = {"flops": float, "epochs": int, "scope": ["global", "layer"], "path": str, "verbose": bool}
    assert validate(given, **kinds) == given
    assert validate({"flops": 1}, flops=float) == {"flops": 1}, "a whole number will do"


def test_a_misspelt_parameter_is_named_with_the_one_that_was_meant():
    with pytest.raises(pl.PruneLabError, match=r"`epoch` is unknown: did you mean `epochs`\?"):
        validate({"epochs": 1, "epoch": 2}, epochs=int)


def test_papermills_own_cell_is_looked_at_and_a_notebooks_other_names_are_not():
    names = {"flops": 0.5, "model": object(), "In": ["", "flops = 0.5", "# Parameters\nflop = 0.7\nflops = 0.7\n"]}
    with pytest.raises(pl.PruneLabError, match="`flop` is unknown"):
        validate(names, flops=float)
    assert validate(names | {"In": ["", "# Parameters\nflops = 0.7\n"]}, flops=float) == {"flops": 0.5}


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ("0.5", float, "a number"),
        (True, float, "a number"),
        (0.5, int, "a whole number"),
        (True, int, "a whole number"),
        (1, bool, "True or False"),
        (1.5, Between(0.1, 0.9), "a number from 0.1 to 0.9"),
        (float("nan"), Between(0.1, 0.9), "a number from 0.1 to 0.9"),
        (2.0, Between(1, 5), "a whole number from 1 to 5"),
        ("all", ["global", "layer"], "one of 'global', 'layer'"),
    ],
)
def test_a_wrong_kind_is_named_with_what_it_should_be(value, kind, words):
    with pytest.raises(pl.PruneLabError, match=f"`x` is {value!r}, but should be {words}"):
        validate({"x": value}, x=kind)


def test_all_problems_are_told_at_once():
    with pytest.raises(pl.PruneLabError, match=r"(?s)`flop` is unknown.*`flops` is missing.*`seed` is 'a'"):
        validate({"flop": 0.5, "seed": "a"}, flops=float, seed=int)


# ── results ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_result_is_displayed_once_and_written(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    table = pd.DataFrame({"criterion": ["random"], "accuracy": [0.5]})
    publish_result("00", {"flops": 0.5}, table, tmp_path / "r.json")
    publish_result("00", {"flops": 0.5}, table)
    assert json.loads((tmp_path / "r.json").read_text()) == shown[0][RESULT] == shown[1][RESULT]
    assert shown[0][RESULT]["table"] == [{"criterion": "random", "accuracy": 0.5}]
    assert str(tmp_path) not in shown[0]["text/plain"]
    with pytest.raises(pl.PruneLabError, match="cannot be written"):
        publish_result("00", {}, table, tmp_path / "missing" / "r.json")


def test_a_table_for_people_has_percent_and_millions():
    table = readable(pd.DataFrame({"accuracy_before": [0.8351], "flops_kept": [float("nan")], "flops": [40_700_000]}))
    assert table.iloc[0].to_dict() == {"accuracy before": "83.5%", "FLOPs kept": "–", "FLOPs": "40.7 M"}


# ── the runner ────────────────────────────────────────────────────────────────────────────────────────────────────

PARAMETERS = cell("x: float = 1.0  # a number\nresult_path: str = ''  # file for the results", "parameters")
PUBLISH = (
    "import pandas as pd\nfrom prunelab.course.notebook import publish_result\n"
    "publish_result('small', {'x': x}, pd.DataFrame({'z': [x], 'accuracy': [x / 10]}), result_path)"
)


def test_a_run_leaves_notebook_page_and_result_and_prints_the_table(tmp_path):
    links = new_markdown_cell("[index](README.md), [paper](https://example.org), [above](#top)")
    notebook = write(tmp_path / "small.ipynb", PARAMETERS, links, cell(PUBLISH))
    before = notebook.read_bytes()
    line = [sys.executable, "-m", "prunelab.course.notebook", "run", "small.ipynb", "--out", "out", "-p", "x", "2.5"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "small.json").read_text())["parameters"] == {"x": 2.5}
    for said in (" z accuracy", "2.5", "25.0%", str(Path("out/small.ipynb")), str(Path("out/small.html"))):
        assert said in done.stdout
    page = (tmp_path / "out" / "small.html").read_text(encoding="utf-8")
    assert all(f'href="{link}"' in page for link in ("../README.md", "https://example.org", "#top"))
    assert notebook.read_bytes() == before


def test_a_failing_cell_is_named_without_a_traceback(tmp_path, command):
    write(tmp_path / "bad.ipynb", new_markdown_cell("## The sum"), cell("y = 1"), cell("y / 0\ny + 1"))
    status, _, said = command("run", "bad.ipynb")
    assert status == 1
    assert "Cell In [2] (`y / 0`, under “The sum”) failed with ZeroDivisionError: division by zero" in said
    assert f"The notebook up to there: {Path('out/bad.ipynb')}" in said
    assert "Traceback" not in said
    assert (tmp_path / "out" / "bad.ipynb").is_file()


def test_a_cell_that_takes_too_long_is_named(tmp_path, command):
    write(tmp_path / "slow.ipynb", cell("import time\ntime.sleep(60)"))
    status, _, said = command("run", "slow.ipynb", "--timeout", "1")
    assert status == 1
    assert "(`import time`) was not finished" in said
    assert "Traceback" not in said


def test_a_misspelt_parameter_is_refused_before_anything_runs(tmp_path, command):
    write(tmp_path / "small.ipynb", PARAMETERS)
    status, _, said = command("run", "small.ipynb", "-p", "y", "1")
    assert status == 1
    assert "Parameter `y` is unknown. There are x, result_path." in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["run", "save"])
def test_a_missing_or_damaged_notebook_is_named(what, tmp_path, command):
    assert command(what, "none.ipynb") == (1, "", "\nThere is no notebook none.ipynb.\n")
    (tmp_path / "torn.ipynb").write_text("{")
    status, _, said = command(what, "torn.ipynb")
    assert status == 1
    assert "torn.ipynb cannot be read as a notebook" in said


# ── saving ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_saving_executes_and_cleans(tmp_path, command):
    source = "import ipywidgets\nprint(6 * 7)\nipywidgets.IntSlider()"
    path = write(tmp_path / "w.ipynb", cell(source, "keep"))
    assert command("save", "w.ipynb")[0] == 0
    book = nbformat.read(path, as_version=4)
    assert "widgets" not in book.metadata
    assert book.cells[0].metadata == {"tags": ["keep"]}
    assert book.cells[0].execution_count == 1
    assert book.cells[0].outputs[0].text == "42\n"
    assert list(book.cells[0].outputs[1].data) == ["text/plain"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("print('/' + 'home/me/data')", "cell In [1] shows /" + "home/me"),
        ("print(('x' * 99 + chr(10)) * 7_000)", "at most 600"),
        ("import sys; print('careful', file=sys.stderr)", "writes to stderr: careful"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_notebook_that_may_not_be_committed_is_not_saved(tmp_path, command, source, words):
    path = write(tmp_path / "w.ipynb", cell(source))
    before = path.read_bytes()
    status, _, said = command("save", "w.ipynb")
    assert status == 1
    assert words in said
    assert path.read_bytes() == before


def test_cleaning_drops_progress_bars(tmp_path, command):
    source = "import time\nfrom prunelab.course.notebook import progress\n"
    source += "for _ in progress(range(3), 'waiting'): time.sleep(0.7)"
    counted = "from tqdm.auto import tqdm\nwith tqdm(unit='unit') as bar: bar.update(3)"
    path = write(tmp_path / "w.ipynb", cell(source), cell(counted))
    book = nbformat.read(path, as_version=4)
    NotebookClient(book).execute()
    assert all(len(one.outputs) == 1 for one in book.cells)  # they were there
    clean(book)
    assert all(one.outputs == [] for one in book.cells)


def test_cleaning_drops_torchs_remarks_about_the_machine():
    log = "W1121 03:31:57.198000 12766 torch/utils/cpp_extension.py:183] No CUDA runtime is found\n"
    noisy = cell("1")
    noisy.outputs = [new_output("stream", name="stderr", text=log), new_output("stream", name="stdout", text="1")]
    book = new_notebook(cells=[noisy])
    clean(book)
    assert [output.name for output in book.cells[0].outputs] == ["stdout"]

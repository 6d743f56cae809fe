"""Sweeps: grids are checked before anything starts, only what is missing is run, a job that fails stops no other."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import dask
import distributed  # noqa: F401, it brings the settings of its workers
import nbformat
import pytest
from filelock import FileLock

import prunelab as pl
from prunelab.__main__ import main
from prunelab.experiments.sweeping import GridError, Limits, gpus, jobs, make_grid, read_grid
from prunelab.experiments.sweeping.cluster import carried, default_workers, on_dask
from prunelab.experiments.sweeping.gpus import borrowed, visible
from prunelab.experiments.sweeping.jobs import prepared, short_hash
from prunelab.experiments.sweeping.kernel import TRIM
from tests.sweeps import executions, write_notebook

ONE = {"retries": 0}


@pytest.fixture
def tiny(tmp_path):
    """A notebook, a folder for its executions, and a function that sweeps it in this process."""
    notebook, log = write_notebook(tmp_path / "tiny.ipynb"), tmp_path / "log"
    log.mkdir()

    def sweep(grid, **options):
        options.setdefault("limits", ONE)
        return pl.sweep(
            notebook,
            grid,
            tmp_path / "out",
            parameters={"log": str(log)} | options.pop("parameters", {}),
            workers=0,
            progress=False,
            **options,
        )

    sweep.notebook, sweep.log, sweep.out = notebook, log, tmp_path / "out"
    return sweep


def folder_of(out: Path, job: str) -> Path:
    (found,) = out.glob(f"jobs/{job}-*")
    return found


# ── grids ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_grid_is_every_combination_and_cases_go_with_all_of_them():
    grid = make_grid("n.ipynb", {"a": [1, 2], "seed": (0, 1)}, parameters={"b": 0.5}, cases=[{"c": [7, 8]}, {"a": 9}])
    found = grid.jobs()
    assert len(found) == 2 * 4 + 2, "the second case replaces a, so that its two seeds are left"
    assert found[0] == {"b": 0.5, "a": 1, "seed": 0, "c": 7}
    assert found[-1] == {"b": 0.5, "a": 9, "seed": 1}
    assert grid.varied == ["a", "seed", "c"]


def test_a_file_says_the_same_and_knows_numbers_without_a_dot(tmp_path):
    write_notebook(tmp_path / "tiny.ipynb")
    path = tmp_path / "g.yaml"
    path.write_text("notebook: tiny.ipynb\ngrid: {a: [1, 2], b: [1e-3, 1]}\nlimits: {minutes: 2, gpus: 0}\n")
    grid = read_grid(path)
    assert (grid.name, grid.notebook) == ("g", tmp_path / "tiny.ipynb")
    assert (grid.limits.minutes, grid.limits.gpus, grid.limits.retries) == (2, 0, 2)
    assert [job.parameters["b"] for job in prepared(grid).jobs] == [0.001, 1.0, 0.001, 1.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no keys"),
        ("notebook: [", "is not YAML"),
        ("notebook: tiny.ipynb\ngrid: {a: [1]}\ngrid: {a: [2]}", "'grid' comes twice"),
        ("notebook: tiny.ipynb\ngird: {a: [1]}", "The key `gird` is unknown: did you mean `grid`?"),
        ("notebook: 3\ngrid: {a: [1]}", "`notebook` is 3, but should be the path"),
        ("notebook: none.ipynb\ngrid: {a: [1]}", "There is no notebook"),
        ("notebook: tiny.ipynb", "is empty: give `grid`"),
        ("notebook: tiny.ipynb\ngrid: {a: 1}", "`grid.a` is 1, but should be a list"),
        ("notebook: tiny.ipynb\ngrid: {a: []}", "`grid.a` is an empty list"),
        ("notebook: tiny.ipynb\ngrid: {a: [1, 1]}", "`grid.a` has 1 twice"),
        ("notebook: tiny.ipynb\ngrid: [1]", "`grid` is [1], but should have values by the name"),
        ("notebook: tiny.ipynb\ncases: {a: 1}", "`cases` is {'a': 1}, but should be a list"),
        ("notebook: tiny.ipynb\ncases: [{a: []}]", "`cases[0].a` is an empty list"),
        ("notebook: tiny.ipynb\nname: a/b\ngrid: {a: [1]}", "`name` is 'a/b'"),
        (
            "notebook: tiny.ipynb\ngrid: {a: [1]}\nlimits: {minuts: 1}",
            "`limits.minuts` is unknown: did you mean `minutes`",
        ),
        (
            "notebook: tiny.ipynb\ngrid: {a: [1]}\nlimits: {minutes: 0}",
            "`limits.minutes` is 0, but should be a number above",
        ),
        ("notebook: tiny.ipynb\ngrid: {a: [1]}\nlimits: {retries: 1.5}", "`limits.retries` is 1.5"),
        ("notebook: tiny.ipynb\ngrid: {sed: [1]}", "`grid.sed` is unknown: did you mean `seed`?"),
        ("notebook: tiny.ipynb\nparameters: {bb: 1}\ngrid: {a: [1]}", "`parameters.bb` is unknown"),
        ("notebook: tiny.ipynb\ncases: [{a: 1}, {A: 2}]", "`cases[1].A` is unknown"),
        ("notebook: tiny.ipynb\ngrid: {result_path: [x]}", "`grid.result_path` is set by the sweep itself"),
        ("notebook: tiny.ipynb\ngrid: {a: [1, x]}", "`a` is 'x', but the notebook expects a whole number"),
        ("notebook: tiny.ipynb\ngrid: {b: [.nan]}", "`b` is nan, which is not a plain value"),
        ("notebook: tiny.ipynb\ngrid: {log: [2020-01-01]}", "`log` is datetime.date(2020, 1, 1)"),
        (
            "notebook: tiny.ipynb\ngrid: {a: [1]}\npublished: [{match: {aa: 1}, y: 1, source: s}]",
            "`published[0].match.aa`",
        ),
        ("notebook: tiny.ipynb\ngrid: {a: [1]}\npublished: [{match: {a: 1}, y: 1}]", "has no `source`"),
        ("notebook: tiny.ipynb\ngrid: {a: [1]}\npublished: [{match: {a: 1}, y: x, source: s}]", "wrong: ['y']"),
    ],
)
def test_a_bad_grid_is_refused_by_file_and_key_before_anything_starts(tmp_path, capsys, text, words):
    write_notebook(tmp_path / "tiny.ipynb")
    (tmp_path / "g.yaml").write_text(text)
    assert main(["sweep", str(tmp_path / "g.yaml"), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "g.yaml" in said
    assert not (tmp_path / "out").exists()


def test_a_mapping_becomes_json_where_the_notebook_expects_text(tmp_path):
    notebook = write_notebook(tmp_path / "n.ipynb")
    made = prepared(make_grid(notebook, {"log": [{"p": 1}, {}]}))
    assert [job.parameters["log"] for job in made.jobs] == ['{"p": 1}', "{}"]


def test_a_job_keeps_its_path_when_the_grid_grows_and_keys_change_places(tmp_path):
    notebook = write_notebook(tmp_path / "n.ipynb")
    one = prepared(make_grid(notebook, {"a": [1], "seed": [0]})).jobs[0]
    other = prepared(make_grid(notebook, {"seed": [1, 0], "a": [2, 1]})).jobs[-1]
    assert one.depends == other.depends
    assert other.name == "a=1_seed=0-" + short_hash({"a": 1, "seed": 0})
    assert one.name == other.name.rsplit("-")[-1], "nothing varies, so that the hash is the name"
    assert short_hash({"a": 1, "seed": 0}) == "222252f332", "hashes are the same on every machine and in every version"


def test_what_a_result_depends_on_is_code_not_prose_nor_outputs(tmp_path):
    def depends(**changes):
        return prepared(make_grid(write_notebook(tmp_path / "n.ipynb", **changes), {"a": [1]})).jobs[0].depends

    assert depends() == depends(text="# Another title")
    assert depends()["notebook"] != depends(happens="z = 1")["notebook"]


# ── one sweep ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_failing_job_keeps_its_notebook_and_stops_no_other(tiny):
    write_notebook(tiny.notebook, "assert a != 2, 'two is too many'")
    table = tiny({"a": [1, 2, 3]})
    assert list(table["status"]) == ["done", "failed", "done"]
    assert list(table["y"].dropna()) == [11.0, 31.0]
    assert table["error"][1] == "AssertionError: two is too many"
    folder = folder_of(tiny.out, "a=2")
    record = json.loads((folder / "job.json").read_text())
    assert (record["status"], record["attempts"]) == ("failed", 1)
    assert record["error"] == {"kind": "error", "message": "AssertionError: two is too many"}
    assert record["parameters"] == {"a": 2, "log": str(tiny.log)}
    book = nbformat.read(folder / "notebook.ipynb", as_version=4)
    assert any(out.output_type == "error" for cell in book.cells for out in cell.get("outputs", ()))
    done = folder_of(tiny.out, "a=1")
    assert json.loads((done / "result.json").read_text())["table"][0]["y"] == 11.0
    assert sorted(path.name for path in done.iterdir()) == [".lock", "job.json", "notebook.ipynb", "result.json"]

    left = folder / ".attempt-left"
    left.mkdir()
    (folder / ".job.json.1-a.tmp").write_text("{")
    tiny({"a": [1, 2, 3]})
    assert not list(folder.glob(".[aj]*")), "what a sweep that was killed has left"
    assert executions(tiny.log) == {"1-0": 1, "2-0": 2, "3-0": 1}, "what has failed is tried again, and nothing else"


def test_rerunning_does_what_is_missing_or_has_changed(tiny, monkeypatch):
    def after(grid, **options):
        before = executions(tiny.log)
        table = tiny(grid, **options)
        assert (table["status"] == "done").all()
        return {name: number - before.get(name, 0) for name, number in executions(tiny.log).items()}

    assert after({"a": [1]}) == {"1-0": 1}
    assert after({"a": [1]}) == {"1-0": 0}
    assert after({"a": [1, 2]}) == {"1-0": 0, "2-0": 1}, "a value more"
    write_notebook(tiny.notebook, text="# In other words")
    assert after({"a": [1, 2]}) == {"1-0": 0, "2-0": 0}, "prose"
    monkeypatch.setattr(jobs, "package", lambda: f"{pl.__version__}+changed")
    assert after({"a": [1]}, by_version=True) == {"1-0": 0, "2-0": 0}
    assert after({"a": [1]}) == {"1-0": 1, "2-0": 0}, "sources of the package"
    write_notebook(tiny.notebook, happens="z = 1")
    assert after({"a": [2]}) == {"1-0": 0, "2-0": 1}, "the notebook's code"
    (folder_of(tiny.out, "a=2") / "job.json").write_text('{"status": "do')
    assert after({"a": [2]}) == {"1-0": 0, "2-0": 1}, "a record that was torn"


def test_cells_that_teach_are_left_out_and_may_change(tiny):
    book = nbformat.read(tiny.notebook, as_version=4)
    book.cells.insert(-1, nbformat.v4.new_code_cell("raise SystemExit('taught')", metadata={"tags": ["lesson"]}))
    nbformat.write(book, tiny.notebook)
    assert (tiny({"a": [1]})["status"] == "done").all() and executions(tiny.log) == {"1-0": 1}
    book.cells[-2].source = "raise SystemExit('taught in other words')"
    nbformat.write(book, tiny.notebook)
    tiny({"a": [1]})
    assert executions(tiny.log) == {"1-0": 1}
    (kept,) = tiny.out.glob("jobs/*/notebook.ipynb")
    assert "taught" not in kept.read_text()


def test_a_file_that_a_parameter_names_is_part_of_the_job(tiny, tmp_path):
    notebook, file = tiny.notebook, tmp_path / "weights.bin"
    file.write_bytes(b"one")
    grid = make_grid(notebook, {"log": [str(file)]})
    before = prepared(grid).jobs[0].depends
    file.write_bytes(b"two!")
    after = prepared(grid).jobs[0].depends
    assert [name for name in before if before[name] != after[name]] == ["files"]


@pytest.mark.parametrize(
    ("happens", "limits", "kind", "words"),
    [
        ("time.sleep(60)", {"minutes": 0.05}, "time", "not finished after 0.05 minutes"),
        ("x = bytearray(900_000_000); time.sleep(60)", {"memory_gb": 0.5}, "memory", "0.5 GB are allowed"),
    ],
)
def test_a_job_beyond_its_limits_is_killed_and_says_so(tiny, happens, limits, kind, words):
    write_notebook(tiny.notebook, happens)
    table = tiny({"a": [1]}, limits=ONE | limits)
    assert table["status"][0] == "failed"
    assert words in table["error"][0]
    folder = next((tiny.out / "jobs").iterdir())
    record = json.loads((folder / "job.json").read_text())
    assert record["error"]["kind"] == kind
    assert record["attempts"] == 1, "it would be beyond them again"
    assert words in nbformat.read(folder / "notebook.ipynb", as_version=4).cells[0].source


def test_a_kernel_that_dies_is_started_again_up_to_the_retries(tiny):
    write_notebook(tiny.notebook, "if first or a == 2: os.kill(os.getpid(), signal.SIGKILL)")
    table = tiny({"a": [1, 2]}, limits={"retries": 1})
    assert list(table["status"]) == ["done", "failed"]
    assert list(table["attempts"]) == [2, 2] == list(executions(tiny.log).values())
    assert "its kernel died, by signal 9" in table["error"][1]


def test_a_kernel_leaves_to_workers_what_dask_sets_for_them(tiny, monkeypatch):
    """With Dask's threshold every tensor would be new pages, and a job 1.4 times as long; a user's own stays."""
    set_by_dask = dask.config.get("distributed.nanny.pre-spawn-environ")
    assert str(set_by_dask[TRIM[0]]) == TRIM[1]
    write_notebook(tiny.notebook, f"assert os.environ.get({TRIM[0]!r}) == (None if a == 1 else '1000')")
    for a, value in enumerate((TRIM[1], "1000"), 1):
        monkeypatch.setenv(TRIM[0], value)
        assert list(tiny({"a": [a]})["status"]) == ["done"]


# ── GPUs, locks, workers ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_job_sees_the_gpu_that_it_was_given(tiny, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "gpu-for-test-5,gpu-for-test-6")
    assert default_workers(None) == 2
    assert default_workers(2) == 1
    with FileLock(gpus._file("gpu-for-test-5")):
        table = tiny({"a": [1]})
    assert table["where"][0] == "gpu-for-test-6"
    table = tiny({"a": [2]}, limits={"gpus": 3})
    assert "it wants 3 GPUs (limits.gpus), and its machine has 2" in table["error"][0]


def test_gpus_are_lent_to_one_at_a_time(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "lent-7, -1,lent-8")
    devices = visible()
    assert devices == ["lent-7", "lent-8"]
    waiting = threading.Event()
    got: list[list[str]] = []

    def third() -> None:
        waiting.set()
        with borrowed(1, devices) as mine:
            got.append(mine)

    with borrowed(1, devices) as one, borrowed(None, devices) as two:
        assert sorted(one + two) == devices
        thread = threading.Thread(target=third)
        thread.start()
        assert waiting.wait(10)
        assert not got
    thread.join(30)
    assert len(got) == 1 and got[0][0] in devices
    with borrowed(None, []) as none, borrowed(0, devices) as zero:
        assert none == zero == []


def test_two_sweeps_do_not_share_a_folder(tiny):
    tiny.out.mkdir()
    with FileLock(tiny.out / ".lock"), pytest.raises(pl.PruneLabError, match="Another sweep is running"):
        tiny({"a": [1]})
    (tiny.out / "thesis.tex").write_text("")
    with pytest.raises(pl.PruneLabError, match="holds no sweep but thesis.tex"):
        tiny({"a": [1]})


def test_what_is_no_grid_or_folder_is_named(tiny):
    with pytest.raises(GridError, match="There is no grid"):
        pl.sweep(tiny.notebook)
    with pytest.raises(GridError, match="The grid is 3"):
        pl.sweep(tiny.notebook, 3)
    with pytest.raises(GridError, match=r"out='tcp://[^']*' looks like the address of a scheduler: give scheduler="):
        pl.sweep(tiny.notebook, {"a": [1]}, "tcp://10.0.0.1:8786")
    with pytest.raises(GridError, match=r"`workers` must be an integer of at least 0, got -1"):
        pl.sweep(tiny.notebook, {"a": [1]}, workers=-1)
    with pytest.raises(GridError, match="`limits.threads` is 0, but should be an integer of at least 1"):
        Limits(threads=0)


def test_the_jobs_of_a_grid_can_be_listed(tiny, tmp_path, capsys):
    (tmp_path / "g.yaml").write_text("notebook: tiny.ipynb\ngrid: {a: [1, 2]}\n")
    assert main(["sweep", str(tmp_path / "g.yaml"), "--list"]) == 0
    assert [line.split("-")[0] for line in capsys.readouterr().out.splitlines()] == ["a=1", "a=2"]


def test_a_worker_gets_the_code_of_a_job_without_importing_prunelab(tmp_path):
    cloudpickle = pytest.importorskip("cloudpickle")
    (tmp_path / "code").write_bytes(carried(cloudpickle))
    script = (
        "import pickle, sys\nrun = pickle.load(open('code', 'rb'))\n"
        "assert run.__name__ == 'run_job'\nfound = {name.split('.')[0] for name in sys.modules}\n"
        "assert not found & {'prunelab', 'torch', 'numpy'}, found"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=60)
    with pytest.raises(ValueError, match="not registered"):
        cloudpickle.unregister_pickle_by_value(sys.modules["prunelab.experiments.sweeping.work"])
    assert pickle.dumps(pl.sweep), "and prunelab's functions are found by name, as ever"


def test_without_dask_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(pl.PruneLabError, match=r"pip install 'prunelab\[sweep\]'"):
        next(on_dask([], scheduler=None, workers=1, retries=0, tell=print))

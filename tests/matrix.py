"""The tests on other versions: the oldest and newest PyTorch that prunelab takes, on every Python that it takes.

    python -m tests.matrix [PATH …] [--only NAME] [--page docs/matrix.md]

Each environment is built by uv in ``.matrix``, from the bounds in pyproject.toml, and kept for the next time.  An
interpreter is looked for on PATH and among pyenv's; one that is not there is told as missing, not left out.  Two
environments run everything, the others a spread that touches every part.  With paths, only these are run, and what was
found before about the others stays.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".matrix"
UV = ROOT / ".uv" / "bin" / "uv"
OLDEST = ("torch==2.6.0", "torchvision==0.21.0")
COLAB = (
    *("ipykernel==6.17.1", "ipywidgets==7.7.1", "matplotlib==3.10.0", "numpy==2.0.2", "pandas==2.2.2"),
    *("papermill", "pip"),
)
"""What Colab brings beside PyTorch, at its versions, and papermill, which plays the reader."""
SPREAD = (
    *("tests/tracing/test_trace.py", "tests/surgery/test_surgery.py", "tests/criteria/test_criteria.py"),
    *("tests/planning/test_plan.py", "tests/io/test_io.py", "tests/planning/test_cost.py"),
    *("tests/curvature/test_collect.py", "tests/course/test_colab.py"),
    "notebooks/00_tour.ipynb",
)
WHOLE = (
    "tests",
    "prunelab",
    *(f"notebooks/{n}.ipynb" for n in ("00_tour", "04_obd", "08_eigendamage", "13_transformers")),
)


@dataclass(frozen=True)
class Environment:
    """One line of the table: a Python, what is installed and what is run there."""

    name: str
    python: str
    what: str
    pins: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    paths: tuple[str, ...] = SPREAD
    bare: bool = False  # without prunelab: the tests run outside and install it there


ENVIRONMENTS = (
    Environment("3.10-oldest", "3.10", "lowest versions of everything", OLDEST, ("--resolution=lowest-direct",), WHOLE),
    *(Environment(f"3.{n}-oldest", f"3.{n}", "oldest PyTorch, the rest newest", OLDEST) for n in (11, 12, 13)),
    *(Environment(f"3.{n}-newest", f"3.{n}", "newest versions of everything") for n in (10, 11, 12)),
    Environment("3.13-newest", "3.13", "newest versions of everything", paths=WHOLE),
    Environment("colab", "3.12", "like Colab's", (*OLDEST, *COLAB), paths=("tests/course/test_colab.py",), bare=True),
)


def interpreter(version: str) -> str | None:
    """Return a Python of this version, on PATH or among pyenv's, or ``None``: nothing is downloaded."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    folders = sorted(kept.glob(f"{version}.*"), key=lambda path: [int(n) for n in path.name.split(".") if n.isdigit()])
    for path in [folder / "bin" / "python" for folder in reversed(folders)]:
        if path.is_file():
            return str(path)
    command = [str(UV), "python", "find", "--no-project", "--no-python-downloads", version]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def build(environment: Environment) -> tuple[Path | None, str]:
    """Make the environment unless it is there; return its Python, or ``None`` and why there is none."""
    inside = HOME / environment.name / "bin" / "python"
    ready = HOME / environment.name / ".ready"
    if ready.is_file() and ready.stat().st_mtime >= (ROOT / "pyproject.toml").stat().st_mtime:
        return inside, ""
    base = interpreter(environment.python)
    if base is None:
        return None, f"no Python {environment.python} was found"
    install = [str(UV), "pip", "install", "--quiet", "--python", str(inside)]
    bounds = ["--requirements", "pyproject.toml", "--extra", "notebooks", "--extra", "test"]
    commands = [
        [str(UV), "venv", "--quiet", "--clear", "--python", base, str(HOME / environment.name)],
        [*install, *environment.options, *([] if environment.bare else bounds), *environment.pins],
        [*install, "--no-deps", "--editable", "."],
    ]
    for command in commands[: 2 if environment.bare else 3]:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            return None, " ".join(done.stderr.split())[:300]
    ready.touch()
    return inside, ""


def run(environment: Environment, python: Path, paths: list[str], jobs: int) -> dict[str, Any]:
    """Run tests or notebooks in an environment; return file -> passed, failed and skipped tests."""
    report = HOME / f"{environment.name}.xml"
    report.unlink(missing_ok=True)
    notebooks = ["--nbval-lax", "--nbval-current-env"] if paths[0].endswith(".ipynb") else []
    beside = ["--numprocesses", str(jobs), "--dist", "loadfile"] if jobs > 1 else []
    # Warnings are failures where versions are pinned, not here: other versions of other libraries have others.
    line = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "-o", "junit_family=xunit1"]
    quiet = {"OMP_NUM_THREADS": "1", "JUPYTER_PREFER_ENV_PATH": "1", "JUPYTER_PLATFORM_DIRS": "1"}
    tester = sys.executable if environment.bare else str(python)
    quiet |= {"PRUNELAB_COLAB": str(python)} if environment.bare else {}
    command = [tester, *line, *beside, *notebooks, f"--junitxml={report}", *paths]
    subprocess.run(command, cwd=ROOT, env=os.environ | quiet, check=False)
    if not report.is_file():
        return {paths[0]: {"passed": 0, "failed": {"pytest": "did not end, see above"}, "skipped": {}}}
    return read(report)


def read(report: Path) -> dict[str, Any]:
    """Return what a JUnit report says, by file."""
    files: dict[str, Any] = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        name = case.get("file") or case.get("classname", "?").replace(".", "/") + ".py"
        one = files.setdefault(name, {"passed": 0, "failed": {}, "skipped": {}})
        bad = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        skip = case.find("skipped")
        if bad is not None:
            one["failed"][case.get("name")] = (bad.get("message") or "").split("\n")[0][:160]
        elif skip is not None:
            reason = (skip.get("message") or "").split("\n")[0]
            one["skipped"][reason] = one["skipped"].get(reason, 0) + 1
        else:
            one["passed"] += 1
    return files


def versions(python: Path) -> dict[str, str]:
    """Return the versions that an environment really has."""
    code = "import json, platform, torch, torchvision, numpy; print(json.dumps({'python': platform.python_version(), "
    code += "'torch': torch.__version__, 'torchvision': torchvision.__version__, 'numpy': numpy.__version__}))"
    said = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return json.loads(said.stdout) if said.returncode == 0 else {"broken": said.stderr.strip().splitlines()[-1]}


def markdown(rows: dict[str, Any]) -> str:
    """Return the page: a row per environment, then what failed and what was skipped."""
    lines = [
        "| Python | torch | torchvision | versions | run | passed | skipped | failed |",
        "|---|---|---|---|---|---:|---:|---:|",
    ]
    left: list[str] = []
    for environment in ENVIRONMENTS:
        row = rows.get(environment.name, {"missing": "not run yet"})
        if "missing" in row:
            lines.append(f"| {environment.python} | – | – | {environment.what} | {row['missing']} | – | – | – |")
            continue
        files = row["files"]
        passed = sum(one["passed"] for one in files.values())
        failed = [f"`{file}::{test}`: {why}" for file, one in files.items() for test, why in one["failed"].items()]
        skips = collections.Counter({})
        for one in files.values():
            skips.update(one["skipped"])
        books = sum(file.endswith(".ipynb") for file in files)
        ran = ", ".join(
            f"{n} {what}{'s' * (n != 1)}" for n, what in ((len(files) - books, "file"), (books, "notebook")) if n
        )
        told = [f"{environment.name}: {text}" for text in failed]
        told += [f"{environment.name}, skipped {count}: {reason}" for reason, count in skips.items()]
        left += [f"- {text}" for text in told]
        have = (row["python"], row["torch"], row["torchvision"], environment.what, ran)
        lines.append(f"| {' | '.join(have)} | {passed} | {skips.total() if skips else 0} | {len(failed)} |")
    return TEXT.format(table="\n".join(lines), left="\n".join(left) or "Nothing.")


TEXT = """# The tests on other versions

What `make test-matrix` found. Two environments run all unit tests, the others files that touch each part of the library
({spread}),
and all of them notebooks, where each cell counts as a test. The last is made to look like Colab, with its older
ipywidgets: there prunelab is installed by the notebooks' own setup cell, from a wheel, and they run in an empty folder.

{{table}}

## What failed or was skipped

{{left}}
""".format(spread=", ".join(f"`{Path(path).stem}`" for path in SPREAD if path.endswith(".py")))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if a test failed anywhere."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="only these test files or notebooks")
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--jobs", type=int, default=1, help="test files side by side")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "matrix.md")
    args = parser.parse_args(arguments)
    kept = args.page.with_suffix(".json")
    bad = 0
    for environment in (one for one in ENVIRONMENTS if one.name in (args.only or names)):
        print(f"== {environment.name}: {environment.what}", flush=True)
        python, missing = build(environment)
        if python is None:
            row: dict[str, Any] = {"missing": missing}
            print(missing)
        else:
            files: dict[str, Any] = {}
            wanted = args.paths or environment.paths
            books = [path for path in wanted if path.endswith(".ipynb")]
            for part in ([path for path in wanted if path not in books], books):
                files |= run(environment, python, part, args.jobs) if part else {}
            bad += sum(len(one["failed"]) for one in files.values())
            row = {**versions(python), "files": files}
        rows = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        if args.paths and python:
            row["files"] = rows.get(environment.name, {}).get("files", {}) | files
        rows[environment.name] = row
        kept.write_text(json.dumps(rows, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        args.page.write_text(markdown(rows), encoding="utf-8")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

"""The wheel, as users install it: in an empty folder, far from the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="it builds the wheel: pip install 'prunelab[test]'")

HOME = Path(__file__).resolve().parents[2]
GRID = """\
parameters: {device: cpu, epochs: 0.02, scoring: 32, images: 200, test_images: 50, latency_images: 0}
grid: {criterion: [magnitude]}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Return a folder with nothing in it but what the wheel puts into site-packages."""
    out = tmp_path_factory.mktemp("wheel")
    run = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(run, cwd=HOME, check=True, capture_output=True)
    (wheel,) = out.glob("prunelab-*.whl")
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    return site


def outside(installed: Path, folder: Path, *arguments: str) -> str:
    """Run Python in a folder of its own, where the wheel's prunelab is the first that is found."""
    env = {key: value for key, value in os.environ.items() if key not in ("PRUNELAB_DATA", "PYTHONPATH")}
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=env | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_the_wheel_holds_the_package_and_no_more(installed):
    tops = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"prunelab"} and (installed / "prunelab" / "py.typed").is_file()
    written = {path.relative_to(HOME) for path in (HOME / "prunelab").rglob("*.py")}
    assert {path.relative_to(installed) for path in (installed / "prunelab").rglob("*.py")} == written


def test_the_first_example_of_the_readme_runs(installed, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (HOME / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    example = next(block for block in blocks if "pl.zoo.load" in block and "pl.save" in block)
    where = outside(installed, tmp_path, "-c", f"{example}\nprint(pl.__file__, pl.count(same, images).flops < 42e6)")
    assert where.split() == [str(installed / "prunelab" / "__init__.py"), "True"]  # half of 82 million
    assert (tmp_path / "small.safetensors").is_file()


def test_networks_and_images_are_in_it(installed, tmp_path):
    code = "import prunelab as pl; print(len(pl.data.cifar10().test), pl.data.root(), pl.zoo.load('resnet20'))"
    found = outside(installed, tmp_path, "-c", code)
    assert found.startswith(f"2000 {installed / 'prunelab' / '_data'} ResNet(")


def test_a_sweep_without_a_notebook_of_its_own_runs_the_shootout(installed, tmp_path):
    pytest.importorskip("papermill")
    (tmp_path / "grid.yaml").write_text(GRID, encoding="utf-8")
    outside(installed, tmp_path, "-m", "prunelab", "sweep", "grid.yaml", "--workers", "0", "--out", "results")
    outside(installed, tmp_path, "-m", "prunelab", "report", "results")
    assert (tmp_path / "results" / "report").is_dir()

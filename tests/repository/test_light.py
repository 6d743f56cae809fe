"""The core is light: torch, NumPy, safetensors, tqdm.  The rest comes when it is used, or an error names the extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
WITHOUT = ("torchvision", "PIL", "pandas", "matplotlib", "scipy", "IPython", "ipywidgets", "papermill", "dask")
BLOCKED = f"import sys\nsys.modules.update(dict.fromkeys({WITHOUT}))  # as if none were installed\n"
LINE = """
import torch, prunelab as pl

model, x = pl.zoo.load("resnet20"), torch.randn(8, 3, 32, 32)
graph = pl.trace(model, x)
scores = pl.criteria.get("obd", fisher="mc")(graph, [(x, torch.arange(8))])
plan = pl.plan(scores, flops=0.5)
small = pl.apply(model, plan, compensate=[x])
pl.save(small, sys.argv[1])
again = pl.load(pl.zoo.build("resnet20"), sys.argv[1])
with torch.no_grad():
    assert torch.equal(again.eval()(x), small.eval()(x))
assert pl.count(small, x[:1]).flops < 0.5 * pl.count(model, x[:1]).flops
for use in (plan.table, graph.draw, pl.Report().table, pl.data.cifar10, lambda: pl.zoo.build("torchvision:resnet18")):
    try:
        use()
    except pl.MissingExtra as error:
        print(error)
    else:
        raise AssertionError(use)
"""


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_line_from_trace_to_load_needs_the_core_alone(tmp_path):
    said = run(BLOCKED + LINE, str(tmp_path / "small.safetensors")).splitlines()
    assert [line.partition(":")[0] for line in said] == [
        "Plan.table() needs pandas",
        "graph.draw() needs matplotlib",
        "Report.table() needs pandas",
        "pl.data needs PIL",
        "torchvision",
    ]
    assert all("pip install 'prunelab[" in line for line in said)


def test_nothing_that_is_heavy_is_imported_before_it_is_used():
    heavy = ("torchvision", "pandas", "matplotlib", "PIL", "sympy", "torch._dynamo", "prunelab.course", "dask")
    code = f"import sys, prunelab; print(*[name for name in {heavy} if name in sys.modules])"
    assert run(code).split() == []

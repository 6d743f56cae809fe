"""Time to find the groups of every classification model of torchvision, beside Torch-Pruning's dependency graph.

    python -m bench.tracing [--models resnet18 …] [--repeats 3] [--times] [--out bench/tracing.md]

Neither gets a hint.  Both run in one process, in turns, on the same model and input; each time is the least of the
repeats.
"cuts" says whether half of everything can then be removed and the model still runs, or the error
that came instead; ``--times`` leaves that out.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
import torchvision.models as tv
from torch import Tensor, nn
from tqdm import tqdm

import prunelab as pl


def ours(model: nn.Module, inputs: Tensor) -> pl.DependencyGraph:
    """Trace with prunelab."""
    return pl.trace(model, inputs)


def theirs(model: nn.Module, inputs: Tensor) -> Any:
    """Trace with Torch-Pruning."""
    return tp.DependencyGraph().build_dependency(model, example_inputs=inputs)


def cuts_ours(model: nn.Module, inputs: Tensor) -> str:
    """Prune half of all channels with prunelab and run the result."""
    graph = pl.trace(model, inputs)
    overrides = {group.name: min(0.5, 1 - 1 / group.size) for group in graph.groups}
    plan = pl.plan(pl.criteria.Random()(graph), ratio=0.5, overrides=overrides)
    pl.apply(model, plan)(inputs)
    return "yes"


def cuts_theirs(model: nn.Module, inputs: Tensor) -> str:
    """Prune half of all channels with Torch-Pruning and run the result; the classifier's outputs are left."""
    model = copy.deepcopy(model)
    last = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1000]
    tp.pruner.BasePruner(
        model, inputs, importance=tp.importance.RandomImportance(), pruning_ratio=0.5, ignored_layers=last
    ).step()
    model(inputs)
    return "yes"


def attempt(function: Callable[[nn.Module, Tensor], Any], model: nn.Module, inputs: Tensor) -> Any:
    """Return what the function returns, or the class of its error."""
    try:
        return function(model, inputs)
    except Exception as error:
        return type(error).__name__


def measure(name: str, repeats: int, cuts: bool) -> dict[str, Any]:
    """Return one row of the table."""
    torch.manual_seed(0)
    size = 299 if name == "inception_v3" else 256 if name.startswith("swin_v2") else 224
    model, inputs = tv.get_model(name, weights=None).eval(), torch.randn(1, 3, size, size)
    times: dict[str, list[float]] = {"prunelab": [], "Torch-Pruning": []}
    for _ in range(repeats):
        for key, function in (("prunelab", ours), ("Torch-Pruning", theirs)):
            start = time.perf_counter()
            done = attempt(function, model, inputs)
            times[key].append(float("nan") if isinstance(done, str) else time.perf_counter() - start)
    row: dict[str, Any] = {"model": name} | {key: min(values) for key, values in times.items()}
    if cuts:
        row["prunelab cuts"] = attempt(cuts_ours, model, inputs)
        row["Torch-Pruning cuts"] = attempt(cuts_theirs, model, inputs)
    return row


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=tv.list_models(module=tv))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--times", action="store_true", help="measure the time to trace alone")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for name in tqdm(args.models, unit="model"):
        rows.append(measure(name, args.repeats, not args.times))
        tqdm.write(json.dumps(rows[-1]))
    text = table(rows)
    print(text)
    if args.out:
        args.out.write_text(text)
        args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown, with the medians below."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    cells = [[f"{value:.3f} s" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    both = [row for row in rows if all(row[key] == row[key] for key in ("prunelab", "Torch-Pruning"))]
    medians = {key: statistics.median(row[key] for row in both) for key in ("prunelab", "Torch-Pruning")}
    ratio = statistics.median(row["Torch-Pruning"] / row["prunelab"] for row in both)
    traced = {key: sum(row[key] == row[key] for row in rows) for key in medians}
    cut = {key: sum(row.get(f"{key} cuts") == "yes" for row in rows) for key in medians}
    lines += [
        "",
        f"Median over {len(both)} models: prunelab {medians['prunelab']:.3f} s, Torch-Pruning "
        f"{medians['Torch-Pruning']:.3f} s; median ratio of times {ratio:.1f}.",
        f"Models traced without a hint: prunelab {traced['prunelab']}, Torch-Pruning {traced['Torch-Pruning']}, of "
        f"{len(rows)}.",
    ]
    if "prunelab cuts" in head:
        both_cut = f"prunelab {cut['prunelab']}, Torch-Pruning {cut['Torch-Pruning']}, of {len(rows)}."
        lines.append(f"Models cut without a hint: {both_cut}")
    lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

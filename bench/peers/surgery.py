"""Plan and surgery: from scores to a smaller model, and the whole way from a model to a smaller one.

python -m bench.peers.surgery [--quick]
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torchvision.models as tv
from torch import nn

import prunelab as pl
from bench.peers.command import main
from bench.peers.libraries import peer
from bench.peers.page import Ratio, Row, chosen, errors, median, seconds, table, times, unique
from bench.peers.setting import Setting
from bench.peers.timing import interleaved
from bench.peers.tracing import inputs_for

TITLE = "Plan and surgery"
MODELS = ("resnet18", "resnet50", "vgg16_bn", "densenet121", "mobilenet_v2", "efficientnet_b0", "regnet_y_1_6gf")
MODELS = (*MODELS, "convnext_tiny", "googlenet", "inception_v3")
QUICK = ("resnet18", "mobilenet_v2")
STEP, WHOLE = "score, plan, cut", "trace, score, plan, cut"
CHECKED = "score, plan, cut, check"


def our_step(model: nn.Module, graph: pl.DependencyGraph, check: bool = False) -> None:
    """Rank by L2 norm over the whole network, take half of the units, cut in place."""
    pl.apply(model, pl.plan(pl.criteria.Magnitude()(graph), ratio=0.5), inplace=True, check=check)


def our_whole(model: nn.Module, inputs: torch.Tensor) -> None:
    """Do the same from the model alone."""
    our_step(model, pl.trace(model, inputs))


def pruner(model: nn.Module, inputs: torch.Tensor) -> Any:
    """Return Torch-Pruning's pruner for the same: L2 norm, global, half of the channels."""
    tp = peer("torch_pruning")
    return tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=0.5,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )


def rows(setting: Setting) -> Iterator[Row]:
    """Time both; models are copied, and for the first of the two ways traced, outside of the time."""
    for name in QUICK if setting.quick else MODELS:
        torch.manual_seed(0)
        model, inputs = tv.get_model(name, weights=None).eval(), inputs_for(name)
        fresh: Callable[[], nn.Module] = lambda model=model: copy.deepcopy(model)  # noqa: E731

        def traced(fresh: Callable = fresh, inputs: torch.Tensor = inputs) -> tuple:
            own = fresh()
            return own, pl.trace(own, inputs)

        contestants = {
            f"prunelab: {STEP}": our_step,
            f"prunelab: {CHECKED}": partial(our_step, check=True),
            f"Torch-Pruning: {STEP}": lambda one: one.step(),
            f"prunelab: {WHOLE}": our_whole,
            f"Torch-Pruning: {WHOLE}": lambda own, x: pruner(own, x).step(),
        }
        prepare = {
            f"prunelab: {STEP}": traced,
            f"prunelab: {CHECKED}": traced,
            f"Torch-Pruning: {STEP}": lambda fresh=fresh, inputs=inputs: (pruner(fresh(), inputs),),
            f"prunelab: {WHOLE}": lambda fresh=fresh, inputs=inputs: (fresh(), inputs),
            f"Torch-Pruning: {WHOLE}": lambda fresh=fresh, inputs=inputs: (fresh(), inputs),
        }
        for method, found in interleaved(contestants, setting.repeats, prepare=prepare).items():
            who, _, what = method.partition(": ")
            yield {"model": name, "who": who, "what": what, "method": method} | found


def about() -> Iterator[str]:
    """Yield what is compared."""
    yield (
        "Half of all units by the L2 norm, ranked over the whole network: `pl.plan` and `pl.apply(…, inplace=True)` on "
        "fresh scores, and `BasePruner(…, global_pruning=True).step()`; then the same with the trace and the pruner's "
        "construction. `pl.apply` rehearses the cut on a copy without data and traces the result again, so that a cut "
        "that would go wrong is refused; that is in its time. By default it also runs the cut network and `pl.masked` "
        "once, at batch 1 in eval mode, and compares their values: that is the time with the check, the others are "
        "with `check=False`. In place the check needs a copy that is cut first."
    )


def markdown(found: list[Row]) -> Iterator[str]:
    """Yield the table."""
    body = []
    for name in unique(found, "model"):
        cells = [name]
        for what in (STEP, WHOLE):
            own = {row["who"]: row.get("cpu") for row in chosen(found, model=name, what=what)}
            cells += [seconds(own["prunelab"]), seconds(own["Torch-Pruning"]), times(_ratio(found, name, what))]
            if what == STEP:
                checked = next(iter(chosen(found, model=name, what=CHECKED)), {})
                cells.insert(2, seconds(checked["cpu"]) if "cpu" in checked else "–")
        body.append(cells)
    head = ["model"]
    for what in (STEP, WHOLE):
        head += [f"{what}: prunelab", *(["with the check"] if what == STEP else []), "Torch-Pruning", "ratio"]
    yield from table(head, body)
    yield from errors(found, "model", "method")


def _ratio(found: list[Row], name: str, what: str) -> float:
    own = {row["who"]: row.get("cpu", float("nan")) for row in chosen(found, model=name, what=what)}
    return own["Torch-Pruning"] / own["prunelab"]


def ratios(found: list[Row]) -> list[Ratio]:
    """Return what goes into the table of ratios."""
    names = unique(found, "model")
    return [
        Ratio(what, "Torch-Pruning", median(_ratio(found, name, what) for name in names), over=f"{len(names)} models")
        for what in (STEP, WHOLE)
    ]


if __name__ == "__main__":
    main(["surgery"])

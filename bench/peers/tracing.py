"""Trace: the time to find what belongs together, and whether the model can then be cut, over torchvision's classifiers.

python -m bench.peers.tracing [--quick]
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision.models as tv
from torch import Tensor, nn

import prunelab as pl
from bench.peers.command import main
from bench.peers.libraries import peer
from bench.peers.page import Ratio, Row, chosen, errors, median, table, times, unique
from bench.peers.problems import classifier
from bench.peers.setting import Setting
from bench.peers.timing import failure, interleaved, within

TITLE = "Trace"
QUICK = (
    "alexnet",
    "resnet18",
    "mobilenet_v2",
    "densenet121",
    "convnext_tiny",
    "shufflenet_v2_x0_5",
    "swin_t",
    "vit_b_32",
)
OURS, THEIRS = "prunelab", "Torch-Pruning"
PATIENCE = 120
"""Seconds that a cut may take."""


def inputs_for(name: str) -> Tensor:
    """Return one image of the size that a model was made for."""
    size = 299 if name == "inception_v3" else 256 if name.startswith("swin_v2") else 224
    return torch.randn(1, 3, size, size)


def ours(model: nn.Module, inputs: Tensor) -> object:
    """Trace with prunelab."""
    return pl.trace(model, inputs)


def theirs(model: nn.Module, inputs: Tensor) -> object:
    """Trace with Torch-Pruning."""
    return peer("torch_pruning").DependencyGraph().build_dependency(model, example_inputs=inputs)


def cut_ours(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Remove half of everything with prunelab."""
    graph = pl.trace(model, inputs)
    overrides = {group.name: min(0.5, 1 - 1 / group.size) for group in graph.groups}
    return pl.apply(model, pl.plan(pl.criteria.Random()(graph), ratio=0.5, overrides=overrides))


def cut_theirs(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Remove half of everything but the classes with Torch-Pruning."""
    tp = peer("torch_pruning")
    model = copy.deepcopy(model)
    own: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}  # not shared by pruners
    tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=[module for module in model.modules() if _makes_classes(module)] or [classifier(model)],
        **own,
    ).step()
    return model


def _makes_classes(module: nn.Module) -> bool:
    return getattr(module, "out_features", getattr(module, "out_channels", None)) == 1000


def runs(cut: Callable[[nn.Module, Tensor], nn.Module], model: nn.Module, inputs: Tensor) -> str:
    """Return "yes" if a model can be cut and still runs, "nothing cut" if nothing changed, or what was raised."""
    try:
        with within(PATIENCE):
            small = cut(model, inputs)
        with torch.no_grad():
            small.eval()(inputs)
        sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, small)]
        return "yes" if sizes[1] < sizes[0] else "nothing cut"
    except Exception as error:
        return failure(error)


def rows(setting: Setting) -> Iterator[Row]:
    """Time both on every model, on the CPU: neither computes what a GPU would help with."""
    for name in QUICK if setting.quick else tv.list_models(module=tv):
        torch.manual_seed(0)
        model, inputs = tv.get_model(name, weights=None).eval(), inputs_for(name)
        size = sum(parameter.numel() for parameter in model.parameters())
        contestants = {OURS: lambda m=model, x=inputs: ours(m, x), THEIRS: lambda m=model, x=inputs: theirs(m, x)}
        slow = [OURS, THEIRS] if size > 2e8 else []
        for method, found in interleaved(contestants, min(setting.repeats, 5), slow=slow).items():
            cut = cut_ours if method == OURS else cut_theirs
            yield {"model": name, "method": method, "cut": runs(cut, model, inputs), "params": size} | found


def about() -> Iterator[str]:
    """Yield what is compared."""
    yield (
        "The time from a model and one image to its groups: `pl.trace` and `tp.DependencyGraph().build_dependency`, "
        "without any hint to either. Then half of everything but the classes is removed at random and the result is "
        "run on an image: *cut* says whether that worked. Models without weights, batch of one."
    )


def markdown(found: list[Row]) -> Iterator[str]:
    """Yield the table."""
    body = []
    for name in unique(found, "model"):
        own = {row["method"]: row for row in chosen(found, model=name)}
        cells = [name]
        for method in (OURS, THEIRS):
            row = own.get(method, {})
            cells.append("fails" if "error" in row else f"{row.get('cpu', float('nan')) * 1000:.0f} ms")
        cells.append(times(_ratio(own)))
        cells += [own[method]["cut"].partition(":")[0] if method in own else "–" for method in (OURS, THEIRS)]
        body.append(cells)
    head = ["model", OURS, THEIRS, "ratio", f"cut, {OURS}", f"cut, {THEIRS}"]
    yield from table(head, body)
    yield from errors(found, "model", "method")
    failed: dict[tuple[str, str], list[str]] = {}
    for row in found:
        if row["cut"] not in ("yes", "nothing cut") and "error" not in row:
            what = re.sub(r"\d+", "n", row["cut"])[:160]  # the same message with other numbers
            failed.setdefault((row["method"], what), []).append(row["model"])
    if failed:
        yield from ["", "Cuts that failed (numbers in messages are written n):", ""]
        for (method, what), names in failed.items():
            yield f"- {method}, {', '.join(names)}: `{what.replace('`', chr(39))}`"


def _ratio(own: dict[str, Row]) -> float:
    if any("cpu" not in own.get(method, {}) for method in (OURS, THEIRS)):
        return float("nan")
    return own[THEIRS]["cpu"] / own[OURS]["cpu"]


def ratios(found: list[Row]) -> list[Ratio]:
    """Return what goes into the table of ratios."""
    names = unique(found, "model")
    own = {name: {row["method"]: row for row in chosen(found, model=name)} for name in names}
    value = median(_ratio(one) for one in own.values())
    both = sum(_ratio(one) == _ratio(one) for one in own.values())
    traced = {method: sum("error" not in row for row in chosen(found, method=method)) for method in (OURS, THEIRS)}
    cut = {method: sum(row["cut"] == "yes" for row in chosen(found, method=method)) for method in (OURS, THEIRS)}
    over = (
        f"{both} models that both trace; traced {traced[OURS]} and {traced[THEIRS]}, cut {cut[OURS]} and {cut[THEIRS]} "
        f"of {len(names)}"
    )
    goal = "≥ 2× at the median, all models"
    return [
        Ratio("trace", f"{THEIRS}, `build_dependency`", value, goal, value >= 2 and traced[OURS] == len(names), over)
    ]


if __name__ == "__main__":
    main(["tracing"])

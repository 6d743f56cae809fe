"""Moments: the diagonal of the empirical Fisher, the mean of every weight's squared per-sample gradients.

python -m bench.peers.moments [--quick]
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from bench.peers.command import main
from bench.peers.libraries import peer
from bench.peers.page import Ratio, Row, chosen, median, multiples, table, unique
from bench.peers.problems import NETWORKS, Batches, forward_backward, problem
from bench.peers.setting import Setting, devices
from bench.peers.timing import clock, interleaved

TITLE = "Moments: the diagonal of the Fisher"
FLOOR, OURS = "forward and backward", "prunelab"
LOOP, SINGLE = "Torch-Pruning, its loop", "Torch-Pruning, its loop, batches of one"
Moments = dict[str, Tensor]


def ours(model: nn.Module, batches: Batches) -> Moments:
    """Return the moments by prunelab."""
    return dict(pl.collect(model, batches, {"moments"}).moments)


def torch_pruning(model: nn.Module, batches: Batches) -> Moments:
    """Do what the docstring of `GroupHessianImportance` shows, and return what it has accumulated."""
    scorer = peer("torch_pruning").importance.GroupHessianImportance()
    scorer.zero_grad()
    for inputs, targets in batches:
        for one in F.cross_entropy(model(inputs), targets, reduction="none"):
            model.zero_grad()
            one.backward(retain_graph=True)
            scorer.accumulate_grad(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[key]: value / scorer._counter[key] for key, value in scorer._accu_grad.items()}


def torch_pruning_single(model: nn.Module, batches: Batches) -> Moments:
    """Do the same with batches of one, so that a backward pass does not go through the others."""
    return torch_pruning(
        model, [(x[None], y[None]) for inputs, targets in batches for x, y in zip(inputs, targets, strict=True)]
    )


def backpack(model: nn.Module, batches: Batches) -> Moments:
    """Return the moments by BackPACK's `SumGradSquared`; the model has been extended.

    Its sums are of gradients of the batch's mean loss, so they are scaled by the batch's size, squared.
    """
    library, extensions = peer("backpack"), peer("backpack.extensions")
    loss = library.extend(nn.CrossEntropyLoss())
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for inputs, targets in batches:
        model.zero_grad()
        with library.backpack(extensions.SumGradSquared()):
            loss(model(inputs), targets).backward()
        for name, parameter in model.named_parameters():
            total[name] += parameter.sum_grad_squared * len(inputs) ** 2
    return {name: value / sum(len(targets) for _, targets in batches) for name, value in total.items()}


def exact(model: nn.Module, batches: Batches) -> Moments:
    """Return the moments by one backward pass per sample, with nothing but autograd."""
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for inputs, targets in batches:
        for x, y in zip(inputs, targets, strict=True):
            gradients = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(parameters.values()))
            for value, gradient in zip(total.values(), gradients, strict=True):
                value += gradient.square()
    return {name: value / sum(len(targets) for _, targets in batches) for name, value in total.items()}


def extended(model: nn.Module) -> nn.Module:
    """Return a copy that BackPACK has prepared; it asks for modules that do not write in place."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return peer("backpack").extend(model)


def contestants(model: nn.Module, batches: Batches) -> dict[str, Callable[[], object]]:
    """Return name -> what is timed; BackPACK and Torch-Pruning leave things on a model and get copies."""
    own, prepared = copy.deepcopy(model), cache(lambda: extended(model))
    return {
        FLOOR: lambda: forward_backward(model, batches),
        OURS: lambda: ours(model, batches),
        "BackPACK": lambda: backpack(prepared(), batches),
        SINGLE: lambda: torch_pruning_single(own, batches),
        LOOP: lambda: torch_pruning(own, batches),
    }


def distance(found: Moments, wanted: Moments) -> float:
    """Return the norm of the difference over all parameters, relative to the wanted."""
    pairs = [(found.get(name, torch.zeros_like(value)), value) for name, value in wanted.items()]
    return float(
        torch.cat([(a - b).flatten() for a, b in pairs]).norm() / torch.cat([b.flatten() for _, b in pairs]).norm()
    )


def rows(setting: Setting) -> Iterator[Row]:
    """Time all on every network and device, and compare what comes out with autograd's, sample by sample."""
    images, batch = (16, 16) if setting.quick else (64, 64)
    for device in devices():
        for network in NETWORKS[:1] if setting.quick else NETWORKS:
            model, batches = problem(network, images, batch, device)
            wanted = exact(model, batches)
            named = contestants(model, batches)
            for method, found in interleaved(named, setting.repeats, slow=(LOOP, SINGLE)).items():
                row = {"network": network, "device": device, "method": method, "images": images, "batch": batch} | found
                if method != FLOOR and "error" not in row:
                    row["difference"] = distance(named[method](), wanted)
                yield row


def about() -> Iterator[str]:
    """Yield what is compared."""
    yield (
        "`pl.collect(model, batches, {\"moments\"})`; BackPACK's `SumGradSquared` on an extended copy; Torch-Pruning's "
        "loop as the docstring of `GroupHessianImportance` has it, one backward pass through the batch for each of its "
        "losses, and the same loop on batches of one image. The floor is one forward and backward pass over the same "
        "data; *difference* is how far the result is from that of autograd, one sample at a time (norms over all "
        "parameters)."
    )


def markdown(found: list[Row]) -> Iterator[str]:
    """Yield the tables: multiples of the floor, and how far off the results are."""
    yield from multiples(found, FLOOR)
    methods = [method for method in unique(found, "method") if method != FLOOR]
    yield "Difference:"
    yield ""
    body = []
    for network in unique(found, "network"):
        own = {row["method"]: row for row in chosen(found, network=network)}
        body.append([network, *(f"{own[m]['difference']:.0e}" if "difference" in own[m] else "–" for m in methods)])
    yield from table(["network", *methods], body)
    if any(row.get("difference", 0) > 0.01 for row in found if row["method"] in (LOOP, SINGLE)):
        yield ""
        yield (
            "Torch-Pruning's difference is not rounding: `accumulate_grad` asks whether a *name* is in a dictionary "
            "that is keyed by *parameter*, so each sample replaces the one before it, and only the last is left."
        )


def ratios(found: list[Row]) -> list[Ratio]:
    """Return what goes into the table of ratios."""
    lines = []
    for device in unique(found, "device"):
        own = chosen(found, device=device)
        where = "" if device == "cpu" else f", {device}"
        by = {(row["network"], row["method"]): row.get(clock(row), float("nan")) for row in own}
        networks = unique(own, "network")

        def against(method: str, by: dict = by, networks: list[str] = networks) -> float:
            return median(by[name, method] / by[name, OURS] for name in networks)

        floor = 1 / against(FLOOR)
        over = f"{len(networks)} networks"
        lines += [
            Ratio(f"moments{where}", LOOP, against(LOOP), "≥ 10×", against(LOOP) >= 10, over),
            Ratio(f"moments{where}", SINGLE, against(SINGLE), over=over),
            Ratio(f"moments{where}", "BackPACK, where it runs", against("BackPACK"), over=over),
            Ratio(f"moments{where}, cost", f"{FLOOR} = 1", floor, "≤ 2.5×", floor <= 2.5, over),
        ]
    return lines


if __name__ == "__main__":
    main(["moments"])

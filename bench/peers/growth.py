"""Growth: what each step costs as width, depth, batch and samples double.

python -m bench.peers.growth [--quick]
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import prunelab as pl
from bench.peers.command import main
from bench.peers.footprint import available, elsewhere, grown
from bench.peers.page import Ratio, Row, chosen, seconds, table, unique
from bench.peers.problems import Batches, forward_backward
from bench.peers.setting import Setting
from bench.peers.timing import interleaved
from prunelab.networks import ResNet

TITLE = "Growth"
BASE = {"width": 8, "depth": 14, "batch": 32, "samples": 64}
GROWN = {"width": (8, 16, 32, 64), "depth": (8, 14, 26, 50), "batch": (8, 16, 32, 64), "samples": (32, 64, 128, 256)}
"""What doubles, the rest staying as in BASE; a ResNet of depth 6n + 2 has n blocks in each of three stages."""
FIGURE = "peers-growth.png"
STEPS = ("forward and backward", "trace", "moments", "K-FAC", "gate", "plan", "surgery")


def steps(width: int, depth: int, batch: int, samples: int) -> dict[str, Callable[[], object]]:
    """Return name -> what is measured, on a residual network of so many channels and layers."""
    torch.manual_seed(0)
    model: nn.Module = ResNet(depth, 10, width=width).eval()
    images, labels = torch.randn(samples, 3, 32, 32), torch.arange(samples) % 10
    batches: Batches = list(zip(images.split(batch), labels.split(batch), strict=True))
    inputs = images[:1]
    graph = pl.trace(model, inputs)
    scores = pl.criteria.Magnitude()(graph)
    plan = pl.plan(scores, flops=0.5)
    return {
        "forward and backward": lambda: forward_backward(model, batches),
        "trace": lambda: pl.trace(model, inputs),
        "moments": lambda: pl.collect(model, batches, {"moments"}),
        "K-FAC": lambda: pl.collect(model, batches, {"kronecker"}),
        "gate": lambda: pl.criteria.Gate(curvature="mc", temperature=4.0)(graph, batches),
        "plan": lambda: pl.plan(scores, flops=0.5),
        "surgery": lambda: pl.apply(model, plan, check=False),
    }


def sizes(quick: bool) -> Iterator[tuple[str, int, dict[str, int]]]:
    """Yield what grows, how large it is, and the whole setting."""
    for what, values in GROWN.items():
        for value in values[:3:2] if quick else values:
            yield what, value, BASE | {what: value}


def rows(setting: Setting) -> Iterator[Row]:
    """Measure time here and memory in clean processes."""
    memory: dict[str, Any] = elsewhere("bench.peers.growth", int(setting.quick)) if available() else {}
    for what, value, size in sizes(setting.quick):
        for step, found in interleaved(steps(**size), 3).items():
            yield {"grows": what, "size": value, "step": step} | found | memory.get(f"{what} {value} {step}", {})


def footprints(quick: bool) -> dict[str, Row]:
    """Return the memory of every step at every size."""
    torch.set_num_threads(1)
    found = {}
    for what, value, size in sizes(quick):
        for step, function in steps(**size).items():
            found[f"{what} {value} {step}"] = grown(function)
    return found


def exponent(points: list[tuple[float, float]]) -> float:
    """Return the slope of a straight line through the logarithms: cost ~ size to that power."""
    points = [(math.log(size), math.log(cost)) for size, cost in points if size > 0 and cost > 0]
    if len(points) < 2:
        return float("nan")
    middle = [sum(column) / len(points) for column in zip(*points, strict=True)]
    above = sum((x - middle[0]) * (y - middle[1]) for x, y in points)
    return above / sum((x - middle[0]) ** 2 for x, _ in points)


def about() -> Iterator[str]:
    """Yield what is measured."""
    base = ", ".join(f"{name} {value}" for name, value in BASE.items())
    yield (
        f"A residual network on noise of 32 × 32 pixels; one of these grows, the rest stays: {base}. *Gate* is with "
        "one sampled label. The exponent p of cost ~ size^p is fitted to all sizes, for time and, in brackets, "
        "memory; a step that does not look at something has p near 0. Memory below 1 MB counts as none."
    )


def markdown(found: list[Row]) -> Iterator[str]:
    """Yield the exponents, the figure and the times."""
    what = unique(found, "grows")
    body = []
    for step in unique(found, "step"):
        cells = [step]
        for name in what:
            own = chosen(found, grows=name, step=step)
            times = exponent([(row["size"], row["cpu"]) for row in own if "cpu" in row])
            memory = [(row["size"], row["megabytes"]) for row in own if row.get("megabytes", 0) >= 1]
            cells.append(f"{times:.1f} ({exponent(memory):.1f})" if len(memory) > 1 else f"{times:.1f} (–)")
        body.append(cells)
    yield from table(["exponent of", *what], body)
    yield ""
    if drawable(found):
        yield f"![Time against size, both on logarithmic axes, a panel for each thing that grows]({FIGURE})"
        yield ""
    for name in what:
        own = chosen(found, grows=name)
        yield f"{name}, time and memory:"
        yield ""
        body = []
        for step in unique(own, "step"):
            cells = [step]
            for row in chosen(own, step=step):
                size = row.get("megabytes")
                cells.append(seconds(row.get("cpu")) + ("" if size is None else f", {size:.0f} MB"))
            body.append(cells)
        yield from table([name, *map(str, unique(own, "size"))], body)
        yield ""


def drawable(found: list[Row]) -> bool:
    """Tell whether there are sizes enough for a figure; a quick run has too few."""
    return len(unique(chosen(found, grows="width"), "size")) > 2


def finish(found: list[Row], folder: Path) -> None:
    """Draw the figure beside the page."""
    if not drawable(found):
        return
    from prunelab.drawing.style import BLUE, GREY, SPARE, VERMILLION, axes_of, picture, png

    what, names = unique(found, "grows"), unique(found, "step")
    figure, panels = picture(12, 4.2), []
    for place, name in enumerate(what, 1):
        label = "seconds of the processor" if place == 1 else ""
        panel = axes_of(figure, xlabel=name, ylabel=label, place=100 + 10 * len(what) + place)
        for number, step in enumerate(names):
            own = [row for row in chosen(found, grows=name, step=step) if "cpu" in row]
            colour, marker, line = [(GREY, "s", ":"), *SPARE, (BLUE, "o", "--"), (VERMILLION, "^", "-")][number]
            points = [row["size"] for row in own], [row["cpu"] for row in own]
            panel.loglog(*points, color=colour, marker=marker, linestyle=line, label=step)
        panel.set_xticks(unique(chosen(found, grows=name), "size"), unique(chosen(found, grows=name), "size"))
        panel.minorticks_off()
        panels.append(panel)
    low, high = (f(panel.get_ylim()[end] for panel in panels) for end, f in enumerate((min, max)))
    for panel in panels:
        panel.set_ylim(low, high)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=11)
    (folder / FIGURE).write_bytes(png(figure))


def ratios(found: list[Row]) -> list[Ratio]:
    """Return nothing: no peer is measured here."""
    return []


if __name__ == "__main__":
    if "--footprint" in sys.argv:
        print(json.dumps(footprints(bool(int(sys.argv[-1])))))
    else:
        main(["growth"])

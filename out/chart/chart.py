"""The one chart of the course: accuracy against FLOPs of one network, and a line for every method that you have met.

Flows in: the trained ResNet-20 and its images.  Flows out: ``data/chart.json``, and figures in which the chapters
before are grey.  ``python -m prunelab.course.chart`` measures it again: half an hour of one core.  Scores are taken on
training images, batch norm gets new statistics from them after a cut, nothing is trained, and accuracies are those on
all test images that come with prunelab.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.optim.swa_utils import update_bn
from tqdm.auto import tqdm

import prunelab as pl
from prunelab.course.held_out import draws
from prunelab.drawing.style import GREY, INK, PALE, axes_of, picture, styles
from prunelab.files.atomic import replacing
from prunelab.files.embedded import root
from prunelab.runtime.devices import accelerator
from prunelab.training import evaluate

Batches = list[tuple[torch.Tensor, torch.Tensor]]
Shares = Literal["competing", "equal"]
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
IMAGES, DRAWS = 500, 3
RAW = {"group_reduction": "sum", "normalizer": "none"}


@dataclass(frozen=True)
class Method:
    """A line of the chart.

    Attributes:
        chapter: the notebook that derives it, as ``"04"``.
        criterion: name of the criterion.
        options: of the criterion; raw ones, so that units compete by what they are said to cost.
        shares: whether the units of all groups compete, every group loses the same share, or both are drawn.
        refit: the layers that lose inputs are refitted, as 11 derives.
    """

    chapter: str
    criterion: str
    options: dict[str, Any] = field(default_factory=dict)
    shares: tuple[Shares, ...] = ("competing", "equal")
    refit: bool = False


METHODS: dict[str, Method] = {
    "random": Method("00", "random"),
    "magnitude": Method("02", "magnitude", RAW),
    "Taylor": Method("03", "taylor", RAW),
    "OBD": Method("04", "obd", {"fisher": "ggn"}),
    "Kron-OBS": Method("07", "kron_obs"),
    "EigenDamage": Method("08", "eigendamage", shares=("competing",)),
    "OBA": Method("09", "oba"),
    "gates, greedy": Method("10", "gate", {"interactions": True, "temperature": 4.0}, ("competing",)),
    "gates, greedy, refit": Method("11", "gate", {"interactions": True, "temperature": 4.0}, ("competing",), True),
}


def chart(chapter: str = "", shares: Shares = "competing") -> Figure:
    """Draw the chart as it stands after a chapter.

    Args:
        chapter: ``"04"``: the lines of the chapters before are grey, its own in colour, later ones are not drawn; by
            default all lines are drawn in colour.
        shares: whether units of all groups compete, or every group loses the same share.
    """
    rows = pd.DataFrame(json.loads((root() / "chart.json").read_text("utf-8"))["rows"])
    rows = rows[rows["shares"] == shares]
    names = [name for name, method in METHODS.items() if shares in method.shares]
    if chapter:
        names = [name for name in names if METHODS[name].chapter <= chapter]
    figure = picture(width=7.4)
    axes = axes_of(figure, xlabel="FLOPs kept (%)", ylabel="accuracy on test images (%)")
    looks = styles(METHODS[name].criterion + " refit" * METHODS[name].refit for name in names)
    for name, (_, color, marker, line) in zip(names, looks, strict=True):
        points = rows[rows["method"] == name].groupby("budget")
        x, y = 100 * points["flops_kept"].mean(), 100 * points["accuracy"].mean()
        error = 100 * points["accuracy"].std().fillna(0.0)
        past = bool(chapter) and METHODS[name].chapter < chapter and name != "random"
        look: dict[str, Any] = {
            "color": GREY if past else color,
            "linewidth": 1 if past else 2,
            "alpha": 0.7 if past else 1.0,
        }
        axes.errorbar(x, y, error, fmt=line, marker=marker, capsize=2, label=name, **look)
    whole = 100 * float(rows["whole"].iloc[0])
    axes.axhline(whole, color=PALE, linewidth=1, zorder=0)
    axes.annotate("the whole network", (100 * max(BUDGETS), whole), fontsize=10, color=INK, ha="right", va="bottom")
    axes.legend(frameon=False, fontsize=10, loc="lower right")
    return figure


def runs() -> Iterator[tuple[str, Shares, int]]:
    """Yield method, shares and draw of everything that is measured."""
    for name, method in METHODS.items():
        for shares in method.shares:
            yield from ((name, shares, draw) for draw in range(DRAWS))


def measure(name: str, shares: Shares, draw: int) -> list[dict[str, Any]]:
    """Return a row for every budget: share of the FLOPs kept, and accuracy on the test images."""
    method, device = METHODS[name], accelerator()
    images = pl.data.cifar10("mini")
    some = draws(images.train, IMAGES, DRAWS)[draw]
    batches = [(x.to(device), y.to(device)) for x, y in pl.data.loader(some, 125)]
    test = list(pl.data.loader(images.test, 500))
    model = pl.zoo.load("resnet20").to(device)
    options = method.options | ({"seed": draw} if method.criterion == "random" else {})
    scores = pl.criteria.get(method.criterion, **options)(pl.trace(model, batches[0][0][:1]), batches)
    whole, rows = evaluate(model, test)["accuracy"], []
    for budget in BUDGETS:
        small = _cut(model, scores, shares, budget, batches, method.refit)
        kept = pl.count(small, batches[0][0][:1]).flops / pl.count(model, batches[0][0][:1]).flops
        accuracy = evaluate(small, test)["accuracy"]
        row = {"method": name, "shares": shares, "draw": draw, "budget": budget, "flops_kept": round(kept, 5)}
        rows.append(row | {"accuracy": round(accuracy, 5), "whole": round(whole, 5)})
    return rows


def _cut(model: nn.Module, scores: Any, shares: Shares, budget: float, batches: Batches, refit: bool) -> nn.Module:
    if isinstance(scores, pl.criteria.EigenScores):
        small = pl.factorize(model, scores, flops=budget)
    else:
        plan = pl.plan(scores, flops=budget, scope="layer" if shares == "equal" else "global")
        small = pl.apply(model, plan, compensate=batches if refit else None)
    if not refit:
        update_bn(batches, small)
    return small.eval()


def main(arguments: list[str] | None = None, measure: Callable[..., list[dict[str, Any]]] = measure) -> None:
    """Measure what is missing and write the file, run by run."""
    parser = argparse.ArgumentParser(prog="python -m prunelab.course.chart", description="Measure the course's chart.")
    parser.add_argument("--out", default=str(root() / "chart.json"), help="the file (default: that of the course)")
    path = Path(parser.parse_args(arguments).out)
    rows = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
    there = {(row["method"], row["shares"], row["draw"]) for row in rows}
    for run in tqdm([run for run in reversed(list(runs())) if run not in there]):
        rows += measure(*run)
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        how = {"images": IMAGES, "network": "resnet20", "torch": torch.__version__}
        with replacing(path) as fresh:
            fresh.write_text(f'{{"settings": {json.dumps(how)}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()

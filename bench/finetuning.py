"""Prune ResNet-20 by several criteria, at once and in steps, fine-tune shortly, and measure what is left.

    python -m bench.finetuning [--data PATH] [--criteria obd …] [--shares 0.5 0.3 0.15] [--seeds 0 …]
                               [--scoring 500] [--images 8000] [--epochs 1] [--steps 4] [--out bench/finetuning]

With `--data full`, or a folder as `pl.data.cifar10` takes it, all of CIFAR-10 is used; else the part that comes with
prunelab.  Both ways see the same training images equally often: at once, all of them after the cut; in steps, a
share of them after each cut, with new scores before each.  OUT.json keeps every run as it ends, and a run that
is there is not done again; OUT.md is the table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import prunelab as pl
from bench.record import keep
from prunelab.data import ImageSet
from prunelab.training import Recipe, default_device, evaluate, fit

NETWORK = "resnet20"
INPUTS = torch.ones(1, 3, 32, 32)
PER: dict[str, Literal["unit", "flops"]] = {"magnitude": "unit"}
"""How scores are compared.  Those that estimate a loss are divided by the FLOPs that a unit saves; magnitude, a number
without such a meaning, is ranked as published.  bench/criteria.md has both ways for all."""
SETTINGS = ("network", "training images", "test images", "scoring", "images", "epochs", "lr", "steps")
Row = dict[str, Any]


def smaller(model: nn.Module, criterion: str, batches: list[tuple[Tensor, Tensor]], left: float) -> nn.Module:
    """Return ``model`` with the share ``left`` of its FLOPs, and with new batch-norm statistics."""
    scores = pl.criteria.get(criterion)(pl.trace(model, INPUTS.to(batches[0][0].device)), batches)
    if isinstance(scores, pl.criteria.EigenScores):
        small = pl.factorize(model, scores, flops=left)
    else:
        small = pl.apply(model, pl.plan(scores, flops=left, per=PER.get(criterion, "flops")))
    update_bn(batches, small)
    return small.eval()


def parts(images: ImageSet, number: int) -> list[ImageSet]:
    """Return the images in so many parts of about the same size."""
    ends = [round(len(images) * part / number) for part in range(number + 1)]
    return [ImageSet(images.images[start:end], images.targets[start:end]) for start, end in pairwise(ends)]


def prune(args: argparse.Namespace, data: pl.data.TrainTest, criterion: str, share: float, way: str, seed: int) -> Row:
    """Do one run and return what was measured, accuracies on all test images."""
    device, start = default_device(), time.process_time()
    test = pl.data.loader(data.test, 500)
    some = pl.data.loader(data.train.subset(args.scoring, seed), 125)
    batches = [(inputs.to(device), targets.to(device)) for inputs, targets in some]
    steps = args.steps if way == "in steps" else 1
    recipe = Recipe(args.epochs, lr=args.lr, weight_decay=5e-4, batch_size=64)
    current = pl.zoo.load(NETWORK).to(device)
    whole = pl.count(current, INPUTS.to(device))
    row: Row = {}
    for step, images in enumerate(parts(data.train.subset(args.images, seed), steps), 1):
        kept = pl.count(current, INPUTS.to(device)).flops / whole.flops
        current = smaller(current, criterion, batches, share ** (step / steps) / kept)
        if steps == 1:
            row["after the cut"] = evaluate(current, test)["accuracy"]
        fit(current, images, recipe, seed=seed + 1000 * step, progress=False)
    cost = pl.count(current, INPUTS.to(device))
    row |= {"flops kept": cost.flops / whole.flops, "params kept": cost.params / whole.params}
    return row | {"accuracy": evaluate(current, test)["accuracy"], "cpu seconds": round(time.process_time() - start, 1)}


# ── the table ─────────────────────────────────────────────────────────────────────────────────────────────────────


def spread(values: list[float]) -> str:
    """Return the mean of shares in percent, and their deviation if there are several."""
    if not values:
        return "–"
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table; its first column is text, the others are numbers."""
    yield "| " + " | ".join(head) + " |"
    yield "|---" + "|---:" * (len(head) - 1) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def markdown(kept: dict[str, Any]) -> str:
    """Return what was run, and two tables for each of the settings: accuracy, and what is left of the network."""
    lines = ["# Fine-tuned after pruning: at once and in steps", ""]
    for settings in dict.fromkeys(tuple(row[name] for name in SETTINGS) for row in kept["rows"]):
        lines += [*section(kept, dict(zip(SETTINGS, settings, strict=True)))]
    return "\n".join(lines)


def section(kept: dict[str, Any], settings: Row) -> Iterator[str]:
    """Yield the lines about all runs with the same settings."""
    rows = [row for row in kept["rows"] if all(row[name] == value for name, value in settings.items())]
    shares = sorted({row["share"] for row in rows}, reverse=True)
    seeds = sorted({row["seed"] for row in rows})
    network, train, test, scoring, images, epochs, lr, steps = settings.values()
    of = "all of CIFAR-10" if train == 50_000 else "the part of CIFAR-10 that comes with prunelab"
    passes = "once" if epochs == 1 else f"{epochs} times"
    yield f"## {network}, {of}"
    yield ""
    drawn = ", ".join(map(str, seeds))
    yield (
        f"The repository's checkpoint, {kept['whole'][str(test)]:.2%} of {test:,} test images before any cut. Scores "
        f"are taken on {scoring:,} training images, drawn from {train:,}. Both schedules train on the same {images:,}, "
        f"{passes}, in batches of 64, learning rate {lr:g} with a warm-up and a cosine: at once, all of them after one "
        f"cut; in steps, {round(images / steps):,} after each of {steps} cuts by the same factor, with scores taken "
        f"again before each. Batch-norm statistics are re-estimated after each cut. Seeds: {drawn}. "
        "`eigendamage` is `pl.factorize`, the others cut channels; `magnitude` ranks units by their raw scores, the "
        f"others by score per FLOP saved. No compensation, no distillation. PyTorch {kept['torch']}, {len(rows)} runs, "
        f"{sum(row['cpu seconds'] for row in rows) / 60:.0f} minutes of CPU time. From the number of test images, one "
        f"standard error of an accuracy is at most {50 / test**0.5:.1f} points; other training images would add to it. "
        "The learning rate was not tuned; it matters to fine-tunes as short as those between steps (12_iterative)."
    )
    yield ""
    flags = {"seeds": " ".join(map(str, seeds)), "shares": " ".join(f"{share:g}" for share in shares)}
    flags |= {name: f"{settings[name]:g}" for name in SETTINGS[3:]}
    yield f"    python -m bench.finetuning --data {'full' if train == 50_000 else 'mini'} " + " ".join(
        f"--{name} {value}" for name, value in flags.items()
    )
    yield ""
    yield f"Accuracy in % on all {test:,} test images:"
    yield ""
    names = list(dict.fromkeys(row["criterion"] for row in rows))

    def cell(name: str, share: float, way: str, what: str) -> str:
        found = [row for row in rows if (row["criterion"], row["share"], row["way"]) == (name, share, way)]
        return spread([row[what] for row in found])

    head = ["criterion"]
    for share in shares:
        head += [f"{share:.0%} of the FLOPs: after the cut", "at once, fine-tuned", "in steps, fine-tuned"]
    columns = [("at once", "after the cut"), ("at once", "accuracy"), ("in steps", "accuracy")]
    yield from table(head, [[name, *(cell(name, s, *column) for s in shares for column in columns)] for name in names])
    yield ""
    yield "What is left, in % of the FLOPs / of the parameters:"
    yield ""
    head = ["criterion", *(f"{share:.0%} asked, {way}" for share in shares for way in ("at once", "in steps"))]
    body = [
        [
            name,
            *(
                f"{cell(name, s, way, 'flops kept')} / {cell(name, s, way, 'params kept')}"
                for s in shares
                for way in ("at once", "in steps")
            ),
        ]
        for name in names
    ]
    yield from table(head, body)
    yield ""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["magnitude", "obd", "kron_obs", "eigendamage", "oba"]
    parser.add_argument("--criteria", nargs="+", default=known, choices=pl.criteria.names())
    parser.add_argument("--data", default="mini", help="mini, full, or a folder with CIFAR-10")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.3, 0.15], help="of the FLOPs kept")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of images and of their order")
    parser.add_argument("--scoring", type=int, default=500, help="training images that scores are taken on")
    parser.add_argument("--images", type=int, default=8000, help="training images for the fine-tune (mini has 5,000)")
    parser.add_argument("--epochs", type=int, default=1, help="passes over them")
    parser.add_argument("--lr", type=float, default=0.02, help="highest learning rate of the fine-tune")
    parser.add_argument("--steps", type=int, default=4, help="of the runs in steps")
    parser.add_argument("--out", type=Path, default=Path("bench/finetuning"), help="without a suffix")
    args = parser.parse_args()
    data = pl.data.cifar10(args.data)
    args.images = min(args.images, len(data.train))
    path = args.out.with_suffix(".json")
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"whole": {}, "rows": []}
    kept["torch"] = torch.__version__.split("+")[0]
    if str(len(data.test)) not in kept["whole"]:
        model = pl.zoo.load(NETWORK).to(default_device())
        kept["whole"][str(len(data.test))] = evaluate(model, pl.data.loader(data.test, 500))["accuracy"]
    settings = {"network": NETWORK, "training images": len(data.train), "test images": len(data.test)}
    settings |= {name: getattr(args, name) for name in SETTINGS[3:]}
    keys = [
        settings | {"seed": seed, "share": share, "criterion": criterion, "way": way}
        for seed in args.seeds
        for share in args.shares
        for criterion in args.criteria
        for way in ("at once", "in steps")
    ]
    missing = [key for key in keys if not any(key.items() <= row.items() for row in kept["rows"])]
    for key in tqdm(missing, unit="run"):
        kept["rows"].append(key | prune(args, data, key["criterion"], key["share"], key["way"], key["seed"]))
        keep(path, kept, markdown)
        tqdm.write(f"{key['criterion']}, {key['share']:.0%}, {key['way']}: {kept['rows'][-1]['accuracy']:.1%}")
    print(markdown(kept))


if __name__ == "__main__":
    main()

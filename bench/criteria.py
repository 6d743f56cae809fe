"""Compare every criterion with the oracle, and see what is left of a network after a cut, without fine-tuning.

    python bench/criteria.py [--networks resnet20 …] [--images 256] [--seeds 0 …] [--out bench/criteria]

Writes OUT.json after every measurement, continues from what is there already, and OUT.md at the end.  Two tables for
every network: Spearman's rank correlation of each criterion with the measured loss of silencing single units (a random
sample of them), over all units and within groups; accuracy and loss on test images after cuts to several shares of the
FLOPs, with and without compensation, scored once or again before each of several steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import prunelab as pl
from prunelab.course.held_out import rank_correlation
from prunelab.criteria.oracle import loss_changes
from prunelab.training import Recipe, evaluate, fit

INPUTS = torch.ones(1, 3, 32, 32)
RAW = {"normalizer": "none", "group_reduction": "sum"}
"""Options under which a groupwise criterion's scores compare between groups as they are."""

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "magnitude": {"magnitude": {}, "magnitude, L1, raw": {"p": 1, **RAW}},
    "taylor": {"taylor": {}, "taylor, raw": RAW, "taylor, sum first, raw": {"multivariable": True, **RAW}},
    "gate": {
        "gate": {},
        "gate + linear": {"linear": True},
        "gate, T=4": {"temperature": 4.0},
        "gate, hard labels": {"curvature": "empirical"},
    },
    "oba": {"oba": {"signed": True}, "oba, absolute": {}},
}
"""Criterion -> label -> options; any other criterion runs with its defaults, and raw where it can."""

GREEDY: dict[str, dict[str, Any]] = {
    "gate greedy": {"interactions": True},
    "gate greedy + linear": {"interactions": True, "linear": True},
    "gate greedy, T=4": {"interactions": True, "temperature": 4.0},
    "gate greedy, T=4 + linear": {"interactions": True, "temperature": 4.0, "linear": True},
    "gate greedy, T=4, 1 label": {"interactions": True, "temperature": 4.0, "curvature": "mc"},
}
"""For cuts only: alone, a unit's score is that of the gate without interactions."""

FACTORIZED: dict[str, dict[str, Any]] = {
    "eigendamage, factorized": {},
    "eigendamage, factorized, sampled labels": {"fisher": "mc"},
    "eigendamage, factorized, GGN": {"fisher": "ggn"},
}
"""For cuts only: the criterion's own surgery, bottlenecks in the eigenbasis instead of channels."""

SHOWN = {
    "random": "random",
    "magnitude, L1, raw": "magnitude, Σ abs(w)",
    "taylor, raw": "Taylor, Σ abs(w g)",
    "obd": "OBD, empirical Fisher",
    "obs": "OBS, Kronecker factors",
    "kron_obd": "Kron-OBD",
    "kron_obs": "Kron-OBS",
    "eigendamage, factorized, GGN": "EigenDamage, factorised",
    "oba": "θ ⊙ Hθ, signed",
    "gate": "gate",
    "gate + linear": "gate, with its slope",
    "gate, T=4": "gate, softened labels",
    "gate greedy, T=4": "gate, greedy, softened labels",
}
"""Label -> name of the lines that the README shows."""

STEPPED = ("magnitude, L1, raw", "taylor, raw", "kron_obd", "gate", *(label for label in GREEDY if "T=4" in label))
"""What is also scored again before each of several steps, which takes a while."""

WAYS: list[tuple[str, str | None]] = [("unit", None), ("flops", None), ("flops", "consumers")]
"""What units are ranked per, and what is refitted."""

SLOW = ("oracle", "quadratic")
"""Only where asked for by name: a pass over the data for every unit."""


def criteria(names: list[str]) -> dict[str, pl.criteria.Criterion]:
    """Return label -> criterion for all variants of the named ones."""
    found = {}
    for name in names:
        defaults = {field.name: field.default for field in dataclasses.fields(pl.criteria.CRITERIA[name])}
        raw = {f"{name}, raw": RAW} if defaults.get("normalizer", "none") != "none" else {}
        for label, options in VARIANTS.get(name, {name: {}, **raw}).items():
            found[label] = pl.criteria.get(name, **options)
    return found


class Run:
    """The settings, and the rows measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.path = args, args.out.with_suffix(".json")
        self.rows: list[dict[str, Any]] = json.loads(self.path.read_text())["rows"] if self.path.is_file() else []
        self.data = pl.data.cifar10("mini")
        self.test = list(pl.data.loader(self.data.test.subset(args.test), 250))
        self.truths: dict[str, tuple[dict[str, list[int]], Tensor]] = {}

    def done(self, **key: Any) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        text = ",\n".join(json.dumps(row) for row in self.rows)
        self.path.write_text(f'{{"torch": "{torch.__version__}", "rows": [\n{text}\n]}}\n')
        tqdm.write("  ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))

    def asked(self, label: str) -> bool:
        """Return whether a variant is wanted."""
        return not self.args.labels or label in (SHOWN if self.args.labels == ["shown"] else self.args.labels)

    def batches(self, images: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        return list(pl.data.loader(self.data.train.subset(images, seed), 64))


def sample(graph: pl.DependencyGraph, number: int, seed: int) -> dict[str, list[int]]:
    """Return about so many units, from every group its share."""
    generator, total = torch.Generator().manual_seed(seed), sum(group.size for group in graph.groups)
    return {
        group.name: torch.randperm(group.size, generator=generator)[
            : max(2, round(number * group.size / total))
        ].tolist()
        for group in graph.groups
    }


def correlations(run: Run, network: str, images: int, seed: int) -> None:
    """Measure a random sample of units and compare all criteria with that."""
    wanted = criteria([name for name in run.args.criteria if name != "oracle"])
    wanted = {label: made for label, made in wanted.items() if run.asked(label)}
    key = {"table": "correlation", "network": network, "images": images, "seed": seed}
    missing = {label: made for label, made in wanted.items() if not run.done(**key, criterion=label)}
    if not missing:
        return
    graph, batches = pl.trace(pl.zoo.load(network), INPUTS), run.batches(images, seed)
    units = sample(graph, run.args.units, seed)
    start = time.perf_counter()
    truth = loss_changes(graph, batches, units)
    seconds = time.perf_counter() - start
    for label, criterion in missing.items():
        start = time.perf_counter()
        try:
            scores = criterion(graph, batches)
        except pl.PruneLabError as error:
            tqdm.write(f"{network}: {label}: {error}")
            continue
        took = time.perf_counter() - start
        found = {name: scores[name][chosen].double() for name, chosen in units.items()}
        within = {name: rank_correlation(found[name], truth[name]) for name in units if len(units[name]) >= 6}
        row = {
            "criterion": label,
            "spearman": rank_correlation(torch.cat(list(found.values())), torch.cat(list(truth.values()))),
            "within groups": mean([value for value in within.values() if value == value] or [float("nan")]),
            "per group": within,
            "seconds": took,
            "oracle seconds": seconds,
            "units": sum(map(len, units.values())),
        }
        run.keep(key | row)


def samples(run: Run, network: str, images: int, seed: int) -> None:
    """Score on few or many images, and compare with what silencing costs on images that no criterion saw."""
    wanted = {label: made for label, made in criteria(run.args.criteria).items() if run.asked(label)}
    key = {"table": "samples", "network": network, "images": images, "seed": seed}
    missing = {label: made for label, made in wanted.items() if not run.done(**key, criterion=label)}
    if not missing:
        return
    graph, batches = pl.trace(pl.zoo.load(network), INPUTS), run.batches(images, seed)
    units, truth = unseen(run, network, graph)
    for label, criterion in missing.items():
        scores = criterion(graph, batches)
        found = torch.cat([scores[name][chosen].double() for name, chosen in units.items()])
        run.keep(key | {"criterion": label, "units": len(found), "spearman": rank_correlation(found, truth)})


def unseen(run: Run, network: str, graph: pl.DependencyGraph) -> tuple[dict[str, list[int]], Tensor]:
    """Return some units of every group and what silencing each costs on test images, measured once."""
    if network not in run.truths:
        units = sample(graph, run.args.units, 0)
        changes = loss_changes(graph, run.test[:2], units)
        run.truths[network] = units, torch.cat(list(changes.values()))
    return run.truths[network]


def cuts(run: Run, network: str, images: int, seed: int) -> None:
    """Cut to every share of the FLOPs, at once and in steps."""
    everything = criteria(run.args.criteria)
    if "gate" in run.args.criteria:
        everything |= {label: pl.criteria.Gate(**options) for label, options in GREEDY.items()}
    everything = {label: made for label, made in everything.items() if run.asked(label)}
    model, batches = pl.zoo.load(network), run.batches(images, seed)
    whole = pl.count(model, INPUTS).flops
    for label, criterion in everything.items():
        for steps in run.args.steps if label in STEPPED else [1]:
            scores = None
            for per, compensate in WAYS if steps == 1 else [("flops", None)]:
                if per not in run.args.per:
                    continue
                for share in run.args.shares:
                    key = {"table": "cuts", "network": network, "images": images, "seed": seed}
                    key |= {"criterion": label, "steps": steps, "per": per, "flops": share, "compensate": compensate}
                    if run.done(**key):
                        continue
                    current = model
                    try:
                        for step in range(1, steps + 1):
                            if scores is None or steps > 1:
                                scores = criterion(pl.trace(current, INPUTS), batches)
                            left = share ** (step / steps) * whole / pl.count(current, INPUTS).flops
                            plan = pl.plan(scores, flops=left, per=per)
                            current = pl.apply(current, plan, compensate=batches if compensate else None)
                    except pl.PruneLabError as error:
                        tqdm.write(f"{network}: {label}: {error}")
                        continue
                    row = key | evaluate(current, run.test)
                    if run.args.finetune and steps == 1 and (per, compensate) == ("flops", None):
                        recipe = Recipe(run.args.finetune, lr=run.args.lr, weight_decay=5e-4)
                        fit(current, run.data.train, recipe, seed=seed, progress=False)
                        row["fine-tuned"] = evaluate(current, run.test)["accuracy"]
                    run.keep(row)


def factorizations(run: Run, network: str, images: int, seed: int) -> None:
    """Replace layers by bottlenecks, to every share of the FLOPs, at once."""
    model, batches = pl.zoo.load(network), run.batches(images, seed)
    graph = pl.trace(model, INPUTS)
    for label, options in FACTORIZED.items():
        if not run.asked(label):
            continue
        scores = None
        for share in run.args.shares:
            key = {"table": "cuts", "network": network, "images": images, "seed": seed, "criterion": label}
            key |= {"steps": 1, "per": "flops", "flops": share, "compensate": None}
            if run.done(**key):
                continue
            scores = scores or pl.criteria.EigenDamage(**options)(graph, batches)
            try:
                run.keep(key | evaluate(pl.factorize(model, scores, flops=share), run.test))
            except pl.PruneLabError as error:
                tqdm.write(f"{network}: {label}: {error}")


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table; its first column is text, the others are numbers."""
    yield "| " + " | ".join(head) + " |"
    yield "|---" + "|---:" * (len(head) - 1) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def spread(values: list[float], form: str = "{:.2f}") -> str:
    """Return the mean of some values, and their deviation if there are several."""
    values = [value for value in values if value == value]
    if not values:
        return "–"
    return form.format(mean(values)) + (f" ± {form.format(stdev(values))}" if len(values) > 1 else "")


def unique(rows: list[dict[str, Any]], name: str) -> list[Any]:
    """Return the values of a column, each once, in the order of rows."""
    return list(dict.fromkeys(row[name] for row in rows if name in row))


def layers(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of rank correlations within each group, means over seeds."""
    rows = [row for row in rows if row.get("per group")]
    groups = list(dict.fromkeys(name for row in rows for name in row["per group"]))
    if not groups:
        return
    yield f"### {rows[0]['network']}: rank correlation within each group"
    yield ""
    body = []
    for label in unique(rows, "criterion"):
        own = [row["per group"] for row in rows if row["criterion"] == label]
        body.append([label, *(spread([one[name] for one in own if name in one]).split(" ")[0] for name in groups)])
    yield from table(["criterion", *(f"`{name}`" for name in groups)], body)


def accuracies(network: str, steps: int, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of accuracies and losses after cuts."""
    shares = sorted(unique(rows, "flops"), reverse=True)
    how = "at once" if steps == 1 else f"in {steps} steps, scored again before each"
    usual = max(unique(rows, "images"), key=[row["images"] for row in rows].count)
    rows = [
        row if row["images"] == usual else row | {"criterion": f"{row['criterion']}, {row['images']} images"}
        for row in rows
    ]
    yield f"## {network}: accuracy (loss) after cuts {how}"
    yield ""
    several = len(unique(rows, "seed"))
    more = f"; means ± deviations are over {several} seeds of these" if several > 1 else ""
    yield f"Without fine-tuning, scored on {usual} images{more}."
    yield ""
    tuned = any("fine-tuned" in row for row in rows)
    head = ["criterion", "ranked per", *(f"{share:.0%} of the FLOPs" for share in shares)]
    head += [f"{share:.0%}, fine-tuned" for share in shares] if tuned else []
    body = []
    for label in unique(rows, "criterion"):
        for per, compensate in WAYS:
            own = [
                row for row in rows if (row["criterion"], row["per"], row.get("compensate")) == (label, per, compensate)
            ]
            if not own:
                continue
            at = {share: [row for row in own if row["flops"] == share] for share in shares}
            cells = [
                f"{spread([100 * row['accuracy'] for row in at[share]], '{:.1f}')} "
                f"({spread([row['loss'] for row in at[share]]).split(' ')[0]})"
                for share in shares
            ]
            if tuned:
                share_of = [[100 * row["fine-tuned"] for row in at[share] if "fine-tuned" in row] for share in shares]
                cells += [spread(values, "{:.1f}") for values in share_of]
            body.append([label, f"{per}, compensated" if compensate else per, *cells])
    yield from table(head, body)


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the tables of the README: a line for each criterion, at its most common setting."""
    lines = []
    for network in ("resnet20", "vit_small"):
        own = [row for row in rows if row["network"] == network and row["images"] == 256]
        shares = [0.7, 0.5, 0.3, 0.15]
        head = [f"`{network}`", "rank correlation", *(f"{share:.0%} of the FLOPs" for share in shares)]
        body = []
        for label, shown in SHOWN.items():
            found = [row for row in own if row["criterion"] == label]
            ranks = [row["spearman"] for row in found if row["table"] == "correlation"]
            cells = []
            for share in shares:
                here = [
                    row for row in found if row.get("flops") == share and row["steps"] == 1 and row["per"] == "flops"
                ]
                ways = [[row for row in here if row.get("compensate") == which] for which in (None, "consumers")]
                means = [spread([100 * row["accuracy"] for row in way], "{:.1f}") for way in ways if way]
                cells.append(" → ".join(means).replace(" ± ", "±") or "–")
            body.append([shown, f"{mean(ranks):.2f}" if ranks else "–", *cells])
        lines += [*table(head, body), ""]
    return "\n".join(lines)


def sizes_table(network: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of rank correlations on unseen images."""
    sizes = sorted(unique(rows, "images"))
    yield f"## {network}: how many images a score takes"
    yield ""
    seeds = ", ".join(str(len({row["seed"] for row in rows if row["images"] == size})) for size in sizes)
    yield f"Rank correlation with what silencing {rows[0]['units']} units, one at a time, costs on 500 test images that"
    yield f"no criterion saw; seeds of scoring images: {seeds}."
    yield ""
    body = []
    for label in unique(rows, "criterion"):
        own = [row for row in rows if row["criterion"] == label]
        body.append([label, *(spread([row["spearman"] for row in own if row["images"] == size]) for size in sizes)])
    yield from table(["criterion", *(f"{size} images" for size in sizes)], body)


def ranks_table(network: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of rank correlations with the oracle on the same images."""
    sizes = sorted(unique(rows, "images"))
    seeds, units = len(unique(rows, "seed")), max(row["units"] for row in rows)
    yield f"## {network}: rank correlation with the oracle"
    yield ""
    yield f"Up to {units} units, seeds of units and images: {seeds}; in brackets the mean within groups."
    yield ""
    body = []
    for label in unique(rows, "criterion"):
        own = [row for row in rows if row["criterion"] == label]
        cells = []
        for size in sizes:
            here = [row for row in own if row["images"] == size]
            inside = spread([row["within groups"] for row in here]).split(" ")[0]
            cells.append(f"{spread([row['spearman'] for row in here])} ({inside})")
        last = [row["seconds"] for row in own if row["images"] == sizes[-1]]
        body.append([label, *cells, f"{mean(last):.1f}" if last else "–"])
    oracle = mean(row["oracle seconds"] / row["units"] for row in rows if row["images"] == sizes[-1])
    body.append(["oracle", *("1" for _ in sizes), f"{oracle:.2f} per unit"])
    yield from table(["criterion", *(f"{size} images" for size in sizes), f"seconds, {sizes[-1]} images"], body)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return all tables."""
    lines = [
        "`python bench/criteria.py` measures what `criteria.json` lacks and writes this page; a row there names its"
        " network, seed and number of images. `bn_scale` has no line where no norm runs through a group, as in a"
        " Transformer's heads and hidden layers.",
        "",
    ]
    order = ["resnet20", "vgg13_narrow", "vit_small"]
    for network in sorted(unique(rows, "network"), key=lambda name: (*order, name).index(name)):
        own = [row for row in rows if row["network"] == network]
        tables = {name: [row for row in own if row["table"] == name] for name in unique(own, "table")}
        if "correlation" in tables:
            lines += [*ranks_table(network, tables["correlation"]), "", *layers(tables["correlation"]), ""]
        if "samples" in tables:
            lines += [*sizes_table(network, tables["samples"]), ""]
        cut = tables.get("cuts", [])
        for steps in sorted(unique(cut, "steps")):
            lines += [*accuracies(network, steps, [row for row in cut if row["steps"] == steps]), ""]
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg13_narrow", "vit_small"])
    parser.add_argument("--criteria", nargs="+", default=[n for n in pl.criteria.names() if n not in SLOW])
    parser.add_argument(
        "--labels", nargs="+", help='of these criteria only these variants; "shown": those of the README'
    )
    parser.add_argument("--per", nargs="+", default=["unit", "flops"], help="what units are ranked per in cuts at once")
    parser.add_argument(
        "--tables", nargs="+", default=["correlation", "cuts"], choices=["correlation", "samples", "cuts"]
    )
    parser.add_argument("--images", nargs="+", type=int, default=[256], help="to score on")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of images and units")
    parser.add_argument("--units", type=int, default=150, help="to measure, about")
    parser.add_argument("--test", type=int, default=1000, help="images to measure accuracy on")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.9, 0.7, 0.5, 0.3, 0.15], help="of the FLOPs kept")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--finetune", type=int, default=0, help="epochs on the embedded images after cuts at once")
    parser.add_argument("--lr", type=float, default=0.01, help="of fine-tuning")
    parser.add_argument("--out", type=Path, default=Path("bench/criteria"), help="without a suffix")
    parser.add_argument("--summary", action="store_true", help="print the README's tables from what is there, and stop")
    args = parser.parse_args()
    if args.summary:
        print(summary(json.loads(args.out.with_suffix(".json").read_text())["rows"]))
        return
    warnings.filterwarnings("ignore", message=".*single units are too large")
    run = Run(args)
    for network in args.networks:
        for images in args.images:
            for seed in args.seeds:
                if "correlation" in args.tables:
                    correlations(run, network, images, seed)
                if "samples" in args.tables:
                    samples(run, network, images, seed)
                if "cuts" in args.tables:
                    cuts(run, network, images, seed)
                    if "eigendamage" in run.args.criteria:
                        factorizations(run, network, images, seed)
    args.out.with_suffix(".md").write_text(markdown(run.rows))
    print(markdown(run.rows))


if __name__ == "__main__":
    main()

"""Budget asked against budget got: networks × criteria × kinds of budget × scopes, counted on what was cut.

    python -m bench.budgets [--networks resnet20 …] [--criteria taylor …] [--shares 0.75 0.5 0.25] [--images 128]
                            [--torchvision [resnet18 …]] [--out bench/budgets]

A plan says what it keeps; here the model is cut by it, and its FLOPs, parameters and bytes are counted again.  Networks
of the zoo are trained, and scored on training images; with `--torchvision`, classifiers of torchvision are cut as well,
with random scores and without memory.  OUT.json keeps every row as soon as it is there, and a row that is there is not
made again; OUT.md is the table.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torchvision.models as tv
from torch import Tensor, nn
from tqdm import tqdm

import prunelab as pl
from bench.finetuning import table
from bench.record import keep
from prunelab.planning.pools import SCOPES

Row = dict[str, Any]
CRITERIA = ("random", "magnitude", "fpgm", "taylor", "obd", "kron_obs", "oba", "gate")
KINDS = ("flops", "params", "bytes")
BLOCKS = 8
"""What is also tried as `round_to`, with the global scope."""
SPREAD = (
    "resnet18 resnet50 vgg16_bn densenet121 mobilenet_v3_large efficientnet_b0 convnext_tiny regnet_y_400mf "
    "shufflenet_v2_x1_0 googlenet mnasnet1_0 squeezenet1_1 vit_b_16 swin_t"
)
KEYS = ("network", "criterion", "scope", "round_to", "kind", "share")


def settings(shares: list[float]) -> list[Row]:
    """Return what is asked of every network and criterion."""
    asked = [(scope, None, kind, share) for scope, kind, share in product(SCOPES, KINDS, shares)]
    asked += [("global", BLOCKS, kind, share) for kind, share in product(KINDS[:2], shares)]
    return [dict(zip(KEYS[2:], row, strict=True)) for row in asked]


def scores_for(network: str, criterion: str, images: int) -> tuple[pl.Scores, Tensor]:
    """Return the scores of a network of the zoo, or random ones of one of torchvision, and its inputs."""
    if network in pl.zoo.MODELS:
        inputs = torch.ones(1, 3, 32, 32)
        batches = pl.data.loader(pl.data.cifar10("mini").train.subset(images), 64)
        return pl.criteria.get(criterion)(pl.trace(pl.zoo.load(network), inputs), batches), inputs
    with torch.device("meta"):
        model: nn.Module = tv.get_model(network, weights=None).eval()
        inputs = torch.empty(1, 3, 224, 224)
    return pl.criteria.Random()(pl.trace(model, inputs)), inputs


def measure(scores: pl.Scores, inputs: Tensor, asked: Row) -> Row:
    """Plan, cut, count, and return the result."""
    model, row = scores.graph.model, {"got": None, "why": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their message is kept in the row
        try:
            plan = pl.plan(scores, **{asked["kind"]: asked["share"]}, scope=asked["scope"], round_to=asked["round_to"])
        except pl.BudgetError as error:
            return row | {"why": str(error)}
        small = pl.apply(model, plan)
    whole, cost = (pl.count(network, inputs).to_dict() for network in (model, small))
    row["got"] = cost[asked["kind"]] / whole[asked["kind"]]
    if abs(row["got"] - plan.budget["kept"][asked["kind"]]) > 1e-9:
        raise AssertionError(f"{asked}: the plan says {plan.budget['kept']}, the network that was cut {row['got']}.")
    return row | {"why": plan.budget.get("why", "")}


# ── the table ─────────────────────────────────────────────────────────────────────────────────────────────────────


def off(row: Row) -> float:
    """Return how far a row is from its budget, as a share of the budget; above it is positive."""
    return float("nan") if row["got"] is None else row["got"] / row["share"] - 1


def met(row: Row) -> bool:
    """Return whether a row is at most its budget, and within 1 % of it."""
    return -0.01 <= off(row) <= 1e-12


def name_of(row: Row) -> str:
    """Return how units were compared, in words."""
    return row["scope"] + (f", blocks of {row['round_to']}" if row["round_to"] else "")


def markdown(kept: Row) -> str:
    """Return the table with what it says in a sentence."""
    lines = ["# Budget asked, budget got", ""]
    rows = kept["rows"]
    zoo = [row for row in rows if row["network"] in pl.zoo.MODELS]
    others = [row for row in rows if row["network"] not in pl.zoo.MODELS]
    lines += section(zoo, "The networks of the zoo", f"scored on {kept['images']} training images") if zoo else []
    lines += section(others, "Classifiers of torchvision", "with random scores") if others else []
    lines.append(f"PyTorch {kept['torch']}; {sum(row['cpu seconds'] for row in rows) / 60:.0f} minutes of CPU time.")
    return "\n".join(lines) + "\n"


def section(rows: list[Row], title: str, how: str) -> Iterator[str]:
    """Yield the lines about some rows."""
    criteria = list(dict.fromkeys(row["criterion"] for row in rows))
    smooth = [row for row in rows if not row["round_to"]]
    yield f"## {title}"
    yield ""
    yield (
        f"{len(rows)} plans, {how}; by {', '.join(f'`{name}`' for name in criteria)}. Each was applied, and "
        f"what is left was counted on the cut network. With single units {sum(map(met, smooth))} of {len(smooth)} "
        "plans are at most their budget and within 1 % of it, "
        f"in blocks of {BLOCKS} {sum(map(met, rows)) - sum(map(met, smooth))} of {len(rows) - len(smooth)}."
    )
    yield ""
    yield "What is kept, in %: the least and the most over the criteria. *n* of *m* plans met their budget."
    yield ""
    body = []
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["network"], name_of(row), row["kind"]), []).append(row)
    shares = sorted({row["share"] for row in rows}, reverse=True)
    for (network, scope, kind), found in groups.items():
        cells = []
        for share in shares:
            got = [row["got"] for row in found if row["share"] == share and row["got"] is not None]
            few = f"{100 * min(got):.2f}" if got else "–"
            cells.append(few if not got or f"{100 * max(got):.2f}" == few else f"{few} to {100 * max(got):.2f}")
        body.append([network, scope, kind, *cells, f"{sum(map(met, found))} of {len(found)}"])
    yield from table(["network", "scope", "budget", *(f"asked {share:.0%}" for share in shares), "met"], body)
    yield ""
    missed = [row for row in rows if not met(row)]
    if missed:
        yield f"The {len(missed)} that did not, and why, as the plan says; the worst of each network and scope:"
        yield ""
        worst: dict[tuple[str, str], Row] = {}
        for row in sorted(missed, key=lambda row: -abs(off(row)) if row["got"] is not None else -9):
            worst.setdefault((row["network"], name_of(row)), row)
        body = [[row["network"], name_of(row), f"`{row['criterion']}`", row["why"]] for row in worst.values()]
        yield from table(["network", "scope", "criterion", "what it says"], body)
        yield ""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=["resnet20", "vgg13_narrow", "vit_small"])
    parser.add_argument("--criteria", nargs="+", default=CRITERIA, choices=pl.criteria.names())
    parser.add_argument("--shares", nargs="+", type=float, default=[0.75, 0.5, 0.25], help="kept")
    parser.add_argument("--images", type=int, default=128, help="training images that scores are taken on")
    parser.add_argument("--torchvision", nargs="*", help="classifiers of torchvision (default: a spread of them)")
    parser.add_argument("--out", type=Path, default=Path("bench/budgets"), help="without a suffix")
    args = parser.parse_args(arguments)
    path = args.out.with_suffix(".json")
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}
    kept |= {"torch": torch.__version__.split("+")[0], "images": args.images}
    others = [] if args.torchvision is None else args.torchvision or SPREAD.split()
    pairs = [*product(args.networks, args.criteria), *((name, "random") for name in others)]
    known = {tuple(row[key] for key in KEYS) for row in kept["rows"]}
    for network, criterion in tqdm(pairs, unit="network × criterion"):
        missing = [
            {"network": network, "criterion": criterion} | asked
            for asked in settings(args.shares)
            if (network, criterion, *asked.values()) not in known
        ]
        if not missing:
            continue
        scores, inputs = scores_for(network, criterion, args.images)
        for asked in missing:
            start = time.process_time()
            row = asked | measure(scores, inputs, asked)
            kept["rows"].append(row | {"cpu seconds": round(time.process_time() - start, 2)})
        keep(path, kept, markdown)
    keep(path, kept, markdown)
    print(markdown(kept))


if __name__ == "__main__":
    main()

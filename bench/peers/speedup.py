"""The speed-up of pruned networks, measured, beside what the FLOPs promise.

python -m bench.peers.speedup [--quick]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

import prunelab as pl
from bench.peers import their_pruner
from bench.peers.command import main
from bench.peers.page import Ratio, Row, chosen, median, seconds, table, times, unique
from bench.peers.problems import TRAINED, problem
from bench.peers.setting import Setting, devices
from bench.peers.timing import clock, failure, interleaved

TITLE = "Speed-up of pruned networks"
SHARES = (0.7, 0.5, 0.3, 0.15)
WHOLE = "whole"


def cuts(network: str, quick: bool) -> Iterator[tuple[str, float, nn.Module | str]]:
    """Yield who cut, the share of the FLOPs that was asked, and the network, or what was raised."""
    model, batches = problem(network, 64, 64)
    graph = pl.trace(model, their_pruner.INPUTS)
    taylor = pl.criteria.get("taylor", normalizer="none", group_reduction="sum")(graph, batches)
    eigen = pl.criteria.get("eigendamage", fisher="ggn")(graph, batches)
    magnitude = their_pruner.IMPORTANCES["magnitude, L2"](model, batches)
    ways: dict[str, Callable[[float], nn.Module]] = {
        "prunelab, Taylor": lambda share: pl.apply(model, pl.plan(taylor, flops=share, per="flops")),
        "prunelab, EigenDamage": lambda share: pl.factorize(model, eigen, flops=share),
        "Torch-Pruning, magnitude": lambda share: their_pruner.at_flops(model, magnitude, share, False),
    }
    for way, cut in ways.items():
        for share in SHARES[1:2] if quick else SHARES:
            try:
                yield way, share, cut(share).eval()
            except Exception as error:
                yield way, share, failure(error)


def passes(model: nn.Module, inputs: torch.Tensor, number: int) -> Callable[[], None]:
    """Return what runs a network so many times."""

    def run() -> None:
        with torch.inference_mode():
            for _ in range(number):
                model(inputs)

    return run


def rows(setting: Setting) -> Iterator[Row]:
    """Time whole and cut networks in turns, at batch 1 and 64."""
    for network in TRAINED[:1] if setting.quick else TRAINED:
        whole, _ = problem(network, 64, 64)
        flops = pl.count(whole, their_pruner.INPUTS).flops
        found = list(cuts(network, setting.quick))
        for device in devices():
            for batch, number in ((1, 16), (64, 1)):
                inputs = torch.randn(batch, 3, 32, 32, device=device)
                models = {WHOLE: whole} | {
                    f"{way}, {share}": one for way, share, one in found if not isinstance(one, str)
                }
                timed = {name: passes(one.to(device), inputs, number) for name, one in models.items()}
                measured = interleaved(timed, setting.repeats)
                base = measured.pop(WHOLE)
                for way, share, one in found:
                    row: Row = {"network": network, "device": device, "batch": batch, "way": way, "share": share}
                    if isinstance(one, str):
                        yield row | {"error": one}
                        continue
                    kept = pl.count(one.cpu(), their_pruner.INPUTS).flops / flops
                    one.to(device)
                    own = measured[f"{way}, {share}"]
                    speed = {f"{name} speed-up": base[name] / own[name] for name in ("cpu", "wall")}
                    whole_time = {f"whole {name}": base[name] / number for name in ("cpu", "wall")}
                    yield row | {"flops": kept} | speed | whole_time


def about() -> Iterator[str]:
    """Yield what is compared."""
    yield (
        "Forward passes of whole and cut networks in turns, without gradients, batches of 1 and 64 images of 32 × 32 "
        "pixels, one thread on a CPU. In brackets the speed-up that the FLOPs would give. EigenDamage's cuts are "
        "bottlenecks, three layers for one; the others remove channels."
    )


def markdown(found: list[Row]) -> Iterator[str]:
    """Yield a table per device."""
    for device in unique(found, "device"):
        own = chosen(found, device=device)
        shares = sorted(unique(own, "share"), reverse=True)
        body = []
        for network in unique(own, "network"):
            for batch in unique(own, "batch"):
                here = chosen(own, network=network, batch=batch)
                base = next((row[f"whole {clock(row)}"] for row in here if "flops" in row), None)
                for way in unique(here, "way"):
                    cells = [network, batch, seconds(base), way]
                    for share in shares:
                        row = next(iter(chosen(here, way=way, share=share)), {})
                        speed = row.get(f"{clock(row)} speed-up")
                        cells.append(f"{times(speed)} ({times(1 / row['flops'])})" if speed else "fails")
                    body.append(cells)
        yield f"{device}:"
        yield ""
        head = ["network", "batch", "whole", "cut by", *(f"{share:.0%} of the FLOPs" for share in shares)]
        yield from table(head, body, text=4)
        yield ""
    failed = {(row["way"], row["network"], row["error"]) for row in found if "error" in row}
    if failed:
        yield from ["What failed, in its own words:", ""]
        yield from (f"- {way}, {network}: `{error}`" for way, network, error in sorted(failed))


def ratios(found: list[Row]) -> list[Ratio]:
    """Return what goes into the table of ratios: how much of the promise is kept at half of the FLOPs."""
    lines = []
    for device in unique(found, "device"):
        for batch in unique(found, "batch"):
            own = [r for r in chosen(found, device=device, batch=batch, share=0.5) if "flops" in r]
            own = [row for row in own if row["way"] == "prunelab, Taylor"]
            speed = median(row[f"{clock(row)} speed-up"] for row in own)
            promise = median(1 / row["flops"] for row in own)
            where = "" if device == "cpu" else f", {device}"
            over = f"{len(own)} networks; the FLOPs promise {times(promise)}"
            lines.append(
                Ratio(f"speed-up at half of the FLOPs, batch {batch}{where}", "the whole network", speed, over=over)
            )
    return lines


if __name__ == "__main__":
    main(["speedup"])

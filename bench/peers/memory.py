"""Peak memory of every measurement, above what the process has once model and data are loaded.

python -m bench.peers.memory [--quick]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch

import prunelab as pl
from bench.peers import kfac, moments, products, their_pruner, tracing
from bench.peers.command import main
from bench.peers.footprint import available, elsewhere, grown
from bench.peers.page import Ratio, Row, chosen, errors, median, table, times, unique
from bench.peers.problems import TRAINED, problem
from bench.peers.setting import Setting

TITLE = "Peak memory"
FLOOR = moments.FLOOR
PAIRS = {
    "trace": ("prunelab", "Torch-Pruning"),
    "moments": ("prunelab", "BackPACK"),
    "moments ": ("prunelab", moments.LOOP),
    "K-FAC": ("prunelab", "curvlinops"),
    "K-FAC, the same factors": (kfac.FULL, "curvlinops"),
    "EKFAC": (kfac.OURS_EKFAC, kfac.THEIRS_EKFAC),
    "Hv": (products.OURS, products.THEIRS),
    "score, plan, cut": ("prunelab", "Torch-Pruning"),
}
"""What one line of the ratios compares: ours, theirs."""


def measured(network: str, images: int, batch: int) -> dict[tuple[str, str], Callable[[], object]]:
    """Return (what, method) -> what is measured."""
    model, batches = problem(network, images, batch)
    inputs = batches[0][0][:1]
    found: dict[tuple[str, str], Callable[[], object]] = {
        ("trace", "prunelab"): lambda: tracing.ours(model, inputs),
        ("trace", "Torch-Pruning"): lambda: tracing.theirs(model, inputs),
    }
    for method, function in moments.contestants(model, batches).items():
        if method != moments.SINGLE:
            found["floor" if method == FLOOR else "moments", method] = function
    for method, function in kfac.contestants(model, batches).items():
        if method != FLOOR:
            found["EKFAC" if "EKFAC" in method else "K-FAC", method] = function
    for method, function in products.METHODS.items():
        if method != FLOOR:
            found["θ⊙Hθ" if method == products.OWN else "Hv", method] = partial(function, model, batches)

    def cut_ours() -> None:
        graph = pl.trace(model, inputs)
        pl.apply(model, pl.plan(pl.criteria.Magnitude()(graph), ratio=0.5), inplace=True, check=False)

    def cut_theirs() -> None:
        importance, _ = their_pruner.IMPORTANCES["magnitude, L2"](model, batches)
        their_pruner.pruner(model, importance, 0.5).step()

    found["score, plan, cut", "prunelab"] = cut_ours
    found["score, plan, cut", "Torch-Pruning"] = cut_theirs
    return found


def rows(setting: Setting) -> Iterator[Row]:
    """Measure all, each in a process of its own."""
    if not available():
        return
    images, batch = (32, 16) if setting.quick else (128, 64)
    for network in TRAINED[:1] if setting.quick else TRAINED:
        for row in elsewhere("bench.peers.memory", network, images, batch):
            yield {"network": network, "images": images, "batch": batch} | row


def footprints(network: str, images: int, batch: int) -> list[Row]:
    """Return a row for every measurement."""
    torch.set_num_threads(1)
    return [
        {"what": what, "method": method} | grown(function)
        for (what, method), function in measured(network, images, batch).items()
    ]


def about() -> Iterator[str]:
    """Yield what is compared."""
    yield (
        "By how much the largest resident set of a process grows, each measurement in a child of a clean process "
        "that has the libraries, the model and the images loaded; on the CPU, one thread, everything as in the tables "
        "above. The floor is one forward and backward pass."
    )


def markdown(found: list[Row]) -> Iterator[str]:
    """Yield the table."""
    networks = unique(found, "network")
    body = []
    for what, method in dict.fromkeys((row["what"], row["method"]) for row in found):
        cells = [what, method]
        for network in networks:
            own = chosen(found, network=network, what=what, method=method)
            floor = next((row.get("megabytes") for row in chosen(found, network=network, what="floor")), None)
            size = own[0].get("megabytes") if own else None
            share = f" ({times(size / floor)})" if size is not None and floor and what != "floor" else ""
            cells.append("fails" if own and "error" in own[0] else "–" if size is None else f"{size:.0f} MB{share}")
        body.append(cells)
    yield from table(["what", "method", *networks], body, text=2)
    yield from errors(found, "network", "method")


def ratios(found: list[Row]) -> list[Ratio]:
    """Return what goes into the table of ratios."""
    by = {(row["network"], row["what"], row["method"]): row.get("megabytes", float("nan")) for row in found}
    networks = unique(found, "network")
    over, lines = f"{len(networks)} networks", []
    for what, (ours, theirs) in PAIRS.items():
        kind = what.partition(",")[0].strip() if what.startswith("K-FAC") else what.strip()
        value = median(
            by.get((name, kind, theirs), float("nan")) / max(by.get((name, kind, ours), float("nan")), 1)
            for name in networks
        )
        lines.append(Ratio(f"memory: {what.strip()}", theirs, value, over=over))
    return lines


if __name__ == "__main__":
    if "--footprint" in sys.argv:
        print(json.dumps(footprints(sys.argv[-3], int(sys.argv[-2]), int(sys.argv[-1]))))
    else:
        main(["memory"])

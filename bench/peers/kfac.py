"""K-FAC and EKFAC: the Kronecker factors of every layer's Fisher, and the moments in their eigenbasis.

python -m bench.peers.kfac [--quick]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

import prunelab as pl
from bench.peers.command import main
from bench.peers.libraries import peer
from bench.peers.page import Ratio, Row, chosen, median, multiples, unique
from bench.peers.problems import NETWORKS, TRAINED, Batches, forward_backward, problem
from bench.peers.setting import Setting, devices
from bench.peers.timing import clock, interleaved

TITLE = "K-FAC and EKFAC"
FLOOR = "forward and backward"
OURS, FULL, THEIRS = "prunelab", "prunelab, factors as curvlinops has them", "curvlinops"
OURS_EKFAC, FULL_EKFAC, THEIRS_EKFAC = (
    "prunelab, EKFAC",
    "prunelab, EKFAC, factors as curvlinops has them",
    "curvlinops, EKFAC",
)


def operator(name: str, model: nn.Module, batches: Batches) -> object:
    """Return curvlinops' operator, on all parameters of the layers it takes, without its checks and extra passes."""
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    parameters = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
    return getattr(peer("curvlinops"), name)(
        model,
        nn.CrossEntropyLoss(),
        parameters,
        batches,
        check_deterministic=False,
        fisher_type="empirical",
        num_data=sum(len(targets) for _, targets in batches),
        num_per_example_loss_terms=1,
    )


def kfac(model: nn.Module, batches: Batches) -> None:
    """Compute the factors by curvlinops."""
    operator("KFACLinearOperator", model, batches).compute_kronecker_factors()  # type: ignore[attr-defined]


def ekfac(model: nn.Module, batches: Batches) -> None:
    """Compute factors, eigenvectors and corrected eigenvalues by curvlinops; its first product does all that."""
    found = operator("EKFACLinearOperator", model, batches)
    found @ torch.ones(found.shape[1], device=batches[0][0].device)  # type: ignore[attr-defined, operator]


def contestants(model: nn.Module, batches: Batches) -> dict[str, Callable[[], object]]:
    """Return name -> what is timed."""

    def ours(what: str, factor: str) -> Callable[[], object]:
        return lambda: pl.collect(model, batches, {what}, factor=factor)

    return {
        FLOOR: lambda: forward_backward(model, batches),
        OURS: ours("kronecker", "channel"),
        FULL: ours("kronecker", "full"),
        THEIRS: lambda: kfac(model, batches),
        OURS_EKFAC: ours("ekfac", "channel"),
        FULL_EKFAC: ours("ekfac", "full"),
        THEIRS_EKFAC: lambda: ekfac(model, batches),
    }


def rows(setting: Setting) -> Iterator[Row]:
    """Time all on every network and device."""
    images, batch = (32, 16) if setting.quick else (128, 64)
    for device in devices():
        for network in NETWORKS[:1] if setting.quick else NETWORKS:
            model, batches = problem(network, images, batch, device)
            named, slow = contestants(model, batches), (FULL_EKFAC, THEIRS_EKFAC)
            if network not in TRAINED:  # eigenvectors of matrices of 4,608 rows, which take minutes for both
                named = {method: function for method, function in named.items() if "EKFAC" not in method}
            for method, found in interleaved(named, setting.repeats, slow=slow).items():
                yield {"network": network, "device": device, "method": method, "images": images, "batch": batch} | found


def about() -> Iterator[str]:
    """Yield what is compared."""
    yield (
        "Factors of the empirical Fisher of every convolution and linear layer. prunelab's own choice is that of "
        "EigenDamage: a convolution's input factor is between channels, `[C, C]`. "
        '`factor="full"` is what the `KFACLinearOperator(fisher_type="empirical")` of curvlinops has: '
        "over channels and kernel positions, `[C·k·k, C·k·k]`. "
        "curvlinops is told the number of samples and loss terms, and not to check for determinism, which saves it "
        "passes over the data. EKFAC is factors, eigenvectors and the second moments in their basis: a second pass for "
        "both."
    )


def markdown(found: list[Row]) -> Iterator[str]:
    """Yield a table of multiples of the floor per device."""
    yield from multiples(found, FLOOR)


def ratios(found: list[Row]) -> list[Ratio]:
    """Return what goes into the table of ratios."""
    lines = []
    for device in unique(found, "device"):
        own = chosen(found, device=device)
        where = "" if device == "cpu" else f", {device}"
        by = {(row["network"], row["method"]): row.get(clock(row), float("nan")) for row in own}
        networks = unique(own, "network")

        def between(one: str, other: str, by: dict = by, networks: list[str] = networks) -> float:
            return median(by[name, one] / by[name, other] for name in networks if (name, one) in by)

        cost, over = between(OURS, FLOOR), f"{len(networks)} networks"
        lines += [
            Ratio(f"K-FAC{where}", THEIRS, between(THEIRS, OURS), "≥ 2×", between(THEIRS, OURS) >= 2, over),
            Ratio(f"K-FAC{where}, the same factors", THEIRS, between(THEIRS, FULL), over=over),
            Ratio(f"K-FAC{where}, cost", f"{FLOOR} = 1", cost, "≤ 1.2×", cost <= 1.2, over),
            Ratio(f"EKFAC{where}", THEIRS_EKFAC, between(THEIRS_EKFAC, OURS_EKFAC), over=over),
            Ratio(f"EKFAC{where}, the same factors", THEIRS_EKFAC, between(THEIRS_EKFAC, FULL_EKFAC), over=over),
        ]
    return lines


if __name__ == "__main__":
    main(["kfac"])

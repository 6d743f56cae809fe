"""Quality: trained networks cut to shares of their FLOPs by every criterion of both, then tested, then fine-tuned.

python -m bench.peers.quality [--quick] [--data full]
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import prunelab as pl
from bench.peers import their_pruner
from bench.peers.command import main
from bench.peers.page import Ratio, Row, chosen, table, unique
from bench.peers.setting import Setting
from bench.peers.timing import failure
from prunelab.training import Recipe, default_device, evaluate, fit

TITLE = "Quality"
THREADS = None  # as many as there are: nothing is timed here
RESUMES = True
NETWORKS = ("resnet20", "vit_small")
SHARES = (0.7, 0.5, 0.3, 0.15)
TUNED_AT = (0.5, 0.15)
SCORING, TUNING, TESTED = 256, 2000, 100
"""Images for the scores and the fine-tune, and at a time in a test."""
RECIPES = {
    "resnet20": Recipe(1, lr=0.003, weight_decay=5e-4, batch_size=64),
    "vit_small": Recipe(1, lr=2e-4, weight_decay=0.05, batch_size=64, optimizer="adamw"),
}
"""Of the short fine-tune; a network of NETWORKS that is not named here is not fine-tuned."""

RAW: dict[str, Any] = {"normalizer": "none", "group_reduction": "sum"}
"""With these, scores that estimate a loss compare between groups."""

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {}),
    "magnitude": ("magnitude", {}),
    "magnitude, L1, raw": ("magnitude", {"p": 1, **RAW}),
    "BN scale": ("bn_scale", {}),
    "FPGM": ("fpgm", {}),
    "Taylor": ("taylor", RAW),
    "OBD": ("obd", {}),
    "OBS": ("obs", {}),
    "C-OBD": ("c_obd", {}),
    "C-OBS": ("c_obs", {}),
    "Kron-OBD": ("kron_obd", {}),
    "Kron-OBS": ("kron_obs", {}),
    "EigenDamage, channels": ("eigendamage", {}),
    "EigenDamage, factorised": ("eigendamage", {"fisher": "ggn"}),
    "θ⊙Hθ": ("oba", {}),
    "quadratic": ("quadratic", {}),
    "gate": ("gate", {}),
    "gate, with its slope": ("gate", {"linear": True}),
    "gate, softened labels": ("gate", {"temperature": 4.0}),
    "gate, greedy, softened labels": ("gate", {"interactions": True, "temperature": 4.0}),
    "oracle": ("oracle", {}),
}
PER_UNIT = ("random", "magnitude", "magnitude, L1, raw", "BN scale", "FPGM")
"""Scores that are not a change of the loss are ranked per unit; the others per FLOP that a unit saves."""
FEW = ("quadratic", "oracle")
"""Scored on a batch of the images: a pass for every unit."""
BOTTLENECKS = ("EigenDamage, factorised",)
"""Layers become products of smaller ones, instead of losing channels."""
ISOMORPHIC = ("magnitude, L2", "Taylor", "Hessian, all samples counted")
QUICK = ("magnitude", "Taylor", "gate, softened labels", "EigenDamage, factorised"), ("magnitude, L2", "Taylor")
RE_ESTIMATED = "batch norm re-estimated"
KINDS = {"compensated": ("compensated",), RE_ESTIMATED: (RE_ESTIMATED,), "as cut": ("cut", "isomorphic")}
"""What was done after a cut, as in the table of the best -> the ways that belong to it."""
Cut = Callable[[float], nn.Module]


def ways(model: nn.Module, batches: list, augmented: list, quick: bool) -> Iterator[tuple[str, str, str, Cut]]:
    """Yield who, the criterion, how, and what cuts to a share of the FLOPs; scores are taken when first needed.

    Batch norms are re-estimated on ``augmented``, as they were in training.
    """
    graph = pl.trace(model, their_pruner.INPUTS.to(batches[0][0].device))
    has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for name in QUICK[0] if quick else OURS:
        criterion, options = OURS[name]
        some = batches[:1] if name in FEW else batches
        scores = cache(lambda criterion=criterion, options=options, some=some: _scores(graph, criterion, options, some))
        ours = _ours(model, scores, "unit" if name in PER_UNIT else "flops", bottlenecks=name in BOTTLENECKS)
        yield "prunelab", name, "cut", ours
        if has_batch_norm:
            yield "prunelab", name, RE_ESTIMATED, _re_estimated(ours, augmented)
        if name not in BOTTLENECKS:
            yield "prunelab", name, "compensated", partial(ours, compensate=batches)
    for name in QUICK[1] if quick else their_pruner.IMPORTANCES:
        make = their_pruner.IMPORTANCES[name]
        theirs = _theirs(model, make, batches, isomorphic=False)
        yield "Torch-Pruning", name, "cut", theirs
        if has_batch_norm:
            yield "Torch-Pruning", name, RE_ESTIMATED, _re_estimated(theirs, augmented)
        if name in ISOMORPHIC and not quick:
            yield "Torch-Pruning", name, "isomorphic", _theirs(model, make, batches, isomorphic=True)


def _ours(model: nn.Module, scores: Callable[[], pl.Scores], per: Any, *, bottlenecks: bool) -> Callable:
    def cut(share: float, compensate: Any = None) -> nn.Module:
        if bottlenecks:
            return pl.factorize(model, scores(), flops=share)
        return pl.apply(model, pl.plan(scores(), flops=share, per=per), compensate=compensate)

    return cut


def _scores(graph: pl.DependencyGraph, name: str, options: dict[str, Any], batches: list) -> pl.Scores:
    return pl.criteria.get(name, **options)(graph, batches)


def _theirs(model: nn.Module, make: their_pruner.Cut, batches: list, isomorphic: bool) -> Cut:
    own = copy.deepcopy(model)
    scored = cache(lambda: make(own, batches))  # it knows the parameters of this copy

    def cut(share: float) -> nn.Module:
        torch.manual_seed(0)
        return their_pruner.at_flops(own, scored(), share, isomorphic)

    return cut


def _re_estimated(cut: Cut, batches: list) -> Cut:
    """Cut, then measure the statistics of batch norms once more, which anyone can do without training."""

    def measured(share: float) -> nn.Module:
        small = cut(share)
        update_bn(batches, small)
        return small.eval()

    return measured


def rows(setting: Setting) -> Iterator[Row]:
    """Cut, test, fine-tune, test; what was measured before and fits is not measured again."""
    device = default_device()
    data = pl.data.cifar10(setting.data)
    test = data.test.subset(500) if setting.quick else data.test
    for network in NETWORKS[:1] if setting.quick else NETWORKS:
        model = pl.zoo.load(network).eval().to(device)
        inputs = their_pruner.INPUTS.to(device)
        whole = pl.count(model, inputs)
        key: Row = {"network": network, "test images": len(test), "training images": len(data.train)}
        images = data.train.subset(SCORING)
        torch.manual_seed(0)
        batches, augmented = (
            [(x.to(device), y.to(device)) for x, y in pl.data.loader(some, 64)] for some in (images, images.augmented())
        )
        base: Row = key | {"who": "–", "criterion": "the whole network", "how": "–", "share": 1.0}
        yield setting.find(base) or base | evaluate(model, pl.data.loader(test, TESTED))
        for who, criterion, how, cut in ways(model, batches, augmented, setting.quick):
            for share in SHARES[1:2] if setting.quick else SHARES:
                row = key | {"who": who, "criterion": criterion, "how": how, "share": share}
                known = setting.find(row)
                if known is None:
                    try:
                        row |= measure(cut(share), data.train, test, network, share, setting.quick)
                        row["flops"] = row["flops"] / whole.flops
                        row["params"] = row["params"] / whole.params
                    except Exception as error:
                        row["error"] = failure(error)
                yield known or row


def measure(small: nn.Module, train: Any, test: Any, network: str, share: float, quick: bool) -> Row:
    """Return loss and accuracy as the network is, and accuracy after a short fine-tune."""
    cost = pl.count(small, their_pruner.INPUTS.to(next(small.parameters()).device))
    row: Row = evaluate(small, pl.data.loader(test, TESTED)) | {"flops": cost.flops, "params": cost.params}
    if network in RECIPES and share in TUNED_AT:
        fit(small, train.subset(200 if quick else TUNING), RECIPES[network], seed=0, progress=False)
        row["fine-tuned"] = evaluate(small, pl.data.loader(test, TESTED))["accuracy"]
    return row


def about() -> Iterator[str]:
    """Yield what is compared."""
    yield (
        f"The repository's checkpoints, cut at once over the whole network. Data-driven scores see {SCORING} training "
        "images (`quadratic` and `oracle` a quarter of them). prunelab's plan meets the FLOPs; the pruner of "
        "Torch-Pruning removes a share of the channels, so its `pruning_ratio` is searched until the result, counted "
        "alike, has as many FLOPs at most. Its options are its defaults, ranking globally, for three importances "
        "isomorphically too; a Transformer's heads are named to it. *Hessian* is its code unchanged, which keeps the "
        "last sample only; *all samples counted* is ours, on top of its class. Compensation refits what is left on the "
        "same images, without labels; Torch-Pruning has none. *Batch norm re-estimated* shows, for both, "
        "what measuring its statistics again does, for which no library is needed: on the same images, augmented as "
        "in training, where these statistics come from. The fine-tune is one pass over "
        f"{TUNING:,} training images, with the learning rates of sweeps/quick.yaml."
    )


def markdown(found: list[Row]) -> Iterator[str]:
    """Yield a table per network: accuracy and loss, and accuracy after the fine-tune."""
    for network in unique(found, "network"):
        own = chosen(found, network=network)
        whole, cuts = own[0], own[1:]
        shares = sorted(unique(cuts, "share"), reverse=True)
        tuned = [share for share in shares if any("fine-tuned" in row for row in chosen(cuts, share=share))]
        yield f"### {network}"
        yield ""
        yield (
            f"Accuracy in % (loss in nats) on {whole['test images']:,} test images; the whole network has "
            f"{100 * whole['accuracy']:.1f} ({whole['loss']:.2f}). Bold: the best of a column."
        )
        yield ""
        keys = list(dict.fromkeys((row["who"], row["criterion"], row["how"]) for row in cuts))
        best = {
            (share, what): max((row[what] for row in chosen(cuts, share=share) if what in row), default=None)
            for share in shares
            for what in ("accuracy", "fine-tuned")
        }

        def cell(row: Row, what: str, best: dict = best) -> str:
            if what not in row:
                return "fails" if "error" in row else "–"
            text = f"{100 * row[what]:.1f}"
            text = f"**{text}**" if row[what] == best[row["share"], what] else text
            return f"{text} ({row['loss']:.2f})" if what == "accuracy" else text

        body = []
        for who, criterion, how in keys:
            at = {r["share"]: r for r in chosen(cuts, who=who, criterion=criterion, how=how)}
            cells = [cell(at.get(share, {}), "accuracy") for share in shares]
            body.append([who, criterion, how, *cells, *(cell(at.get(share, {}), "fine-tuned") for share in tuned)])
        head = ["who", "criterion", "how", *(f"{s:.0%}" for s in shares), *(f"{s:.0%}, fine-tuned" for s in tuned)]
        yield from table(head, body, text=3)
        failed = {(row["who"], row["criterion"], row["error"]) for row in cuts if "error" in row}
        if failed:
            yield from ["", "What failed, in its own words:", ""]
            yield from (f"- {who}, {name}: `{error.replace('`', chr(39))}`" for who, name, error in sorted(failed))
        yield ""


def best(found: list[Row]) -> Iterator[str]:
    """Yield a table of the best accuracy of each side for what was done after the cut, with its criterion."""
    cuts = [row for row in found if row["who"] != "–"]
    shares = sorted(unique(cuts, "share"), reverse=True)
    body = []
    for network, who, (kind, hows) in product(unique(cuts, "network"), unique(cuts, "who"), KINDS.items()):
        own = [row for row in chosen(cuts, network=network, who=who) if row["how"] in hows and "accuracy" in row]
        if not own:
            continue
        at = [max(chosen(own, share=share), key=lambda row: row["accuracy"], default=None) for share in shares]
        cells = [f"{100 * top['accuracy']:.1f} ({top['criterion']})" if top else "–" for top in at]
        body.append([network, f"{who}, {kind}", *cells])
    yield from table(["accuracy in %", "best", *(f"{share:.0%} of the FLOPs" for share in shares)], body, text=2)


def ratios(found: list[Row]) -> list[Ratio]:
    """Return what goes into the table of ratios: the best of each side, as accuracies."""
    lines = []
    for network in unique(found, "network"):
        for share in sorted(unique(chosen(found, network=network)[1:], "share"), reverse=True):
            own = [row for row in chosen(found, network=network, share=share) if "accuracy" in row]
            theirs = max(chosen(own, who="Torch-Pruning"), key=lambda row: row["accuracy"], default=None)
            ours = max(chosen(own, who="prunelab"), key=lambda row: row["accuracy"], default=None)
            if not ours or not theirs:
                continue
            how = "compensated" if ours["how"] == "compensated" else "not compensated"
            over = (
                f"{100 * ours['accuracy']:.1f} % ({ours['criterion']}, {how}) and {100 * theirs['accuracy']:.1f} % "
                f"({theirs['criterion']})"
            )
            value = ours["accuracy"] / theirs["accuracy"]
            what = f"accuracy, {network} at {share:.0%} of the FLOPs"
            lines.append(Ratio(what, "Torch-Pruning's best", value, "first", value > 1, over))
    return lines


if __name__ == "__main__":
    main(["quality"])

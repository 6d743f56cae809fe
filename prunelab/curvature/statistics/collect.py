"""Collect: several statistics of a model on data in one pass, to share between criteria.

Flows in: a dependency graph and batches.  Flows out: ``Statistics``.  What can be collected is one visible table,
``accumulators.ACCUMULATORS``.  Notebook 07_kfac shows what is in them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import nn

from prunelab.batches import Batches, Loss
from prunelab.curvature.fisher import Fisher, check_fisher
from prunelab.curvature.statistics.accumulators import ACCUMULATORS
from prunelab.curvature.statistics.factor_sums import FACTORS, Factor
from prunelab.curvature.statistics.kronecker import Factors
from prunelab.curvature.statistics.one_pass import model_of, one_pass, readable_again
from prunelab.curvature.statistics.statistics import Statistics
from prunelab.distributed import Sharded, agreed
from prunelab.errors import BatchError, OptionError
from prunelab.options import one_of, shown, whole
from prunelab.tracing.trace import DependencyGraph

__all__ = ["Statistics", "collect", "statistics_for"]


def collect(
    graph: DependencyGraph | nn.Module,
    batches: Batches | None,
    what: Collection[str] = ("grad", "moments", "kronecker"),
    *,
    fisher: Fisher = "empirical",
    loss: Loss = F.cross_entropy,
    seed: int = 0,
    factor: Factor = "channel",
    basis: Statistics | None = None,
    first: int = 0,
) -> Statistics:
    """Collect several statistics of a model in one pass over the batches, in eval mode.

    Cost: one forward pass; one backward pass, one per class and position of the outputs with ``fisher="ggn"``, and one
    more where ``"grad"`` is asked for together with another Fisher than the empirical.  ``"ekfac"`` repeats all that,
    unless ``basis`` is given.

    Args:
        graph: of the model, or the model itself.
        batches: pairs ``(inputs, targets)``, mappings with labels, or a ``Task``; or ``distributed.Sharded``, a share
            of them in every process: each measures its own, and all have the sums over all.
        what: any of ``"grad"``, ``"moments"``, ``"kronecker"``, ``"ekfac"``, ``"inputs"``; see ``Statistics``.
        fisher: of which gradients the moments and factors are: ``"empirical"`` (labels as given), ``"mc"`` (labels
            sampled from the softmax) or ``"ggn"`` (exactly the generalised Gauss-Newton matrix).
        loss: ``loss(outputs, targets)``, a mean over the samples.
        seed: of the sampled labels; the label of a sample depends on the seed and its number only.
        factor: of convolutions: ``"channel"`` or ``"full"``; see ``Factors``.
        basis: for ``"ekfac"``: statistics with the factors whose eigenbasis is used.
        first: number of the first sample, when this continues an earlier collection.

    Returns:
        The statistics; ``a + b`` of two collections are those of one over both.

    Raises:
        BatchError: the batches do not fit the model, the loss is not a mean over samples, or something is not finite.
        OptionError: an option is not one of those above.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> found = collect(model, [(torch.randn(8, 3), torch.arange(8) % 2)], {"moments", "kronecker"})
        >>> found.moments["0.weight"].shape, found.kronecker["2.weight"].S.shape
        (torch.Size([4, 3]), torch.Size([2, 2]))
    """
    if not isinstance(what, (str, Collection)):
        raise OptionError(f"`what` must be names of statistics, of {', '.join(ACCUMULATORS)}, got {shown(what)}.")
    wanted = {what} if isinstance(what, str) else set(what)
    unknown = sorted(wanted - ACCUMULATORS.keys())
    if unknown or not wanted:
        raise OptionError(f"what={unknown} is not one of {', '.join(ACCUMULATORS)}.")
    check_fisher(fisher)
    one_of("factor", factor, FACTORS)
    seed = whole("seed", seed, least=-(2**63), most=2**63 - 1)
    options: dict[str, Any] = {"fisher": fisher, "loss": loss, "seed": seed, "first": first}
    share = batches.batches if isinstance(batches, Sharded) else batches
    if isinstance(batches, Sharded) and fisher == "mc":
        options["first"] += batches.first()

    def measured(what: Collection[str], known: Mapping[str, Factors]) -> Statistics:
        if not isinstance(batches, Sharded):
            return one_pass(graph, batches, what, factor, known, **options)
        found = agreed(lambda: one_pass(graph, share, what, factor, known, **options), batches.group)
        return replace(found.all_reduce(batches.group), batches=batches)

    if "ekfac" in wanted and basis is None:
        if not readable_again(share):
            raise BatchError('"ekfac" reads the batches twice: pass a list or a loader, or the first pass as `basis`.')
        found = measured(wanted - {"ekfac"} | {"kronecker"}, {})
        return found | measured({"ekfac"}, found.kronecker)
    return measured(wanted, {} if basis is None else basis.kronecker)


def statistics_for(
    graph: DependencyGraph | nn.Module,
    batches: Batches | Statistics | None,
    what: Collection[str],
    *,
    fisher: Fisher = "empirical",
    loss: Loss = F.cross_entropy,
    seed: int = 0,
    factor: Factor = "channel",
) -> Statistics:
    """Return the given statistics if they hold what is needed, else collect it from the given batches.

    Args:
        graph: of the model, or the model itself.
        batches: pairs ``(inputs, targets)``, or ``Statistics``.
        what: which are needed.
        fisher: see ``collect``.
        loss: see ``collect``.
        seed: see ``collect``.
        factor: see ``collect``.

    Raises:
        BatchError: the statistics lack something, are of another Fisher or of another model; or as in ``collect``.
    """
    if not isinstance(batches, Statistics):
        return collect(graph, batches, what, fisher=fisher, loss=loss, seed=seed, factor=factor)
    needed = {what} if isinstance(what, str) else set(what)
    if needed - batches.what:
        options = ", ".join(repr(name) for name in sorted(needed | batches.what))
        raise BatchError(
            f"These statistics hold {', '.join(sorted(batches.what))}; needed is {', '.join(sorted(needed))}: "
            f"collect(graph, batches, what={{{options}}})."
        )
    if needed & {"moments", "kronecker", "ekfac"} and batches.fisher != fisher:
        raise BatchError(
            f'These statistics are of fisher="{batches.fisher}", needed is "{fisher}": collect(…, fisher="{fisher}"), '
            f'or set fisher="{batches.fisher}" on the criterion.'
        )
    _check_model(model_of(graph), batches)
    return batches


def _check_model(model: nn.Module, statistics: Statistics) -> None:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for what in statistics.what & {"grad", "moments"}:
        for name, value in statistics.sums[what].items():
            if shapes.get(name) != value.shape:
                raise BatchError(
                    f"These statistics are of another model: `{name}` has shape {list(value.shape)} in them, "
                    f"{list(shapes[name]) if name in shapes else 'no place'} in the model; collect them again."
                )

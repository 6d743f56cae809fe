"""Compensation: what is left of a network makes up for what went.

A layer y = W u loses the columns R of W, since the units that made u_R go.  The columns K that stay, bias included, are
refitted so that its output on the calibration data changes least:

    Δ = argmin E‖W_R u_R − Δ u_K‖² + tr(Δ Λ Δᵀ) = W_R C_RK (C_KK + Λ)⁻¹,     C = E[u uᵀ],  Λ = damping · diag(C_KK),

and W_K + Δ takes the place of W_K.  It is the update of the optimal brain surgeon for the layer's squared error, for
all removed columns at once.  On the producers' side the same is done with rows: with the Fisher F ≈ S ⊗ A, rows R go
and the rows J that stay become W_J + (S_JJ + Λ)⁻¹ S_JR W_R.

Flows in: the whole model, what stays of it, and statistics or batches.  Flows out: new values of weights, which surgery
then cuts.  Notebook 11_compensation derives it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from prunelab.batches import Batches, call, checked
from prunelab.compensation.refit import losing_inputs, refit_consumers, refit_producers
from prunelab.compensation.tied import tied_by_example
from prunelab.curvature.collect import Statistics, statistics_for
from prunelab.curvature.factor_sums import KINDS, key
from prunelab.curvature.inputs import MEMORY, InputMoment, consumers, describe, read, summed
from prunelab.curvature.taps import LayerCall, Taps
from prunelab.errors import BatchError, OptionError
from prunelab.isolation import evaluating
from prunelab.options import flag, one_of, real, whole
from prunelab.planning.plan import Plan
from prunelab.tracing import fakes
from prunelab.tracing.trace import DependencyGraph, trace

if TYPE_CHECKING:
    from prunelab.surgery.apply import Kept


@dataclass(frozen=True)
class Compensation:
    """How ``apply`` makes up for what it cuts.

    Args:
        source: statistics with ``"inputs"`` (``"kronecker"`` for producers), or batches to collect them from.
        side: ``"consumers"`` refits the layers that lose inputs, by least squares on their outputs; ``"producers"``
            updates the rows that stay beside the removed ones, by Kronecker-factored OBS.
        sequential: refit layer by layer in forward order, each on what the cut and refitted layers before it give,
            towards the outputs of the whole model: later layers correct what earlier ones could not.  Needs batches;
            the default where ``source`` are batches.  At once, statistics serve any number of plans.
        damping: share of each input's second moment that is added to it, which holds the weights where they are; by
            default 0.01, and more for a layer whose inputs are few for its columns.
        memory: bytes that the second moment of one layer's inputs may take; where patches of a convolution would need
            more, channels are refitted alike at all kernel positions.

    Source: Hassibi & Stork 1992, equation 5, for a layer's squared error; He et al. 2017, *Channel Pruning*, equation 3
    (least squares on the kept channels; ``sequential`` is its target, the whole model's output); producers: Wang et al.
    2019, *EigenDamage*, section 4 (Kron-OBS), for several rows at once.
    """

    source: Statistics | Batches | None = None
    side: Literal["consumers", "producers"] = "consumers"
    sequential: bool | None = None
    damping: float | None = None
    memory: int = MEMORY

    def __post_init__(self) -> None:
        one_of("side", self.side, ("consumers", "producers"))
        set_option = partial(object.__setattr__, self)  # the dataclass is frozen
        if self.sequential is not None and flag("sequential", self.sequential) and self.side == "producers":
            raise OptionError("sequential=True refits consumers: leave side at 'consumers'.")
        if self.damping is not None:
            set_option("damping", real("damping", self.damping, least=0))
        set_option("memory", whole("memory", self.memory))

    @property
    def in_order(self) -> bool:
        """Whether layers are refitted one after the other."""
        return not isinstance(self.source, Statistics) if self.sequential is None else self.sequential

    @property
    def batches(self) -> Batches | None:
        """The batches, or those that the statistics were collected from."""
        return self.source.batches if isinstance(self.source, Statistics) else self.source


def make_up(
    model: nn.Module, plan: Plan, graph: DependencyGraph, kept: Kept, how: Compensation | Statistics | Batches
) -> dict[str, Tensor]:
    """Return new values, of the whole model's shapes, for the parameters that make up for what ``plan`` removes.

    Cost: for consumers one forward pass with the second moments of the inputs (none, given statistics), and a system of
    n equations per layer; sequentially one forward pass for every layer more.

    Args:
        model: the whole model.
        plan: what goes.
        graph: of the model, or of a copy on tensors without data.
        kept: which entries of the graph's axes stay.
        how: options, or simply statistics or batches.

    Raises:
        BatchError: batches or statistics are missing, of another model, or not finite.
    """
    how = how if isinstance(how, Compensation) else Compensation(how)
    if how.side == "producers":
        whole = trace(model, fakes.recall_inputs(plan.inputs))
        factors = statistics_for(whole, how.source, {"kronecker"}).kronecker
        fresh, left = refit_producers(model, factors, graph, kept, how.damping, _tied(model, plan, graph, kept))
    elif how.in_order:
        from prunelab.compensation.sequential import (
            refit_in_order,  # which silences, which needs surgery, which needs us
        )

        fresh, left = refit_in_order(model, plan, graph, kept, how)
    else:
        if isinstance(how.source, Statistics):
            moments = how.source.inputs
        else:
            taps = consumers(graph)
            losing = {name: taps[name] for name in losing_inputs(graph, kept)}
            moments = input_moments(model, how.source, losing, how.memory)
        fresh, left = refit_consumers(model, moments, graph, kept, how.damping, _tied(model, plan, graph, kept))
    if left:
        reasons = "; ".join(f"`{name}` ({why})" for name, why in left.items())
        warnings.warn(f"Cut without compensation: {reasons}.", stacklevel=4)
    return fresh


def _tied(model: nn.Module, plan: Plan, graph: DependencyGraph, kept: Kept) -> list[str]:
    with evaluating(model):
        return tied_by_example(model, fakes.recall_inputs(plan.inputs), graph, kept)


def input_moments(
    model: nn.Module, batches: Batches | None, weights: Mapping[str, int], memory: int = MEMORY
) -> dict[str, InputMoment]:
    """Return the input moments of the given weights (see ``InputMoment``); ``weights`` is what ``consumers`` returns.

    Cost: one forward pass, and n² multiplications per position of each layer.

    Raises:
        BatchError: the batches do not fit the model, or an input is not finite.
    """
    parameters = dict(model.named_parameters())
    sums: dict[str, Tensor] = {}
    meta: dict[str, dict] = {}
    number = -1

    def add_sum(seen: LayerCall) -> None:
        if seen.kind in KINDS and seen.weight in weights:
            weight = parameters[seen.weight]
            name = key(seen, weight)
            meta[name] = describe(seen, weight, weights[seen.weight], memory)
            total = summed(seen, weight, meta[name]["over"], weights[seen.weight])
            if not total.isfinite().all():
                raise BatchError(
                    f"The input of the layer of `{seen.weight}` is not finite in batch {number}: check the batch's "
                    "inputs and the weights up to there."
                )
            sums[name] = sums[name] + total if name in sums else total

    with evaluating(model), torch.no_grad():
        for batch in checked(model, batches, "compensation", None):
            number += 1
            with Taps(model, after=add_sum, keep=False):
                call(model, batch.inputs)
    return read(sums, meta)

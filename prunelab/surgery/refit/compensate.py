"""Compensation: what is left of a network makes up for what went.

A layer y = W u loses the columns R of W, since the units that made u_R go.  The columns K that stay, bias included, are
refitted so that its output on the calibration data changes least:

    Δ = argmin E‖W_R u_R − Δ u_K‖² + tr(Δ D Δᵀ) = W_R C_RK (C_KK + D)⁻¹,     C = E[u uᵀ],  D = damping · diag(C_KK),

and W_K + Δ takes the place of W_K.  It is the update of the optimal brain surgeon for the layer's squared error, for
all removed columns at once.  On the producers' side the same is done with rows: with the Fisher F ≈ S ⊗ A, rows R go
and the rows J that stay become W_J + (S_JJ + D)⁻¹ S_JR W_R.

Flows in: the whole model, what stays of it, and statistics or batches.  Flows out: new values of weights, which surgery
then cuts.  Notebook 11_compensation derives it.
"""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from prunelab.batches import Batches
from prunelab.curvature.statistics.collect import Statistics, statistics_for
from prunelab.curvature.statistics.input_moments import consumers
from prunelab.kept import Kept
from prunelab.plans import Plan
from prunelab.runtime.isolation import evaluating
from prunelab.runtime.stack import user_level
from prunelab.surgery.refit.in_order import refit_in_order
from prunelab.surgery.refit.moments import input_moments
from prunelab.surgery.refit.options import Compensation
from prunelab.surgery.refit.solve import losing_inputs, refit_consumers, refit_producers
from prunelab.surgery.refit.tied import tied_by_example
from prunelab.tracing import fakes
from prunelab.tracing.trace import DependencyGraph, trace


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
        warnings.warn(f"Cut without compensation: {reasons}.", stacklevel=user_level())
    return fresh


def _tied(model: nn.Module, plan: Plan, graph: DependencyGraph, kept: Kept) -> list[str]:
    with evaluating(model):
        return tied_by_example(model, fakes.recall_inputs(plan.inputs), graph, kept)

"""Refitting: the least squares of compensation, for layers that lose columns and for layers that lose rows.

Flows in: weights, what stays of them, input moments or Kronecker factors.  Flows out: new values of weights, of the
whole model's shapes.  ``compensate`` has the formulas; notebook 11_compensation derives them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from prunelab.curvature.statistics.input_moments import InputMoment, Layer, matrix
from prunelab.curvature.statistics.kronecker import Factors
from prunelab.errors import BatchError
from prunelab.kept import Kept
from prunelab.runtime.devices import exact
from prunelab.tracing.trace import DependencyGraph

UNSEEN = "no layer with it was seen"
TWO_WAYS = "used in two ways"
DEPENDENT = "the inputs that stay are linearly dependent: raise damping"


def ridge(
    moment: Tensor, residual: Tensor, damping: float | None, count: float, *, constant: bool = False
) -> Tensor | None:
    """Return ``Δ = residual (moment + D)⁻¹``; ``None`` if that matrix is singular.

    D is diagonal, damping times the second moment of each input, but no less than that of the upper quartile: an input
    that is almost always zero would get a large weight by chance.  By default the damping is 0.01 + k / 2N for
    k unknowns and a moment over N columns: the fewer columns there are, the more of what they show is chance.

    Args:
        moment: ``C_KK``, float64 ``[k, k]``.
        residual: what is to be made up for, times the inputs that stay: ``E[e u_Kᵀ]``, float64 ``[rows, k]``.
        damping: relative to the inputs' second moments.
        count: N.
        constant: whether the last input is the constant one.
    """
    damping = 0.01 + len(moment) / (2 * count) if damping is None else damping
    own = moment.diagonal()
    own = own.masked_fill(own == 0, 1)  # nothing is known of such an input, so its weights stay
    level = own.clone()
    inputs = level[: len(level) - constant]
    inputs.clamp_(min=inputs.quantile(0.75))
    scale = own.sqrt()  # solved with a diagonal of ones, the system is well conditioned
    system = moment / scale / scale[:, None]
    system.diagonal().copy_(1 + damping * level / own)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed or factor.diagonal().min() < 1e-7:  # the square of which is all that float64 can tell from zero
        return None
    change = torch.cholesky_solve((residual / scale).mT, factor).mT / scale
    return change if change.isfinite().all() else None


def losing_inputs(graph: DependencyGraph, kept: Kept) -> list[str]:
    """Return the parameters that lose columns."""
    parameters = {name for name, _ in graph.model.named_parameters()}
    found: dict[str, None] = {}
    for member in (member for group in graph.groups for member in group.members if member.role == "consumes"):
        dim = graph.dims[member.name][member.dim]
        if member.name in parameters and kept.size(dim.axis) != dim.size:
            found[member.name] = None
    return list(found)


def kept_channels(layer: Layer, dim: int, graph: DependencyGraph, kept: Kept) -> Tensor:
    """Return which channels along one dimension of a layer's weight stay, bool ``[groups, channels]``."""
    return layer.view.rows_of(kept.mask(graph.dims[layer.weight][dim].axis), dim, layer.rows)


def refit_consumers(
    model: nn.Module,
    moments: Mapping[str, InputMoment],
    graph: DependencyGraph,
    kept: Kept,
    damping: float | None,
    tied: Collection[str] = (),
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return new weights and biases of all layers that lose columns, and those left unchanged, with the reason.

    Raises:
        BatchError: the moments are of another model.
    """
    parameters = dict(model.named_parameters())
    losing = losing_inputs(graph, kept)
    _check_model(moments, parameters)
    seen = {found.weight for found in moments.values()}
    left = {name: UNSEEN for name in losing if name not in seen}
    left |= {name: TWO_WAYS for name in tied}
    biases = Counter((found.bias, found.bias_rows.start) for found in moments.values())
    fresh: dict[str, Tensor] = {}
    for found in (found for found in moments.values() if found.weight in losing and found.weight not in left):
        constant = found.bias is not None and biases[found.bias, found.bias_rows.start] == 1
        if any(_overlap(found, other) for other in moments.values()):
            left[found.weight] = "its rows are used in more than one way"
            continue
        solved = _refit(
            found,
            parameters[found.weight].detach(),
            kept_channels(found, found.view.in_dim, graph, kept),
            constant,
            damping,
        )
        if solved is None:
            left[found.weight] = DEPENDENT
            continue
        add(fresh, parameters, found.weight, found.rows, solved[0])
        if constant and found.bias is not None:
            add(fresh, parameters, found.bias, found.bias_rows, solved[1])
    return fresh, left


def add(fresh: dict[str, Tensor], parameters: Mapping[str, Tensor], name: str, rows: slice, change: Tensor) -> None:
    """Add a change to some rows of what will be the new value of a parameter."""
    if name not in fresh:
        fresh[name] = parameters[name].detach().clone()
    fresh[name][rows] += change.to(fresh[name])


def _refit(
    found: InputMoment, weight: Tensor, stay: Tensor, constant: bool, damping: float | None
) -> tuple[Tensor, Tensor] | None:
    """Return the change of the weight's rows and of the bias; ``None`` if the system is singular."""
    moment = found.moment
    flat = matrix(found, weight).to(moment)  # [groups, out, n], with n = channels × taps
    width, taps = moment.shape[-1] - 1, flat.shape[-1] // stay.shape[1]
    if found.over == "channels":  # the same change at every tap: taps count as outputs
        taps = flat.shape[-1] // width
        stay = stay.unflatten(1, (width, -1)).all(-1)
        flat = flat.unflatten(-1, (width, taps)).transpose(-1, -2).flatten(1, 2)
        constant = constant and not found.padded
    else:
        stay = stay.repeat_interleave(taps, 1)
    change, shift = torch.zeros_like(flat), flat.new_zeros(flat.shape[:2])
    for group, mask in enumerate(stay.to(moment.device)):
        gone, rest = (~mask).nonzero().flatten(), mask.nonzero().flatten()
        if not len(gone) or not len(rest):
            continue
        used = torch.cat([rest, rest.new_full((1,), width)]) if constant else rest
        among, across = moment[group][used][:, used], moment[group][gone][:, used]
        solved = ridge(among, flat[group][:, gone] @ across, damping, found.count, constant=constant)
        if solved is None:
            return None
        change[group][:, rest] = solved[:, : len(rest)]
        if constant:
            shift[group] = solved[:, -1]
    if found.over == "channels":
        change = change.unflatten(1, (-1, taps)).transpose(-1, -2).flatten(2)
        shift = shift.unflatten(1, (-1, taps)).sum(-1)
    return found.view.from_matrix(change), shift.flatten()


def _overlap(found: InputMoment, other: InputMoment) -> bool:
    if found is other or found.weight != other.weight:
        return False
    return found.rows.start < other.rows.stop and other.rows.start < found.rows.stop


def _check_model(found: Mapping[str, Layer], parameters: Mapping[str, Tensor]) -> None:
    for name, layer in found.items():
        weight = parameters.get(layer.weight)
        if isinstance(layer, InputMoment) and weight is not None and layer.rows.stop <= len(weight):
            width = matrix(layer, weight).shape[-1] if len(weight) % layer.view.groups == 0 else 0
            if layer.total.shape[-1] - 1 == width or (
                layer.over == "channels" and width % (layer.total.shape[-1] - 1) == 0
            ):
                continue
        raise BatchError(f"These statistics are of another model: `{name}` does not fit; collect them again.")


# ── producers ─────────────────────────────────────────────────────────────────────────────────────────────────────


def refit_producers(
    model: nn.Module,
    factors: Mapping[str, Factors],
    graph: DependencyGraph,
    kept: Kept,
    damping: float | None,
    tied: Collection[str] = (),
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return new rows of all layers that lose some: ``W_J + (S_JJ + D)⁻¹ S_JR W_R``, biases included.

    Removing row i alone moves row j by ``−[S⁻¹]_ji / [S⁻¹]_ii · w_i``; the block formula removes all of R at once.
    """
    parameters = dict(model.named_parameters())
    fresh: dict[str, Tensor] = {}
    left: dict[str, str] = {name: TWO_WAYS for name in tied}
    for name, found in ((name, found) for name, found in factors.items() if found.weight not in left):
        if found.weight not in parameters or found.rows.stop > len(parameters[found.weight]):
            raise BatchError(f"These statistics are of another model: `{name}` does not fit; collect them again.")
        weight = parameters[found.weight].detach()
        fisher = exact(found.S if found.view.groups > 1 else found.S[None])
        stay = kept_channels(found, found.view.out_dim, graph, kept).to(fisher.device)
        flat = matrix(found, weight).to(fisher)
        change, mixing = torch.zeros_like(flat), torch.zeros_like(fisher)
        for group, mask in enumerate(stay):
            if mask.all() or not mask.any():
                continue
            solved = ridge(fisher[group][mask][:, mask], fisher[group][~mask][:, mask], damping, found.samples)
            if solved is None:
                left[found.weight] = "the gradients of the rows that stay are linearly dependent: raise damping"
                break
            mixing[group][mask.nonzero(), (~mask).nonzero().flatten()] = solved.mT
        change = mixing @ flat
        if not change.any():
            continue
        add(fresh, parameters, found.weight, found.rows, found.view.from_matrix(change))
        if found.bias is not None:
            bias = parameters[found.bias].detach()[found.bias_rows].to(mixing).view(len(mixing), -1, 1)
            add(fresh, parameters, found.bias, found.bias_rows, (mixing @ bias).flatten())
    return fresh, left

"""FPGM: a filter close to the geometric median of its layer can be replaced by the others.

Flows in: a graph.  Flows out: how far each unit is from the middle of its layer.  Notebook 02_magnitude sets it beside
the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunelab.batches import Batches
from prunelab.criteria.base import GroupwiseCriterion, Scores
from prunelab.runtime.devices import exact
from prunelab.tracing.groups import Member
from prunelab.tracing.trace import DependencyGraph


@dataclass
class FPGM(GroupwiseCriterion, name="fpgm"):
    """Score a unit by ``(1/n) Σ_j ‖w_i − w_j‖``: how far its filter w_i is from the geometric median of its layer.

    The geometric median minimises ``f(x) = Σ_j ‖x − w_j‖``.  The paper's shortcut looks for the minimum among the
    filters themselves, so the score is ``f(w_i)/n``, the mean distance to all filters.  With ``exact=True`` the median
    x* is found and the score is ``‖w_i − x*‖``.  Only members that produce the unit count, reduced over them.

    In the quadratic model this keeps no term.  Cost: n² distances per layer; no data are read.

    Args:
        exact: distance to the geometric median itself, by Weiszfeld's iteration.
        group_reduction: see ``GroupwiseCriterion``, as all other options.

    Source: He et al. 2019, *Filter Pruning via Geometric Median*, section 3.3: the median, and the shortcut.
    """

    exact: bool = False

    def __call__(self, graph: DependencyGraph, batches: Batches | None = None) -> Scores:
        """Return the scores; ``batches`` are not looked at."""
        return self.reduce(graph, {name: value.detach() for name, value in graph.model.named_parameters()})

    def member_scores(self, values: Mapping[str, Tensor], member: Member, size: int) -> Tensor:
        """Return ``[size]``: the distance of every unit's filter to the middle of all."""
        filters = filters_by_unit(values[member.name], member, size)
        if self.exact:
            return (filters - geometric_median(filters)).norm(dim=1)
        distances = torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.mean(1)

    def _counted(self, model: nn.Module, members: list[Member]) -> list[Member]:
        members = super()._counted(model, members)
        return [member for member in members if member.role == "produces"] or members


def filters_by_unit(values: Tensor, member: Member, size: int) -> Tensor:
    """Return ``[size, weights per unit]``: all weights that each unit owns in one member, side by side."""
    unit = member.unit.to(values.device)
    owned = (unit >= 0).nonzero().flatten()
    order = owned[unit[owned].argsort(stable=True)]
    return values.movedim(member.dim, 0)[order].reshape(size, -1)


def geometric_median(points: Tensor, iterations: int = 200, tolerance: float = 1e-10) -> Tensor:
    """Return ``[d]``, the point whose distances to the points ``[n, d]`` have the smallest sum.

    Weiszfeld's iteration ``x ← Σ w_j/‖x − w_j‖ / Σ 1/‖x − w_j‖``, in float64; a point that the iteration lands on is
    stepped off as long as the pull of the others is stronger than its own.

    Source: Vardi & Zhang 2000, *The multivariate L1-median and associated data depth*, section 2.
    """
    points, like = exact(points), points
    median = points.mean(0)
    scale = (points - median).norm(dim=1).mean()
    for _ in range(iterations):
        difference = points - median
        distance = difference.norm(dim=1)
        apart = distance > 1e-12 * scale
        if not apart.any():
            break
        inverse = distance[apart].reciprocal()
        step = (difference[apart] * inverse[:, None]).sum(0)
        on_it, pull = float((~apart).sum()), float(step.norm())
        if pull <= on_it:
            break
        move = (1 - on_it / pull) * step / inverse.sum()
        median = median + move
        if move.norm() <= tolerance * scale:
            break
    return median.to(like)

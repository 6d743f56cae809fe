"""Taylor: the first-order change of the loss when a unit goes.  Notebook 03_taylor derives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.batches import Batches, Loss
from prunelab.criteria.base import GroupwiseCriterion, Scores, sum_by_unit
from prunelab.curvature import mean_gradient
from prunelab.tracing.groups import Member
from prunelab.tracing.trace import DependencyGraph


@dataclass
class Taylor(GroupwiseCriterion, name="taylor"):
    """Score a unit by ``Σ |w g|`` over its weights, or by ``|Σ w g|`` with ``multivariable=True``; g = E[∂ℓ/∂w].

    In the quadratic model this keeps ``gᵀδ`` alone.  Cost: one forward and one backward pass over the batches.

    Args:
        multivariable: sum before taking the absolute value, so that signs cancel within a unit's slice of a member.
        loss: ``loss(outputs, targets)``, a mean over samples.
        group_reduction: see ``GroupwiseCriterion``, as all other options. ``normalizer="none"`` compares predicted
            changes of the loss between groups as they are.

    Source: Molchanov et al. 2017, *Pruning CNNs for Resource Efficient Inference*, equation 4 (sum first);
    Molchanov et al. 2019, *Importance Estimation for Neural Network Pruning*, equation 8.
    """

    multivariable: bool = False
    loss: Loss = F.cross_entropy

    def __call__(self, graph: DependencyGraph, batches: Batches | None = None) -> Scores:
        """Return the scores.

        Raises:
            BatchError: batches are missing or do not fit the model.
        """
        return self.reduce(graph, self._products(graph.model, batches))

    def elementwise(self, model: nn.Module, batches: Batches | None = None) -> dict[str, Tensor]:
        """Return ``|w g|`` for every weight."""
        return {name: value.abs() for name, value in self._products(model, batches).items()}

    def _products(self, model: nn.Module, batches: Batches | None) -> dict[str, Tensor]:
        gradient = mean_gradient(model, batches, self.loss)
        return {name: _product(p.detach(), gradient[name]) for name, p in model.named_parameters() if name in gradient}

    def member_scores(self, values: Mapping[str, Tensor], member: Member, size: int) -> Tensor:
        """Return ``[size]``: ``Σ |w g|`` or ``|Σ w g|`` of every unit on one member."""
        if self.multivariable:
            return sum_by_unit(values[member.name], member, size).abs()
        return sum_by_unit(values[member.name].abs(), member, size)


def _product(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return ``w g``; of complex numbers ``Re(w̄ g)``, which is what the loss loses with them."""
    return (weight.conj() * gradient).real if weight.is_complex() else weight * gradient

"""Magnitude: small weights are assumed to matter little.  Notebook 02_magnitude derives what that assumes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from prunelab.batches import Batches
from prunelab.criteria.base import GroupwiseCriterion, Scores
from prunelab.options import real
from prunelab.tracing.trace import DependencyGraph


@dataclass
class Magnitude(GroupwiseCriterion, name="magnitude"):
    """Score a unit by the size of its weights: ``Σ |w|^p`` over every member, then reduced over members.

    In the quadratic model this keeps ``½ δᵀHδ`` with H a multiple of the identity (p = 2).  Cost: none, no data are
    read.

    Args:
        p: the power of the norm, 1 or 2 as a rule.
        group_reduction: see ``GroupwiseCriterion``, as all other options.

    Source: Li et al. 2017, *Pruning Filters for Efficient ConvNets*, section 3.1, for one layer; Fang et al. 2023,
    *DepGraph*, section 3.3, for groups.
    """

    p: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.p = real("p", self.p, above=0)

    def __call__(self, graph: DependencyGraph, batches: Batches | None = None) -> Scores:
        """Return the scores; ``batches`` are not looked at."""
        return self.reduce(graph, self.elementwise(graph.model))

    def elementwise(self, model: nn.Module, batches: Batches | None = None) -> dict[str, Tensor]:
        """Return ``|w|^p`` for every weight."""
        return {name: parameter.detach().abs() ** self.p for name, parameter in model.named_parameters()}

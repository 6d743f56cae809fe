"""Random: the baseline that every criterion has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunelab.batches import Batches
from prunelab.criteria.base import Criterion, Scores
from prunelab.tracing.trace import DependencyGraph


@dataclass
class Random(Criterion, name="random"):
    """Score every unit, or every weight, by a number drawn uniformly from [0, 1).

    In the quadratic model this keeps nothing.  Cost: none, no data are read.

    Args:
        seed: two calls with the same seed give the same scores.

    Source: a baseline, as in Molchanov et al. 2017, *Pruning CNNs for Resource Efficient Inference*.
    """

    seed: int = 0

    def __call__(self, graph: DependencyGraph, batches: Batches | None = None) -> Scores:
        """Return the scores; ``batches`` are not looked at."""
        generator = torch.Generator().manual_seed(self.seed)
        return Scores(
            graph,
            {group.name: torch.rand(group.size, generator=generator, dtype=torch.float32) for group in graph.groups},
            str(self),
        )

    def elementwise(self, model: nn.Module, batches: Batches | None = None) -> dict[str, Tensor]:
        """Return a score for every weight, a tensor like each parameter; ``batches`` are not looked at."""
        generator = torch.Generator().manual_seed(self.seed)
        return {
            name: torch.rand(value.shape, generator=generator, dtype=torch.float32).to(value.device)
            for name, value in model.named_parameters()
        }

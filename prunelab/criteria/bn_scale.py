"""BN scale: a channel that its norm multiplies by little is assumed to matter little.

Flows in: a graph.  Flows out: |γ| of every unit that a norm scales.  Notebook 02_magnitude sets it beside the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from prunelab.batches import Batches
from prunelab.criteria.base import Criterion, GroupwiseCriterion, Normalizer, Scores
from prunelab.errors import OptionError, PruneLabError
from prunelab.options import shown
from prunelab.tracing.groups import Member
from prunelab.tracing.trace import DependencyGraph

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""Layers that divide by a statistic, then scale every channel by its own ``weight``."""


@dataclass
class BNScale(GroupwiseCriterion, name="bn_scale"):
    """Score a unit by ``|γ|``, the scale that a norm gives it; reduced over the norms if it passes several.

    After batch norm a channel has unit variance over the data, so ``|γ|`` is the deviation of what it passes on.  That
    says nothing of what consumers do with it: the score is meant for networks trained with an L1 penalty on γ.

    In the quadratic model this keeps no term.  Cost: none, no data are read.

    Args:
        fallback: for groups without a norm: ``"error"``; ``"keep"``, an infinite score, so that they go last; or a
            criterion that scores them instead (mind the scale: give both a ``normalizer``).
        group_reduction: see ``GroupwiseCriterion``, as all other options.  With ``target_types`` only norms of these
            types count (Liu et al. mean ``[nn.BatchNorm2d]``); by default batch, group, layer, instance and RMS norms
            do.
        normalizer: ``"none"`` by default: one threshold on ``|γ|`` for the whole network, as in the paper.

    Raises:
        OptionError: ``fallback`` is not one of these.

    Source: Liu et al. 2017, *Learning Efficient Convolutional Networks through Network Slimming*, section 3.
    """

    normalizer: Normalizer = "none"
    fallback: Literal["error", "keep"] | Criterion = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.fallback, Criterion) and str(self.fallback) not in ("error", "keep"):
            raise OptionError(f'fallback={shown(self.fallback)} is not one of "error", "keep", or a criterion.')

    def __call__(self, graph: DependencyGraph, batches: Batches | None = None) -> Scores:
        """Return the scores; ``batches`` go to the fallback, if that is a criterion.

        Raises:
            PruneLabError: no norm with a scale runs through some group and ``fallback`` is ``"error"``.
        """
        without = [group for group in graph.groups if not self._norms(graph.model, group.members)]
        if without and self.fallback == "error":
            names = ", ".join(f"`{group.name}`" for group in without[:5]) + (", …" if len(without) > 5 else "")
            raise PruneLabError(
                f"No norm with a scale runs through group {names} ({len(without)} of {len(graph.groups)} groups): "
                'pass fallback="keep", or a criterion for these groups as fallback=.'
            )
        values = {name: parameter.detach().abs() for name, parameter in graph.model.named_parameters()}
        scores = dict(self.reduce(graph, values).by_name)
        if isinstance(self.fallback, Criterion):
            others = self.fallback(graph, batches) if without else {}
            scores |= {group.name: others[group] for group in without}
        else:
            scores |= {group.name: torch.full((group.size,), torch.inf) for group in without}
        return Scores(graph, scores, str(self))

    def elementwise(self, model: nn.Module, batches: Batches | None = None) -> dict[str, Tensor]:
        """Return ``|γ|`` for every scale of a norm."""
        return {
            f"{name}.weight": module.weight.detach().abs()
            for name, module in model.named_modules()
            if isinstance(module, NORMS) and module.weight is not None and self._is_target(model, f"{name}.weight")
        }

    def _norms(self, model: nn.Module, members: Iterable[Member]) -> list[Member]:
        scales = self.elementwise(model)
        return [member for member in members if member.name in scales]

    def _counted(self, model: nn.Module, members: list[Member]) -> list[Member]:
        return self._norms(model, members) or members[:1]

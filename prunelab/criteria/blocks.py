"""Weights as blocks: what the Kronecker criteria share, rows that units own, with the factors of the Fisher S ⊗ A.

Flows in: factors, a member of a group and its weight.  Flows out: a ``Block``, and scores per unit from it.  Notebook
07_kfac derives the formulas that use it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prunelab.batches import Batches, Loss
from prunelab.criteria.base import NORMALIZERS, REDUCTIONS, Criterion, Normalizer, Reduction, Scores
from prunelab.criteria.unknown import with_unknown
from prunelab.curvature.fisher import FISHERS, Curvature, Fisher
from prunelab.curvature.statistics.collect import Statistics, statistics_for
from prunelab.curvature.statistics.kronecker import Factors
from prunelab.errors import BatchError
from prunelab.options import one_of, real
from prunelab.tracing.groups import Group, Member
from prunelab.tracing.trace import DependencyGraph


@dataclass(frozen=True, eq=False)
class Block:
    """A weight with its factors, seen from the side on which a group's units lie, per group g of a convolution.

    Attributes:
        values: the weight, ``[g, n, in, K]``: n rows, of which units own some; K kernel positions.  With factors of
            patches ``in`` (or n, if flipped) counts these positions too, and K is 1.
        S: factor of the rows, ``[g, n, n]``.
        A: factor of the columns, ``[g, in, in]``.
        unit: int64 ``[g, n]``, which unit owns a row, or -1.
        factors: where they are from.
        flipped: whether the rows are the weight's inputs, and ``S`` and ``A`` have changed places.
    """

    values: Tensor
    S: Tensor
    A: Tensor
    unit: Tensor
    factors: Factors
    flipped: bool

    def gram(self) -> Tensor:
        """Return ``W A Wᵀ`` summed over kernel positions, ``[g, n, n]``."""
        return torch.einsum("gnik,gij,gmjk->gnm", self.values, self.A, self.values)

    def sum_rows(self, rows: Tensor, size: int) -> Tensor:
        """Sum one number per row, ``[g, n]``, over the rows of each unit, to ``[size]``."""
        owned = self.unit >= 0
        return rows.new_zeros(size).index_add_(0, self.unit[owned], rows[owned])

    def together(self, matrix: Tensor, size: int) -> Tensor:
        """Return ``[size]``: the sum of a matrix ``[g, n, n]`` over all pairs of rows of each unit."""
        same = (self.unit[:, :, None] == self.unit[:, None, :]) & (self.unit >= 0)[:, :, None]
        return self.sum_rows((matrix * same).sum(2), size)

    def rows_of(self, size: int) -> Iterable[tuple[int, int, Tensor]]:
        """Yield ``(unit, group, positions)`` for the rows of every unit in every group of the convolution."""
        for place, owners in enumerate(self.unit):
            for unit in range(size):
                rows = (owners == unit).nonzero().flatten()
                if len(rows):
                    yield unit, place, rows


def block(factors: Factors, member: Member, weight: Tensor) -> Block | None:
    """Return a weight as rows that the units of ``member`` own; ``None`` if it is about neither rows nor columns.

    Args:
        factors: of the weight, or of some of its rows.
        member: one of its dimensions.
        weight: the weight itself.
    """
    view, flipped = factors.view, member.dim == factors.view.in_dim
    if member.dim not in (view.in_dim, view.out_dim):
        return None
    unit = view.rows_of(member.unit.to(weight.device), member.dim, factors.rows)
    values, left, right = factors.matrices(weight.detach().to(factors.A)), factors.S, factors.A
    if view.groups == 1:
        values, left, right = values[None], left[None], right[None]
    values = values.reshape(*values.shape[:3], -1)
    if flipped:
        values, left, right = values.transpose(1, 2), right, left
    unit = unit.repeat_interleave(values.shape[1] // unit.shape[1], 1)
    return Block(values, left, right, unit, factors, flipped)


@dataclass
class KroneckerCriterion(Criterion):
    """Scores every layer that produces a unit by the Fisher's Kronecker factors, then reduces over these layers.

    A unit may own several rows of a layer (a head's width): they go together, with the terms between them.  Groups that
    no layer produces (embeddings) are scored by the columns of the layers that consume them, in the same way.  A group
    of vectors alone has no layer, no score, and is never removed first (infinity); a group with matrices that are used
    in no way that is known is scored by ``½ Σ w² E[g_n²]``, after a warning.  Biases are not charged.

    Args:
        fisher: ``"empirical"`` (labels as given), ``"mc"`` (sampled from the model) or ``"ggn"`` (exact).
        loss: ``loss(outputs, targets)``, a mean over samples.
        seed: for ``fisher="mc"``.
        group_reduction: over the layers that share a unit: ``"sum"``, ``"mean"``, ``"max"``, ``"prod"``, ``"first"`` or
            ``"gate"`` (the last of them).
        normalizer: over the units of a group, see ``GroupwiseCriterion``; ``"none"`` compares predicted changes of the
            loss between groups as they are.
    """

    fishers: ClassVar[tuple[Curvature, ...]] = FISHERS

    fisher: Fisher = "empirical"
    loss: Loss = F.cross_entropy
    seed: int = 0
    group_reduction: Reduction = "sum"
    normalizer: Normalizer = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if str(self.normalizer) == "standarization":
            self.normalizer = "standardization"
        one_of("fisher", self.fisher, self.fishers)
        one_of("group_reduction", self.group_reduction, REDUCTIONS)
        one_of("normalizer", self.normalizer, NORMALIZERS)
        if hasattr(self, "damping"):
            damping = real("damping", self.damping, least=0, why="it is a share of the mean eigenvalue")
            setattr(self, "damping", damping)  # noqa: B010 - only some of these criteria have it

    def __call__(self, graph: DependencyGraph, batches: Batches | Statistics | None = None) -> Scores:
        """Return the scores.

        Args:
            graph: of the model.
            batches: pairs ``(inputs, targets)``, or ``Statistics`` that hold what is needed.

        Raises:
            BatchError: batches are missing or do not fit the model, or the statistics are of another kind.
        """
        found = statistics_for(graph, batches, self.needs(), fisher=self.fisher, loss=self.loss, seed=self.seed)
        return Scores(graph, self.units(graph, found), str(self))

    def needs(self) -> set[str]:
        """Return which statistics are used."""
        return {"kronecker"}

    def units(self, graph: DependencyGraph, statistics: Statistics) -> dict[str, Tensor]:
        """Return group name -> score of every unit."""
        parameters, by_weight = dict(graph.model.named_parameters()), self.by_weight(statistics)
        scores = {group.name: self._group(group, by_weight, parameters) for group in graph.groups}
        return with_unknown(str(self), graph, scores, by_weight, statistics)

    def by_weight(self, statistics: Statistics) -> dict[str, list[Any]]:
        """Return weight name -> what is known of it."""
        found: dict[str, list[Any]] = {}
        for factors in statistics.kronecker.values():
            found.setdefault(factors.weight, []).append(factors)
        if not found:
            raise BatchError(f"`{self}` found no linear or convolution layer whose outputs have gradients by sample.")
        return found

    def _group(self, group: Group, known: dict[str, list[Any]], parameters: Mapping[str, Tensor]) -> Tensor:
        for role in ("produces", "carries", "consumes"):
            rows = []
            for member in group.members:
                if member.role == role and member.name in known:
                    parts = [
                        self.member(one, member, parameters[member.name], group.size) for one in known[member.name]
                    ]
                    scores = [part for part in parts if part is not None]
                    if scores:
                        rows.append(torch.stack(scores).sum(0).float().cpu())
            if rows:
                reduced = REDUCTIONS[self.group_reduction](torch.stack(rows), [role] * len(rows))
                return NORMALIZERS[self.normalizer](reduced)
        return torch.full((group.size,), torch.inf)

    def member(self, factors: Factors, member: Member, weight: Tensor, size: int) -> Tensor | None:
        """Return ``[size]``: what every unit costs on one layer."""
        part = block(factors, member, weight)
        return None if part is None else self.score(part, size)

    @abstractmethod
    def score(self, part: Block, size: int) -> Tensor:
        """Return ``[size]``: what every unit costs on one block."""

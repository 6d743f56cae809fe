"""OBS: what removing costs once all other weights have adapted.

OBD's ½ w²h keeps the other weights fixed.  Here the cost is the minimum of ½ δᵀHδ over all δ that take the unit's
weights S away: ``½ w_Sᵀ ([H⁻¹]_SS)⁻¹ w_S``.  On a network of some thousand weights H is dense (``surgeon`` has the
algebra); on larger ones it is a block per layer, S ⊗ A, whose inverse is S⁻¹ ⊗ A⁻¹:

    one weight          ½ w_ij² / ([S⁻¹]_ii [A⁻¹]_jj)
    an output i         ½ w_iᵀ A w_i / [S⁻¹]_ii         several rows R:      ½ tr(([S⁻¹]_RR)⁻¹ W_R A W_Rᵀ)
    an input j          ½ w_jᵀ S w_j / [A⁻¹]_jj         several columns C:   ½ tr(([A⁻¹]_CC)⁻¹ W_Cᵀ S W_C)

Flows in: a graph and batches, or ``Statistics``.  Flows out: scores; from ``prune_weights`` a sparse model whose other
weights make up for what went.  Notebook 05_obs derives all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from prunelab.batches import Batches
from prunelab.criteria.base import NORMALIZERS, REDUCTIONS, Scores
from prunelab.criteria.blocks import Block, KroneckerCriterion
from prunelab.criteria.dense import bowl, prune_weights, split
from prunelab.curvature.fisher import CURVATURES, Curvature
from prunelab.curvature.statistics.collect import Statistics, statistics_for
from prunelab.curvature.statistics.factor_sums import FACTORS, Factor
from prunelab.curvature.statistics.kronecker import Factors
from prunelab.errors import BatchError, OptionError
from prunelab.options import one_of
from prunelab.sparsity.masks import bake, mask_of, parameters_of
from prunelab.sparsity.surgeon import damped, damped_inverse, joint_saliency, saliency
from prunelab.tracing.groups import Group
from prunelab.tracing.trace import DependencyGraph

__all__ = ["OBS", "prune_weights"]

Structure = Literal["kronecker", "layer", "dense"]
STRUCTURES: tuple[Structure, ...] = get_args(Structure)


@dataclass
class OBS(KroneckerCriterion, name="obs"):
    """Score a unit by ``½ w_Sᵀ ([H⁻¹]_SS)⁻¹ w_S``, what is left of its cost when all other weights adapt.

    With a block of H per layer the unit's cost is the sum over all layers that produce or consume it (``kron_obs``
    charges producers alone).  Biases and norms belong to no block, and a group without layers goes last (infinity);
    with ``curvature="dense"`` every parameter counts.

    In the quadratic model this keeps ``½ δᵀHδ`` at its minimum over all other weights of the block.

    Args:
        curvature: ``"kronecker"``, a block F ≈ S ⊗ A per layer; ``"layer"``, the block I ⊗ A, which asks for the change
            of the layer's own outputs instead of the loss; or ``"dense"``, the whole matrix, on networks of at most
            5000 weights.
        fisher: ``"empirical"`` (labels as given), ``"mc"`` (sampled from the model), ``"ggn"`` (exact), or with
            ``"dense"`` also ``"hessian"``.
        damping: added to the matrix, or to S and to A, as a share of the mean eigenvalue of each.
        factor: of convolutions, ``"channel"`` (A over channels, nothing between kernel positions) or ``"full"`` (A over
            whole patches, as in OBC).
        loss: ``loss(outputs, targets)``, a mean over samples.
        seed: for ``fisher="mc"``.
        group_reduction: over the layers of a unit, see ``GroupwiseCriterion``; a sum is exact for blocks.
        normalizer: over the units of a group; ``"none"`` compares predicted changes of the loss between groups.

    Cost: one forward and one backward pass (``"ggn"``: a backward pass per class), and an inverse per factor.

    Source: Hassibi & Stork 1992, *Optimal Brain Surgeon*, equation 5; Frantar, Singh & Alistarh 2022, *Optimal Brain
    Compression*, equation 3, for one matrix per layer; Wang et al. 2019, *EigenDamage*, section 4, for S ⊗ A.
    """

    fishers = CURVATURES

    curvature: Structure = "kronecker"
    fisher: Curvature = "empirical"  # type: ignore[assignment]  # "hessian" too, where the matrix is dense
    damping: float = 1e-3
    factor: Factor = "channel"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("curvature", self.curvature, STRUCTURES)
        one_of("factor", self.factor, FACTORS)
        if self.fisher == "hessian" and self.curvature != "dense":
            raise OptionError('fisher="hessian" needs curvature="dense": the Hessian has no Kronecker factors.')

    def __call__(self, graph: DependencyGraph, batches: Batches | Statistics | None = None) -> Scores:
        """Return the scores.

        Args:
            graph: of the model.
            batches: pairs ``(inputs, targets)``, or ``Statistics`` that hold ``"kronecker"``.

        Raises:
            BatchError: batches are missing or do not fit the model, or the statistics are of another kind.
            BudgetError: ``curvature="dense"`` on a model that is too large, or a matrix that has no inverse.
        """
        if self.curvature == "dense":
            return Scores(graph, self._dense_units(graph, batches), str(self))
        return Scores(graph, self.units(graph, self._statistics(graph, batches)), str(self))

    def elementwise(self, model: nn.Module, batches: Batches | Statistics | None = None) -> dict[str, Tensor]:
        """Return ``½ w²/[H⁻¹]_qq`` for every weight that has a block, or all of them (``"dense"``).

        Each is the cost of removing that weight alone, if the others then adapt.  Ranked over a whole network and
        removed at once without any update, they empty layers whose factors have low rank: the others can make up for
        every single weight there, but not for all.  Rank within layers (``sparsify(…, scope="layer")``), or let the
        others adapt (``prune_weights``).  A model with masks is scored as it would be without them (``bake``).
        """
        if any(mask_of(model, name) is not None for name in parameters_of(model)):
            model = bake(model)
        if self.curvature == "dense":
            options: dict[str, Any] = {"loss": self.loss, "seed": self.seed}
            values = saliency(*bowl(model, batches, fisher=self.fisher, damping=self.damping, **options))
            return split(values, model)
        out: dict[str, Tensor] = {}
        for factors in chain.from_iterable(self.by_weight(self._statistics(model, batches)).values()):
            weight = model.get_parameter(factors.weight).detach()
            s, a = (self._inverse(m, factors).diagonal(dim1=-2, dim2=-1) for m in (factors.S, factors.A))
            values = factors.matrices(weight.to(s))
            kernel = (1,) * (values.dim() - s.dim() - 1)
            values = values**2 / 2 / (s[..., :, None] * a[..., None, :]).view(*values.shape[: s.dim() + 1], *kernel)
            score = out.setdefault(factors.weight, torch.zeros_like(weight))
            score[factors.rows] = factors.like_weight(values).to(weight)
        return out

    # ── a block per layer ─────────────────────────────────────────────────────────────────────────────────────────

    def _statistics(self, graph: DependencyGraph | nn.Module, batches: Batches | Statistics | None) -> Statistics:
        fisher = batches.fisher if self.curvature == "layer" and isinstance(batches, Statistics) else self.fisher
        options: dict[str, Any] = {"fisher": fisher, "loss": self.loss, "seed": self.seed, "factor": self.factor}
        found = statistics_for(graph, batches, {"kronecker"}, **options)
        other = next(
            (one for one in found.kronecker.values() if one.kind == "conv" and one.factor != self.factor), None
        )
        if other is not None:
            raise BatchError(
                f'These statistics hold factors of factor="{other.factor}", needed is "{self.factor}": '
                f'collect(graph, batches, factor="{self.factor}"), or set factor="{other.factor}" on the criterion.'
            )
        return found

    def by_weight(self, statistics: Statistics) -> dict[str, list[Any]]:
        """Return weight name -> its factors; S is the identity if the layers' own outputs count."""
        known = super().by_weight(statistics)
        if self.curvature == "layer":
            return {name: [replace(one, S=self._identity(one.S)) for one in found] for name, found in known.items()}
        return known

    def _identity(self, like: Tensor) -> Tensor:
        """Return what is the identity once it is damped."""
        return torch.eye(like.shape[-1]).to(like).expand_as(like) / (1 + self.damping)

    def _group(self, group: Group, known: dict[str, list[Any]], parameters: Any) -> Tensor:
        counted = [member for member in group.members if member.name in known]
        if not counted:
            return torch.full((group.size,), torch.inf)
        rows = []
        for member in counted:
            parts = [self.member(one, member, parameters[member.name], group.size) for one in known[member.name]]
            rows.append(torch.stack([part for part in parts if part is not None]).sum(0).float().cpu())
        reduced = REDUCTIONS[self.group_reduction](torch.stack(rows), [member.role for member in counted])
        return NORMALIZERS[self.normalizer](reduced)

    def score(self, part: Block, size: int) -> Tensor:
        """Return ``[size]``: ``½ tr(([S⁻¹]_RR)⁻¹ W_R A W_Rᵀ)`` for the rows R of every unit."""
        inverse = self._inverse(part.S, part.factors)
        part = replace(part, values=part.values.to(inverse), unit=part.unit.to(inverse.device))
        gram = replace(part, A=damped(part.A, self.damping)).gram()
        if torch.bincount(part.unit[part.unit >= 0], minlength=size).amax() <= 1:
            return part.sum_rows((gram / inverse).diagonal(dim1=1, dim2=2), size) / 2
        scores = gram.new_zeros(size)
        for unit, place, rows in part.rows_of(size):
            square = (rows[:, None], rows)
            scores[unit] += torch.linalg.solve(inverse[place][square], gram[place][square]).trace() / 2
        return scores

    def _inverse(self, matrix: Tensor, factors: Factors) -> Tensor:
        return damped_inverse(matrix, self.damping, f"A Kronecker factor of `{factors.weight}`")

    # ── the whole matrix ──────────────────────────────────────────────────────────────────────────────────────────

    def _dense_units(self, graph: DependencyGraph, batches: Any) -> dict[str, Tensor]:
        options: dict[str, Any] = {"loss": self.loss, "seed": self.seed}
        weights, inverse = bowl(graph.model, batches, fisher=self.fisher, damping=self.damping, **options)
        places = split(torch.arange(len(weights), device=weights.device), graph.model)
        scores = {}
        for group in graph.groups:
            costs = [joint_saliency(weights, inverse, index) for index in _indices(group, places)]
            scores[group.name] = NORMALIZERS[self.normalizer](torch.stack(costs).float().cpu())
        return scores


def _indices(group: Group, places: dict[str, Tensor]) -> Iterator[Tensor]:
    """Yield, for every unit of a group, where all its weights are in the vector of all parameters."""
    members = [member for member in group.members if member.name in places]
    for unit in range(group.size):
        found = [
            places[member.name]
            .index_select(member.dim, member.positions(unit).to(places[member.name].device))
            .flatten()
            for member in members
        ]
        yield torch.cat(found).unique()

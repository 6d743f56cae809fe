"""Gate: the quadratic model in numbers that multiply each unit where it is consumed.  Notebook 10_oracle derives it.

Flows in: a graph and batches.  Flows out: scores, and with ``interactions`` the matrix by which ``plan`` chooses units
that are cheap together.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunelab.batches import Batch, Batches, Loss, checked, device_of
from prunelab.batches.mean_check import check_apart, check_mean, check_own
from prunelab.batches.trees import tree_leaves, tree_map
from prunelab.criteria.base import Criterion, Scores
from prunelab.criteria.gates import Gates
from prunelab.criteria.memory import check_fits
from prunelab.curvature.fisher import CURVATURES, Curvature, columns, passes, slopes
from prunelab.curvature.statistics.collect import Statistics
from prunelab.curvature.watching.checkpoints import no_checkpoints
from prunelab.errors import BatchError, OptionError
from prunelab.options import one_of, real, whole
from prunelab.runtime.isolation import evaluating
from prunelab.runtime.stack import user_level
from prunelab.runtime.switches import plain_attention
from prunelab.tracing.trace import DependencyGraph

MANY = 2000
"""Backward passes for one batch, above which ``"ggn"`` warns."""


@dataclass
class Gate(Criterion, name="gate"):
    """Score a unit by ``½ ∂²L/∂z_u²`` for a gate z_u = 1 that multiplies it where it is consumed.

    In the quadratic model this keeps ``½ G_uu``, in one number per unit instead of its weights: removing the unit is
    δz_u = −1 and costs ``−∂L/∂z_u + ½ G_uu``, of which the first term counts with ``linear=True``.  In the weights the
    same step is cubic or worse (a unit's producers, norm and consumers all scale it); in the gate it is linear up to
    the next activation.  By default ``G = E[J_nᵀ Λ_n J_n]``, the generalised Gauss-Newton matrix: J_n the derivative of
    one sample's outputs in all gates, Λ_n the Hessian of the loss in the outputs.

    Cost per batch: one forward pass and, for ``"ggn"``, one backward pass per output; for ``"mc"``, ``samples``; for
    ``"empirical"``, one; for ``"hessian"``, one double backward per unit; ``linear`` one more.

    Args:
        curvature: ``"ggn"``, exact; ``"mc"``, an unbiased estimate of it from sampled labels, for many classes;
            ``"empirical"``, E[g_n g_nᵀ] with g_n the gradient of one sample's loss; or ``"hessian"``, exact.
        linear: add ``−∂L/∂z_u``.  Better for units that go alone, mostly worse for many at once.
        interactions: keep all of G as the scores' matrix, ``[U, U]`` for U units in the network (4 U² bytes); ``plan``
            then selects greedily.
        samples: how often ``"mc"`` samples the labels.
        temperature: T in ``T² ℓ(outputs / T)``, whose Hessian Λ_n then is.  A sample of which the model is sure has
            Λ_n ≈ 0 at T = 1, so its outputs may be spoilt at no cost: right for one unit, wrong for half a network.
            With T of about 4 all samples count; then one sampled label does as well as all classes.
        loss: ``loss(outputs, targets)``, a mean over samples, convex in outputs ``[B, …]``.
        seed: of the sampled labels.
        progress: show a progress bar over the batches.

    Source: ours.  Gates are also those of Molchanov et al. 2019, *Importance Estimation for Neural Network Pruning*,
    section 3.2, who score them by their squared gradient; the temperature is that of Hinton et al. 2015, *Distilling
    the Knowledge in a Neural Network*, section 2.
    """

    curvature: Curvature = "ggn"
    linear: bool = False
    interactions: bool = False
    samples: int = 1
    temperature: float = 1.0
    loss: Loss = F.cross_entropy
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("curvature", self.curvature, CURVATURES)
        self.samples = whole("samples", self.samples)
        self.temperature = real("temperature", self.temperature, above=0)
        if self.temperature != 1 and self.curvature not in ("ggn", "mc"):
            raise OptionError(
                f"`temperature` must be 1 for curvature={self.curvature!r}, got temperature={self.temperature!r}."
            )

    def __call__(self, graph: DependencyGraph, batches: Batches | None = None) -> Scores:
        """Return the scores.

        Raises:
            BatchError: batches are missing or do not fit the model, or derivatives are not finite.
            OptionError: the matrix of interactions does not fit into memory.
        """
        if not graph.groups:
            return Scores(graph, {}, str(self))
        if self.interactions:
            units = sum(group.size for group in graph.groups)
            check_fits(
                f"The matrix of interactions between {units} units",
                2 * 4 * units**2,  # the sum so far, and what a batch adds to it
                device_of(graph.model),
                "trace with ignore= what need not be cut, or leave out interactions=True",
            )
        gradient, matrix = self.measure(graph, batches)
        diagonal = matrix.diagonal() if self.interactions else matrix
        score = (diagonal / 2 - gradient if self.linear else diagonal / 2).float().cpu()
        parts = score.split([group.size for group in graph.groups])
        by_name = {group.name: part for group, part in zip(graph.groups, parts, strict=True)}
        return Scores(graph, by_name, str(self), matrix.float().cpu() if self.interactions else None)

    def measure(self, graph: DependencyGraph, batches: Batches | None) -> tuple[Tensor, Tensor]:
        """Return ``∂L/∂z [U]`` and the curvature, ``[U, U]`` with ``interactions``, else its diagonal ``[U]``.

        Raises:
            BatchError: as for a call.
        """
        batches = batches.batches if isinstance(batches, Statistics) else batches
        first, seen = 0, 0.0
        sums: list[Tensor] = []
        with no_checkpoints(graph.model, "gate"), evaluating(graph.model):
            bar = tqdm(
                checked(graph.model, batches, "gate", self.loss), desc="gate", disable=not self.progress, leave=False
            )
            for number, batch in enumerate(bar):
                self._check(graph, batch, number)
                gates = self._gates(graph, batch)
                for found in self._sums(gates, batch, first):
                    if not all(bool(value.isfinite().all()) for value in found):
                        raise BatchError(f"The derivatives in the gates are not finite in batch {number}.")
                    sums = (
                        [total.add_(value) for total, value in zip(sums, found, strict=True)] if sums else list(found)
                    )
                first, seen = first + batch.size, seen + batch.total
        gradient, curvature = sums
        return gradient / seen, curvature / seen

    def _check(self, graph: DependencyGraph, batch: Batch, number: int) -> None:
        """Check that a batch has what the curvature needs, and the first one that it does not take hours."""
        check_own(graph.model, batch)
        if self.curvature in ("ggn", "mc") or self.temperature != 1:
            batch.opened(f"gate with curvature={self.curvature!r}")
        if self.curvature == "hessian":
            return
        batch.apart("gate")
        if number:
            return
        check_apart(graph.model, batch)
        if self.curvature == "ggn":
            with torch.no_grad():
                count = passes(batch.take([0]).run(graph.model, check=False), batch.take([0]), "ggn")
            if count > MANY:
                warnings.warn(
                    f'gate with curvature="ggn" needs one backward pass for every number that the model returns for a '
                    f'sample: {count} for each batch here.  curvature="mc" needs {self.samples}.',
                    stacklevel=user_level(),
                )

    def _gates(self, graph: DependencyGraph, batch: Batch) -> Gates:
        for name, module in graph.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise BatchError(
                    f"`{name}` normalises over the batch (track_running_stats=False), so that samples have no "
                    "derivatives of their own."
                )
        return Gates(graph, batch)

    def _sums(self, gates: Gates, batch: Batch, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield gradient and curvature, summed over samples: of the whole batch, or of one sample after the other."""
        like = next(p for p in gates.model.parameters() if p.is_floating_point())
        ones = torch.ones(gates.size, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        if self.curvature == "hessian":
            with torch.enable_grad(), plain_attention:  # fused attention has no double backward
                yield self._hessian(gates, batch, ones)
            return
        if gates.per_sample:
            with torch.enable_grad():
                yield self._outer_products(gates, batch, ones.repeat(batch.size, 1).requires_grad_(), first)
            return
        for number, one in enumerate(batch.singles()):
            if one.total > 0:
                with torch.enable_grad():
                    yield self._outer_products(gates, one, ones.clone().requires_grad_(), first + number)

    def _outer_products(self, gates: Gates, batch: Batch, z: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Return ``Σ_n c_n ∂ℓ_n/∂z`` and ``Σ_n c_n J_nᵀ Λ_n J_n``."""
        outputs = batch.picked(gates.run(batch.inputs, z))
        check_mean(outputs, batch)
        tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        reached = [leaf.requires_grad for leaf in tensors]

        def back(column: list[Tensor]) -> Tensor:
            pairs = [(leaf, v) for leaf, v, used in zip(tensors, column, reached, strict=True) if used]
            if not pairs:
                return z.new_zeros(1, gates.size)
            roots, backs = zip(*pairs, strict=True)
            (found,) = torch.autograd.grad(roots, z, backs, retain_graph=True, materialize_grads=True)
            return found.view(-1, gates.size)

        gradient = z.new_zeros(gates.size)
        if self.linear or self.curvature == "empirical":
            gradient = back(slopes(outputs, batch)).sum(0)
        heated = outputs
        if self.temperature != 1:
            heated = tree_map(lambda leaf: leaf / self.temperature if _is_float(leaf) else leaf, outputs)
        draws = self.samples if self.curvature == "mc" else 1
        total: Tensor | None = None
        for draw in range(draws):
            for column in columns(heated, batch, self.curvature, self.seed + draw, first, "curvature"):
                rows = back(column)
                found = rows.t() @ rows if self.interactions else rows.square().sum(0)
                total = found if total is None else total.add_(found)
        if total is None:  # a loss that is linear in the outputs
            total = z.new_zeros((gates.size,) * (1 + self.interactions))
        return gradient, total / draws

    def _hessian(self, gates: Gates, batch: Batch, ones: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradient and Hessian of the summed loss in gates that all samples share, one row after the other."""
        z = ones.clone().requires_grad_()
        outputs = batch.picked(gates.run(batch.inputs, z))
        if batch.problem is None:
            check_mean(outputs, batch)
        value = batch.value(outputs) * batch.total
        (gradient,) = torch.autograd.grad(value, z, create_graph=True, materialize_grads=True)
        rows = []
        for unit in tqdm(range(gates.size), desc="gate", disable=not self.progress, leave=False):
            (row,) = torch.autograd.grad(gradient[unit], z, retain_graph=True, materialize_grads=True)
            rows.append(row if self.interactions else row[unit])
        return gradient.detach(), torch.stack(rows)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()

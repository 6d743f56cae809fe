"""Gate: the quadratic model in numbers that multiply each unit where it is consumed.  Notebook 10_oracle derives it.

Flows in: a graph and batches.  Flows out: scores, and with ``interactions`` the matrix by which ``plan`` chooses units
that are cheap together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from prunelab.batches import Batches, Loss, checked, device_of
from prunelab.criteria.base import Criterion, Scores
from prunelab.criteria.gates import Gates, samples
from prunelab.criteria.memory import check_fits
from prunelab.curvature.collect import Statistics
from prunelab.curvature.fisher import check_mean, columns
from prunelab.curvature.layout import leaves
from prunelab.curvature.one_pass import evaluating
from prunelab.errors import BatchError, OptionError
from prunelab.options import one_of, real, whole
from prunelab.tracing.trace import DependencyGraph

CURVATURES = ("ggn", "mc", "empirical", "hessian")


@dataclass
class Gate(Criterion):
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

    curvature: str = "ggn"
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
        gates, seen = None, 0
        sums: list[Tensor] = []
        with evaluating(graph.model):
            bar = tqdm(checked(graph.model, batches, "gate"), desc="gate", disable=not self.progress, leave=False)
            for number, (inputs, targets) in enumerate(bar):
                gates = gates or self._gates(graph, inputs)
                for found in self._sums(gates, inputs, targets, seen):
                    if not all(bool(value.isfinite().all()) for value in found):
                        raise BatchError(f"The derivatives in the gates are not finite in batch {number}.")
                    sums = (
                        [total.add_(value) for total, value in zip(sums, found, strict=True)] if sums else list(found)
                    )
                seen += len(targets)
        gradient, curvature = sums
        return gradient / seen, curvature / seen

    def _gates(self, graph: DependencyGraph, inputs: Any) -> Gates:
        for name, module in graph.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise BatchError(
                    f"`{name}` normalises over the batch (track_running_stats=False), so that samples have no "
                    "derivatives of their own."
                )
        return Gates(graph, inputs)

    def _sums(self, gates: Gates, inputs: Any, targets: Tensor, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield gradient and curvature, summed over samples: of the whole batch, or of one sample after the other."""
        like = next(p for p in gates.model.parameters() if p.is_floating_point())
        ones = torch.ones(gates.size, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        if self.curvature == "hessian":
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no double backward
                yield self._hessian(gates, inputs, targets, ones)
            return
        parts = [(inputs, targets, ones.repeat(len(targets), 1))]
        if not gates.per_sample:
            parts = [(x, y, ones) for x, y in zip(samples(inputs, len(targets)), targets.split(1), strict=True)]
        for number, (x, y, z) in enumerate(parts):
            with torch.enable_grad():
                yield self._outer_products(gates, x, y, z.clone().requires_grad_(), first + number)

    def _outer_products(
        self, gates: Gates, inputs: Any, targets: Tensor, z: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        """Return ``Σ_n ∂ℓ_n/∂z`` and ``Σ_n J_nᵀ Λ_n J_n``."""
        outputs = gates.run(inputs, z)
        self._check(outputs, targets)
        tensors = leaves(outputs, len(targets))

        def back(column: list[Tensor]) -> Tensor:
            (found,) = torch.autograd.grad(tensors, z, column, retain_graph=True, materialize_grads=True)
            return found.view(-1, gates.size)

        gradient, slopes = z.new_zeros(gates.size), None
        if self.linear or self.curvature == "empirical":
            slopes = back(next(columns(outputs, targets, self.loss, "empirical", self.seed, first)))
            gradient = slopes.sum(0)
        heated = outputs / self.temperature if isinstance(outputs, Tensor) else outputs
        draws = self.samples if self.curvature == "mc" else 1
        total: Tensor | None = None
        for draw in range(draws):
            for column in columns(heated, targets, self.loss, self.curvature, self.seed + draw, first):
                rows = slopes if slopes is not None and self.curvature == "empirical" else back(column)
                found = rows.t() @ rows if self.interactions else rows.square().sum(0)
                total = found if total is None else total.add_(found)
        if total is None:  # a loss that is linear in the outputs
            total = z.new_zeros((gates.size,) * (1 + self.interactions))
        return gradient, total / draws

    def _check(self, outputs: Any, targets: Tensor) -> None:
        try:
            check_mean(outputs, targets, self.loss)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise BatchError(f"The loss cannot take the outputs with targets {list(targets.shape)}: {error}") from error

    def _hessian(self, gates: Gates, inputs: Any, targets: Tensor, ones: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradient and Hessian of the summed loss in gates that all samples share, one row after the other."""
        z = ones.clone().requires_grad_()
        value = self.loss(gates.run(inputs, z), targets) * len(targets)
        (gradient,) = torch.autograd.grad(value, z, create_graph=True, materialize_grads=True)
        rows = []
        for unit in tqdm(range(gates.size), desc="gate", disable=not self.progress, leave=False):
            (row,) = torch.autograd.grad(gradient[unit], z, retain_graph=True, materialize_grads=True)
            rows.append(row if self.interactions else row[unit])
        return gradient.detach(), torch.stack(rows)

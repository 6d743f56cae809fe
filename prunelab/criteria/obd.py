"""OBD: optimal brain damage, the quadratic model with a diagonal Hessian.  Notebook 04_obd derives it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.batches import Batches, Loss
from prunelab.criteria.base import GroupwiseCriterion, Normalizer, Reduction, Scores
from prunelab.curvature import exact
from prunelab.curvature.fisher import CURVATURES, Curvature
from prunelab.curvature.second.hvp import hessian_product
from prunelab.curvature.statistics.collect import statistics_for
from prunelab.curvature.statistics.statistics import Statistics
from prunelab.errors import BatchError
from prunelab.options import one_of, whole
from prunelab.tracing.trace import DependencyGraph


@dataclass
class OBD(GroupwiseCriterion, name="obd"):
    """Score a weight by ``½ w² h``, h the diagonal of the curvature, and a unit by the sum over all its weights.

    In the quadratic model this keeps ``½ δᵀHδ`` with everything off the diagonal of H taken as zero, and leaves out
    ``gᵀδ``, which vanishes at a minimum.  A score is a predicted change of the loss, so units of all groups compare as
    they are.  What is used for h:

    - ``"empirical"``: E[g_n²], g_n the gradient of one sample's loss.  Cost: one forward and backward pass, and the
      squares (about 2 together);
    - ``"mc"``: the same with labels drawn from the model, an unbiased estimate of the next;
    - ``"ggn"``: the diagonal of the Gauss-Newton matrix (for cross-entropy the Fisher's), exactly; one backward pass
      per class;
    - ``"hessian"``: the diagonal of H itself.  Up to ``exact_below`` parameters exactly, at one double backward pass
      per parameter; above it Hutchinson's estimate E[z ⊙ Hz] with random signs z, which is unbiased and noisy, at one
      double backward pass per probe.  It may be negative.

    Cost: one forward and one backward pass with per-sample moments, for ``"empirical"`` and ``"mc"``.

    Args:
        fisher: one of the above.
        probes: sign vectors for ``"hessian"``.
        exact_below: up to how many parameters ``"hessian"`` is exact.
        loss: ``loss(outputs, targets)``, a mean over samples.
        seed: of drawn labels, or of the sign vectors.
        group_reduction: see ``GroupwiseCriterion``, as all other options.

    Source: LeCun, Denker & Solla 1989, *Optimal Brain Damage*, equation 2 and section 2.2, step 4 (the saliency
    ``h_kk u_k² / 2``); the probes are Hutchinson's (Bekas, Kokiopoulou & Saad 2007, for a diagonal).
    """

    group_reduction: Reduction = "sum"
    normalizer: Normalizer = "none"
    bias: bool = True
    fisher: Curvature = "empirical"
    probes: int = 16
    exact_below: int = 2000
    loss: Loss = F.cross_entropy
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("fisher", self.fisher, CURVATURES)
        self.probes = whole("probes", self.probes)
        self.exact_below = whole("exact_below", self.exact_below, least=0)

    def __call__(self, graph: DependencyGraph, batches: Batches | Statistics | None = None) -> Scores:
        """Return the scores.

        Args:
            graph: of the model.
            batches: pairs ``(inputs, targets)``, or statistics with ``"moments"`` of the same Fisher.

        Raises:
            BatchError: batches are missing or do not fit the model, or the statistics are of another kind.
        """
        return self.reduce(graph, self.elementwise(graph.model, batches))

    def elementwise(self, model: nn.Module, batches: Batches | Statistics | None = None) -> dict[str, Tensor]:
        """Return ``½ w² h`` for every weight."""
        diagonal = self.diagonal(model, batches)
        return {
            name: parameter.detach().square() * diagonal[name].to(parameter) / 2
            for name, parameter in model.named_parameters()
            if name in diagonal
        }

    def diagonal(self, model: nn.Module, batches: Batches | Statistics | None) -> dict[str, Tensor]:
        """Return h for every weight, a tensor like each parameter; zeros where nothing depends on one."""
        if self.fisher != "hessian":
            found = statistics_for(model, batches, {"moments"}, fisher=self.fisher, loss=self.loss, seed=self.seed)
            moments = found.moments
            return {name: moments.get(name, torch.zeros_like(value)) for name, value in _floating(model).items()}
        if isinstance(batches, Statistics):
            if batches.batches is None:
                raise BatchError(
                    'fisher="hessian" is not in these statistics, and their batches are gone: pass a loader.'
                )
            batches = batches.batches
        parameters = _floating(model)
        if sum(value.numel() for value in parameters.values()) <= self.exact_below:
            matrix = exact.hessian(model, batches, self.loss, list(parameters), max_parameters=self.exact_below)
            sizes = [value.numel() for value in parameters.values()]
            parts = zip(parameters.items(), matrix.diagonal().split(sizes), strict=True)
            return {name: part.view_as(value) for (name, value), part in parts}
        signs = _signs(parameters, self.probes, self.seed)
        products = hessian_product(model, batches, signs, self.loss)
        return {name: (sign * products[name]).mean(0) for name, sign in signs.items()}


def _floating(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.is_floating_point()}


def _signs(parameters: dict[str, Tensor], probes: int, seed: int) -> dict[str, Tensor]:
    """Return random signs ``[probes, *shape]`` for every parameter; more probes begin with the same ones."""
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(probes):
        for name, value in parameters.items():
            rows[name].append(torch.randint(2, value.shape, generator=generator).to(value) * 2 - 1)
    return {name: torch.stack(values) for name, values in rows.items()}

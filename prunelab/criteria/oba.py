"""OBA: optimal brain apoptosis, the Hessian with all weights on one side.  Notebook 09_oba derives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.batches import Batches, Loss
from prunelab.criteria.base import GroupwiseCriterion, Normalizer, Reduction, Scores, sum_by_unit
from prunelab.curvature.gradient import mean_gradient
from prunelab.curvature.second.higher import self_derivative
from prunelab.curvature.second.hvp import self_product
from prunelab.curvature.second.layer_pairs import pair_matrix
from prunelab.curvature.second.vjp import HessianPart, check_part
from prunelab.curvature.statistics.one_pass import model_of
from prunelab.curvature.statistics.statistics import Statistics
from prunelab.errors import OptionError
from prunelab.options import whole
from prunelab.tracing.groups import Member
from prunelab.tracing.trace import DependencyGraph


@dataclass
class OBA(GroupwiseCriterion, name="oba"):
    """Score a weight by ``θ_k (Hθ)_k = Σ_l θ_k H_kl θ_l``, and a unit by the sum over all its weights.

    The product is the weight's row in ``θᵀHθ``: its interactions with *all* weights of the network, as if all of them
    went at once.  As published, what ranks is an absolute value: of a weight's product for single weights, and for a
    unit of the sum over its slice of each member.  ``signed=True`` keeps the sign.

    For the loss of a network, H is the sum of the Gauss-Newton part, E[JᵀΛJ], and the functional part, E[Σ_k r_k
    ∂²f_k/∂θ²].  The code first released with the paper (April 2025) hands the slope of the loss back through the
    network and holds it fixed: on ReLU networks that is the functional part.  *FastOBA* (June 2025) differentiates the
    loss twice, which is the exact ``θ ⊙ Hθ``, the default here.

    ``order`` is that of FastOBA: ``k`` scores by ``θ_i Σ ∂^k L/∂θ_i∂θ_j∂θ_l… θ_j θ_l…``, a weight's share in the k-th
    Taylor term without its factor ``±1/k!``; 1 is Taylor's ``θ ⊙ g``.  The released code leaves θ differentiable
    between two orders, and so adds lower orders from the third on; here θ is held fixed.

    With ``first_order`` the score is ``−θ_k g_k + ½ θ_k (Hθ)_k``: with δ = −θ, the weight's share in the quadratic
    model ``gᵀδ + ½ δᵀHδ`` of losing them all.

    In a network of L layers without biases and norms, whose activations are positively homogeneous (ReLU), outputs are
    homogeneous in each layer's weights.  Euler's theorem then gives, in every weight, *functional part =
    (L−1) θ_k g_k*: the first-order term again, with the sign opposite to that of its δ.

    In the quadratic model this keeps ``δᵀHδ`` for all units at once, shared out among them; a unit that goes alone
    interacts with itself only, which is ``quadratic``.

    Cost: two to three forward and backward passes over the data, whatever the depth; about twice as much for every
    order beyond.

    Args:
        part: of the Hessian: ``"exact"``, all of it, as FastOBA; ``"functional"``, what the code first released
            computes on ReLU networks; or ``"gauss_newton"``.
        first_order: add the Taylor term, as above.
        order: of the derivative, from 1; other than 2 it goes with ``part="exact"`` and without ``first_order``.
        signed: keep the sign of the products, so that a unit whose product is negative goes first.
        loss: ``loss(outputs, targets)``, a mean over samples.
        group_reduction: see ``GroupwiseCriterion``, as all other options.

    Source: Sun et al. 2025, *Optimal Brain Apoptosis*, section 3; ``any_order_differentiation`` of NEU-REAL/OBA.
    """

    group_reduction: Reduction = "sum"
    normalizer: Normalizer = "none"
    bias: bool = True
    part: HessianPart = "exact"
    first_order: bool = False
    signed: bool = False
    order: int = 2
    loss: Loss = F.cross_entropy

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part(self.part)
        self.order = whole("order", self.order)
        if self.order != 2 and (self.part != "exact" or self.first_order):
            raise OptionError(f"order={self.order} is a derivative of the whole loss: it needs part='exact' alone.")

    def __call__(self, graph: DependencyGraph, batches: Batches | Statistics | None = None) -> Scores:
        """Return the scores.

        Args:
            graph: of the model.
            batches: pairs ``(inputs, targets)``, or statistics that know the batches they were collected from.

        Raises:
            BatchError: batches are missing or do not fit the model.
        """
        return self.reduce(graph, self._products(graph.model, batches))

    def elementwise(self, model: nn.Module, batches: Batches | Statistics | None = None) -> dict[str, Tensor]:
        """Return the score of every weight, a tensor like each parameter."""
        products = self._products(model, batches)
        return products if self.signed else {name: value.abs() for name, value in products.items()}

    def member_scores(self, values: Mapping[str, Tensor], member: Member, size: int) -> Tensor:
        """Return ``[size]``: the sum of every unit's products on one member, or its absolute value."""
        summed = sum_by_unit(values[member.name], member, size)
        return summed if self.signed else summed.abs()

    def _products(self, model: nn.Module, batches: Batches | Statistics | None) -> dict[str, Tensor]:
        given = batches.batches if isinstance(batches, Statistics) else batches
        if self.order == 2:
            product = self_product(model, given, self.loss, part=self.part)
        else:
            product = self_derivative(model, given, self.order, self.loss)
        theta = {name: value.detach() for name, value in model.named_parameters() if name in product}
        if self.first_order:
            gradient = mean_gradient(model, given, self.loss)
            return {name: value * (product[name] / 2 - gradient[name]) for name, value in theta.items()}
        return {name: value * product[name] for name, value in theta.items()}


def layer_pairs(
    model: nn.Module | DependencyGraph,
    batches: Batches | Statistics | None,
    part: HessianPart = "exact",
    *,
    names: Sequence[str] | None = None,
    loss: Loss = F.cross_entropy,
) -> tuple[tuple[str, ...], Tensor]:
    """Return ``θ_iᵀ H_ij θ_j`` for every pair of layers: how much of ``θᵀHθ`` is between which.

    The sum over a row is the sum of ``θ ⊙ (Hθ)`` over that layer, where ``names`` are all parameters.  The diagonal is
    the layer by itself.  Off it the paper knows two relations whose block is not zero: *series*, one layer feeds the
    other, and *parallel*, their outputs are multiplied, as queries, keys and values are.  Layers whose outputs are
    added are neither: between them the functional part is zero.

    Cost: one forward and backward pass over the data, and about as much again for every layer.

    Args:
        model: the network, or its graph.
        batches: pairs ``(inputs, targets)``, or statistics that know theirs.
        part: ``"exact"``, ``"functional"`` or ``"gauss_newton"``.
        names: of the parameters; by default all weights that are matrices or more, in the order of the model.
        loss: ``loss(outputs, targets)``, a mean over samples.

    Returns:
        The names, and float64 ``[n, n]`` on the CPU, symmetric.

    Raises:
        PruneLabError: a name is not a parameter of the model.
        BatchError: batches are missing or do not fit the model.

    Source: the decomposition over pairs of layers of Sun et al. 2025, *Optimal Brain Apoptosis*, section 3, exact.
    """
    model, given = model_of(model), batches.batches if isinstance(batches, Statistics) else batches
    if names is None:
        names = [name for name, value in model.named_parameters() if name.endswith("weight") and value.dim() > 1]
    return tuple(names), pair_matrix(model, given, names, loss, part=part)

"""Quadratic: the second-order change of the loss when a unit goes, with nothing left out.  Notebook 09_oba derives it.

Flows in: a graph and batches.  Flows out: ``gᵀδ + ½ δᵀHδ`` for every unit, δ the step that removes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunelab.batches import Batch, Batches, Loss, call
from prunelab.criteria.base import Criterion, Scores
from prunelab.curvature.second.double_backward import twice_differentiable
from prunelab.curvature.second.unit_slopes import UnitSlopes
from prunelab.curvature.second.vjp import HessianPart, differentiable, half_batches, output_gradients, vjp
from prunelab.curvature.statistics.statistics import Statistics
from prunelab.curvature.watching.checkpoints import no_checkpoints
from prunelab.errors import BatchError
from prunelab.options import one_of, whole
from prunelab.runtime.devices import exact, raise_out_of_memory
from prunelab.runtime.isolation import evaluating, replaced
from prunelab.tracing.groups import Group, Member
from prunelab.tracing.trace import DependencyGraph

SecondOrder = Literal["hessian", "ggn"]
SECOND_ORDER: tuple[SecondOrder, ...] = get_args(SecondOrder)


@dataclass
class Quadratic(Criterion, name="quadratic"):
    """Score a unit by ``gᵀδ + ½ δᵀHδ``, with δ = −θ on all of the unit's slices and zero elsewhere.

    In the quadratic model this keeps everything, in the coordinates of the weights: every other criterion in them
    leaves something out.  A unit's slices are those of all members that are parameters, weights and biases of norms
    included; running means and variances are not parameters and stay.  (Without its scale and bias a channel of a batch
    norm gives zero whatever they are, so silencing them would change nothing.)

    All units of a group are scaled by numbers s, one each; δ is the step −1 in s_u, so that ``gᵀδ = −∂L/∂s_u`` and
    ``δᵀHδ = ∂²L/∂s_u²``.  The Gauss-Newton part takes one forward pass, and one backward pass per output, for all units
    together.  The functional part takes a forward and a backward pass per group, and per unit one more through both, in
    the layers where it is not zero: with ReLU these lie between the unit's first and last layer, else they go on to the
    end of the network.  (Where parameters are used in other ways than by layers, norms and broadcasting, or outputs are
    more than units, the Gauss-Newton part goes through its units too.)

    Cost: one forward pass and one backward pass per output, and with ``"hessian"`` a forward and a backward pass per
    unit through the layers between its first and last.

    Args:
        curvature: ``"hessian"``, exact, or ``"ggn"``, its Gauss-Newton part, which is never negative.
        linear: whether the first-order term ``gᵀδ`` counts.
        chunk: how many units go through one vectorised backward pass: more for small networks, or a GPU.
        loss: ``loss(outputs, targets)``, a mean over samples.
        progress: show a progress bar if it takes more than a few seconds.

    Source: ours; the quadratic model is equation 1 of LeCun et al. 1989, *Optimal Brain Damage*.
    """

    curvature: SecondOrder = "hessian"
    linear: bool = True
    chunk: int = 1
    loss: Loss = F.cross_entropy
    progress: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("curvature", self.curvature, SECOND_ORDER)
        self.chunk = whole("chunk", self.chunk)

    def __call__(self, graph: DependencyGraph, batches: Batches | Statistics | None = None) -> Scores:
        """Return the scores.

        Args:
            graph: of the model.
            batches: pairs ``(inputs, targets)``, or statistics that know the batches they were collected from.

        Raises:
            BatchError: batches are missing or do not fit the model, or a derivative is not finite.
        """
        terms = self.terms(graph, batches)
        scores = {name: (self.linear * first + second).float() for name, (first, second) in terms.items()}
        return Scores(graph, scores, str(self))

    def terms(self, graph: DependencyGraph, batches: Batches | Statistics | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Return ``gᵀδ`` and ``½ δᵀHδ`` for every unit: group name -> two float64 ``[group.size]`` on the CPU.

        Raises:
            BatchError: as for a call.
        """
        given = batches.batches if isinstance(batches, Statistics) else batches
        total = {group.name: torch.zeros(2, group.size, dtype=torch.float64) for group in graph.groups}
        together: UnitSlopes | None = None
        seen = 0.0
        bar = tqdm(desc="quadratic", unit="unit", delay=2, leave=False, disable=not self.progress, total=0)
        with no_checkpoints(graph.model, "quadratic"), evaluating(graph.model), bar:
            part: HessianPart = "gauss_newton" if self.curvature == "ggn" else "exact"
            for number, batch in half_batches(graph.model, given, "quadratic", self.loss, part):
                bar.total += sum(group.size for group in graph.groups)
                if together is None:
                    together = UnitSlopes(graph.model, graph.groups, batch)
                    for parameter in graph.model.parameters():
                        parameter.requires_grad_(False)
                for group, sums in self._sums(graph, together, batch, bar):
                    if not bool(sums.isfinite().all()):
                        raise BatchError(
                            f"The derivatives in the units of `{group.name}` are not finite in batch {number}: "
                            "check its inputs."
                        )
                    total[group.name] += exact(sums).cpu()
                seen += batch.total
        return {name: (-first / seen, second / seen / 2) for name, (first, second) in total.items()}

    def _sums(
        self, graph: DependencyGraph, together: UnitSlopes, batch: Batch, bar: tqdm
    ) -> Iterator[tuple[Group, Tensor]]:
        """Yield ``∂L/∂s`` and the diagonal of ``∂²L/∂s²``, ``[2, size]``, summed over the samples, for every group."""
        known: dict[str, Tensor] = {}
        try:
            found = together.sums(batch) if together.groups else None
        except BatchError:  # the other way says what is wrong, or does without a convex loss
            found = None
        if found is None:
            together.groups = ()
        else:
            parts = torch.stack(found).split([group.size for group in together.groups], 1)
            known = {group.name: part for group, part in zip(together.groups, parts, strict=True)}
        for group in graph.groups:
            if self.curvature == "ggn" and group.name in known:
                bar.update(group.size)
                yield group, known[group.name]
                continue
            part = "gauss_newton" if self.curvature == "ggn" else "functional" if group.name in known else "exact"
            with torch.enable_grad():
                sums = self._group(graph.model, group, batch, part, bar)
            if part == "functional":
                sums[1] += known[group.name][1]
            yield group, sums

    def _group(self, model: nn.Module, group: Group, batch: Batch, part: str, bar: tqdm) -> Tensor:
        """Return ``∂L/∂s`` and one part of the diagonal of ``∂²L/∂s²``, ``[2, size]``, one unit after the other."""
        parameters = dict(model.named_parameters())
        like = next(iter(parameters.values()))
        s = torch.ones(group.size, dtype=like.dtype, device=like.device, requires_grad=True)
        with twice_differentiable(), replaced(model, scaled(parameters, group, s)):
            outputs = batch.picked(call(model, batch.inputs))
        tensors = differentiable(outputs)
        ends, found = output_gradients(outputs, batch)
        values, backs = tensors, [slope.detach() for slope in found]
        if part == "exact":
            values = [batch.value(outputs) * batch.total]
            backs = [torch.ones_like(values[0])]
        (gradient,) = vjp(values, [s], backs, create_graph=part != "gauss_newton")
        dummies = [torch.zeros_like(leaf, requires_grad=True) for leaf in tensors]
        (back,) = vjp(tensors, [s], dummies, create_graph=True) if part == "gauss_newton" else (gradient,)

        def curvature(step: Tensor) -> Tensor:
            if part != "gauss_newton":
                return (vjp([back], [s], [step])[0] * step).sum()
            along = vjp([back], dummies, [step])
            return sum_of_products(along, vjp(found, ends, along))

        rows = list(each(curvature, torch.eye(group.size, dtype=s.dtype, device=s.device), self.chunk, bar))
        return torch.stack([gradient.detach(), torch.cat(rows)])


def scaled(parameters: Mapping[str, Tensor], group: Group, s: Tensor) -> dict[str, Tensor]:
    """Return the group's parameters with the slices of every unit multiplied by its number, each entry once."""
    members: dict[str, list[Member]] = {}
    for member in group.members:
        if member.name in parameters:
            members.setdefault(member.name, []).append(member)
    return {name: parameters[name] * _factor(found, parameters[name].dim(), s) for name, found in members.items()}


def _factor(members: list[Member], dims: int, s: Tensor) -> Tensor:
    """Return what a parameter is multiplied by, broadcast to it; where two members meet in one unit it counts once."""
    padded, factor = torch.cat([s, s.new_ones(1)]), s.new_ones(())
    units: list[Tensor] = []
    for member in members:
        unit = member.unit.to(s.device).view([-1 if dim == member.dim else 1 for dim in range(dims)])
        part = padded[unit]
        for other in units:
            part = torch.where((unit == other) & (unit >= 0), 1.0, part)
        units.append(unit)
        factor = factor * part
    return factor


def each(curvature: Callable[[Tensor], Tensor], steps: Tensor, chunk: int, bar: tqdm) -> Iterator[Tensor]:
    """Yield the curvature along steps ``[K, size]``, a chunk at a time where that can be vectorised."""
    start = 0
    while chunk > 1 and start < len(steps):
        some = steps[start : start + chunk]
        try:
            found = torch.func.vmap(curvature)(some)
        except RuntimeError as error:  # vmap does not know an operator
            raise_out_of_memory(error, "give smaller batches, or a smaller chunk")
            break
        yield found.detach()
        start += len(some)
        bar.update(len(some))
    for step in steps[start:]:
        yield curvature(step).detach()[None]
        bar.update()


def sum_of_products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Return ``Σ left · right`` over all entries of all tensors."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()

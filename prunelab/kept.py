"""What stays: which entries of every axis of a model remain once a plan is carried out.

Flows in: a model and a ``Plan``.  Flows out: its trace, and a ``Kept`` that masks every dimension of every parameter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from prunelab.errors import PlanError
from prunelab.plans import Plan, check_plan
from prunelab.tracing import fakes
from prunelab.tracing.axes import Axis, fold, size_with
from prunelab.tracing.trace import DependencyGraph, trace


class Kept:
    """Which entries of every axis stay, given the kept mask (bool ``[size]``) of some leaves, by their ``id``."""

    def __init__(self, masks: dict[int, Tensor]) -> None:
        self.masks = masks
        self.sizes = {part: int(mask.sum()) for part, mask in masks.items()}

    def size(self, axis: Axis) -> int:
        """Return how many entries of the axis stay."""
        return size_with(axis, self.sizes)

    def mask(self, axis: Axis) -> Tensor:
        """Return which entries of the axis stay, bool ``[axis.size]``: AND over factors, joined over segments."""

        def at_leaf(part: Axis) -> Tensor:
            return self.masks.get(id(part), torch.ones(part.size, dtype=torch.bool))

        def outer_and(parts: list[Tensor]) -> Tensor:
            out = parts[0]
            for part in parts[1:]:
                out = (out[:, None] & part[None, :]).flatten()
            return out

        return fold(axis, at_leaf, outer_and, torch.cat)


def open_plan(model: nn.Module, plan: Plan) -> tuple[DependencyGraph, Kept]:
    """Trace the model and return, for every leaf that loses entries, which of them stay (bool ``[size]``)."""
    check_plan(plan)
    graph = trace(model, fakes.recall_inputs(plan.inputs))
    groups = {group.name: group for group in graph.groups}
    stay = {}
    for cut in plan.cuts:
        group = groups.get(cut.group)
        if group is None:
            raise PlanError(
                f"The plan cuts group `{cut.group}`, which {type(model).__name__} does not have: it was made for "
                "another model, or this one is pruned already."
            )
        if group.size != cut.size:
            raise PlanError(
                f"Cannot cut `{cut.group}`: the plan was made for {cut.size} units, this model has {group.size}."
            )
        if {(member.name, member.dim) for member in group.members} != set(cut.members):
            raise PlanError(f"Cannot cut `{cut.group}`: the plan couples other parameters than this model does.")
        wrong = [unit for unit in cut.removed if not 0 <= unit < group.size]
        if wrong or len(set(cut.removed)) >= group.size:
            what = f"unit {wrong[0]} was asked for" if wrong else "none would be left"
            raise PlanError(f"Cannot cut `{cut.group}`: it has {group.size} units and {what}.")
        mask = torch.ones(group.size, dtype=torch.bool)
        mask[list(cut.removed)] = False
        stay[id(group.axis)] = mask
    return graph, Kept(stay)


def masks(graph: DependencyGraph, kept: Kept) -> Iterator[tuple[str, int, Tensor]]:
    """Yield parameter, dimension and kept mask for every dimension that loses entries."""
    for name, dims in graph.dims.items():
        for place, dim in enumerate(dims):
            if kept.size(dim.axis) != dim.size:
                yield name, place, kept.mask(dim.axis)

"""Surgery: cut what a plan says.

Flows in: a model and a ``Plan``.  Flows out: a smaller model of the same class, checked by tracing it again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from prunelab.batches import Batches
from prunelab.compensation.compensate import Compensation, make_up
from prunelab.curvature.collect import Statistics
from prunelab.errors import PlanError, TraceError
from prunelab.isolation import copied
from prunelab.options import flag, one_of
from prunelab.planning.plan import Plan, check_plan
from prunelab.surgery.agreement import Example, has_data
from prunelab.surgery.constants import ScaleFix, scale_fixes
from prunelab.surgery.integers import compare_integers
from prunelab.surgery.layout import laid_out_like
from prunelab.surgery.modules import free
from prunelab.surgery.rehearsal import compare
from prunelab.surgery.sizes import resize
from prunelab.surgery.unused import warn_of_unused
from prunelab.surgery.weight_norm import folded
from prunelab.switches import undisturbed
from prunelab.tracing import fakes
from prunelab.tracing.axes import Axis, fold, size_with
from prunelab.tracing.trace import DependencyGraph, trace

PLANS = "prunelab_plans"
"""Name of the attribute in which a pruned model carries the plans that made it."""


@undisturbed()
def apply(
    model: nn.Module,
    plan: Plan,
    *,
    inplace: bool = False,
    backend: Literal["auto", "module", "graph"] = "auto",
    compensate: Compensation | Statistics | Batches | None = None,
    check: bool = True,
) -> nn.Module:
    """Return ``model`` without the units that ``plan`` removes.

    Parameters and buffers are indexed, sizes that layers and the model's own code keep as integers are set, and the
    result is traced again on tensors without data: every operator must give the shape that the plan says.  Then the cut
    network and ``pl.masked`` run once, in eval mode, and must give the same.

    Args:
        model: the model that the plan was made for, in any mode and on any device.
        plan: what goes.
        inplace: cut ``model`` itself instead of a copy.
        backend: ``"module"`` keeps the model's class and cuts it; ``"graph"`` rebuilds the model from the operators it
            calls (``replay``); ``"auto"`` does the first where it is right, else the second, with a warning.
        compensate: batches, statistics or ``Compensation``: what is left is refitted to make up for what goes.
        check: compare the cut network with ``pl.masked`` by value, on an input of the traced shape: two forward passes,
            and a copy of the model.  Without data (on the meta device) that is left out, with a warning.

    Returns:
        The smaller model: of the same class or a ``torch.fx.GraphModule``, in the same mode, on the same device.

    Raises:
        PlanError: the plan does not fit the model, or the cut model would not compute what the plan says; ``model`` is
            then as it was.
        BatchError: what ``compensate`` was given does not fit the model.
    """
    one_of("backend", backend, ("auto", "module", "graph"))
    flag("inplace", inplace)
    check_plan(plan)
    if backend != "module":
        from prunelab.replay.rebuild import route  # which needs this module

        return route(model, plan, backend, inplace=inplace, compensate=compensate, check=check)
    touched = {name for cut in plan.cuts for name, _ in cut.members}
    rehearsal = free(fakes.fake_model(model, fakes.fake_mode()), touched)
    graph, kept = open_plan(rehearsal, plan)
    _cut(rehearsal, graph, kept, ())
    try:
        after = trace(rehearsal, fakes.recall_inputs(plan.inputs))
    except TraceError as error:
        raise PlanError(f"The cut {type(model).__name__} does not run, so nothing was cut: {error}") from error
    pairs = compare(graph, after, kept.size)
    compare_integers(graph, after, kept, pairs)
    fixes = scale_fixes(graph, kept.size, pairs)
    target = None
    if check and (example := example_for(model, plan, graph, kept)) is not None:
        target = free(fakes.forget(copied(model)), touched)
        _cut(target, graph, kept, fixes)
        example.check(target)
    if target is None or inplace or compensate is not None:
        fresh = {} if compensate is None else make_up(model, plan, graph, kept, compensate)
        target = free(fakes.forget(model if inplace else copied(model)), touched)
        _cut(target, graph, kept, fixes, fresh)
    setattr(target, PLANS, [*getattr(model, PLANS, []), plan])
    warn_of_unused(model, graph, kept.size)
    return target


def example_for(model: nn.Module, plan: Plan, graph: DependencyGraph, kept: Kept) -> Example | None:
    """Return what a cut network is compared by; ``None``, with a warning, if the model has no data."""
    from prunelab.surgery.silence import silenced  # which needs ``Kept``

    if not kept.masks:
        return None
    if not has_data(model):
        warnings.warn(
            f"The cut {type(model).__name__} was not compared with pl.masked: its weights have no data. Compare them "
            "once it has, or pass check=False.",
            stacklevel=4,
        )
        return None
    return Example(partial(silenced, model, graph, kept), plan.inputs)


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


def _cut(
    model: nn.Module,
    graph: DependencyGraph,
    kept: Kept,
    fixes: tuple[ScaleFix, ...],
    refitted: Mapping[str, Tensor] | None = None,
) -> None:
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    fresh = dict(refitted or {})
    with torch.no_grad():
        for fix in fixes:
            source = fresh.get(fix.name, tensors[fix.name])
            scale = torch.ones(source.shape[0], dtype=source.dtype, device=source.device)
            scale[fix.rows.to(source.device)] = fix.factor
            fresh[fix.name] = source * scale.view(-1, *(1 for _ in source.shape[1:]))
        fresh |= folded(graph, kept, tensors | fresh)
        for name, place, mask in masks(graph, kept):
            source = fresh.get(name, tensors[name])
            fresh[name] = fakes.select(source, place, mask.nonzero().flatten())
    _replace(model, {id(tensors[name]): tensor for name, tensor in fresh.items()})
    resize(model, graph, kept.size)


def _replace(model: nn.Module, fresh: dict[int, Tensor]) -> None:
    """Put new tensors where the old ones were, in every module that shares them."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None and id(old) in fresh:
                new = made.setdefault(
                    id(old), fakes.as_parameter(laid_out_like(fresh[id(old)], old), old.requires_grad)
                )
                module._parameters[name] = new  # type: ignore[assignment]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and id(buffer) in fresh:
                module._buffers[name] = laid_out_like(fresh[id(buffer)], buffer)

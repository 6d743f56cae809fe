"""Surgery: cut what a plan says.

Flows in: a model and a ``Plan``.  Flows out: a smaller model of the same class, checked by tracing it again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunelab.batches import Batches
from prunelab.compensation.compensate import Compensation, make_up
from prunelab.curvature.collect import Statistics
from prunelab.errors import PlanError, TraceError
from prunelab.options import flag, one_of
from prunelab.planning.plan import Plan, check_plan
from prunelab.surgery.constants import ScaleFix, scale_fixes
from prunelab.surgery.modules import free
from prunelab.surgery.rehearsal import compare
from prunelab.tracing import fakes
from prunelab.tracing.axes import Axis, fold, size_with
from prunelab.tracing.groups import VIEWS
from prunelab.tracing.trace import DependencyGraph, trace

PLANS = "prunelab_plans"
"""Name of the attribute in which a pruned model carries the plans that made it."""


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    inplace: bool = False,
    backend: Literal["auto", "module", "graph"] = "auto",
    compensate: Compensation | Statistics | Batches | None = None,
) -> nn.Module:
    """Return ``model`` without the units that ``plan`` removes.

    Parameters and buffers are indexed, sizes that layers and the model's own code keep as integers are set, and the
    result is traced again on tensors without data: every operator must give the shape that the plan says.

    Args:
        model: the model that the plan was made for, in any mode and on any device.
        plan: what goes.
        inplace: cut ``model`` itself instead of a copy.
        backend: ``"module"`` keeps the model's class and cuts it; ``"graph"`` rebuilds the model from the operators it
            calls (``replay``); ``"auto"`` does the first where it is right, else the second, with a warning.
        compensate: batches, statistics or ``Compensation``: what is left is refitted to make up for what goes.

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

        return route(model, plan, backend, inplace=inplace, compensate=compensate)
    touched = {name for cut in plan.cuts for name, _ in cut.members}
    rehearsal = free(fakes.fake_model(model, fakes.fake_mode()), touched)
    graph, kept = open_plan(rehearsal, plan)
    _cut(rehearsal, graph, kept, ())
    try:
        after = trace(rehearsal, fakes.recall_inputs(plan.inputs))
    except TraceError as error:
        raise PlanError(f"The cut {type(model).__name__} does not run, so nothing was cut: {error}") from error
    fixes = scale_fixes(graph, kept.size, compare(graph, after, kept.size))
    fresh = {} if compensate is None else make_up(model, plan, graph, kept, compensate)
    target = free(fakes.forget(model if inplace else copy.deepcopy(model)), touched)
    _cut(target, graph, kept, fixes, fresh)
    setattr(target, PLANS, [*getattr(model, PLANS, []), plan])
    return target


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
        for name, place, mask in masks(graph, kept):
            source = fresh.get(name, tensors[name])
            fresh[name] = fakes.select(source, place, mask.nonzero().flatten())
    _replace(model, {id(tensors[name]): tensor for name, tensor in fresh.items()})
    _resize(model, graph, kept)


def _replace(model: nn.Module, fresh: dict[int, Tensor]) -> None:
    """Put new tensors where the old ones were, in every module that shares them."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None and id(old) in fresh:
                new = made.setdefault(id(old), fakes.as_parameter(fresh[id(old)].contiguous(), old.requires_grad))
                module._parameters[name] = new  # type: ignore[assignment]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and id(buffer) in fresh:
                module._buffers[name] = fresh[id(buffer)].contiguous()


# ── sizes that code keeps as integers ─────────────────────────────────────────────────────────────────────────────


def _resize(model: nn.Module, graph: DependencyGraph, kept: Kept) -> None:
    recorded: dict[str, dict[str, int]] = {}
    for owner, attribute, axis in graph.sizes:
        recorded.setdefault(owner, {})[attribute] = kept.size(axis)
    changes = _viewed_sizes(graph, kept)
    for name, module in model.named_modules():
        own = recorded.get(name, {})
        known = _layer_sizes(module, own.get("groups"))
        known |= {attribute: size for attribute, size in own.items() if hasattr(module, attribute)}
        for attribute, value in known.items():
            setattr(module, attribute, value)
        for attribute, value in list(vars(module).items()):
            if attribute not in known and type(value) in (int, tuple):
                new = changes.get(name, {}).get(value, set())
                if len(new) == 1:
                    setattr(module, attribute, next(iter(new)))


Size = int | tuple[int, ...]
"""What a module's code gives to a view: the size of one dimension, or a whole shape."""


def _viewed_sizes(graph: DependencyGraph, kept: Kept) -> dict[str, dict[Size, set[Size]]]:
    """Return, for every module, the sizes and shapes that its own views give and what they become."""
    changes: dict[str, dict[Size, set[Size]]] = {}
    for op in graph.tape:
        for tensor in op.outputs if op.name in VIEWS else ():
            old = tuple(axis.size for axis in graph.axes_of(tensor))
            new = tuple(kept.size(axis) for axis in graph.axes_of(tensor))
            pairs: list[tuple[Size, Size]] = [(old, new), *zip(old, new, strict=True)]
            for before, after in pairs:
                if before != after:
                    changes.setdefault(op.module, {}).setdefault(before, set()).add(after)
    return changes


def _layer_sizes(module: nn.Module, groups: int | None) -> dict[str, Any]:
    """Return the size attributes of one of PyTorch's own layers, read off its new parameters."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return {"in_channels": weight.shape[0], "out_channels": weight.shape[1] * (groups or 1)}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"out_channels": weight.shape[0], "in_channels": weight.shape[1] * (groups or 1)}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        first = weight if weight is not None else module.running_mean
        return {} if first is None else {"num_features": first.shape[0]}
    if isinstance(module, nn.LayerNorm) and weight is not None:
        return {"normalized_shape": tuple(weight.shape)}
    if isinstance(module, nn.GroupNorm) and weight is not None:
        return {"num_channels": weight.shape[0]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": weight.shape[1]}
    return {}

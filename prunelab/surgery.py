"""Surgery: cut what a plan says, or silence it.

Flows in: a model and a ``Plan``.  Flows out: a smaller model of the same class, checked by tracing it again; or the same
model with the same entries silenced, which the smaller one must equal.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunelab import fakes
from prunelab.attention_scale import ScaleFix, scale_fixes
from prunelab.axes import Axis, fold
from prunelab.errors import PlanError, TraceError
from prunelab.modules import KeptGroupNorm, KeptLayerNorm
from prunelab.plan import Plan
from prunelab.trace import DependencyGraph, trace

PLANS = "prunelab_plans"
"""Name of the attribute in which a pruned model carries the plans that made it."""


def apply(
    model: nn.Module, plan: Plan, *, inplace: bool = False, backend: Literal["auto", "module"] = "auto"
) -> nn.Module:
    """Return ``model`` without the units that ``plan`` removes.

    Parameters and buffers are indexed, sizes that layers and the model's own code keep as integers are set, and the
    result is traced again on tensors without data: every operator must give the shape that the plan says.

    Args:
        model: the model that the plan was made for, in any mode and on any device.
        plan: what goes.
        inplace: cut ``model`` itself instead of a copy.
        backend: ``"module"`` keeps the model's class and cuts it; ``"auto"`` is the same until there is another.

    Returns:
        The smaller model: of the same class, in the same mode, on the same device.

    Raises:
        PlanError: the plan does not fit the model, or the cut model would not compute what the plan says; ``model`` is
            then as it was.
    """
    if backend not in ("auto", "module"):
        raise PlanError(f"backend={backend!r} is not one of auto, module.")
    graph, kept = _open(model, plan)
    fixes = scale_fixes(graph, lambda axis: _kept_size(axis, kept))
    rehearsal = fakes.fake_model(model, fakes.fake_mode())
    _cut(rehearsal, graph, kept, ())
    _check(rehearsal, graph, kept, plan)
    target = model if inplace else copy.deepcopy(model)
    _cut(target, graph, kept, fixes)
    setattr(target, PLANS, [*getattr(model, PLANS, []), plan])
    return target


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` that computes what ``apply(model, plan)`` does, with nothing removed.

    The removed entries of every member are zero, and normalisations leave them out of their statistics.

    Raises:
        PlanError: the plan does not fit the model, or a normalisation that it touches is no module.
    """
    graph, kept = _open(model, plan)
    silent = copy.deepcopy(model)
    parameters = dict(silent.named_parameters())
    with torch.no_grad():
        for name, place, mask in _masks(graph, kept):
            if name in parameters:
                parameters[name].index_fill_(place, (~mask).nonzero().flatten().to(parameters[name].device), 0)
    for op in graph.tape:
        if op.name in ("native_layer_norm", "_fused_rms_norm", "native_group_norm"):
            _silence_norm(silent, graph, kept, op)
    return silent


def _open(model: nn.Module, plan: Plan) -> tuple[DependencyGraph, dict[int, Tensor]]:
    """Trace the model and return, for every leaf that loses entries, which of them stay (bool ``[size]``)."""
    graph = trace(model, fakes.recall_inputs(plan.inputs))
    groups = {group.name: group for group in graph.groups}
    kept = {}
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
        if tuple((member.name, member.dim) for member in group.members) != cut.members:
            raise PlanError(f"Cannot cut `{cut.group}`: the plan couples other parameters than this model does.")
        wrong = [unit for unit in cut.removed if not 0 <= unit < group.size]
        if wrong or len(set(cut.removed)) >= group.size:
            what = f"unit {wrong[0]} was asked for" if wrong else "none would be left"
            raise PlanError(f"Cannot cut `{cut.group}`: it has {group.size} units and {what}.")
        mask = torch.ones(group.size, dtype=torch.bool)
        mask[list(cut.removed)] = False
        kept[id(group.axis)] = mask
    return graph, kept


def _kept_mask(axis: Axis, kept: dict[int, Tensor]) -> Tensor:
    def outer_and(parts: list[Tensor]) -> Tensor:
        out = parts[0]
        for part in parts[1:]:
            out = (out[:, None] & part[None, :]).flatten()
        return out

    return fold(axis, lambda part: kept.get(id(part), torch.ones(part.size, dtype=torch.bool)), outer_and, torch.cat)


def _kept_size(axis: Axis, kept: dict[int, Tensor]) -> int:
    return fold(axis, lambda part: int(kept[id(part)].sum()) if id(part) in kept else part.size, math.prod, sum)


def _masks(graph: DependencyGraph, kept: dict[int, Tensor]) -> Iterator[tuple[str, int, Tensor]]:
    """Yield parameter, dimension and kept mask for every dimension that loses entries."""
    for name, dims in graph.dims.items():
        for place, dim in enumerate(dims):
            if _kept_size(dim.axis, kept) != dim.size:
                yield name, place, _kept_mask(dim.axis, kept)


def _cut(model: nn.Module, graph: DependencyGraph, kept: dict[int, Tensor], fixes: tuple[ScaleFix, ...]) -> None:
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    fresh: dict[str, Tensor] = {}
    with torch.no_grad():
        for fix in fixes:
            source = fresh.get(fix.name, parameters[fix.name])
            scale = torch.ones(source.shape[0], dtype=source.dtype, device=source.device)
            scale[fix.rows.to(source.device)] = fix.factor
            fresh[fix.name] = source * scale.view(-1, *(1 for _ in source.shape[1:]))
        for name, place, mask in _masks(graph, kept):
            source = fresh.get(name, parameters.get(name, buffers.get(name)))
            fresh[name] = source.index_select(place, mask.nonzero().flatten().to(source.device))
    _replace(model, {id(parameters.get(name, buffers.get(name))): tensor for name, tensor in fresh.items()})
    _resize(model, graph, kept)


def _replace(model: nn.Module, fresh: dict[int, Tensor]) -> None:
    """Put new tensors where the old ones were, in every module that shares them."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None and id(old) in fresh:
                new = made.setdefault(id(old), nn.Parameter(fresh[id(old)].contiguous(), old.requires_grad))
                module._parameters[name] = new  # type: ignore[assignment]
        for name, old in list(module._buffers.items()):
            if old is not None and id(old) in fresh:
                module._buffers[name] = fresh[id(old)].contiguous()


# ── sizes that code keeps as integers ─────────────────────────────────────────────────────────────────────────────


def _resize(model: nn.Module, graph: DependencyGraph, kept: dict[int, Tensor]) -> None:
    recorded = {(module, attribute): _kept_size(axis, kept) for module, attribute, axis in graph.sizes}
    changes = _viewed_sizes(graph, kept)
    for name, module in model.named_modules():
        known = _layer_sizes(module, recorded.get((name, "groups")))
        for (owner, attribute), size in recorded.items():
            if owner == name and hasattr(module, attribute):
                known[attribute] = size
        for attribute, value in known.items():
            setattr(module, attribute, value)
        for attribute, value in list(vars(module).items()):
            if attribute not in known and type(value) is int and len(changes.get(name, {}).get(value, ())) == 1:
                setattr(module, attribute, next(iter(changes[name][value])))


def _viewed_sizes(graph: DependencyGraph, kept: dict[int, Tensor]) -> dict[str, dict[int, set[int]]]:
    """Return, for every module, the sizes that its own views give and what they become."""
    changes: dict[str, dict[int, set[int]]] = {}
    for op in graph.tape:
        if op.name in ("view", "_unsafe_view", "reshape", "expand", "split", "split_with_sizes"):
            for tensor in op.outputs:
                for axis in graph.axes_of(tensor):
                    if _kept_size(axis, kept) != axis.size:
                        changes.setdefault(op.module, {}).setdefault(axis.size, set()).add(_kept_size(axis, kept))
    return changes


def _layer_sizes(module: nn.Module, groups: int | None) -> dict[str, Any]:
    """Return the size attributes of one of PyTorch's own layers, read off its new parameters."""
    weight = getattr(module, "weight", None)
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


def _check(model: nn.Module, graph: DependencyGraph, kept: dict[int, Tensor], plan: Plan) -> None:
    """Trace the cut model and compare every operator's result with what the axes say.

    Raises:
        PlanError: they differ.
    """
    try:
        again = trace(model, fakes.recall_inputs(plan.inputs))
    except TraceError as error:
        raise PlanError(f"The cut {type(model).__name__} does not run, so nothing was cut: {error}") from error
    for before, after in zip(graph.tape, again.tape, strict=False):
        wanted = [tuple(_kept_size(axis, kept) for axis in graph.axes_of(tensor)) for tensor in before.outputs]
        found = [tuple(tensor.shape) for tensor in after.outputs]
        if before.name != after.name or wanted != found:
            raise PlanError(
                f"Cutting {type(model).__name__} would go wrong in `{before.module}`, so nothing was cut: "
                f"`{before.name}` should give {wanted}, `{after.name}` gives {found}. "
                "Its code holds a size that could not be changed; ignore that module in the plan."
            )
    if len(graph.tape) != len(again.tape):
        raise PlanError(f"The cut {type(model).__name__} runs other operators than before, so nothing was cut.")


# ── silencing ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _silence_norm(model: nn.Module, graph: DependencyGraph, kept: dict[int, Tensor], op: Any) -> None:
    axes = graph.axes_of(op.args[0])
    axes = axes[1:2] if op.name == "native_group_norm" else axes[len(axes) - len(op.args[1]) :]
    if all(_kept_size(axis, kept) == axis.size for axis in axes):
        return
    norm = model.get_submodule(op.module)
    makers: dict[type, Callable] = {nn.LayerNorm: KeptLayerNorm.of, nn.GroupNorm: KeptGroupNorm.of}
    if isinstance(norm, (KeptLayerNorm, KeptGroupNorm)):
        return
    if type(norm) not in makers:
        raise PlanError(f"`{op.module}` normalises over units that the plan removes, but is no LayerNorm or GroupNorm.")
    mask = _kept_mask(axes[0], kept)
    for axis in axes[1:]:
        mask = mask[..., None] & _kept_mask(axis, kept)
    parent, _, name = op.module.rpartition(".")
    device = next(iter(norm.parameters()), torch.empty(0)).device
    setattr(model.get_submodule(parent), name, makers[type(norm)](norm, mask.to(device)))


"""The first way to cut: a model's own parameters are indexed, and the sizes that its layers keep are set.

Flows in: a model, its trace and what stays.  Flows out: the same model, smaller, of the same class.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prunelab.errors import PlanError, TraceError
from prunelab.kept import Kept, masks, open_plan
from prunelab.plans import PLANS, Plan
from prunelab.runtime.isolation import copied
from prunelab.surgery.agreement import example_for
from prunelab.surgery.config import follow, is_configured
from prunelab.surgery.constants import ScaleFix, scale_fixes
from prunelab.surgery.integers import compare_integers
from prunelab.surgery.layers import free
from prunelab.surgery.layout import laid_out_like
from prunelab.surgery.refit.compensate import make_up
from prunelab.surgery.refit.options import How
from prunelab.surgery.rehearsal import compare
from prunelab.surgery.sizes import resize
from prunelab.surgery.unused import warn_of_unused
from prunelab.surgery.weight_norm import folded
from prunelab.tracing import fakes
from prunelab.tracing.trace import DependencyGraph, trace


def cut(model: nn.Module, plan: Plan, *, inplace: bool, compensate: How, check: bool) -> nn.Module:
    """Return a model of the same class without the units that ``plan`` removes; options as for ``apply``.

    Raises:
        PlanError: the plan does not fit the model, or the cut model would not compute what the plan says.
    """
    touched = {name for part in plan.cuts for name, _ in part.members}
    config = copy.deepcopy(model.config) if is_configured(model) else None
    rehearsal = free(fakes.fake_model(model, fakes.fake_mode()), touched)
    graph, kept = open_plan(rehearsal, plan)
    cut_down(rehearsal, graph, kept, ())
    try:
        after = trace(rehearsal, fakes.recall_inputs(plan.inputs))
    except TraceError as error:
        aligned = " Its kernel wants such widths: plan with round_to=8." if "multiple of 16 bytes" in str(error) else ""
        raise PlanError(f"The cut {type(model).__name__} does not run, so nothing was cut: {error}{aligned}") from error
    pairs = compare(graph, after, kept.size)
    compare_integers(graph, after, kept, pairs)
    fixes = scale_fixes(graph, kept.size, pairs)
    target = None
    if check and (example := example_for(model, plan, graph, kept)) is not None:
        target = free(fakes.forget(copied(model)), touched)
        cut_down(target, graph, kept, fixes)
        example.check(target)
    if target is None or inplace or compensate is not None:
        fresh = {} if compensate is None else make_up(model, plan, graph, kept, compensate)
        target = free(fakes.forget(model if inplace else copied(model)), touched)
        cut_down(target, graph, kept, fixes, fresh)
    if config is not None:
        follow(target, config, after, fakes.recall_inputs(plan.inputs))
    setattr(target, PLANS, [*getattr(model, PLANS, []), plan])
    warn_of_unused(model, graph, kept.size)
    return target


def cut_down(
    model: nn.Module,
    graph: DependencyGraph,
    kept: Kept,
    fixes: tuple[ScaleFix, ...],
    refitted: Mapping[str, Tensor] | None = None,
) -> None:
    """Index parameters and buffers of a model in place, after some were scaled or refitted, and set its sizes."""
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

"""The graph back end: a model rebuilt from the operators it calls, for code that bakes in sizes.

Where a class writes a width into its code, cutting its layers makes it fail.  Here the code is left behind: the tape of
operators is replayed as an ``fx.GraphModule`` in which every size follows the cut.

Flows in: a model and a ``Plan``.  Flows out: a ``Replayed`` module with the original's parameter names, checked on
tensors without data, operator by operator.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec

from prunelab.errors import PlanError, PruneLabError
from prunelab.kept import masks, open_plan
from prunelab.plans import PLANS, Plan
from prunelab.runtime.stack import user_level
from prunelab.surgery.agreement import example_for
from prunelab.surgery.layers import layer_type
from prunelab.surgery.layout import laid_out_like
from prunelab.surgery.rebuilt.graph import Builder, constant
from prunelab.surgery.rebuilt.inputs import Sizes
from prunelab.surgery.rebuilt.sizes import batch_of, choices, resized, with_batch
from prunelab.surgery.rebuilt.step import Inexpressible
from prunelab.surgery.rebuilt.tape import record
from prunelab.surgery.refit.compensate import make_up
from prunelab.surgery.refit.options import How
from prunelab.surgery.weight_norm import folded
from prunelab.tracing import fakes
from prunelab.tracing.answering import Answering
from prunelab.tracing.recorder import first_line, named_tensors


class Replayed(fx.GraphModule):
    """A model rebuilt from its operators.

    Parameters and buffers have the names they had in the original, and ``state_dict`` its keys.  The operators are
    those of eval mode; batch norm and dropout follow ``train()``, and nothing else that only happens in training does
    (auxiliary heads, stochastic depth, dropout within attention).  Gradients do not stop where code said ``no_grad``.

    Attributes:
        input_sizes: name of an input tensor -> its sizes, ``None`` where any size will do.
        result_structure: how what it returns is nested.
    """

    input_sizes: Sizes
    result_structure: TreeSpec

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "Replayed") -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name)
        for store in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            vars(self)[store] = vars(root)[store]
        self.graph = graph

    def __deepcopy__(self, memo: dict[int, Any]) -> Replayed:
        """Copy everything; ``fx`` alone would lose what the graph does not use, and which buffers are saved."""
        new = Replayed(nn.Module(), copy.deepcopy(self.graph), type(self).__name__)
        memo[id(self)] = new
        own = {"_graph", "_code"}
        vars(new).update(copy.deepcopy({key: value for key, value in vars(self).items() if key not in own}, memo))
        return new

    def __reduce__(self) -> Any:
        raise PlanError("A module rebuilt from operators cannot be pickled: write it with pl.save.")


def replay(model: nn.Module, plan: Plan, compensate: How = None, *, check: bool = True) -> Replayed:
    """Return ``model`` without the units that ``plan`` removes, as a graph of the operators it calls.

    The batch size is free, and so are image sizes on which no number in the model's code depends but sizes of tensors:
    the model is recorded at several sizes, and numbers that follow them are taken from the inputs.  Where that cannot
    be done there is a warning, and other sizes than the plan's are an error when the module is called.

    Args:
        model: the model that the plan was made for; it is not changed.
        plan: what goes.
        compensate: as for ``apply``.
        check: as for ``apply``.

    Raises:
        PlanError: the plan does not fit the model, or the graph would not give the shapes that the plan says.

    Cost: eight to ten runs on tensors without data.
    """
    builder = _built(model, plan)
    module = _module(model, builder, {})
    _rehearse(module, plan.inputs, builder)
    example = example_for(model, plan, builder.source, builder.kept) if check else None
    if example is not None:
        example.check(module)
    if compensate is not None:
        module = _module(model, builder, make_up(model, plan, builder.source, builder.kept, compensate))
    if not any(size is None for sizes in builder.sizes.values() for size in sizes):
        warnings.warn(
            f"{type(model).__name__} was rebuilt for inputs of exactly the sizes {builder.sizes}: its code computes "
            f"with the batch size in a way that the graph back end cannot follow. {builder.reason}",
            stacklevel=user_level(),
        )
    remembered = dataclasses.replace(plan, budget={**plan.budget, "backend": "graph"})
    setattr(module, PLANS, [*getattr(model, PLANS, []), remembered])
    return module


def _module(model: nn.Module, builder: Builder, refitted: Mapping[str, Tensor]) -> Replayed:
    module = Replayed(_skeleton(model, builder, refitted), builder.nodes, f"Replayed{type(model).__name__}")
    module.input_sizes, module.result_structure = builder.sizes, builder.tapes[0].spec
    module.training = model.training
    return module


def _built(model: nn.Module, plan: Plan) -> Builder:
    """Return the graph that leaves most sizes free.

    A batch of one lies in memory in more than one way and hides what follows the batch, so two come first.
    """
    starts = [with_batch(plan.inputs, 2)] if batch_of(plan.inputs) == 1 else []
    for inputs in [*starts, plan.inputs]:
        given = inputs is plan.inputs
        try:
            graph, kept = open_plan(model, dataclasses.replace(plan, inputs=inputs))
            base = record(model, inputs)
        except PruneLabError:
            if given:
                raise
            continue
        reason = ""
        for others, least in choices(model, inputs, base, fixed=given):
            try:
                builder = Builder(model, graph, kept, [base, *others], least)
                builder.build()
                builder.reason = reason
                return builder
            except Inexpressible as error:
                reason = str(error)
    raise AssertionError("with fixed sizes every number is what it was")


# ── parameters, and the check ─────────────────────────────────────────────────────────────────────────────────────


def _skeleton(model: nn.Module, builder: Builder, refitted: Mapping[str, Tensor]) -> nn.Module:
    """Return plain modules, nested as in the model, that hold its parameters and buffers, refitted and cut."""
    tensors = dict(named_tensors(model))
    fresh = {name: refitted.get(name, tensor).detach() for name, tensor in tensors.items()}
    fresh |= folded(builder.source, builder.kept, fresh)
    for name, place, mask in masks(builder.source, builder.kept):
        index = mask.nonzero().flatten().to(fresh[name].device)
        fresh[name] = laid_out_like(fresh[name].index_select(place, index), tensors[name])
    made: dict[int, Any] = {}
    for name, old in tensors.items():
        new = fresh[name].clone()
        made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new

    def hollow(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            out = made[id(module)] = nn.Module()
            out.training = module.training
            vars(out)["stands_for"] = layer_type(module)
            for name, parameter in module._parameters.items():
                out.register_parameter(name, None if parameter is None else made[id(parameter)])
            for name, buffer in module._buffers.items():
                saved = name not in module._non_persistent_buffers_set
                out.register_buffer(name, None if buffer is None else made[id(buffer)], persistent=saved)
            if "running_mean" in module._buffers and hasattr(module, "momentum"):
                out.momentum = module.momentum
            for name, child in module._modules.items():
                out.add_module(name, None if child is None else hollow(child))
        return made[id(module)]

    root = hollow(model)
    for number, tensor in enumerate(builder.tapes[0].constants):
        root.register_buffer(constant(number), tensor.detach().clone(), persistent=False)
    return root


class _Rehearsal(fx.Interpreter):
    """Runs the graph on tensors without data and compares every result with its shape."""

    def __init__(self, module: nn.Module, shapes: dict[str, tuple[int, ...] | None]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.shapes = shapes

    def run_node(self, n: fx.Node) -> Any:
        where = n.meta.get("where", n.name)
        try:
            result = super().run_node(n)
        except Exception as error:
            raise PlanError(f"Rebuilding goes wrong at {where}, so nothing was cut: {first_line(error)}.") from error
        wanted = self.shapes.get(n.name)
        if wanted is not None and tuple(result.shape) != tuple(wanted):
            raise PlanError(
                f"Rebuilding goes wrong at {where}, so nothing was cut: it gives {list(result.shape)} instead of "
                f"{list(wanted)}. Ignore that module."
            )
        return result


def _rehearse(module: Replayed, inputs: Any, builder: Builder) -> None:
    mode = fakes.fake_mode()
    fake: Any = fakes.fake_model(module, mode).eval()
    known = [node for node in module.graph.nodes if node in builder.shapes]
    names = [node.target for node in module.graph.nodes if node.op == "placeholder"]
    assert {node.name for node in fake.graph.nodes} >= {node.name for node in known}
    seen: list[Any] = []
    for number, tape in enumerate(builder.tapes):
        if tape.inputs in seen:
            continue
        seen.append(tape.inputs)
        sizes = [list(shape) for shape in tape.inputs.values() if isinstance(shape, torch.Size)]
        described = resized(inputs, partial(_take, sizes))
        args, kwargs = fakes.fake_inputs(fakes.recall_inputs(described), mode, fake)
        with torch.no_grad(), mode, Answering(mode):
            rehearsal = _Rehearsal(fake, {node.name: builder.shapes[node][number] for node in known})
            rehearsal.run(*args, *(kwargs[name] for name in names[len(args) :]))


def _take(sizes: list[list[int]], shape: list[int]) -> list[int]:
    """Return the next of the sizes, whatever the shape was."""
    return sizes.pop(0)

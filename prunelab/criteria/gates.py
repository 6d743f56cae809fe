"""Gates: numbers that multiply every unit of a network where it is consumed; at one nothing changes.

Flows in: a dependency graph and one batch, to see what the model calls.  Flows out: ``Gates``, which run the model
with a gate for every unit, shared by all samples (``z [U]``) or one set for each (``z [B, U]``), so that one backward
pass gives the derivative of every sample's output in every gate.  Notebook 10_oracle derives why gates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from prunelab.batches import Batch, batch_of
from prunelab.batches import call as call_model
from prunelab.errors import BatchError
from prunelab.surgery.weighted import WEIGHTED, weighted
from prunelab.tracing.axes import Axis
from prunelab.tracing.calls import Calls, FunctionCall, RealAxes, WatchedCalls, leaves_of, tensors_of
from prunelab.tracing.groups import unit_map
from prunelab.tracing.hooks import only_needed
from prunelab.tracing.trace import DependencyGraph

_PRODUCTS = (
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution matmul "
    "__matmul__ __rmatmul__ bmm mm mv dot vdot inner addmm addmv baddbmm addbmm einsum bilinear deform_conv2d "
    "scaled_dot_product_attention lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell "
    "grouped_mm _grouped_mm"
)
PRODUCTS = frozenset(_PRODUCTS.split())
"""Functions that are linear in each of the tensors that they multiply, so that a gate on one of them is enough."""


class Layout(NamedTuple):
    """Where a tensor keeps its samples: dimension ``dim``, in runs of ``inner`` rows per sample."""

    dim: int
    inner: int


@dataclass
class Gated:
    """A call that consumes units.

    Attributes:
        name: of the function.
        operand: which of its tensors gets the gates, in the order of ``tree_leaves((args, kwargs))``.
        places: dimension of the operand -> for each group, where each entry finds its gate among all, int64
            ``[size]``; the last place holds a one.
        averages: the function takes a mean or variance, in which entries count with their gates.
        layout: where the operand keeps its samples, ``None`` if that is not known.
    """

    name: str
    operand: int
    places: dict[int, list[Tensor]]
    averages: bool
    layout: Layout | None = None


class Gates:
    """A gate for every unit of every group, in the order of ``Scores.matrix``.

    A gate multiplies its unit in every call that consumes it: a layer, a product of activations such as that of queries
    and keys, a sum.  It enters each of them once, through one tensor.  In means, variances and norms over units an
    entry counts with its gate.  So with gates of 0 and 1 this is the network of ``prunelab.masked``.

    Args:
        graph: of the model; it must be in eval mode while gates run.
        batch: the batch, or its inputs, to see what the model calls and in which rows each sample's numbers are.

    Raises:
        PlanError: with these inputs the model couples units otherwise than in its trace.
    """

    def __init__(self, graph: DependencyGraph, batch: Any) -> None:
        batch = batch if isinstance(batch, Batch) else batch_of(batch)
        self.graph, self.model = graph, graph.model
        self.size = sum(group.size for group in graph.groups)
        axes = RealAxes(self.model, graph)
        learned = _Learning(axes)
        known = batch.problem is None  # where the samples are
        few = batch.take([0, batch.size - 1]) if known else batch
        with torch.no_grad(), only_needed(self.model), axes, learned:
            call_model(self.model, few.inputs)
        axes.check(axes.leaves)
        self.jobs = _jobs(graph, axes, learned.calls)
        self.names = learned.names
        self.per_sample = known and batch.size > 1
        if self.per_sample:
            self._find_layouts(batch)
            self.per_sample = all(job.layout for jobs in self.jobs.values() for job in jobs)

    def _find_layouts(self, batch: Batch) -> None:
        """Run the model on two samples, on two that are equal, and on three, and see where the samples are.

        A dimension that grows with the number of samples holds them; whether one sample's rows are together there is
        seen from the rows that change with the second sample.
        """
        runs = []
        for places in ([0, batch.size - 1], [0, 0], [0, batch.size - 1, 0]):
            some = batch.take(places).inputs
            with torch.no_grad(), only_needed(self.model), _Operands(self.jobs, self.names) as seen:
                call_model(self.model, some)
            runs.append(seen.operands)
        for key, job in enumerate(job for jobs in self.jobs.values() for job in jobs):
            job.layout = _layout(*(run[key] for run in runs))

    def run(self, inputs: Any, z: Tensor) -> Any:
        """Return the model's outputs with gates ``z``, ``[U]`` or, if ``per_sample``, ``[B, U]``.

        Raises:
            BatchError: the model calls other functions than on the batch that these gates were made for, or consumes a
                unit where no derivative passes.
        """
        with only_needed(self.model), _Gating(self.jobs, self.names, z):
            return call_model(self.model, inputs)


def _jobs(graph: DependencyGraph, axes: RealAxes, calls: dict[int, FunctionCall]) -> dict[int, list[Gated]]:
    """Return, for every call by its number, the tensors in it that get gates."""
    starts, start = {}, 0
    for group in graph.groups:
        starts[id(axes.leaves[id(group.axis)])] = axes.leaves[id(group.axis)], start
        start += group.size

    def places(axis: Axis, target: Axis, first: int) -> Tensor:
        unit = unit_map(axis, target)
        return torch.where(unit >= 0, unit + first, start)

    found: dict[int, list[Gated]] = {}
    for number, call in calls.items():
        averaged = leaves_of(call.averaged)
        if averaged.keys() & starts.keys() and call.name not in WEIGHTED:
            raise BatchError(
                f"`{call.name}` takes a mean or a variance over units in a way that gates do not know: write it with "
                "mean, var or a norm of torch.nn.functional, or ignore these units in the trace."
            )
        jobs: dict[tuple[int, bool], Gated] = {}
        for key in sorted(call.consumed().keys() & starts.keys(), key=lambda key: starts[key][1]):
            leaf, first = starts[key]
            operand, dims = (0, call.given[0].holds(leaf)) if key in averaged else _operand(call, leaf)
            job = jobs.setdefault((operand, key in averaged), Gated(call.name, operand, {}, key in averaged))
            for dim in dims:
                job.places.setdefault(dim, []).append(places(call.given[operand].axes[dim], leaf, first))
        if jobs:
            found[number] = list(jobs.values())
    return found


def _operand(call: FunctionCall, leaf: Axis) -> tuple[int, list[int]]:
    """Return which tensor of a call gets the gates of a group, and in which dimension: an activation if there is one.

    Raises:
        BatchError: every tensor holds the group's units in several dimensions, or the function is not linear in each.
    """
    holding = [(operand, dims) for operand in range(len(call.given)) if (dims := call.given[operand].holds(leaf))]
    if len(holding) > 1 and call.name not in PRODUCTS:
        raise BatchError(
            f"`{call.name}` consumes units of several tensors in a way that gates do not know: write it with sums, "
            "products and norms, or ignore these units in the trace."
        )
    for operand, dims in sorted(holding, key=lambda pair: call.given[pair[0]].parametric):
        if len(dims) == 1:
            return operand, dims
    raise BatchError(
        f"`{call.name}` holds the same units in two dimensions of a tensor, and gates cannot tell which of them it "
        "consumes: ignore these units in the trace."
    )


class _Learning(WatchedCalls):
    """Numbers the calls of a forward pass and keeps the axes of each."""

    def __init__(self, axes: RealAxes) -> None:
        super().__init__(axes)
        self.names: list[str] = []
        self.calls: dict[int, FunctionCall] = {}

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Number the call, if it returns tensors: what else is called may depend on whether gradients are on."""
        out = super().on_call(func, args, kwargs)
        if tensors_of(out):
            self.names.append(_name(func))
        return out

    def after_call(self, call: FunctionCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Keep the call."""
        if tensors_of(out):
            self.calls[len(self.names)] = call
        return out


def _name(func: Any) -> str:
    return getattr(func, "__name__", "").partition(".")[0]


class _Numbered(Calls):
    """Finds the jobs of every call by its number, and checks that the calls are those that were learned."""

    def __init__(self, jobs: dict[int, list[Gated]], names: list[str]) -> None:
        super().__init__()
        self.jobs, self.names, self.number = jobs, names, 0

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function, with gates where it has some."""
        name, jobs = _name(func), self.jobs.get(self.number)
        here = jobs is not None and jobs[0].name == name
        out = self.gated(jobs, func, args, kwargs) if jobs is not None and here else func(*args, **kwargs)
        if tensors_of(out):
            if self.names[self.number : self.number + 1] != [name]:
                raise BatchError(
                    "The model calls other functions for some samples of a batch than for others, so gates do not know "
                    "what they multiply: put samples that are alike into one batch."
                )
            self.number += 1
        return out

    def gated(self, jobs: list[Gated], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function with gates."""
        raise NotImplementedError


class _Operands(_Numbered):
    """Keeps every tensor that gets gates."""

    def __init__(self, jobs: dict[int, list[Gated]], names: list[str]) -> None:
        super().__init__(jobs, names)
        self.operands: list[Tensor] = []

    def gated(self, jobs: list[Gated], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep the tensors and call the function as it is."""
        tensors = tensors_of((args, kwargs))
        self.operands += [tensors[job.operand].clone() for job in jobs]
        return func(*args, **kwargs)


class _Gating(_Numbered):
    """While on, gates multiply what they belong to."""

    def __init__(self, jobs: dict[int, list[Gated]], names: list[str], z: Tensor) -> None:
        super().__init__(jobs, names)
        self.padded = torch.cat([z, z.new_ones(*z.shape[:-1], 1)], -1)

    def gated(self, jobs: list[Gated], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function on gated tensors; a mean or variance counts every entry with its gate."""
        if self.padded.requires_grad and not torch.is_grad_enabled():
            raise BatchError(
                f"`{jobs[0].name}` consumes units where no gradient is computed (under no_grad, or in a "
                "torch.autograd.Function), so gates have no derivatives there: ignore these units."
            )
        flat, spec = tree_flatten((args, kwargs))
        at = [place for place, part in enumerate(flat) if isinstance(part, Tensor)]
        weights = None
        for job in jobs:
            x = flat[at[job.operand]]
            factor = self._factor(job, x)
            if job.averages:
                weights = factor
            else:
                flat[at[job.operand]] = x * factor
        args, kwargs = tree_unflatten(flat, spec)
        return func(*args, **kwargs) if weights is None else weighted(jobs[0].name, args, kwargs, weights)

    def _factor(self, job: Gated, x: Tensor) -> Tensor:
        """Return the gates of the entries of ``x``, in a shape that broadcasts to it."""
        shape = list(x.shape)
        layout = job.layout if self.padded.dim() == 2 else None
        factor = self.padded.new_ones(())
        for dim, places in job.places.items():
            for index in places:
                found = self.padded[..., index.to(x.device)]
                if layout is None:
                    factor = factor * found.view(-1, *(1 for _ in shape[dim + 1 :]))
                    continue
                rows = [len(found), *(1 for _ in shape)]
                rows[1 + dim] = shape[dim]
                factor = factor * found.reshape(rows)
        if layout is not None:  # [B, *shape with ones] -> the samples' own rows
            factor = factor.movedim(0, layout.dim).flatten(layout.dim, layout.dim + 1)
            factor = factor.repeat_interleave(layout.inner, layout.dim) if layout.inner > 1 else factor
        return factor.to(x.dtype)


def _layout(two: Tensor, equal: Tensor, three: Tensor) -> Layout | None:
    grown = [dim for dim in range(two.dim()) if two.shape[dim] != three.shape[dim]]
    if len(grown) != 1 or 3 * two.shape[grown[0]] != 2 * three.shape[grown[0]]:
        return None
    dim = grown[0]
    change = (two - equal).narrow(dim, 0, two.shape[dim] // 2).abs().max()
    if float(change) > 1e-3 * float(two.abs().max()):  # rounding aside, the second sample reached the first one's rows
        return None
    return Layout(dim, two.shape[dim] // 2)

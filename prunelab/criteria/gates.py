"""Gates: numbers that multiply every unit of a network where it is consumed; at one nothing changes.

Flows in: a dependency graph and one batch, to see how layers are called.  Flows out: ``Gates``, which run the model
with a gate for every unit, shared by all samples (``z [U]``) or one set for each (``z [B, U]``), so that one backward
pass gives the derivative of every sample's output in every gate.  Notebook 10_oracle derives why gates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from prunelab.batches import Batch, batch_of
from prunelab.batches import call as call_model
from prunelab.curvature.taps import FLAT, IN_FIRST, LayerCall, Taps
from prunelab.tracing.axes import Axis, factors_of, find, is_frozen, leaves, segments_of
from prunelab.tracing.groups import Group, Member
from prunelab.tracing.trace import DependencyGraph


class Layout(NamedTuple):
    """Where a layer's input keeps its samples: dimension ``dim``, in runs of ``inner`` rows per sample."""

    dim: int
    inner: int


class Gates:
    """A gate for every unit of every group, in the order of ``Scores.matrix``.

    A gate multiplies the inputs of all layers that consume the unit, and nothing else, so it enters each of them once.
    Units of attention's query and key widths are consumed by the product of the two: their gate multiplies the query
    rows.  A group whose consumers or producers are not layers (a plain product with a parameter) has its gates on that
    parameter.

    Args:
        graph: of the model; it must be in eval mode while gates run.
        batch: one batch, or its inputs, to see which layers run and in which rows each sample's numbers are.
    """

    def __init__(self, graph: DependencyGraph, batch: Any) -> None:
        self.graph, self.model, self.parameters = graph, graph.model, dict(graph.model.named_parameters())
        self.size = sum(group.size for group in graph.groups)
        calls, self.layouts = _watch(graph, batch if isinstance(batch, Batch) else batch_of(batch))
        kinds: dict[str, list[str]] = {}
        for call in calls:
            kinds.setdefault(call.weight, []).append(call.kind)
        # weight -> where each entry of its input, or output, finds its gate among all; the last place holds a one.
        self.consumed: dict[tuple[str, str], list[Tensor]] = {}
        self.produced: dict[tuple[str, str], list[Tensor]] = {}
        self.scaled: dict[str, list[tuple[int, Tensor]]] = {}
        start = 0
        for group in graph.groups:
            self._place(group, start, kinds)
            start += group.size
        gated = [n for n, c in enumerate(calls) if {(c.weight, c.kind)} & {*self.consumed, *self.produced}]
        self.per_sample = not self.scaled and all(self.layouts[number] for number in gated)

    def _place(self, group: Group, start: int, kinds: dict[str, list[str]]) -> None:
        def places(unit: Tensor) -> Tensor:
            return torch.where(unit >= 0, unit + start, self.size)

        def uses(member: Member, *, inputs: bool) -> list[str]:
            """Return the kinds of the calls whose inputs, or outputs, run along a member."""
            found = dict.fromkeys(kinds.get(member.name, ()))
            return [kind for kind in found if member.dim == (0 if (kind in IN_FIRST) == inputs else 1)]

        used = [(m, kind) for m in group.members if m.role != "carries" for kind in uses(m, inputs=True)]
        for member, kind in used:
            self.consumed.setdefault((member.name, kind), []).append(places(member.unit))
        plain = [m for m in group.members if m.role == "consumes" and m.name in self.parameters.keys() - kinds.keys()]
        for member in plain:
            self.scaled.setdefault(member.name, []).append((member.dim, places(member.unit)))
        made = [m for m in group.members if m.role == "produces"] or list(group.members)
        axis = self.graph.dims[made[0].name][made[0].dim].axis
        unit = first_copy(axis, group.axis)
        copies = len(made) > 1 or bool((unit >= 0).sum() < (made[0].unit >= 0).sum())
        contracted = group.axis.label == "head_width" and copies
        if (used or plain) and not contracted:
            return
        outputs = uses(made[0], inputs=False)
        if outputs:
            self.produced.setdefault((made[0].name, outputs[0]), []).append(places(unit))
        else:
            self.scaled.setdefault(made[0].name, []).append((made[0].dim, places(unit)))

    def run(self, inputs: Any, z: Tensor) -> Any:
        """Return the model's outputs with gates ``z``, ``[U]`` or, if ``per_sample``, ``[B, U]``."""
        padded = torch.cat([z, z.new_ones(*z.shape[:-1], 1)], -1)
        number = -1

        def before(call: LayerCall) -> Tensor | None:
            nonlocal number
            number += 1
            return self._scale(call.input, call, self.consumed.get((call.weight, call.kind)), padded, number)

        def after(call: LayerCall) -> Tensor | None:
            found = self.produced.get((call.weight, call.kind))
            rows = None if found is None else [index[call.rows] if call.kind == "linear" else index for index in found]
            assert call.output is not None
            return self._scale(call.output, call, rows, padded, number)

        with Taps(self.model, before, after, keep=False):
            if not self.scaled:
                return call_model(self.model, inputs)
            return call_model(_Scaled(self.model, self._scaled(padded)), inputs)

    def _scale(
        self, x: Tensor, call: LayerCall, found: list[Tensor] | None, padded: Tensor, number: int
    ) -> Tensor | None:
        if found is None:
            return None
        channel = x.dim() - 1 if call.kind in FLAT else 1
        factor = padded.new_ones(())
        for index in found:
            index = index.repeat(x.shape[channel] // len(index))  # a weight's slice serves every group of a convolution
            factor = factor * padded[..., index.to(padded.device)]
        factor = factor.to(x.dtype)
        if padded.dim() == 1:
            return x * factor.view(-1, *(1 for _ in range(channel + 1, x.dim())))
        layout = self.layouts[number]
        assert layout is not None
        split = x.unflatten(layout.dim, (-1, layout.inner))
        channel += channel > layout.dim
        shape = [1] * split.dim()
        shape[layout.dim], shape[channel] = factor.shape
        factor = factor if layout.dim < channel else factor.t()
        return (split * factor.reshape(shape)).flatten(layout.dim, layout.dim + 1)

    def _scaled(self, padded: Tensor) -> dict[str, Tensor]:
        tensors = {**self.parameters, **dict(self.model.named_buffers())}
        out = {}
        for name, places in self.scaled.items():
            out[name] = tensors[name]
            for dim, index in places:
                factor = padded[index.to(padded.device)].to(out[name].dtype)
                out[name] = out[name] * factor.view(-1, *(1 for _ in range(dim + 1, out[name].dim())))
        return out


class _Scaled(torch.nn.Module):
    """A model with some of its parameters replaced for the time of a call."""

    def __init__(self, model: torch.nn.Module, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.call = lambda *args, **kwargs: functional_call(model, parameters, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def first_copy(axis: Axis, target: Axis) -> Tensor:
    """Return int64 ``[axis.size]``: the unit of the leaf ``target`` that each entry belongs to, in one copy only.

    Where an axis holds the units several times, as the fused projection to queries, keys and values does (one segment
    after the other, or numbered by a factor that nothing can be removed from), -1 stands for all copies but the first.
    """
    axis, target = find(axis), find(target)
    if axis is target:
        return torch.arange(axis.size)
    holds = any(leaf is target for leaf in leaves(axis))
    if not holds:  # 0: in the copy, of no unit of its own; -1: in another copy
        numbers_copies = is_frozen(axis) and axis.label != "heads"
        return torch.where(torch.arange(axis.size) > 0, -1, 0) if numbers_copies else torch.zeros(axis.size).long()
    if axis.kind == "sum":
        parts = segments_of(axis)
        first = next(place for place, part in enumerate(parts) if any(leaf is target for leaf in leaves(part)))
        outside = [torch.full((part.size,), -1) for part in parts]
        return torch.cat([*outside[:first], first_copy(parts[first], target), *outside[first + 1 :]])
    out = torch.zeros(1).long()
    for part in factors_of(axis):
        left, right = out[:, None], first_copy(part, target)[None, :]
        out = torch.where((left < 0) | (right < 0), -1, left + right).flatten()
    return out


def _watch(graph: DependencyGraph, batch: Batch) -> tuple[list[LayerCall], list[Layout | None]]:
    """Run the model on two samples, on three, and on two that are equal; return its calls and the layout of each.

    A dimension that grows with the number of samples holds them; whether one sample's rows stand together there is
    seen from the rows that change with the second sample.
    """
    number = batch.size
    runs = []
    for places in ([0, number - 1], [0, 0], [0, number - 1, 0]):
        with torch.no_grad(), Taps(graph.model) as taps:
            call_model(graph.model, batch.take(places).inputs)
        runs.append(taps.calls)
    layouts = [_layout(*(call.input for call in calls)) for calls in zip(*runs, strict=True)] if number > 1 else []
    return runs[0], layouts or [None] * len(runs[0])


def _layout(two: Tensor, equal: Tensor, three: Tensor) -> Layout | None:
    grown = [dim for dim in range(two.dim()) if two.shape[dim] != three.shape[dim]]
    if len(grown) != 1 or 3 * two.shape[grown[0]] != 2 * three.shape[grown[0]]:
        return None
    dim = grown[0]
    change = (two - equal).narrow(dim, 0, two.shape[dim] // 2).abs().max()
    if float(change) > 1e-3 * float(two.abs().max()):  # rounding aside, the second sample reached the first one's rows
        return None
    return Layout(dim, two.shape[dim] // 2)

"""Unit slopes: how every sample's outputs change as each unit's slices are scaled, for all units in one backward pass.

Scaling the rows of a weight scales what the layer gives, scaling its columns scales what it takes.  So the derivative
in a unit's scale is, call by call and for every sample, Σ g ⊙ z over the unit's outputs and Σ g ⊙ a over its inputs, g
the gradient that arrives there: no gradient of a weight is ever made.

Flows in: a graph and batches.  Flows out: sums over samples of slopes and of Gauss-Newton curvatures, one per unit, for
the groups of which this is all there is to know; the rest has to go another way.  Notebook 09_oba derives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from prunelab.batches import Batch
from prunelab.batches.mean_check import check_mean
from prunelab.curvature.fisher import columns, slopes
from prunelab.curvature.watching.layer_calls import KINDS, LayerCall
from prunelab.curvature.watching.parameter_calls import ParameterCalls
from prunelab.curvature.watching.samples import Layout, Routes, routes
from prunelab.errors import BatchError
from prunelab.tracing.groups import Group, Member

NORMS = ("channel_norm", "last_norm")


class Term(NamedTuple):
    """What one end of one call adds to the slopes of units.

    Attributes:
        name: of the parameter that the units scale.
        edge: where the gradient arrives.
        values: what is there, without what another parameter adds.
        shape: that aligns the parameter's dimension with the values, from the right.
        layout: where the samples are.
        dim: of the parameter; ``None`` where all of its dimensions are in ``shape``.
        rows: which part of that dimension.
        repeats: how many groups of the convolution share it.
        version: of the values; a higher one means that they were changed in place.
    """

    name: str
    edge: GradientEdge
    values: Tensor
    shape: tuple[int, ...]
    layout: Layout
    dim: int | None
    rows: slice
    repeats: int
    version: int


class UnitSlopes:
    """The slopes of all units of some groups.

    Args:
        model: the network, in eval mode, with gradients for all its parameters.
        groups: of its graph.
        batch: one batch, or its inputs, to see how parameters are used.

    Attributes:
        groups: those of the given groups that go this way.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], batch: Any) -> None:
        self.model, self.copies = model, False
        self.parameters = dict(model.named_parameters())
        self.ways = _ways(model, batch)
        kinds: dict[str, set[str]] = {}
        for weight, bias, kind in self.ways.calls if self.ways else ():
            kinds.setdefault(weight, set()).add(kind)
            if bias is not None:
                kinds.setdefault(bias, set()).add("bias")
        self.groups = tuple(group for group in groups if self._goes(group, kinds))
        self.members: dict[str, list[tuple[Member, int]]] = {}
        self.size = 0
        for group in self.groups:
            for member in group.members:
                self.members.setdefault(member.name, []).append((member, self.size))
            self.size += group.size

    def _goes(self, group: Group, kinds: dict[str, set[str]]) -> bool:
        """Return whether every parameter of a group is used by calls alone, and held in one dimension."""
        members = [member for member in group.members if member.name in self.parameters]
        names = [member.name for member in members]
        used = all(
            kinds[member.name] <= {*KINDS, *NORMS, "bias", "broadcast"}
            or (kinds[member.name] == {"embedding"} and member.dim == 1)
            for member in members
            if member.name in kinds
        )
        known = self.ways is not None and all(name in kinds and name not in self.ways.rest for name in names)
        return used and known and len(set(names)) == len(names)

    def sums(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Return ``Σ_n ∂ℓ_n/∂s`` and ``Σ_n j_nᵀ Λ_n j_n``, each ``[units]``, of one batch.

        ``None`` where the outputs are not one tensor, or hold more numbers for each sample than there are units.  Cost:
        one forward pass, and a backward pass per output without gradients of weights.

        Raises:
            BatchError: the model cannot take the inputs, or the loss the outputs; it is not a mean or not convex.
        """
        outputs, terms = self._forward(batch)
        if not isinstance(outputs, Tensor) or outputs.dim() == 0 or len(outputs) != batch.size:
            return None
        if outputs.numel() > self.size * len(outputs):
            return None
        check_mean(outputs, batch)
        first = self._slopes(outputs, slopes(outputs, batch), terms).sum(0)
        second = torch.zeros_like(first)
        for column in columns(outputs, batch, "ggn", 0, 0, "curvature"):
            second += self._slopes(outputs, column, terms).square_().sum(0)
        return first, second

    def _forward(self, batch: Batch) -> tuple[Any, list[Term]]:
        terms: list[Term] = []
        place = 0

        def before(call: LayerCall) -> Tensor | None:
            if not any(member.dim == _dims(call)[0] for member, _ in self.members.get(call.weight, ())):
                return None
            if not call.input.requires_grad:
                return call.input.detach().requires_grad_()
            return call.input.clone() if self.copies else call.input.view_as(call.input)

        def after(call: LayerCall) -> Tensor | None:
            nonlocal place
            assert self.ways is not None
            layout = self.ways.layout(place, call, batch.size)
            place += 1
            if layout is None or call.edge is None:
                return None
            found = list(self._terms(call, layout))
            terms.extend(found)
            return call.output.clone() if self.copies and found and call.output is not None else None

        with torch.enable_grad(), ParameterCalls(self.model, before, after, keep=False, cut=True):
            outputs = batch.run(self.model)
        if any(term.values._version != term.version for term in terms):
            self.copies = True  # what a layer gave was changed in place
            return self._forward(batch)
        return outputs, terms

    def _terms(self, call: LayerCall, layout: Layout) -> Iterator[Term]:
        weight, output = self.parameters[call.weight], call.output
        assert output is not None and call.edge is not None
        whole = call.kind in ("last_norm", "broadcast")
        shape = tuple(weight.shape) if whole else _shape(output, call.kind in ("linear", "embedding"))
        bias = None if call.bias is None else self.parameters[call.bias].detach()[call.bias_rows]
        if call.bias in self.members and bias is not None:
            spread = bias.view(shape).expand_as(output)
            yield Term(call.bias, call.edge, spread, shape, layout, None, call.bias_rows, 1, spread._version)
        dims = {member.dim for member, _ in self.members.get(call.weight, ())}
        inner, outer = _dims(call)
        if dims - {inner}:
            values = output.detach() if bias is None else output.detach() - bias.view(shape)
            rows, repeats = (slice(None), call.view.groups) if outer else (call.rows, 1)
            yield Term(call.weight, call.edge, values, shape, layout, outer, rows, repeats, values._version)
        if inner in dims:
            edge, values = get_gradient_edge(call.input), call.input.detach()
            shape = _shape(values, call.kind == "linear")
            rows, repeats = (slice(None), call.view.groups) if inner else (call.rows, 1)
            yield Term(call.weight, edge, values, shape, layout, inner, rows, repeats, values._version)

    def _slopes(self, outputs: Tensor, column: list[Tensor], terms: list[Term]) -> Tensor:
        """Return ``[samples, units]``: the slopes of the outputs along a column."""
        total = outputs.new_zeros(len(outputs), self.size)
        edges = list({(id(term.edge.node), term.edge.output_nr): term.edge for term in terms}.values())
        if not edges or not outputs.requires_grad:
            return total
        found = torch.autograd.grad(outputs, edges, column, retain_graph=True, allow_unused=True)
        arrived = {(id(e.node), e.output_nr): gradient for e, gradient in zip(edges, found, strict=True)}
        for term in terms:
            gradient = arrived[id(term.edge.node), term.edge.output_nr]
            if gradient is None:
                continue
            slopes = _by_sample(gradient * term.values, term)
            for member, offset in self.members[term.name]:
                if term.dim is not None and member.dim != term.dim:
                    continue
                dim = member.dim if term.dim is None else 0
                along = slopes.movedim(dim + 1, 1).flatten(2).sum(2) if slopes.dim() > 2 else slopes
                unit = (member.unit[term.rows] if member.dim == (term.dim or 0) else member.unit).to(total.device)
                owned = unit >= 0
                total.index_add_(1, unit[owned] + offset, along[:, owned].to(total))
        return total


def _shape(values: Tensor, last: bool) -> tuple[int, ...]:
    """Return the shape that aligns one number per channel with values, whose channels may come last."""
    return (values.shape[-1],) if last else (values.shape[1], *(1 for _ in values.shape[2:]))


def _by_sample(values: Tensor, term: Term) -> Tensor:
    """Return ``[samples, *dimensions of the parameter]``: the sum over all else."""
    split = term.layout.by_sample(values)
    padded = (1,) * (split.dim() - 1 - len(term.shape)) + term.shape
    dims = [place + 1 for place, size in enumerate(padded) if size == 1 and split.shape[place + 1] != 1]
    summed = (split.sum(dims) if dims else split).reshape(len(split), *term.shape)
    if term.dim is None:
        return summed
    return summed.reshape(len(split), term.repeats, -1).sum(1)


def _dims(call: LayerCall) -> tuple[int | None, int | None]:
    """Return the dimensions of a weight that inputs and outputs run along; ``None``: outputs along all, inputs none."""
    return (call.view.in_dim, call.view.out_dim) if call.kind in (*KINDS, "embedding") else (None, None)


def _ways(model: nn.Module, batch: Any) -> Routes | None:
    try:
        return routes(model, batch)
    except BatchError:
        return None  # the other way says what is wrong, if anything is

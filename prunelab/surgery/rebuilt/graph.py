"""The graph of a cut model: the rows of its tape, called again with sizes that follow the cut and the inputs.

Flows in: a traced model, what stays of it, and its tapes at several input sizes.  Flows out: an ``fx.Graph``, and the
shape that every node must have.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

from prunelab.errors import PlanError
from prunelab.kept import Kept
from prunelab.surgery.rebuilt.inputs import Sizes, add_inputs
from prunelab.surgery.rebuilt.ops import is_pure, replay_row
from prunelab.surgery.rebuilt.sizes import Varying, merged
from prunelab.surgery.rebuilt.step import Inexpressible
from prunelab.surgery.rebuilt.tape import Ref, Tape
from prunelab.tracing.axes import Axis
from prunelab.tracing.recorder import Op, named_tensors
from prunelab.tracing.trace import DependencyGraph


class Builder:
    """Builds the ``fx.Graph`` of a cut model.

    Attributes:
        nodes: the graph.
        rows: the tape's rows; arguments that are not the same at all sizes are ``Varying``.
        kept: what stays of every axis.
        sizes: name of an input tensor -> its sizes, ``None`` where free.
        least: the smallest batch that the graph is right for.
        reason: why no more sizes are free, where it is known.
        floating: nodes of the input tensors of a floating type.
        shapes: node -> its shape on each of the tapes, after the cut.
    """

    def __init__(self, model: nn.Module, graph: DependencyGraph, kept: Kept, tapes: list[Tape], least: int) -> None:
        self.model, self.source, self.kept, self.tapes, self.least = model, graph, kept, tapes, least
        self.rows = merged(tapes)
        self.ops = _aligned(model, graph, tapes[0])
        self.nodes = fx.Graph()
        self.sizes: Sizes = {}
        self.floating: list[fx.Node] = []
        self.reason = ""
        self.shapes: dict[fx.Node, list[tuple[int, ...] | None]] = {}
        self._env: dict[Ref, fx.Node] = {}
        self._memo: dict[Any, fx.Node] = {}
        self._at = 0
        self._given: dict[tuple[int, ...], tuple[Ref, int]] = {}
        self._latest: dict[tuple[int, ...], tuple[Ref, int]] = {}
        self._last_write = {storage: number for number, row in enumerate(self.rows) for storage in row.writes}

    def build(self) -> None:
        """Add every node.

        Raises:
            Inexpressible: a number follows the inputs in a way that the graph cannot say.
            PlanError: an operator cannot follow the cut.
        """
        add_inputs(self)
        for number, row in enumerate(self.rows):
            self._at = number
            replay_row(self, number, row)
        result = tree_unflatten([self.node(value) for value in self.tapes[0].result], self.tapes[0].spec)
        if not _plain(result):
            flat = [self.node(value) for value in self.tapes[0].result]
            result = self.call(tree_unflatten, flat, self.attribute("result_structure"))
        self.nodes.output(result)
        for node in reversed(self.nodes.nodes):
            if not node.users and is_pure(node):
                self.nodes.erase_node(node)

    def where(self, number: int) -> str:
        """Return in words which call a row is."""
        op = self.ops[number]
        return f"`{op.name}` in `{op.module or type(self.model).__name__}`" if op else "a dropout"

    # what is known of tensors

    def axes(self, ref: Ref) -> tuple[Axis, ...] | None:
        """Return the axes of a parameter or a result; ``None`` for inputs and constants, which are not cut."""
        if ref.kind in ("tensor", "data"):
            return tuple(dim.axis for dim in self.source.dims[ref.key])
        if ref.kind != "op":
            return None
        op = self.ops[ref.key]
        if op is None:
            return self.axes(self.rows[ref.key].args[0])
        places = list(self.rows[ref.key].shapes)
        return self.source.axes_of(op.outputs[places.index(ref.place)])

    def was(self, ref: Ref) -> tuple[int, ...]:
        """Return the shape of a tensor on the first tape."""
        return self.tapes[0].shape(ref)

    def stays(self, ref: Ref) -> tuple[int, ...]:
        """Return what is kept of it."""
        axes = self.axes(ref)
        return self.was(ref) if axes is None else tuple(self.kept.size(axis) for axis in axes)

    def sizes_of(self, ref: Ref) -> list[Any]:
        """Return the sizes of a tensor, ``Varying`` where they are not the same on all tapes."""
        shapes = [tape.shape(ref) for tape in self.tapes]
        return [values[0] if len(set(values)) == 1 else Varying(values) for values in zip(*shapes, strict=True)]

    def mask(self, ref: Ref, dim: int) -> Tensor:
        """Return which entries of a dimension are kept, bool."""
        axes = self.axes(ref)
        assert axes is not None
        return self.kept.mask(axes[dim])

    def written_later(self, ref: Ref) -> bool:
        """Tell whether a later call writes to the memory that a result lies in."""
        storage = self.rows[ref.key].lies[ref.place]
        return self._last_write.get(storage, -1) > ref.key

    # nodes

    def call(self, func: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call."""
        return self.nodes.call_function(func, args, kwargs)

    def give(self, ref: Ref, node: fx.Node) -> None:
        """Say that a node is the tensor ``ref``, and keep the shape that it must have."""
        self._env[ref] = node
        node.meta["where"] = f"input `{node.args[2]}`" if ref.kind == "input" else self.where(ref.key)
        was, stays = self.was(ref), self.stays(ref)
        self.shapes[node] = [_scaled(tape.shape(ref), was, stays) for tape in self.tapes]
        known = self._given if ref.kind == "input" else self._latest
        known.update({values: (ref, dim) for dim, values in self._varying(ref)})

    def _varying(self, ref: Ref) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield the dimensions of a tensor that follow the inputs and are not cut, with their sizes on all tapes."""
        shapes, stays = [tape.shape(ref) for tape in self.tapes], self.stays(ref)
        if all(len(shape) == len(stays) for shape in shapes):
            for dim, values in enumerate(zip(*shapes, strict=True)):
                if len(set(values)) > 1 and values[0] == stays[dim]:
                    yield dim, values

    def node(self, value: Any) -> Any:
        """Return the node of a tensor; anything else as it is.

        Raises:
            PlanError: it is a by-product of a call that the graph makes in another way.
        """
        if not isinstance(value, Ref):
            return value
        if value not in self._env:
            if value.kind == "op":
                raise PlanError(f"{self.where(value.key)} gives a by-product that cannot be rebuilt: ignore it.")
            name = constant(value.key) if value.kind == "constant" else value.key
            node = self.attribute(name)
            self._env[value] = self.call(torch.ops.aten.detach.default, node) if value.kind == "data" else node
        return self._env[value]

    def attribute(self, name: str) -> fx.Node:
        """Return the node of an attribute of the module."""
        if ("attribute", name) not in self._memo:
            self._memo["attribute", name] = self.nodes.create_node("get_attr", name)
        return self._memo["attribute", name]

    def argument(self, value: Any) -> Any:
        """Return an argument to call with: nodes for tensors and for what follows the inputs."""

        def leaf(part: Any) -> Any:
            if isinstance(part, Varying):
                if isinstance(part.values[0], torch.dtype):
                    return self._follows("dtype")
                return self.number(part, 0, 0)
            return self._follows("device") if isinstance(part, torch.device) else self.node(part)

        return tree_map(leaf, value)

    def _follows(self, what: str) -> Any:
        """Return the type or device of the first input tensor of a floating type, else of the first parameter."""
        if what not in self._memo:
            like = next(iter(self.floating), None)
            name = next((name for name, t in named_tensors(self.model) if t.is_floating_point()), None)
            like = like if like is not None else None if name is None else self.attribute(name)
            if like is None:
                raise PlanError(f"{type(self.model).__name__} has no tensor that tells the {what} to compute in.")
            self._memo[what] = self.call(getattr, like, what)
        return self._memo[what]

    def number(self, value: Any, was: int, stays: int) -> Any:
        """Return the integer to call with for one that was ``value`` on the tapes, for an axis that is cut.

        Raises:
            Inexpressible: it follows the inputs, but is neither a size of a tensor nor a multiple of an input's.
        """
        if not isinstance(value, Varying):
            return stays if value == was else value
        if was == stays and (place := self._place(value.values)):
            return self._length(*place)
        for lengths, place in self._given.items():
            if not lengths[0]:
                continue
            factor = value.values[0] // lengths[0]
            whole = all(number == factor * length for number, length in zip(value.values, lengths, strict=True))
            if whole and factor * stays % max(was, 1) == 0:
                return self.call(operator.mul, self._length(*place), factor * stays // was if was else factor)
        raise Inexpressible(
            f"{self.where(self._at)} computes with {value.values[0]}, which follows the inputs in a way that the graph "
            "back end cannot tell."
        )

    def _place(self, values: tuple[int, ...]) -> tuple[Ref, int] | None:
        """Return a dimension that has these sizes: of the inputs, of what this row is called with, or of the latest."""
        if values in self._given:
            return self._given[values]
        row = self.rows[self._at]
        for ref in tree_leaves((row.args, row.kwargs)):
            if isinstance(ref, Ref) and ref.kind == "op":
                for dim, found in self._varying(ref):
                    if found == values:
                        return ref, dim
        return self._latest.get(values)

    def _length(self, ref: Ref, dim: int) -> fx.Node:
        if (ref, dim) not in self._memo:
            self._memo[ref, dim] = self.call(torch.ops.aten.sym_size.int, self.node(ref), dim)
        return self._memo[ref, dim]

    def statistics(self, mean: str, momentum: float) -> tuple[fx.Node, fx.Node | None, float | None]:
        """Return what batch norm in training needs, by its running mean: mode, count of batches and momentum."""
        owner = mean.rpartition(".")[0]
        before = f"{owner}." if owner else ""
        count = (
            self.attribute(f"{before}num_batches_tracked")
            if f"{before}num_batches_tracked" in self.source.dims
            else None
        )
        momentum = getattr(self.model.get_submodule(owner), "momentum", momentum)
        return self.attribute(f"{before}training"), count, momentum


def _aligned(model: nn.Module, graph: DependencyGraph, tape: Tape) -> list[Op | None]:
    """Return the traced operator of every row, ``None`` for marks."""
    ops = iter(graph.tape)
    found = [None if row.marks else next(ops, None) for row in tape.rows]
    for row, op in zip(tape.rows, found, strict=True):
        if row.marks:
            continue
        shapes = [tuple(axis.size for axis in graph.axes_of(tensor)) for tensor in op.outputs] if op else None
        if op is None or op.func is not row.func or shapes != list(row.shapes.values()):
            raise PlanError(f"{type(model).__name__} calls other operators in every run and cannot be rebuilt.")
    return found


def _scaled(shape: tuple[int, ...], was: tuple[int, ...], stays: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape on another tape after the cut, ``None`` where dimensions cannot be compared."""
    if was == stays:
        return shape
    if len(shape) != len(was):
        return None
    return tuple(n if a == b else n * b // a for n, a, b in zip(shape, was, stays, strict=True))


def constant(number: int) -> str:
    """Return the name of the buffer that holds a tensor of the model's code."""
    return f"constant_of_the_code_{number}"


def _plain(value: Any) -> bool:
    """Tell whether a result is nested in Python's own containers only."""
    if type(value) in (tuple, list):
        return all(_plain(part) for part in value)
    if type(value) is dict:
        return all(type(key) is str and _plain(part) for key, part in value.items())
    return isinstance(value, (fx.Node, int, float, str, bool, type(None)))

"""The tracer: run the model once on tensors without data, and read off which slices must be cut together.

Flows in: a model and example inputs.  Flows out: a ``DependencyGraph`` whose groups hold the coupled slices.  Every
operator that the model calls states one equation between axes (``rules``); what the equations leave free is a group.
Notebook 01_tracing derives it.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunelab import fakes
from prunelab.axes import Axis, find, fold, freeze, is_frozen, leaf, leaves
from prunelab.errors import TraceError
from prunelab.rules import Call, Dim, Dims, apply_rule

VIEWS = ("view", "_unsafe_view", "reshape", "expand", "split", "split_with_sizes")
"""Operators whose sizes stand in the model's code, often as an integer attribute."""


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter or buffer that a group runs through.

    Attributes:
        name: qualified name of the parameter or buffer.
        dim: the dimension.
        role: ``"produces"`` (rows of a weight), ``"consumes"`` (its columns) or ``"carries"`` (norms, biases, scales).
        unit: int64 ``[size of the dimension]``: the unit that owns each position, -1 where none does.
    """

    name: str
    dim: int
    role: str
    unit: Tensor = field(repr=False, compare=False)

    def positions(self, unit: int) -> Tensor:
        """Return int64 positions of one unit of the group in this dimension."""
        return (self.unit == unit).nonzero().flatten()


@dataclass(frozen=True, eq=False)
class Group:
    """Slices that can only be removed together.

    Attributes:
        name: of the module that produces the units, with what they are after a colon if it has several kinds.
        size: number of prunable units.
        members: every dimension that the group runs through.
        axis: the leaf of the axis algebra.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    axis: Axis = field(repr=False)


@dataclass(frozen=True)
class Op:
    """One call of an operator: what was called, where, and the fake tensors that went in and came out."""

    func: Any
    args: tuple
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    module: str

    @property
    def name(self) -> str:
        return self.func._schema.name.removeprefix("aten::")


class Recorder(TorchDispatchMode):
    """Lets a model run on fake tensors and keeps, for every tensor, the axes of its dimensions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.tape: list[Op] = []
        self.marks: list[tuple[tuple[str, int], str, Axis | None]] = []
        self.sizes: list[tuple[str, str, Axis]] = []
        self.ties: list[list[Axis]] = []
        self.conditions: list[tuple[list[Tensor], Dims, str]] = []
        self.flops: list[tuple[int, tuple[Axis, ...]]] = []
        self.visited: dict[str, int] = {}
        self._dims: dict[int, Dims] = {}
        self._keep: list[Tensor] = []
        self._stack: list[str] = []
        self.parameters: dict[str, Dims] = {}
        self._names: dict[int, str] = {}
        for name, tensor in _tensors(model):
            why = None if tensor.is_floating_point() or tensor.is_complex() else "it holds numbers, not weights"
            self.parameters[name] = [Dim(leaf(n, why), frozenset([(name, d)])) for d, n in enumerate(tensor.shape)]
            self._names[id(tensor)] = name
            self.know(tensor, self.parameters[name])

    @property
    def module(self) -> str:
        """Qualified name of the module whose ``forward`` runs now."""
        return self._stack[-1] if self._stack else ""

    def know(self, tensor: Tensor, dims: Dims) -> None:
        """Keep the axes of a tensor (and the tensor, so that its identity stays its own)."""
        self._dims[id(tensor)] = dims
        self._keep.append(tensor)

    def dims(self, tensor: Tensor) -> Dims:
        """Return the axes of a tensor; one that the tracer never saw is a constant of the code."""
        if id(tensor) not in self._dims:
            where = f"a constant in `{self.module or type(self.model).__name__}`"
            self.know(tensor, [Dim(leaf(size, where)) for size in tensor.shape])
        return self._dims[id(tensor)]

    def watch_modules(self) -> None:
        """Follow which module runs, by hooks on the fake copy."""

        def leave(*_: Any) -> None:
            self._stack.pop()

        for name, module in self.model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._stack.append(name))
            module.register_forward_hook(leave, always_call=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            raise TraceError(
                f"{type(self.model).__name__} cannot be traced: `{func}` in `{self.module or 'its forward'}` "
                f"failed on tensors without data: {_first_line(error)}"
            ) from error
        call = Call(self, func, args, kwargs, out)
        if not call.outputs:
            return out
        for tensor in call.tensors:
            if id(tensor) in self._names:
                self.visited.setdefault(self._names[id(tensor)], len(self.visited))
        computed = any(not _parametric(self.dims(tensor)) for tensor in call.tensors)
        for tensor, dims in zip(call.outputs, apply_rule(call), strict=True):
            if id(tensor) not in self._names:
                self.know(tensor, [Dim(dim.axis) for dim in dims] if computed else dims)
        self.tape.append(Op(func, args, kwargs, tuple(call.outputs), self.module))
        return out


def _parametric(dims: Dims) -> bool:
    return not dims or any(dim.origins for dim in dims)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer once, by its first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


class DependencyGraph:
    """What the tracer found: the groups, and the axes of every parameter.

    Attributes:
        model: the model that was traced, untouched.
        inputs: description of the example inputs, as plain data.
        groups: the groups in forward order.
        bundles: the groups again, with those together that must keep equal numbers of units.
        frozen: ``(name, dim) -> reason`` for every dimension of a parameter that has nothing to remove.
        tape: every operator call, in order.
    """

    def __init__(self, model: nn.Module, inputs: Any, recorder: Recorder, ties: list[set[int]]) -> None:
        self.model, self.inputs, self.tape = model, inputs, recorder.tape
        self.visited = recorder.visited
        self.sizes, self.flop_terms = recorder.sizes, recorder.flops
        self.dims = recorder.parameters
        self._recorder = recorder
        self.frozen: Mapping[tuple[str, int], str] = {
            (name, place): next(leaves(dim.axis)).frozen or ""
            for name, dims in self.dims.items()
            for place, dim in enumerate(dims)
            if is_frozen(dim.axis)
        }
        self.groups: tuple[Group, ...] = _groups(recorder)
        self._by_leaf = {id(group.axis): group for group in self.groups}
        self.bundles: tuple[tuple[Group, ...], ...] = _bundles(self.groups, ties)

    def groups_of(self, name: str, dim: int = 0) -> tuple[Group, ...]:
        """Return every group that runs through a dimension of a parameter, the outermost first.

        Raises:
            TraceError: the model has no such parameter or dimension.
        """
        if name not in self.dims or not -len(self.dims[name]) <= dim < len(self.dims[name]):
            raise TraceError(f"{type(self.model).__name__} has no dimension {dim} of a parameter or buffer `{name}`.")
        found = (self._by_leaf.get(id(part)) for part in leaves(self.dims[name][dim].axis))
        return tuple(dict.fromkeys(group for group in found if group is not None))

    def group_of(self, name: str, dim: int = 0) -> Group | None:
        """Return the group that runs through a dimension of a parameter, ``None`` where it is frozen.

        Where several do (attention heads × head width) it is the outermost; ``groups_of`` gives all.

        Raises:
            TraceError: the model has no such parameter or dimension.
        """
        return next(iter(self.groups_of(name, dim)), None)

    def axes_of(self, tensor: Tensor) -> tuple[Axis, ...]:
        """Return the axes of a fake tensor on the tape."""
        return tuple(dim.axis for dim in self._recorder.dims(tensor))

    def origins_of(self, tensor: Tensor) -> set[tuple[str, int]]:
        """Return the dimensions of parameters that a fake tensor on the tape is made from, if from nothing else."""
        return {origin for dim in self._recorder.dims(tensor) for origin in dim.origins}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and buffer when it was traced."""
        return {name: tuple(dim.size for dim in dims) for name, dims in self.dims.items()}

    def __repr__(self) -> str:
        rows = [("group", "units", "produced by", "consumed by"), *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self._title(), *lines])

    def _repr_html_(self) -> str:
        head, *rows = [("group", "units", "produced by", "consumed by"), *self._rows()]
        cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        names = "".join(f"<th>{name}</th>" for name in head)
        return f"<p>{html.escape(self._title())}</p><table><tr>{names}</tr>{cells}</table>"

    def _title(self) -> str:
        units = sum(group.size for group in self.groups)
        number = f"{len(self.groups)} group{'s' if len(self.groups) != 1 else ''}"
        return f"{type(self.model).__name__}: {number}, {units} prunable units"

    def _rows(self) -> list[tuple[str, str, str, str]]:
        def names(group: Group, role: str) -> str:
            found = list(dict.fromkeys(_module_of(m.name) for m in group.members if m.role == role))
            return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")

        return [(g.name, str(g.size), names(g, "produces") or "–", names(g, "consumes") or "–") for g in self.groups]


def trace(model: nn.Module, example_inputs: fakes.Inputs) -> DependencyGraph:
    """Find the groups of coupled slices of ``model``, without computing anything.

    The model runs once, in eval mode, as a copy on tensors that have a shape and no data; the model itself is not
    touched, and may be of any size and on any device.  If that leaves parameters unused, it runs once more in training
    mode, for auxiliary heads.

    Args:
        model: any module that PyTorch can run on fake tensors: no hints are needed.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; only shapes and
            types matter.

    Returns:
        The dependency graph.

    Raises:
        TraceError: the model's code depends on the data, or an operator cannot run without any; the message names the
            operator and the module.
        BatchError: ``example_inputs`` is of a type that no model takes.

    >>> graph = trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(1, 4))
    >>> print(graph)
    Sequential: 1 group, 8 prunable units
    group  units  produced by  consumed by
    0      8      0            2
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace takes a torch.nn.Module, not {type(model).__name__}.")
    mode = fakes.fake_mode()
    copy = fakes.fake_model(model, mode)
    args, kwargs = fakes.fake_inputs(example_inputs, mode)
    recorder = Recorder(copy)
    recorder.watch_modules()
    for tensor in tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor):
            recorder.know(tensor, [Dim(leaf(size, "the model's input")) for size in tensor.shape])
    out = _run(copy.eval(), args, kwargs, mode, recorder)
    results = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
    if not results:
        raise TraceError(f"{type(model).__name__} returned no tensor but {type(out).__name__}; nothing can be traced.")
    if any(name not in recorder.visited for name, _ in model.named_parameters()):
        results += _run_in_training(copy, args, kwargs, mode, recorder)
    for tensor in results:
        for dim in recorder.dims(tensor):
            freeze(dim.axis, "the model's output")
    used = _used(recorder.tape, results)
    for outputs, dims, reason in recorder.conditions:
        for dim in dims if any(id(tensor) in used for tensor in outputs) else []:
            freeze(dim.axis, reason)
    for name, dims in recorder.parameters.items():
        if name not in recorder.visited:
            for dim in dims:
                freeze(dim.axis, "no operator used it in this trace")
    return DependencyGraph(model, fakes.describe_inputs(example_inputs), recorder, _tie(recorder))


def _run(copy: nn.Module, args: tuple, kwargs: dict, mode: Any, recorder: Recorder) -> Any:
    fast_path, log = torch.backends.mha.get_fastpath_enabled(), logging.getLogger("torch._subclasses.fake_tensor")
    quiet = log.disabled
    torch.backends.mha.set_fastpath_enabled(False)
    log.disabled = True  # what fails is raised, with the module's name
    try:
        with torch.no_grad(), mode, recorder:
            return copy(*args, **kwargs)
    except TraceError:
        raise
    except Exception as error:
        where = f"in `{recorder.module}`" if recorder.module else "in its forward"
        raise TraceError(
            f"{type(copy).__name__} cannot be traced: {where}: {_first_line(error)}. "
            "Check the example inputs; code that looks at values cannot run on tensors without data."
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        log.disabled = quiet


def _used(tape: list[Op], results: list[Tensor]) -> set[int]:
    """Return the ``id`` of every tensor that the results depend on; operators that write in place count as used."""
    used = {id(tensor) for tensor in results}
    for op in reversed(tape):
        if op.func._schema.is_mutable or any(id(tensor) in used for tensor in op.outputs):
            used.update(id(value) for value in tree_leaves((op.args, op.kwargs)) if isinstance(value, Tensor))
            used.update(id(tensor) for tensor in op.outputs)
    return used


def _run_in_training(copy: nn.Module, args: tuple, kwargs: dict, mode: Any, recorder: Recorder) -> list[Tensor]:
    """Trace what only runs in training onto the same axes and return its outputs; none if it cannot run."""
    flops, length = list(recorder.flops), len(recorder.tape)
    try:
        out = _run(copy.train(), args, kwargs, mode, recorder)
    except TraceError:
        del recorder.tape[length:]
        return []
    finally:
        recorder.flops = flops
    return [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]


def _tie(recorder: Recorder) -> list[set[int]]:
    """Return sets of leaves (by ``id``) that must keep equal numbers, since code asks for parts of equal size.

    Parts are compared leaf by leaf; where they are not built alike they are frozen.  Views whose sizes stand in one
    integer attribute of their module are tied too: it can only have one new value.
    """
    ties: list[set[int]] = []
    for parts in recorder.ties:
        columns = _columns(parts)
        for column in columns or []:
            reason = next((part.frozen for part in column if part.frozen), None)
            for part in column if reason else []:
                freeze(part, f"parts of equal size: {reason}")
            ties.append({id(part) for part in column})
        for part in parts if columns is None else []:
            freeze(part, "code splits it into parts of equal size that are not built alike")
    for module, attributes in _integers(recorder.model).items():
        by_size: dict[int, list[Axis]] = {}
        for op in recorder.tape:
            if op.module == module and op.name in VIEWS:
                for axis in (dim.axis for tensor in op.outputs for dim in recorder.dims(tensor)):
                    if axis.size in attributes and not is_frozen(axis):
                        by_size.setdefault(axis.size, []).append(axis)
        for axes in by_size.values():
            ties += [{id(part) for part in column} for column in _columns(axes) or []]
    return ties


def _columns(axes: list[Axis]) -> list[list[Axis]] | None:
    """Return the leaves of axes that are built alike, place by place; ``None`` if they are not."""
    rows = [list(leaves(axis)) for axis in axes]
    if len({tuple(part.size for part in row) for row in rows}) != 1:
        return None
    return [list(column) for column in zip(*rows, strict=True) if len({id(part) for part in column}) > 1]


def _integers(model: nn.Module) -> dict[str, set[int]]:
    found = {name: {value for value in vars(m).values() if type(value) is int} for name, m in model.named_modules()}
    return {name: values for name, values in found.items() if values}


def _bundles(groups: tuple[Group, ...], ties: list[set[int]]) -> tuple[tuple[Group, ...], ...]:
    bundle_of = {id(group.axis): [group] for group in groups}
    for tie in ties:
        bundles = list({id(bundle_of[part]): bundle_of[part] for part in tie if part in bundle_of}.values())
        joined = [group for bundle in bundles for group in bundle]
        for group in joined:
            bundle_of[id(group.axis)] = joined
    order = {group.name: place for place, group in enumerate(groups)}
    unique = {id(bundle): sorted(bundle, key=lambda group: order[group.name]) for bundle in bundle_of.values()}
    return tuple(tuple(bundle) for bundle in unique.values())


def _groups(recorder: Recorder) -> tuple[Group, ...]:
    """Collect the free leaves of all parameters, in the order in which the model first used them."""
    found: dict[int, tuple[Axis, list[tuple[str, int]]]] = {}
    for name in sorted(recorder.visited, key=recorder.visited.__getitem__):
        for place, dim in enumerate(recorder.parameters[name]):
            for part in leaves(dim.axis):
                if part.frozen is None:
                    found.setdefault(id(part), (part, []))[1].append((name, place))
    roles = _roles(recorder)
    drafts = []
    for axis, places in found.values():
        members = tuple(
            Member(
                name, place, _role(roles, (name, place), axis), unit_map(recorder.parameters[name][place].axis, axis)
            )
            for name, place in dict.fromkeys(places)
        )
        drafts.append((axis, members))
    names = _names(recorder, drafts)
    return tuple(Group(name, axis.size, members, axis) for name, (axis, members) in zip(names, drafts, strict=True))


def _roles(recorder: Recorder) -> dict[tuple[str, int], list[tuple[str, Axis | None]]]:
    roles: dict[tuple[str, int], list[tuple[str, Axis | None]]] = {}
    for origin, role, within in recorder.marks:
        roles.setdefault(origin, []).append((role, within))
    return roles


def _role(roles: dict, origin: tuple[str, int], axis: Axis) -> str:
    known = roles.get(origin, [])
    if any(within is not None and any(part is axis for part in leaves(within)) for _, within in known):
        return "carries"
    plain = {role for role, within in known if within is None}
    return "produces" if "produces" in plain else "consumes" if "consumes" in plain else "carries"


def _names(recorder: Recorder, drafts: Iterable[tuple[Axis, tuple[Member, ...]]]) -> list[str]:
    """Name each group after the module of its first producer, and after what or where it is in there."""
    names: list[str] = []
    for axis, members in drafts:
        first = next((member for member in members if member.role == "produces"), members[0])
        free = [part for part in leaves(recorder.parameters[first.name][first.dim].axis) if part.frozen is None]
        alone = all(part is axis for part in free)
        place = next(place for place, part in enumerate(free) if part is axis)
        name = _module_of(first.name) + (f":{axis.label}" if axis.label else "" if alone else f":{place}")
        names.append(name if name not in names else f"{name}.{place}")
    return names


def _module_of(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    return module if module and parameter in ("weight", "bias", "running_mean", "running_var") else name


def unit_map(axis: Axis, target: Axis) -> Tensor:
    """Return int64 ``[axis.size]``: which entry of the leaf ``target`` each entry of ``axis`` belongs to, or -1."""

    def at_leaf(part: Axis) -> Tensor:
        return torch.arange(part.size) if part is find(target) else torch.full((part.size,), -1)

    def at_product(parts: list[Tensor]) -> Tensor:
        out = parts[0]
        for part in parts[1:]:
            out = torch.maximum(out[:, None], part[None, :]).flatten()
        return out

    return fold(axis, at_leaf, at_product, torch.cat)

"""The tracer: run the model once on tensors without data, and read off which slices must be cut together.

Flows in: a model and example inputs.  Flows out: a ``DependencyGraph`` whose groups hold the coupled slices.  Every
operator that the model calls states one equation between axes (``rules``); what the equations leave free is a group.
Notebook 01_tracing derives it.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunelab.errors import TraceError
from prunelab.runtime.extras import extra
from prunelab.runtime.isolation import Snapshot
from prunelab.runtime.outputs import result_tensors
from prunelab.runtime.switches import uncollected, without_data
from prunelab.tracing import fakes, hooks
from prunelab.tracing.axes import Axis, freeze, leaf, leaves
from prunelab.tracing.blame import failed
from prunelab.tracing.groups import Group, make_bundles, make_groups, module_of
from prunelab.tracing.made import freeze_unproduced
from prunelab.tracing.named import covered
from prunelab.tracing.observe import observed, with_or_without
from prunelab.tracing.recorder import Dim, Op, Recorder
from prunelab.tracing.rules import apply_rule
from prunelab.tracing.shortcut import Shortcut
from prunelab.tracing.sizes import depends_on_size, others
from prunelab.tracing.ties import tie

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class DependencyGraph:
    """What the tracer found: the groups, and the axes of every parameter.

    Attributes:
        model: the model that was traced, untouched.
        inputs: description of the example inputs, as plain data.
        groups: the groups in forward order.
        bundles: the groups again, with those together that must keep equal numbers of units.
        ignored: names of what stays whole because ``ignore`` says so.
        frozen: ``(name, dim) -> reason`` for every dimension of a parameter that has nothing to remove.
        tape: every operator call, in order.
        integers: attributes of modules whose value follows a cut, since the model's code took a size from them.
    """

    def __init__(
        self, model: nn.Module, inputs: Any, recorder: Recorder, ties: list[set[int]], ignored: Mapping[str, str]
    ) -> None:
        self.model, self.inputs, self.tape = model, inputs, recorder.tape
        self.visited = recorder.visited
        self.sizes, self.flop_terms = recorder.sizes, recorder.flops
        self.weight_norms = recorder.weight_norms
        self.integers, self.described = recorder.integers, recorder.described
        self.dims = recorder.parameters
        self._recorder = recorder
        self.ignored: tuple[str, ...] = ()
        reasons: dict[int, str] = {}
        bundles, groups = [], make_groups(recorder)
        for bundle in make_bundles(groups, ties):
            why = next((ignored[m.name] for group in bundle for m in group.members if m.name in ignored), None)
            if why is None:
                bundles.append(bundle)
            else:
                reasons |= {id(group.axis): why for group in bundle}
        self.bundles: tuple[tuple[Group, ...], ...] = tuple(bundles)
        self.groups: tuple[Group, ...] = tuple(group for group in groups if id(group.axis) not in reasons)
        self._by_leaf = {id(group.axis): group for group in self.groups}
        self.frozen: Mapping[tuple[str, int], str] = {
            (name, place): next(part.frozen or reasons[id(part)] for part in leaves(dim.axis))
            for name, dims in self.dims.items()
            for place, dim in enumerate(dims)
            if all(part.frozen is not None or id(part) in reasons for part in leaves(dim.axis))
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as a model and what it was traced with: the fakes of a trace cannot leave their process."""
        return _traced_again, (self.model, self.inputs, self.ignored)

    def groups_of(self, name: str, dim: int = 0) -> tuple[Group, ...]:
        """Return every group that runs through a dimension of a parameter, the outermost first.

        Raises:
            TraceError: the model has no such parameter or dimension.
        """
        if (
            not isinstance(name, str)
            or type(dim) is not int
            or name not in self.dims
            or not -len(self.dims[name]) <= dim < len(self.dims[name])
        ):
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
        left = ' style="text-align: left"'  # notebooks put tables to the right, which suits numbers
        sides = (left, "", left, left)
        lines = [
            "".join(f"<td{side}>{html.escape(cell)}</td>" for side, cell in zip(sides, row, strict=True))
            for row in rows
        ]
        cells = "".join(f"<tr>{line}</tr>" for line in lines)
        names = "".join(f"<th{side}>{name}</th>" for side, name in zip(sides, head, strict=True))
        return f"<p>{html.escape(self._title())}</p><table><tr>{names}</tr>{cells}</table>"

    def draw(self, groups: Iterable[Group | str] | None = None) -> Figure:
        """Draw the network with one colour per group, or only the given groups in colour; see ``drawing.draw``.

        Raises:
            PlanError: ``groups`` names one that there is not, or the network is too large for a figure.
            MissingExtra: matplotlib is not installed.
        """
        extra("matplotlib", "figures", "graph.draw()")
        from prunelab.drawing.network import draw

        return draw(self, groups)

    def _title(self) -> str:
        units = sum(group.size for group in self.groups)
        number = f"{len(self.groups)} group{'s' if len(self.groups) != 1 else ''}"
        return f"{type(self.model).__name__}: {number}, {units} prunable units"

    def _rows(self) -> list[tuple[str, str, str, str]]:
        def names(group: Group, role: str) -> str:
            found = list(dict.fromkeys(module_of(m.name) for m in group.members if m.role == role))
            return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")

        return [(g.name, str(g.size), names(g, "produces") or "–", names(g, "consumes") or "–") for g in self.groups]


def _traced_again(model: nn.Module, inputs: Any, ignored: tuple[str, ...]) -> DependencyGraph:
    return trace(model, fakes.recall_inputs(inputs), ignore=ignored)


def trace(model: nn.Module, example_inputs: fakes.Inputs, *, ignore: Iterable[str | nn.Module] = ()) -> DependencyGraph:
    """Find the groups of coupled slices of ``model``, without computing anything.

    The model runs once, in eval mode, as a copy on tensors that have a shape and no data; the model itself is not
    touched, and may be of any size and on any device.  Its hooks run only as far as they are part of the function
    (``prunelab.tracing.hooks``).  If that leaves parameters unused, it runs once more in training mode, for auxiliary
    heads.

    Args:
        model: any module that PyTorch can run on fake tensors: no hints are needed.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; only shapes and
            types matter.
        ignore: names of modules or parameters, or modules, that must stay whole; what is coupled to them stays too.

    Returns:
        The dependency graph.

    Raises:
        TraceError: the model's code depends on the data, or an operator cannot run without any; the message names the
            operator and the module.  Or ``ignore`` names something that the model does not have.
        BatchError: ``example_inputs`` is of a type that no model takes.

    >>> graph = trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(1, 4))
    >>> print(graph)
    Sequential: 1 group, 8 prunable units
    group  units  produced by  consumed by
    0      8      0            2
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace takes a torch.nn.Module, not {type(model).__name__}.")
    with uncollected, without_data():  # tens of thousands of objects, all of which are needed to the end
        return with_or_without(partial(_trace, model, example_inputs, ignore))


def _trace(model: nn.Module, example_inputs: fakes.Inputs, ignore: Iterable[str | nn.Module]) -> DependencyGraph:
    named = covered(model, ignore, error=TraceError)
    reasons = {key: f"`{name}` is ignored, as asked" for key, name in named.items()}
    hooks.warn_of_global_hooks()
    mode = fakes.fake_mode()
    copy = fakes.fake_model(model, mode)
    args, kwargs = fakes.fake_inputs(example_inputs, mode, copy)
    recorder = Recorder(copy, apply_rule, Shortcut(mode), depends_on_size)
    sparse = next((name for name in recorder.parameters if name.endswith(".mask") and "parametriz" in name), None)
    if sparse is not None:
        module = sparse.partition(".parametrizations.")[0]
        raise TraceError(f"`{module}` has a mask on its weights: write the zeros into them first, with pl.bake(model).")
    for tensor in tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor):
            recorder.know(tensor, [Dim(leaf(size, "the model's input")) for size in tensor.shape])
    out = _run(copy.eval(), args, kwargs, mode, recorder)
    results = result_tensors(out)
    if not results:
        raise TraceError(f"{type(model).__name__} returned no tensor but {type(out).__name__}; nothing can be traced.")
    if any(name not in recorder.visited for name in recorder.learned):
        results += _run_in_training(copy, args, kwargs, mode, recorder)
    used = _used(recorder.tape, results)
    if recorder.sized:
        again, other = _run_at_another_size(copy.eval(), (args, kwargs), mode, recorder)
        results += again
        used |= other
    for tensor in results:
        for dim in recorder.dims(tensor):
            freeze(dim.axis, "the model's output")
    for outputs, dims, reason in recorder.conditions:
        for dim in dims if any(id(tensor) in used for tensor in outputs) else []:
            freeze(dim.axis, reason)
    for name, dims in recorder.parameters.items():
        if name not in recorder.visited:
            for dim in dims:
                freeze(dim.axis, "no operator used it in this trace")
    freeze_unproduced(recorder)
    graph = DependencyGraph(model, fakes.describe_inputs(example_inputs), recorder, tie(recorder), reasons)
    graph.ignored = tuple(dict.fromkeys(named.values()))
    recorder.forget()
    return graph


def _run(copy: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: Any, recorder: Recorder) -> Any:
    try:
        watched = nullcontext() if recorder.held is not None else observed(recorder)
        with mode, recorder, watched:
            return copy(*args, **kwargs)
    except TraceError:
        raise
    except Exception as error:
        why = failed(copy, error, recorder.failed_in)
        raise TraceError(f"{type(copy).__name__} cannot be traced: {why}") from error


def _used(tape: list[Op], results: list[Tensor]) -> set[int]:
    """Return the ``id`` of every tensor that the results depend on; operators that write in place count as used."""
    used = set(map(id, results))
    for op in reversed(tape):
        made = list(map(id, op.outputs))
        if not used.isdisjoint(made) or _writes(op.func):
            used.update(made)
            used.update(map(id, op.tensors))
    return used


@cache
def _writes(func: Any) -> bool:
    return bool(func._schema.is_mutable)


def _run_at_another_size(
    copy: nn.Module, inputs: tuple[Any, ...], mode: fakes.FakeMode, recorder: Recorder
) -> tuple[list[Tensor], set[int]]:
    """Trace the model onto the same axes at the first other size at which it runs.

    Returns:
        What it returned, and the ``id`` of every tensor that this depends on; nothing if it runs at no other size.
    """

    def make(tensor: Tensor, shape: list[int]) -> Tensor:
        return mode.make(torch.empty(shape, dtype=tensor.dtype, device="meta"), tensor.device)

    flops, length = list(recorder.flops), len(recorder.tape)
    for args, kwargs in others(inputs, make):
        recorder.held, before = [], Snapshot(copy)
        try:
            out = _run(copy, args, kwargs, mode, recorder)
        except TraceError:
            before.restore()  # such as a cache, which the next run would read
            continue
        finally:
            held, recorder.held = recorder.held, None
        if any(torch.Tag.inplace_view in func.tags for func, *_ in held):
            return [], set()  # shapes are not what they were when these were called
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                recorder.know(tensor, [Dim(leaf(size, "the model's input")) for size in tensor.shape])
        recorder.note_held(held)
        results = result_tensors(out)
        used = _used(recorder.tape[length:], results)
        del recorder.tape[length:]
        recorder.flops = flops
        return results, used
    return [], set()


def _run_in_training(
    copy: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: Any, recorder: Recorder
) -> list[Tensor]:
    """Trace what only runs in training onto the same axes and return its outputs; none if it cannot run."""
    flops, length = list(recorder.flops), len(recorder.tape)
    try:
        out = _run(copy.train(), args, kwargs, mode, recorder)
    except TraceError:
        del recorder.tape[length:]
        return []
    finally:
        recorder.flops = flops
    return result_tensors(out)

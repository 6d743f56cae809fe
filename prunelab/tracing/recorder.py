"""The recorder: what a model calls while it runs on tensors without data, and the axes of every tensor on the way.

Flows in: a fake model and a rule for operators.  Flows out: a tape of calls, and facts about axes that rules noted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from prunelab.errors import TraceError
from prunelab.runtime.outputs import tensors_of
from prunelab.tracing.axes import Axis, freeze, is_frozen, leaf, unify
from prunelab.tracing.blame import failed
from prunelab.tracing.blame import first_line as first_line
from prunelab.tracing.integers import Attribute, Expression
from prunelab.tracing.known import Known, asks
from prunelab.tracing.shortcut import Shortcut


class Dim(NamedTuple):
    """One dimension of one tensor: its axis, and the ``(parameter, dimension)`` pairs that it is made from, if any.

    Only tensors computed from parameters alone have origins; they tell which parameter an operator consumes.
    """

    axis: Axis
    origins: frozenset[tuple[str, int]] = frozenset()

    @property
    def size(self) -> int:
        return self.axis.size


Dims = list[Dim]

_STORES = ("_parameters", "_buffers", "_modules")

_OWN_HOOK: Any = "prunelab"
"""Key of the recorder's hooks; those of others are numbered."""

NUMBERS = "it holds numbers, not weights"
"""Why a buffer of integers is frozen."""


@cache
def signature(func: Any) -> tuple[str, dict[str, Any]]:
    """Return an operator's name and its arguments with their defaults, in order."""
    name = func._schema.name.removeprefix("aten::")
    return name, {argument.name: argument.default_value for argument in func._schema.arguments}


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return all tensors among values, lists and tuples of them included."""
    found: list[Tensor] = []
    for value in values:
        kind = type(value)
        if kind is FakeTensor or isinstance(value, Tensor):
            found.append(value)
        elif kind not in _SINGLE and isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


_SINGLE = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}


class Call:
    """One call of an operator: its arguments by name, the axes of its tensors, and where it happened.

    Attributes:
        values: argument name -> what was given, or the default.
        tensors: all tensors among the arguments, lists included.
        outputs: all tensors that it returned.
        where: which operator it is and in which module, for a reason.
        strides: of the first argument before the call, for operators that change them in place.
    """

    def __init__(
        self,
        recorder: Recorder,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        outputs: list[Tensor],
        strides: tuple[int, ...] = (),
        given: list[Tensor] | None = None,
    ) -> None:
        self.recorder, self.func, self.out, self.outputs, self.strides = recorder, func, out, outputs, strides
        self.name, defaults = signature(func)
        self.values: dict[str, Any] = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
        self.tensors = tensors_in(self.values.values()) if kwargs or given is None else given
        self.where = f"`{self.name}` in `{recorder.module or type(recorder.model).__name__}`"

    @property
    def owner(self) -> nn.Module:
        """The module whose ``forward`` runs, as a copy without data."""
        return self.recorder.model.get_submodule(self.recorder.module)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def dims(self, value: Any) -> Dims:
        """Return the dimensions of an argument, given by its name or as a tensor."""
        return self.recorder.dims(self.values[value] if isinstance(value, str) else value)

    def unify(self, first: Dim, second: Dim) -> None:
        unify(first.axis, second.axis, self)

    def freeze(self, dims: Iterable[Dim], why: str = "") -> None:
        for dim in dims:
            if not is_frozen(dim.axis):
                freeze(dim.axis, f"{self.where}{why and ' ' + why}")

    def freeze_if_used(self, dims: Iterable[Dim], why: str) -> None:
        """Freeze the dimensions once it is known that the model's output depends on what this call returns."""
        self.recorder.conditions.append((self.outputs, list(dims), f"{self.where} {why}"))

    def fresh(self, size: int, why: str = "makes it") -> Dim:
        return Dim(leaf(size, f"{self.where} {why}"))

    def mark(self, dim: Dim, role: str, within: Axis | None = None) -> None:
        for origin in dim.origins:
            self.recorder.marks.append((origin, role, within))

    def contract(self, *dims: Dim) -> None:
        """Say that entries of these dimensions are added up: here their units are consumed."""
        self.recorder.contracted += [dim.axis for dim in dims]

    def count(self, constant: int, *dims: Dim) -> None:
        """Add a term ``constant × sizes of dims`` to the model's FLOPs."""
        self.recorder.flops.append((constant, tuple(dim.axis for dim in dims)))


class Op(NamedTuple):
    """One call of an operator: what was called, where, and the fake tensors that went in and came out.

    ``training`` marks those of the second run, in training mode, for what only exists there.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    module: str
    training: bool
    tensors: list[Tensor]
    """All tensors among the arguments, lists included."""

    @property
    def place(self) -> str:
        """Where it was called, for a message."""
        return f"`{self.module}`" if self.module else "the model's own forward"

    @property
    def name(self) -> str:
        return signature(self.func)[0]


class Integer(NamedTuple):
    """An attribute whose value is a sum of products of axes' sizes: ``terms`` are ``(coefficient, axes)``."""

    attribute: Attribute
    terms: tuple[tuple[int, tuple[Axis, ...]], ...]

    def value(self, size: Callable[[Axis], int]) -> int:
        """Return what it is for given sizes of axes."""
        return sum(number * prod(size(axis) for axis in axes) for number, axes in self.terms)


class Recorder(TorchDispatchMode):
    """Lets a model run on fake tensors and keeps, for every tensor, the axes of its dimensions.

    Args:
        model: a copy on fake tensors; gets hooks that tell which module runs.
        rule: gives the dimensions of every output of a call.
        shortcut: answers in PyTorch's place what a call returns, where it knows that.
        sizes_matter: tells of a call whether its sizes may hold for the example alone.

    Attributes:
        tape: every operator call, in order.
        parameters: name -> dimensions of every parameter and buffer.
        learned: names of the parameters alone.
        visited: name -> order of first use.
        marks: ``((parameter, dim), role, axis)``: what an operator uses a dimension of a parameter for.
        sizes: ``(module, attribute, axis)``: integers that PyTorch's own layers keep.
        ties: axes that the model's code takes to be of equal size.
        described: ``(expression, axis)``: sizes that the model's code computes from attributes.
        values: attribute -> the integer that it is.
        integers: attributes whose value follows a cut.
        conditions: ``(outputs, dims, reason)``: dimensions to freeze if the outputs matter.
        held: if a list, calls are put there and state no equation yet.
        modules: name and module, of the fake copy.
        sized: some call gave a size that may hold for the example alone.
        function: name of PyTorch's function that the model's code called last, as long as it runs; empty if unknown.
        contracted: axes over which some operator adds entries up.
        made: ``(axis, where)``: sizes of tensors that code makes of one number; free if a weight has that width too.
        weight_norms: ``(v, g, dim)``: parameters whose weight is ``g · v / ‖v‖``, with a norm per entry of ``dim``.
        flops: ``(constant, axes)``: each operator's FLOPs are the constant times the sizes of the axes.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Callable[[Call], list[Dims]],
        shortcut: Shortcut,
        sizes_matter: Callable[[Call], bool] = lambda call: False,
    ) -> None:
        super().__init__()
        self.model, self.rule, self.shortcut, self.sizes_matter = model, rule, shortcut, sizes_matter
        self.tape: list[Op] = []
        self.marks: list[tuple[tuple[str, int], str, Axis | None]] = []
        self.sizes: list[tuple[str, str, Axis]] = []
        self.ties: list[list[Axis]] = []
        self.described: list[tuple[Expression, Axis]] = []
        self.values: dict[Attribute, int] = {}
        self.integers: list[Integer] = []
        self.conditions: list[tuple[list[Tensor], Dims, str]] = []
        self.contracted: list[Axis] = []
        self.made: list[tuple[Axis, str]] = []
        self.weight_norms: list[tuple[str, str, int]] = []
        self.flops: list[tuple[int, tuple[Axis, ...]]] = []
        self.visited: dict[str, int] = {}
        self.held: list[tuple[Any, ...]] | None = None
        self.sized = False
        self.function = ""
        self._dims: dict[int, Dims] = {}
        self._keep: list[Tensor] = []
        self._known = Known(shortcut.mode)
        self._looked_at: list[tuple[Tensor, str]] = []
        self.stack: list[str] = []
        self._failed_in: list[str] = []
        self.parameters: dict[str, Dims] = {}
        self.learned: list[str] = []
        self._names: dict[int, str] = {}
        self.modules = list(model.named_modules())
        for name, tensor in _tensors_of(self.modules):
            why = None if tensor.is_floating_point() or tensor.is_complex() else NUMBERS
            self.parameters[name] = [Dim(leaf(n, why), frozenset([(name, d)])) for d, n in enumerate(tensor.shape)]
            self._names[id(tensor)] = name
            if isinstance(tensor, nn.Parameter):
                self.learned.append(name)
            self.know(tensor, self.parameters[name])
        self._together: dict[str, list[str]] = {}
        for path, cell in self.modules:
            if isinstance(cell, nn.RNNCellBase):
                own = [f"{path}.{key}".lstrip(".") for key in cell._parameters]
                self._together |= dict.fromkeys(own, own)
        self._watch_modules()

    @property
    def module(self) -> str:
        """Qualified name of the module whose ``forward`` runs now."""
        return self.stack[-1] if self.stack else ""

    @property
    def failed_in(self) -> str:
        """Qualified name of the module out of which the last error came."""
        return self._failed_in[0] if self._failed_in else self.module

    def know(self, tensor: Tensor, dims: Dims) -> None:
        """Keep the axes of a tensor (and the tensor, so that its identity stays its own)."""
        self._dims[id(tensor)] = dims
        self._keep.append(tensor)

    def dims(self, tensor: Tensor) -> Dims:
        """Return the axes of a tensor; one that the tracer never saw is a constant of the code."""
        if id(tensor) not in self._dims:
            where = f"a constant in `{self.module or type(self.model).__name__}`"
            held = None if isinstance(tensor, FakeTensor) else held_as(self.model, tensor)
            if held is not None and tensor.is_floating_point():
                where = f"`{held}` is a plain tensor, which no cut changes; register_buffer makes it part of the model"
            self.know(tensor, [Dim(leaf(size, where)) for size in tensor.shape])
        return self._dims[id(tensor)]

    def known(self, tensor: Tensor) -> Dims | None:
        """Return the axes of a tensor, ``None`` for one that the tracer never saw."""
        return self._dims.get(id(tensor))

    def forget(self) -> None:
        """Let go of what only a run needs: the fake copy holds most of a trace's objects."""
        self.shortcut.mode.forget()
        self._known = Known(self.shortcut.mode)
        self.model, self.modules = nn.Module(), []
        self.marks, self.described, self.conditions, self.contracted = [], [], [], []

    def _watch_modules(self) -> None:
        """Follow which module runs, by hooks on the fake copy; they know the stack alone, so that no cycle is made."""
        stack, failed_in = self.stack, self._failed_in

        def enter(*_: Any, name: str) -> None:
            stack.append(name)
            failed_in.clear()

        def leave(*_: Any) -> None:
            name = stack.pop()
            if sys.exc_info()[0] is not None and not failed_in:
                failed_in.append(name)

        for name, module in self.modules:  # as register_forward_hook does; its handles take a twentieth of a trace
            module._forward_pre_hooks[_OWN_HOOK] = partial(enter, name=name)
            module._forward_hooks[_OWN_HOOK] = leave
            module._forward_hooks_always_called[_OWN_HOOK] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # where a tensor lies: nothing is computed
            return args[0].device if type(args[0]) is FakeTensor else func(*args, **kwargs)
        strides = args[0].stride() if func in RESTRIDES else ()
        given = tensors_in([*args, *kwargs.values()] if kwargs else args)
        answered = self._answer(func, args, kwargs, given) if asks(func) else None
        if answered is None:
            out = self._run(func, args, kwargs)
        else:
            args, out = answered
        made: list[Tensor] = [out] if type(out) is FakeTensor else tensors_in([out])
        taken = given if answered is None else None
        self._known.note(func, args, kwargs, given, made)
        if self.held is not None:
            self.held.append((func, args, kwargs, out, made, strides, taken, self.module))
        elif made:
            self._note(func, args, kwargs, out, made, strides, taken)
        return out

    def note_held(self, held: list[tuple[Any, ...]]) -> None:
        """State the equations of calls that were held back."""
        for func, args, kwargs, out, made, strides, given, module in held:
            self.stack.append(module)
            if made:
                self._note(func, args, kwargs, out, made, strides, given)
            self.stack.pop()
        self._freeze_looked_at()

    def _note(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        made: list[Tensor],
        strides: tuple[int, ...],
        given: list[Tensor] | None,
    ) -> None:
        """State the equations of a call that made tensors, and put it on the tape."""
        call = Call(self, func, args, kwargs, out, made, strides, given)
        self.sized = self.sized or self.sizes_matter(call)
        computed = False
        for tensor in call.tensors:
            name = self._names.get(id(tensor))
            if name is None:
                computed = computed or not is_parametric(self.dims(tensor))
            elif name not in self.visited:
                self._visit(name)
        for tensor, dims in zip(call.outputs, self._rule(call), strict=True):
            if id(tensor) not in self._names:
                self.know(tensor, [Dim(dim.axis) for dim in dims] if computed else dims)
        self.tape.append(Op(func, args, kwargs, tuple(made), self.module, self.model.training, call.tensors))

    def _rule(self, call: Call) -> list[Dims]:
        """Return the dimensions of a call's outputs; where the rule fails, nothing that it touches may be cut."""
        try:
            found = self.rule(call)
            if [len(dims) for dims in found] == [tensor.dim() for tensor in call.outputs]:
                return found
            problem = f"it gives {[len(dims) for dims in found]} dimensions"
        except Exception as error:
            problem = f"{type(error).__name__}: {first_line(error)}"
        why = f"prunelab's rule for {call.where} failed ({problem})"
        warnings.warn(f"{why}, so that nothing it touches can be pruned; please report it.", stacklevel=2)
        for tensor in call.tensors:
            for dim in self.dims(tensor):
                freeze(dim.axis, why)
        return [[Dim(leaf(size, why)) for size in tensor.shape] for tensor in call.outputs]

    def _answer(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]
    ) -> tuple[tuple[Any, ...], Any] | None:
        """Return the arguments and the result of an operator that looks at the values of constants.

        What the code learns from them it would not learn from a cut constant, so they stay whole.  That nothing is
        broken holds for the cut network too.
        """
        answered = self._known.answer(func, args, kwargs, given)
        if answered is not None and not (isinstance(answered[1], bool) and self._known.guards(given)):
            why = f"code in `{self.module or type(self.model).__name__}` looks at its values"
            looked = [tensor for tensor in given if self._known.knows(tensor)]
            self._looked_at += [(tensor, why) for tensor in self._known.sources(looked)]
            if self.held is None:
                self._freeze_looked_at()
        return answered

    def _freeze_looked_at(self) -> None:
        for tensor, why in self._looked_at:
            for dim in self.dims(tensor):
                freeze(dim.axis, why)
        self._looked_at = []

    def _visit(self, name: str) -> None:
        """Note that a parameter is used; those of a recurrent cell are used together, in an order of the device's."""
        for each in (*self._together.get(name, ()), name):
            if each in self.parameters:
                self.visited.setdefault(each, len(self.visited))

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operator on tensors without data."""
        key = self.shortcut.describe(func, args, kwargs)
        out = None if key is None else self.shortcut.recall(key, args)
        if out is None:
            try:
                out = func(*args, **kwargs)
            except Exception as error:
                name = func._schema.name.removeprefix("aten::")
                why = failed(self.model, error, self.module, name)
                raise TraceError(f"{type(self.model).__name__} cannot be traced: {why}") from error
            if key is not None:
                self.shortcut.remember(key, func, args, kwargs, out)
        return out


RESTRIDES = (torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_.default)
"""Operators whose meaning depends on how a tensor lies in memory."""


def is_parametric(dims: Dims) -> bool:
    """Tell whether the tensor with these dimensions is computed from parameters and buffers alone."""
    return not dims or any(dim.origins for dim in dims)


def held_as(model: nn.Module, tensor: Tensor) -> str | None:
    """Return the name of the attribute that holds a tensor that is neither a parameter nor a buffer."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _STORES and any(part is tensor for part in tensors_of(value)):
                return f"{path}.{name}" if path else name
    return None


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer once, by its first name."""
    return _tensors_of(list(model.named_modules()))


def _tensors_of(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for store in ("_parameters", "_buffers"):
        for path, module in modules:
            for name, tensor in getattr(module, store).items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{path}.{name}" if path else name, tensor

"""What a model calls on real tensors, with the axes of all that goes in and comes out.

Flows in: a traced model and a forward pass.  Flows out: the axes of every tensor of that pass, as soon as it is made,
for those who change what a call does to some units: silencing and gates.  The axes of the parameters come from the
trace; the rules carry them on through the operators, so code may branch on values and inputs may have other sizes.
Notebook 01_tracing says what removing a unit means.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from types import FrameType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from prunelab.errors import PlanError
from prunelab.tracing.axes import Axis, copies, find, leaf, leaves
from prunelab.tracing.recorder import RESTRIDES, Call, Dim, Dims, is_parametric, named_tensors, tensors_in
from prunelab.tracing.rules import apply_rule

if TYPE_CHECKING:
    from prunelab.tracing.trace import DependencyGraph


class _Ignored(list[Any]):
    """A list that forgets what it is given: what rules note for a trace, and nobody asks for here."""

    def append(self, value: Any) -> None:
        """Do nothing."""

    def __iadd__(self, values: Iterable[Any]) -> _Ignored:  # type: ignore[misc]
        return self


def innermost(modules: Mapping[int, str]) -> str | None:
    """Return the name of the innermost module whose code runs, ``None`` if none does.

    Args:
        modules: ``id`` of a module -> its name.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = modules.get(id(frame.f_locals.get("self"))) if "self" in frame.f_code.co_varnames else None
        if name is not None:
            return name
        frame = frame.f_back
    return None


class RealAxes(TorchDispatchMode):
    """While on, knows the axes of every tensor that the model computes.

    Args:
        model: the traced model, or a copy of it.
        graph: its trace.

    Attributes:
        leaves: the leaf of every group in the trace, by its ``id`` there -> its stand-in here.  What a run says of
            axes stays here and does not reach the trace.
        reduced: axes over which an operator took a mean or a variance, since it was last emptied.
        contracted: axes over which an operator added entries up, since it was last emptied.
        recent: what operators returned, since it was last emptied.
    """

    def __init__(self, model: nn.Module, graph: DependencyGraph) -> None:
        super().__init__()
        self.model, self.graph = model, graph
        self.tape = ()
        self.marks, self.sizes, self.ties, self.conditions = (_Ignored() for _ in range(4))
        self.flops, self.made, self.weight_norms = (_Ignored() for _ in range(3))
        self.reduced: list[Axis] = []
        self.contracted: list[Axis] = []
        self.recent: list[Tensor] = []
        self.parameters: dict[str, Dims] = {}
        self._names: dict[int, str] = {}
        self._dims = WeakIdKeyDictionary()
        self._quiet = False
        self._modules = {id(module): name for name, module in model.named_modules()}
        axes = (dim.axis for dims in graph.dims.values() for dim in dims)
        twin, self.leaves = copies(axes, fixed=[group.axis for group in graph.groups])
        held = list(named_tensors(model))
        self._held = [tensor for _, tensor in held]  # a model may drop a buffer, and its id goes on
        for name, tensor in held:
            self._names[id(tensor)] = name
            self.parameters[name] = [Dim(twin(dim.axis), dim.origins) for dim in graph.dims[name]]
            self.know(tensor, self.parameters[name])

    def fits(self, model: nn.Module) -> bool:
        """Tell whether the model still has the modules, parameters and buffers that it had, for another run."""
        self.recent.clear()
        held = [tensor for _, tensor in named_tensors(model)]
        same = len(held) == len(self._held) and all(a is b for a, b in zip(held, self._held, strict=True))
        return same and self._modules == {id(module): name for name, module in model.named_modules()}

    @property
    def module(self) -> str:
        """Qualified name of the module whose code runs now."""
        return innermost(self._modules) or ""

    def know(self, tensor: Tensor, dims: Dims) -> None:
        """Say what the axes of a tensor are."""
        self._dims[tensor] = dims

    def adopt(self, tensor: Tensor) -> None:
        """Know a tensor that a function returned: one of a class of the user's is another object in the same place."""
        if self._dims.get(tensor) is None:
            same = next((one for one in reversed(self.recent) if _place(one) == _place(tensor)), None)
            if same is not None:
                self.know(tensor, self.dims(same))

    def dims(self, tensor: Tensor) -> Dims:
        """Return the axes of a tensor; one that was never seen is an input or a constant of the code."""
        found: Dims | None = self._dims.get(tensor)
        if found is None:
            found = [Dim(leaf(size, "an input or a constant")) for size in tensor.shape]
            self.know(tensor, found)
        return found

    def axes(self, tensor: Tensor) -> tuple[Axis, ...]:
        """Return the axes of a tensor."""
        return tuple(dim.axis for dim in self.dims(tensor))

    def is_parametric(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is computed from parameters and buffers alone."""
        return is_parametric(self.dims(tensor))

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Leave what is computed inside out: it is not the model that computes."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        strides = args[0].stride() if func in RESTRIDES else ()
        out = func(*args, **kwargs)
        if self._quiet or func.namespace == "prim":
            return out
        call = Call(self, func, args, kwargs, out, tensors_in([out]), strides)  # type: ignore[arg-type]
        if not call.outputs:
            return out
        computed = any(not is_parametric(self.dims(tensor)) for tensor in call.tensors)
        for tensor, dims in zip(call.outputs, apply_rule(call), strict=True):
            if id(tensor) not in self._names:
                self.know(tensor, [Dim(dim.axis) for dim in dims] if computed else dims)
        self.recent += call.outputs
        self.reduced += _averaged(call)
        return out

    def check(self, cut: Iterable[int]) -> None:
        """Check that this run said nothing new of some leaves (by their ``id`` in the trace).

        Raises:
            PlanError: with these inputs the model couples units in another way than it was traced with.
        """
        for key in cut:
            axis = self.leaves[key]
            if find(axis) is not axis or axis.frozen is not None:
                group = next(group.name for group in self.graph.groups if id(group.axis) == key)
                why = axis.frozen or "they are coupled to others"
                raise PlanError(
                    f"{type(self.model).__name__} treats the units of group `{group}` otherwise with these inputs than "
                    f"with those it was traced with: {why}. Trace it with inputs like these, or ignore that group."
                )


def is_quiet() -> bool:
    """Tell whether some ``RealAxes`` leave out what is computed now, such as a call that is made again."""
    return any(mode._quiet for mode in _watching())


@contextmanager
def unwatched() -> Iterator[None]:
    """Leave what is computed inside out of all ``RealAxes``: someone measures the model's tensors."""
    with ExitStack() as stack:
        for mode in _watching():
            stack.enter_context(mode.quiet())
        yield


def _watching() -> list[RealAxes]:
    return [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, RealAxes)]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return where a tensor lies in memory, and how."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _averaged(call: Call) -> list[Axis]:
    """Return the axes over which an operator takes a mean or a variance."""
    if call.name in ("mean", "var", "var_mean", "std", "std_mean"):
        axes = [dim.axis for dim in call.dims(call.tensors[0])]
        chosen = call.get("dim")
        places = [chosen] if isinstance(chosen, int) else chosen or range(len(axes))
        return [axes[place] for place in places] if axes else []
    if call.name in ("native_layer_norm", "_fused_rms_norm"):
        return [dim.axis for dim in call.dims("input")[-len(call["normalized_shape"]) :]]
    if call.name == "native_group_norm":
        return [call.dims("input")[1].axis]
    if "batch_norm" in call.name and call.get("training", call.name == "_batch_norm_with_update"):
        return [dim.axis for dim in call.dims("input")[2:]]
    return []


@cache
def opened(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the body of a function that PyTorch writes in Python, ``None`` for any other function.

    Such a function asks first whether a mode wants to take it over as a whole.  This one does not ask, so that the mode
    sees what it calls: ``with mode: return opened(func)(...)``.
    """
    if not isinstance(func, FunctionType) or not (func.__module__ or "").startswith("torch."):
        return None
    asks = [name for name in func.__code__.co_names if name.startswith("has_torch_function")]
    if not asks:
        return None
    unasked = {**func.__globals__, **{name: lambda *_: False for name in asks}}
    body = FunctionType(func.__code__, unasked, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


_ONE = (
    "relu relu_ leaky_relu leaky_relu_ gelu silu silu_ tanh tanh_ hardswish hardswish_ hardtanh hardtanh_ neg abs "
    "square clone contiguous detach to type float double half mul mul_ __mul__ __rmul__ __imul__ multiply view reshape "
    "flatten unflatten permute transpose t expand expand_as squeeze unsqueeze chunk split unbind dropout layer_norm "
    "rms_norm group_norm __getitem__ __get__"
)
FOLLOWS_ONE = frozenset(_ONE.split())
"""Functions whose result is zero where one of their tensors is."""

ADDS = frozenset(
    ("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__", "__setitem__")
)
_ALL = (
    "cat concat stack linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul __matmul__ "
    "bmm mm addmm einsum sum scaled_dot_product_attention"
)
FOLLOWS_ALL = ADDS | frozenset(_ALL.split())
"""Functions whose result is zero where all their tensors are; with ``ADDS`` a number would show."""


@dataclass(frozen=True)
class Given:
    """A tensor that a function was given.

    Attributes:
        axes: of its dimensions.
        parametric: it is computed from parameters and buffers alone.
        silent: once the parameters of some units are zero, it is zero wherever it holds these units.
    """

    axes: tuple[Axis, ...]
    parametric: bool
    silent: bool

    def holds(self, leaf: Axis) -> list[int]:
        """Return the dimensions that a leaf is part of."""
        return [dim for dim, axis in enumerate(self.axes) if any(leaf is part for part in leaves(axis))]


@dataclass(frozen=True)
class FunctionCall:
    """One call of a function, with the axes of what went in and came out.

    Attributes:
        name: of the function.
        given: the tensors among its arguments, in the order of ``tree_leaves((args, kwargs))``.
        made: the axes of the tensors that it returned.
        averaged: axes over which it takes a mean or a variance.
        contracted: axes over which it adds entries up.
        writes: it changes one of the tensors that it was given.
        view: what it returns are parts of what it was given, in the same memory: no entries meet.
    """

    name: str
    given: tuple[Given, ...]
    made: tuple[tuple[Axis, ...], ...]
    averaged: tuple[Axis, ...]
    contracted: tuple[Axis, ...]
    writes: bool
    view: bool = False

    def consumed(self) -> dict[int, Axis]:
        """Return the leaves, by ``id``, whose entries meet in this call: they are added up, or not in the result."""
        if self.view:  # what a slice leaves out is still there, and code may write to what it took
            return {}
        gone = leaves_of(axis for one in self.given for axis in one.axes)
        for key in leaves_of(axis for axes in self.made for axis in axes):
            gone.pop(key, None)
        return {**gone, **leaves_of(self.contracted), **leaves_of(self.averaged)}


def leaves_of(axes: Iterable[Axis]) -> dict[int, Axis]:
    """Return the leaves of axes by their ``id``."""
    return {id(part): part for axis in axes for part in leaves(axis)}


def tensors_of(tree: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists and dicts."""
    return [part for part in tree_leaves(tree) if isinstance(part, Tensor)]


class Calls(TorchFunctionMode):
    """While on, hands every function that the model calls to ``on_call``; those written in Python are looked into."""

    def __init__(self) -> None:
        super().__init__()
        self._inside: list[Callable[..., Any]] = []

    def on_call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what the function does."""
        return func(*args, **kwargs)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        body = opened(func)
        if body is None or func in self._inside[-1:]:  # ``Tensor.unflatten`` and its like call what has their own name
            return self.on_call(func, args, kwargs or {})
        self._inside.append(func)
        try:
            with self:  # a handler runs without its mode
                return body(*args, **(kwargs or {}))
        finally:
            self._inside.pop()


class WatchedCalls(Calls):
    """While on, hands every call to ``after_call``, with the axes of what went in and came out.

    Args:
        axes: of what the model computes; on for as long as this mode is.
    """

    def __init__(self, axes: RealAxes) -> None:
        super().__init__()
        self.axes = axes
        self._groups = {id(leaf) for leaf in axes.leaves.values()}
        self._silent = WeakIdKeyDictionary()

    def after_call(self, call: FunctionCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Return what the call is to return."""
        raise NotImplementedError

    def on_call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function and describe the call."""
        given = tensors_of((args, kwargs))
        before = [Given(self.axes.axes(one), self.axes.is_parametric(one), self._is_silent(one)) for one in given]
        versions = [_version(one) for one in given]
        self.axes.reduced, self.axes.contracted, self.axes.recent = [], [], []
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "").partition(".")[0]
        made = tensors_of(out) if name != "__setitem__" else [args[0]]
        if not made:
            return out
        for one in made:
            self.axes.adopt(one)
        call = FunctionCall(
            name,
            tuple(before),
            tuple(self.axes.axes(one) for one in made),
            tuple(self.axes.reduced),
            tuple(self.axes.contracted),
            versions != [_version(one) for one in given],
            _are_views(made, given) and not self.axes.contracted and not self.axes.reduced,
        )
        number = any(isinstance(part, (int, float)) and part != 0 for part in _operands(name, args))
        silent = self._follows(call, number)
        out = self.after_call(call, func, args, kwargs, out)
        for one in made if name == "__setitem__" else tensors_of(out):
            self._silent[one] = _version(one) if silent else None
        return out

    def _is_silent(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is zero where parameters made it so; a view whose base was written to is not."""
        if tensor in self._silent:
            return bool(self._silent[tensor] == _version(tensor))
        return isinstance(tensor, nn.Parameter)

    def _follows(self, call: FunctionCall, number: bool) -> bool:
        holding = [one for one in call.given if leaves_of(one.axes).keys() & self._groups]
        if call.name in FOLLOWS_ALL and not (number and call.name in ADDS):
            return all(one.silent for one in holding)
        if call.name not in FOLLOWS_ONE:
            return False
        zero = {key for one in holding if one.silent for key in leaves_of(one.axes)}
        return leaves_of(axis for axes in call.made for axis in axes).keys() & self._groups <= zero


def _operands(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a function adds or writes, if it does one of these."""
    return args[2:] if name == "__setitem__" else args[:2]


def _are_views(made: list[Tensor], given: list[Tensor]) -> bool:
    """Tell whether tensors lie in the memory of others, none of which they are."""
    memory = {one.untyped_storage()._cdata for one in given if one.layout is torch.strided}
    return all(
        one.layout is torch.strided
        and one.untyped_storage()._cdata in memory
        and not any(one is other for other in given)
        for one in made
    )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version

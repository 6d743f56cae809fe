"""The tape as plain data: every operator a model calls on tensors without data, with arguments that refer to results.

Flows in: a model and a description of its inputs, of any batch size.  Flows out: a ``Tape`` that can be compared with
the tape of the same model on other inputs, and replayed (``replay``).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_flatten_with_path, tree_leaves, tree_map

from prunelab.errors import PlanError
from prunelab.runtime.switches import without_data
from prunelab.tracing import fakes
from prunelab.tracing.blame import failed
from prunelab.tracing.known import Known, asks
from prunelab.tracing.recorder import named_tensors, tensors_in

DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
"""In eval mode these call no operator; the tape marks where they are."""


@dataclass(frozen=True)
class Ref:
    """Where a tensor comes from.

    ``("op", row, place)``: a result (place -1: the only one), ``("input", path)``: a leaf of the model's inputs,
    ``("tensor", name)``: a parameter or buffer, ``("data", name)``: its ``.data``, ``("constant", number)``: a tensor
    that the code holds.
    """

    kind: Literal["op", "input", "tensor", "data", "constant"]
    key: Any
    place: int = -1


@dataclass(frozen=True)
class Row:
    """One call: a function, arguments in which tensors are ``Ref``, and what is known of the results.

    Attributes:
        func: an ATen operator, or one of ``DROPOUTS``.
        shapes: place of a result (-1: the only one) -> its shape.
        lies: place -> the storage that it lies in.
        writes: storages that the call writes to.
        strides: of the first tensor among the arguments, before the call.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: dict[int, tuple[int, ...]]
    lies: dict[int, int]
    writes: frozenset[int]
    strides: tuple[int, ...] = ()

    @property
    def marks(self) -> bool:
        """Whether it only marks a function that calls no operator."""
        return self.func in DROPOUTS


@dataclass(frozen=True)
class Tape:
    """All calls of one run.

    Attributes:
        rows: the calls.
        inputs: path of a leaf of the inputs -> its ``torch.Size``, or its value if it is not a tensor.
        types: path -> type of every tensor among them.
        result: what the model returned, flat, with ``Ref`` for tensors; ``spec`` tells how it was nested.
        constants: tensors with data that the code holds apart from parameters and buffers.
        tensors: name -> shape of every parameter and buffer.
        functions: what the model's code called, before PyTorch made operators of it.
    """

    rows: list[Row]
    inputs: dict[tuple[Any, ...], Any]
    types: dict[tuple[Any, ...], torch.dtype]
    result: list[Any]
    spec: TreeSpec
    constants: list[Tensor]
    tensors: dict[str, tuple[int, ...]]
    functions: list[Any]
    keep: list[Tensor] = field(repr=False, default_factory=list)

    def shape(self, ref: Ref) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        if ref.kind == "op":
            return self.rows[ref.key].shapes[ref.place]
        if ref.kind == "input":
            return self.inputs[ref.key]
        return tuple(self.constants[ref.key].shape) if ref.kind == "constant" else self.tensors[ref.key]


def record(model: nn.Module, inputs: Any, dtype: torch.dtype | None = None) -> Tape:
    """Run ``model`` in eval mode on tensors without data and return its tape; the model is not touched.

    Args:
        model: any module.
        inputs: as ``fakes.describe_inputs`` describes them.
        dtype: run in this floating type instead of the model's own.

    Raises:
        PlanError: the model does not run on these inputs, or holds tensors that cannot be told from results.
    """
    mode = fakes.fake_mode()
    copy = fakes.fake_model(model, mode).eval()
    args, kwargs = fakes.fake_inputs(fakes.recall_inputs(inputs), mode, copy)
    if dtype is not None:
        with mode:
            args, kwargs = _retyped(copy, (args, kwargs), dtype)
    recording = _Recording(copy, tree_flatten_with_path((args, kwargs))[0], Known(mode))
    out = _run(copy, args, kwargs, mode, recording)
    result, spec = tree_flatten(out)
    for value in result:
        if not isinstance(value, (Tensor, int, float, str, bool, type(None))):
            raise PlanError(
                f"{type(model).__name__} returns a {type(value).__name__}, which cannot be rebuilt from operators: "
                "return tensors in a tuple, list or dict, or register the class with torch.utils._pytree."
            )
    return Tape(
        recording.rows,
        {path: v.shape if isinstance(v, Tensor) else v for path, v in recording.inputs.items()},
        {path: v.dtype for path, v in recording.inputs.items() if isinstance(v, Tensor)},
        [recording.encode(value) for value in result],
        spec,
        recording.constants,
        {name: tuple(tensor.shape) for name, tensor in named_tensors(copy)},
        recording.functions,
        recording.keep,
    )


def _run(copy: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: Any, recording: _Recording) -> Any:
    try:
        with without_data(), mode, recording, _Functions(recording):
            return copy(*args, **kwargs)
    except PlanError as error:
        raise PlanError(f"{type(copy).__name__} cannot be rebuilt from its operators: {error}.") from error
    except Exception as error:
        why = failed(copy, error, "")
        raise PlanError(f"{type(copy).__name__} cannot be rebuilt from its operators: {why}") from error


def _retyped(copy: nn.Module, inputs: Any, dtype: torch.dtype) -> Any:
    """Give a fake model, in place, and its inputs another floating type."""
    made: dict[int, Tensor] = {}

    def retyped(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return made.setdefault(id(value), value.detach().to(dtype))

    for module in copy.modules():
        for store in (module._parameters, module._buffers):
            store.update({name: retyped(value) for name, value in store.items()})
    return tree_map(retyped, inputs)


class _Recording(TorchDispatchMode):
    """Writes down every call; tensors are known by their identity, so all of them are kept."""

    def __init__(self, model: nn.Module, inputs: list[tuple[tuple[Any, ...], Any]], known: Known) -> None:
        super().__init__()
        self.model, self.known = model, known
        self.rows: list[Row] = []
        self.constants: list[Tensor] = []
        self.inputs: dict[tuple[Any, ...], Any] = dict(inputs)
        self.keep: list[Tensor] = []
        self.functions: list[Any] = []
        self.paused = False
        self._refs: dict[int, Ref] = {}
        self._own = {_place(tensor): name for name, tensor in reversed(list(named_tensors(model)))}
        for name, tensor in named_tensors(model):
            self._know(tensor, Ref("tensor", name))
        for path, value in inputs:
            if isinstance(value, Tensor):
                self._know(value, Ref("input", path))

    def _know(self, tensor: Tensor, ref: Ref) -> None:
        self._refs[id(tensor)] = ref
        self.keep.append(tensor)

    def encode(self, value: Any) -> Any:
        """Return a tensor's ``Ref``, and anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._refs:
            if not isinstance(value, FakeTensor):
                self._know(value, Ref("constant", len(self.constants)))
                self.constants.append(value)
            elif _place(value) in self._own:  # ``parameter.data`` is another tensor in the same place
                self._know(value, Ref("data", self._own[_place(value)]))
            else:
                raise PlanError(f"no operator that PyTorch shows makes its tensor of shape {tuple(value.shape)}")
        return self._refs[id(value)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        strides = args[0].stride() if args and isinstance(args[0], Tensor) else ()
        given = tensors_in([*args, *kwargs.values()])
        answered = self.known.answer(func, args, kwargs, given) if asks(func) else None
        if answered is not None and not isinstance(answered[1], Tensor):
            self.refuse_weights(given)
        try:
            out = func(*args, **kwargs) if answered is None else answered[1]
        except Exception as error:
            why = failed(self.model, error, "", func._schema.name.removeprefix("aten::"))
            raise PlanError(why.rstrip(".")) from error
        self.known.note(func, args, kwargs, given, tensors_in([out]))
        if not self.paused:
            self.write(func, args, kwargs, out, strides)
        return out

    def refuse_weights(self, looked: list[Tensor]) -> None:
        """Refuse code that looks at a weight: in a graph its value would never change again."""
        for tensor in self.known.sources(looked):
            ref = self._refs.get(id(tensor))
            if ref is not None and ref.kind == "tensor" and tensor.is_floating_point():
                raise PlanError(f"its code looks at the value of `{ref.key}`, which a graph would keep for ever")

    def write(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, strides: tuple[int, ...] = ()
    ) -> None:
        """Add a row, if the call returned tensors."""
        results = (
            {-1: out} if isinstance(out, Tensor) else dict(enumerate(out)) if isinstance(out, (list, tuple)) else {}
        )
        results = {place: value for place, value in results.items() if isinstance(value, Tensor)}
        writes = _written(func, args, kwargs)
        if not results:
            if writes:
                raise PlanError(f"`{func}` writes to a tensor and returns none, which cannot be replayed")
            return
        args, kwargs = tree_map(self.encode, (args, kwargs))
        for place, tensor in results.items():
            self._know(tensor, Ref("op", len(self.rows), place))
        shapes = {place: tuple(tensor.shape) for place, tensor in results.items()}
        lies = {place: _storage(tensor) for place, tensor in results.items()}
        self.rows.append(Row(func, args, kwargs, shapes, lies, writes, strides))


class _Functions(TorchFunctionMode):
    """Lists what code calls, and marks dropout: in eval mode it hands its input on and calls no operator."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.recording.functions.append(func)
        if func not in DROPOUTS or not isinstance(out, Tensor):
            return out
        given = inspect.signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        if given.arguments["training"] or not given.arguments["p"]:
            return out
        self.recording.paused = True
        same = torch.ops.aten.alias.default(out)
        self.recording.paused = False
        self.recording.write(func, (out, given.arguments["p"]), {}, same)
        return same


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[int]:
    """Return the storages that a call writes to."""
    if not isinstance(func, torch._ops.OpOverload) or not func._schema.is_mutable:
        return frozenset()
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    found = tree_leaves([named.get(name) for name in written])
    return frozenset(_storage(tensor) for tensor in found if isinstance(tensor, Tensor))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return _storage(tensor), tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())

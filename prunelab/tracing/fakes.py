"""Stand-ins without data: a fake copy of a model and fake inputs, so that a model of any size is traced for nothing.

Flows in: a model and example inputs.  Flows out: a copy whose tensors know their shape and nothing else; the user's
model is not touched.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from prunelab.distributed import refuse_wrapped
from prunelab.errors import BatchError, TraceError
from prunelab.runtime.isolation import held, kept_tensors, modes_kept, uncopied
from prunelab.runtime.switches import undisturbed
from prunelab.tracing import hooks

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


class FakeMode(FakeTensorMode):
    """The mode in which fake tensors live; a real tensor that meets them becomes a fake one."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._attributes: dict[torch.device, dict[str, Any]] = {}
        self._data: dict[int, tuple[FakeTensor, Tensor]] = {}

    def make(self, like: Tensor, device: torch.device) -> FakeTensor:
        """Return ``FakeTensor(self, like, device)`` without its checks, which take most of the time.

        Args:
            like: a tensor on the meta device.
            device: where the fake says that it is.
        """
        if device not in self._attributes:
            self._attributes[device] = vars(FakeTensor(self, like, device))
        made = Tensor._make_subclass(FakeTensor, like, False, dispatch_device=True, device_for_backend_keys=device)
        torch._C._set_throw_on_mutable_data_ptr(made)
        made.__dict__.update(self._attributes[device])
        return made

    def remember(self, fake: Tensor, source: Tensor) -> None:
        """Keep the data of a tensor that no cut changes: one of integers or truth values, or a single number."""
        if source.is_floating_point() and source.numel() != 1:
            return
        data = data_of(source)
        if data is not None and isinstance(fake, FakeTensor):
            self._data[id(fake)] = (fake, data)

    def data_of(self, fake: Tensor) -> Tensor | None:
        """Return the data that are remembered for one of this mode's tensors."""
        return self._data[id(fake)][1] if id(fake) in self._data else None

    def forget(self) -> None:
        """Let go of all data; the fakes that they belong to know this mode, so that a cycle would keep them."""
        self._data.clear()


def data_of(tensor: Tensor) -> Tensor | None:
    """Return a tensor with data, or what the mode of a fake one remembers of them; ``None`` if nothing is known."""
    if isinstance(tensor, FakeTensor):
        return tensor.fake_mode.data_of(tensor) if isinstance(tensor.fake_mode, FakeMode) else None
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided
    return tensor if plain and tensor.device.type != "meta" else None


def fake_mode() -> FakeMode:
    """Return a mode for fake tensors."""
    return FakeMode()


def fake_tensor(tensor: Tensor, mode: FakeMode, instead: torch.device | None = None) -> Tensor:
    """Return a fake of ``tensor``, on its own device; where that is not a real one, on another, or else on the CPU."""
    device = tensor.device if tensor.device.type != "meta" else instead or torch.device("cpu")
    device = torch.device("cpu") if device.type == "meta" else device
    return mode.make(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"), device)


def select(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return ``tensor.index_select(dim, index)``; of a fake tensor at once, for only the size of the index matters."""
    if not isinstance(tensor, FakeTensor) or not isinstance(tensor.fake_mode, FakeMode):
        return tensor.index_select(dim, index.to(tensor.device))
    shape = [len(index) if place == dim else size for place, size in enumerate(tensor.shape)]
    return tensor.fake_mode.make(torch.empty(shape, dtype=tensor.dtype, device="meta"), tensor.fake_device)


def as_parameter(tensor: Tensor, requires_grad: bool) -> Tensor:
    """Return ``nn.Parameter(tensor, requires_grad)``; a fake tensor passes for one itself, without that detour."""
    if not isinstance(tensor, FakeTensor):
        return nn.Parameter(tensor, requires_grad)
    tensor.requires_grad_(requires_grad)._is_param = True
    return tensor


def fake_parameter(parameter: nn.Parameter, mode: FakeMode) -> Tensor:
    """Return a fake of ``parameter`` that passes for a parameter."""
    return as_parameter(fake_tensor(parameter, mode), parameter.requires_grad)


def fake_model(model: nn.Module, mode: FakeMode) -> nn.Module:
    """Return a copy of ``model`` on fake parameters and buffers; tied parameters stay tied.

    Of the user's hooks it has those that are part of the function, see ``hooks``.

    Raises:
        TraceError: the model cannot be copied, or has parameters that are not initialised yet.
        PruneLabError: it is in a wrapper (``DistributedDataParallel``, ``torch.compile``).
    """
    refuse_wrapped(model)
    with held(model), undisturbed():
        return _fake_model(model, mode)


def _fake_model(model: nn.Module, mode: FakeMode) -> nn.Module:
    memo: dict[int, Any] = {}
    modules = list(model.named_modules())
    _refuse(modules)
    for path, module in modules:
        for name, parameter in module._parameters.items():
            if isinstance(parameter, nn.UninitializedParameter):
                name = f"{path}.{name}" if path else name
                raise TraceError(f"Parameter `{name}` has no shape yet: run the model once on a batch, then trace it.")
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = fake_parameter(parameter, mode)
                mode.remember(memo[id(parameter)], parameter)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = fake_tensor(buffer, mode)
                mode.remember(memo[id(buffer)], buffer)
    for tensor in kept_tensors(module for _, module in modules):
        if isinstance(tensor, FakeTensor):
            memo.setdefault(id(tensor), fake_tensor(tensor, mode))
        elif not tensor.is_leaf:  # which PyTorch does not copy
            memo.setdefault(id(tensor), tensor.detach())
    found = hooks.emptied(modules, memo)
    try:
        copied = _copy(model, [module for _, module in modules], memo)
        copied = forget(copied)
    except Exception as error:
        raise uncopied(model, error) from error
    hooks.fill(found, memo)
    return copied


def _refuse(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse modules that no trace can follow."""
    for name, module in modules:
        where = f"Module `{name}`" if name else f"{type(module).__name__}"
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"{where} is scripted (torch.jit), so its code cannot be traced: "
                "trace and cut the model before it is scripted, then script the cut one."
            )


_IMMUTABLE = {int, float, bool, str, bytes, type(None), type, FunctionType, BuiltinFunctionType}
_IMMUTABLE |= {torch.dtype, torch.device, torch.layout, torch.memory_format}
_HOOKS = frozenset(name for name in vars(nn.Module()) if "_hooks" in name)


def _copy(model: nn.Module, modules: list[nn.Module], memo: dict[int, Any]) -> nn.Module:
    """Do as ``copy.deepcopy(model, memo)`` does, several times faster for modules that leave copying to PyTorch.

    A module has thirty attributes, almost all of them numbers, or empty dictionaries for hooks.
    """
    plain = [module for module in modules if _is_plain(type(module))]
    for module in plain:
        memo[id(module)] = type(module).__new__(type(module))
    for module in reversed(plain):  # what copies itself finds its own modules complete
        state = dict(module.__getstate__())
        for name, value in state.items():
            if type(value) not in _IMMUTABLE:
                empty = name in _HOOKS and not value and id(value) not in memo
                state[name] = type(value)() if empty else _copied(value, memo)
        memo[id(module)].__setstate__(state)
    copy: nn.Module = _copied(model, memo)
    return copy


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _IMMUTABLE or (kind is tuple and all(type(part) in _IMMUTABLE for part in value)):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind is dict or kind is OrderedDict:
        memo[id(value)] = new = kind()
        for key, part in value.items():
            new[_copied(key, memo)] = _copied(part, memo)
        return new
    if kind is set and not value:
        return memo.setdefault(id(value), set())
    return copy.deepcopy(value, memo)


def _is_plain(kind: type[nn.Module]) -> bool:
    """Tell whether modules of a class are copied as PyTorch copies any module."""
    own = ("__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getstate__", "__new__")
    return all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in own)


def _sets_mode(module: nn.Module) -> bool:
    """Tell whether something of a module's own happens when it is set to train."""
    return type(module).train is not nn.Module.train or "train" in vars(module)


def forget(model: nn.Module) -> nn.Module:
    """Make a model drop what it computed from its parameters and kept for later (LeViT's attention biases).

    Such models do so when they are set to train; every module then gets its own mode back.
    """
    if not any(map(_sets_mode, model.modules())):
        return model
    with modes_kept(model):
        model.train()
    return model


def fake_inputs(inputs: Inputs, mode: FakeMode, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments of a call of the model, with fakes for tensors.

    Inputs of which only the shape is known (on the meta device) get the device of the model's first parameter.

    Raises:
        BatchError: ``inputs`` is neither a tensor nor a tuple, list or dict.
    """
    first = next(model.parameters(), None)
    device = None if first is None else first.device

    def fake(value: Any) -> Any:
        return fake_tensor(value, mode, device) if isinstance(value, Tensor) else value

    if isinstance(inputs, Tensor):
        return (fake(inputs),), {}
    if isinstance(inputs, Mapping):
        return (), {name: tree_map(fake, value) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(tree_map(fake, value) for value in inputs), {}
    raise BatchError(f"example_inputs is a {type(inputs).__name__}; give a tensor, a tuple of them, or a dict by name.")


KEPT_VALUES = 4096
"""How many whole numbers of an example input are kept, so that the model can be run on them again."""


def describe_inputs(inputs: Inputs) -> Any:
    """Return example inputs as plain data, from which ``recall_inputs`` makes inputs of the same shapes.

    Of whole numbers (tokens, masks, places) the values are kept too: a model may not run on others.
    """
    if isinstance(inputs, Tensor):
        described: dict[str, Any] = {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
        whole = not (inputs.is_floating_point() or inputs.is_complex())
        if whole and inputs.numel() <= KEPT_VALUES and not inputs.is_meta and not isinstance(inputs, FakeTensor):
            described["values"] = inputs.tolist()
        return described
    if isinstance(inputs, Mapping):
        return {"named": {name: describe_inputs(value) for name, value in inputs.items()}}
    if isinstance(inputs, (tuple, list)):
        return [describe_inputs(value) for value in inputs]
    return {"value": inputs}


def shapes_only(described: Any) -> Any:
    """Return described inputs without the values that were kept, which belong to the user: for a file."""
    if isinstance(described, list):
        return [shapes_only(value) for value in described]
    if isinstance(described, dict) and "named" in described:
        return {"named": {name: shapes_only(value) for name, value in described["named"].items()}}
    if isinstance(described, dict):
        return {key: value for key, value in described.items() if key != "values"}
    return described


def recall_inputs(described: Any) -> Any:
    """Return inputs of the described shapes, without data, on the meta device."""
    return _recalled(described, lambda shape, dtype, values: torch.empty(shape, dtype=dtype, device="meta"))


def example(described: Any, device: torch.device) -> Any:
    """Return inputs of the described shapes with data: the values that were kept, else normal numbers, seeded.

    Whole numbers that were not kept are zero, truth values ``True``.
    """
    generator = torch.Generator().manual_seed(0)

    def made(shape: list[int], dtype: torch.dtype, values: Any) -> Tensor:
        if values is not None:
            kept = torch.tensor(values, dtype=dtype, device=device)
            if list(kept.shape) == shape:
                return kept
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape, generator=generator).to(device, dtype)
        return torch.full(shape, dtype == torch.bool, dtype=dtype, device=device)

    return _recalled(described, made)


def _recalled(described: Any, make: Callable[[list[int], torch.dtype, Any], Tensor]) -> Any:
    if isinstance(described, list):
        return tuple(_recalled(value, make) for value in described)
    if "named" in described:
        return {name: _recalled(value, make) for name, value in described["named"].items()}
    if "shape" in described:
        return make(list(described["shape"]), getattr(torch, described["dtype"]), described.get("values"))
    return described["value"]

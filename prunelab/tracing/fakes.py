"""Stand-ins without data: a fake copy of a model and fake inputs, so that a model of any size is traced for nothing.

Flows in: a model and example inputs.  Flows out: a copy whose tensors know their shape and nothing else; the user's
model is not touched.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from prunelab.distributed import refuse_wrapped
from prunelab.errors import BatchError, TraceError

Inputs = Tensor | tuple | list | Mapping[str, Any]


def fake_mode() -> FakeTensorMode:
    """Return the mode in which fake tensors live; a real tensor that meets them becomes a fake one."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_tensor(tensor: Tensor, mode: FakeTensorMode, instead: torch.device | None = None) -> Tensor:
    """Return a fake of ``tensor``, on its own device; where that is no real one, on another, or else on the CPU."""
    device = tensor.device if tensor.device.type != "meta" else instead or torch.device("cpu")
    device = torch.device("cpu") if device.type == "meta" else device
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(mode, empty, device)


def fake_parameter(parameter: nn.Parameter, mode: FakeTensorMode) -> Tensor:
    """Return a fake of ``parameter`` that passes for a parameter, without the detour of ``nn.Parameter``."""
    fake = fake_tensor(parameter, mode).requires_grad_(parameter.requires_grad)
    fake._is_param = True
    return fake


def fake_model(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Return a copy of ``model`` on fake parameters and buffers; tied parameters stay tied.

    Raises:
        TraceError: the model cannot be copied, or has parameters that are not initialised yet.
        PruneLabError: it is in a wrapper (``DistributedDataParallel``, ``torch.compile``).
    """
    refuse_wrapped(model)
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise TraceError(f"Parameter `{name}` has no shape yet: run the model once on a batch, then trace it.")
        memo[id(parameter)] = fake_parameter(parameter, mode)
    for _, buffer in model.named_buffers():
        memo[id(buffer)] = fake_tensor(buffer, mode)
    for module in model.modules():  # a module has a dozen of these, for hooks, and copying each takes longer than this
        memo |= {
            id(empty): OrderedDict() for empty in vars(module).values() if type(empty) is OrderedDict and not empty
        }
    try:
        return forget(copy.deepcopy(model, memo))
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied, which tracing and surgery need: {error}. "
            "Keep locks, loaders and open files outside the model."
        ) from error


def forget(model: nn.Module) -> nn.Module:
    """Make a model drop what it computed from its parameters and kept for later (LeViT's attention biases).

    Such models do so when they are set to train; every module then gets its own mode back.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, training in modes:
        module.training = training
    return model


def fake_inputs(inputs: Inputs, mode: FakeTensorMode, model: nn.Module) -> tuple[tuple, dict[str, Any]]:
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


def describe_inputs(inputs: Inputs) -> Any:
    """Return example inputs as plain data, from which ``recall_inputs`` makes inputs of the same shapes."""
    if isinstance(inputs, Tensor):
        return {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
    if isinstance(inputs, Mapping):
        return {"named": {name: describe_inputs(value) for name, value in inputs.items()}}
    if isinstance(inputs, (tuple, list)):
        return [describe_inputs(value) for value in inputs]
    return {"value": inputs}


def recall_inputs(described: Any) -> Any:
    """Return inputs of the described shapes, without data, on the meta device."""
    if isinstance(described, list):
        return tuple(recall_inputs(value) for value in described)
    if "named" in described:
        return {name: recall_inputs(value) for name, value in described["named"].items()}
    if "shape" in described:
        return torch.empty(described["shape"], dtype=getattr(torch, described["dtype"]), device="meta")
    return described["value"]

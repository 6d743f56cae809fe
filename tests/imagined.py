"""An imagined Apple GPU: tensors that say they are on ``mps``, and cannot be in double precision, as on a real one.

What they hold is on the CPU, so everything can be computed; a class of tensors notices what a real device would refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

MPS = torch.device("mps")
DOUBLE = (torch.float64, torch.complex128)


class OnMPS(Tensor):
    """A tensor on the imagined device."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return MPS
        if func == Tensor.is_mps.__get__:  # type: ignore[attr-defined]
            return True
        if func is Tensor.__deepcopy__:
            return _copied(*args)
        if func is Tensor.cpu:
            return plain(args[0])
        if func is Tensor.to:
            return _moved(args, kwargs)
        if name in ("copy_", "item", "tolist", "as_subclass", "__setitem__"):
            return super().__torch_function__(func, types, args, kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "mps":
            kwargs["device"] = torch.device("cpu")
        others = [leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) in (Tensor, nn.Parameter) and leaf.dim()]
        if any(leaf.dtype in DOUBLE for leaf in others):
            raise RuntimeError(f"Expected all tensors to be on the same device, but `{name}` found mps and cpu.")
        out = super().__torch_function__(func, types, args, kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, OnMPS) and leaf.dtype in DOUBLE:
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype, as `{name}` would.")
        return out


class ImaginedMPS(TorchFunctionMode):
    """Lets code make tensors on the imagined device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        place = kwargs.get("device")
        if func is not Tensor.to and place is not None and torch.device(place).type == "mps":
            made = func(*args, **{**kwargs, "device": "cpu"})
            if made.dtype in DOUBLE:
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype, as `{func.__name__}` would.")
            return made.as_subclass(OnMPS)
        if func is Tensor.to and type(args[0]) is not OnMPS:
            return _moved(tuple(args), kwargs)
        return func(*args, **kwargs)


def _moved(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Return what ``tensor.to`` returns."""
    tensor, *rest = args
    asked = [*rest, *kwargs.values()]
    like = next((value for value in asked if isinstance(value, Tensor)), None)
    device = next((torch.device(value) for value in asked if isinstance(value, (str, torch.device))), None)
    device = tensor.device if device is None and like is None else device if like is None else like.device
    cpu = torch.device("cpu")
    args, kwargs = tree_map(
        lambda value: plain(value) if isinstance(value, Tensor) else cpu if isinstance(value, torch.device) else value,
        (tuple(cpu if isinstance(value, str) else value for value in args), kwargs),
    )
    with torch._C.DisableTorchFunction():
        made = Tensor.to(*args, **kwargs)
        if device.type != "mps":
            return made
        if made.dtype in DOUBLE:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype.")
        return made.as_subclass(OnMPS)


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo:
        copied = plain(tensor.detach()).clone().as_subclass(OnMPS)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
    return memo[id(tensor)]


def plain(tensor: Tensor) -> Tensor:
    """Return what a tensor holds, on the CPU."""
    with torch._C.DisableTorchFunction():
        return tensor.as_subclass(Tensor)


def moved(model: nn.Module) -> nn.Module:
    """Put a model's parameters and buffers on the imagined device, in place."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = nn.Parameter(parameter.detach().as_subclass(OnMPS), parameter.requires_grad)
                module._parameters[name] = memo.setdefault(id(parameter), made)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = memo.setdefault(id(buffer), buffer.as_subclass(OnMPS))
    return model

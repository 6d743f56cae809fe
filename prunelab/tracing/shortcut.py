"""What an operator returns for tensors of given shapes, remembered: PyTorch takes ten times longer to find out.

Flows in: an operator with its arguments, fake tensors among them.  Flows out: fake tensors as before, or ``None`` where
PyTorch must be asked.  Only shapes, strides, types and devices are kept, of which results without data are a pure
function; whatever else may play a role (constants that PyTorch follows, other tensor classes, generators, a tensor that
changes its shape in place) is left to PyTorch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from prunelab.tracing.fakes import FakeMode

LIMIT = 4096
"""How many calls are remembered, over all traces; a thousand of them take a megabyte or two."""

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.layout, torch.memory_format)
_CHANGES_SHAPE = (torch.Tag.inplace_view, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_FIRST = "its first argument"


class _Unknown(Exception):
    """An argument may decide more than its description tells."""


class _Result(NamedTuple):
    """What describes a fake tensor: one without data of the same shape, strides and type, and a device."""

    like: Tensor
    device: torch.device


_LOCK = threading.Lock()

_REMEMBERED: dict[tuple[Any, ...], Any] = {}
"""Description of a call -> ``_FIRST``, or the ``_Result`` of every output (``None`` where it returns none)."""


class Shortcut:
    """Answers for one fake mode from what is remembered, and remembers more.

    Args:
        mode: the mode in which the tensors live.
    """

    def __init__(self, mode: FakeMode) -> None:
        self.mode = mode

    def describe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """Return what decides the result of a call, ``None`` where that cannot be told.

        With gradients on, PyTorch looks at who shares memory with whom, so nothing is remembered then.
        """
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return None
        try:
            key = [func, torch.get_default_dtype(), *self._parts(args)]
            for name, value in kwargs.items():
                key += [name, *self._parts((value,))]
        except _Unknown:
            return None
        return tuple(key)

    def _parts(self, values: Iterable[Any]) -> list[Any]:
        parts: list[Any] = []
        for value in values:
            kind = type(value)
            if kind is FakeTensor:
                dtype = value.dtype
                if value.constant is not None or value.fake_mode is not self.mode or not _is_ordinary(value, dtype):
                    raise _Unknown
                parts += (value.shape, value.stride(), value.storage_offset(), dtype, value.fake_device)
            elif kind is list or kind is tuple:
                parts += (kind, len(value), *self._parts(value))
            elif kind in _PLAIN or (kind is torch.device and value.type == "cpu"):
                parts += (kind, value)  # 1 and 1.0 and True are equal, yet make tensors of different types
            else:
                raise _Unknown
        return parts

    def recall(self, key: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        """Return what a call with this description returns, ``None`` where that is not known."""
        known = _REMEMBERED.get(key)
        if known is None or known is _FIRST:
            return known and args[0]
        if type(known) is _Result:
            return self.mode.make(*known)
        kind, results = known
        return kind([result and self.mode.make(*result) for result in results])

    def remember(
        self, key: tuple[Any, ...], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        """Keep what a call returned, if it is fake tensors made by it, or its first argument written to."""
        if any(tag in func.tags for tag in _CHANGES_SHAPE) or self.describe(func, args, kwargs) != key:
            return
        known: Any = None
        if func._schema.is_mutable and args and out is args[0]:
            known = _FIRST
        elif isinstance(out, Tensor):
            known = _describe_result(out, args)
        elif type(out) in (tuple, list):
            results = [_describe_result(tensor, args) for tensor in out if tensor is not None]
            if results and None not in results:
                rest = iter(results)
                known = (type(out), [None if tensor is None else next(rest) for tensor in out])
        if known is not None:
            with _LOCK:  # so that threads do not pass the limit, or clear what was kept a moment ago
                if len(_REMEMBERED) >= LIMIT:
                    _REMEMBERED.clear()
                _REMEMBERED[key] = known


def _is_ordinary(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether shape, strides and type are all there is to a tensor: not where it is sparse or a lazy conjugate."""
    return _layout(tensor) is torch.strided and not dtype.is_complex


_layout = Tensor.layout.__get__  # type: ignore[attr-defined]
"""Of any tensor; the one that fake tensors have takes as long as everything else here."""


def _describe_result(tensor: Any, args: tuple[Any, ...]) -> _Result | None:
    """Return what makes another such tensor, ``None`` for one that was an argument or holds more than a shape."""
    if type(tensor) is not FakeTensor or tensor.constant is not None or any(tensor is value for value in args):
        return None
    if not _is_ordinary(tensor, tensor.dtype):
        return None
    shape, stride, start = tensor.shape, tensor.stride(), tensor.storage_offset()
    with torch._C._DisableTorchDispatch():
        like = torch.empty_strided(shape, stride, dtype=tensor.dtype, device="meta")
        if start:
            room = start + like.untyped_storage().nbytes() // like.element_size()
            like = torch.empty(room, dtype=tensor.dtype, device="meta").as_strided(shape, stride, start)
    return _Result(like, tensor.fake_device)

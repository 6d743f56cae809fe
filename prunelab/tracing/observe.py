"""Which attribute gave which size: calls of PyTorch are watched while arguments still are the integers of the code.

The dispatcher makes every integer plain, so they are read one floor above, in a function mode.

Flows in: the calls that a model makes.  Flows out: pairs ``(expression, axis)`` in ``recorder.described``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunelab.tracing.axes import Axis, leaf, regroup, split
from prunelab.tracing.integers import Expression, Formula, Notes, Observed, observe, plant, restore
from prunelab.tracing.recorder import Dims, Recorder

T = TypeVar("T")


class _Attempt:
    """One try at a trace: whether integers are watched, and whether it failed while they were."""

    def __init__(self, watch: bool) -> None:
        self.watch, self.failed = watch, False


_ATTEMPT: ContextVar[_Attempt] = ContextVar("attempt")


def with_or_without(run: Callable[[], T]) -> T:
    """Run a trace, and once more with plain integers if it fails with observed ones."""
    for watch in (True, False):
        attempt = _Attempt(watch)
        token = _ATTEMPT.set(attempt)
        try:
            return run()
        except Exception:
            if not attempt.failed:
                raise
        finally:
            _ATTEMPT.reset(token)
    raise AssertionError("a run that is not watched either returns or raises")


@contextmanager
def observed(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Watch which attributes of ``model``, a fake copy, its sizes come from; within ``with_or_without`` only."""
    attempt = _ATTEMPT.get(None)
    if attempt is None or not attempt.watch:
        yield
        return
    notes = Notes(recorder.stack)
    values, before = plant(model, notes)
    recorder.values.update(values)
    try:
        with _uncached(), Observer(recorder, notes):
            yield
    except Exception:
        attempt.failed = True
        raise
    finally:
        restore(before)


@contextmanager
def _uncached() -> Iterator[None]:
    """Hold the cache of einops: it takes an integer of one module for an equal one of another."""
    einops: Any = sys.modules.get("einops.einops")
    cached: Any = getattr(einops, "_reconstruct_from_shape", None)
    if not hasattr(cached, "__wrapped__"):
        yield
        return
    einops._reconstruct_from_shape = cached.__wrapped__
    try:
        yield
    finally:
        einops._reconstruct_from_shape = cached


class Observer(TorchFunctionMode):
    """Notes which expression gave which axis.

    Args:
        recorder: knows the axes of tensors, and keeps what is found.
        notes: of this trace.
    """

    def __init__(self, recorder: Recorder, notes: Notes) -> None:
        super().__init__()
        self.recorder, self.notes = recorder, notes

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self.shape(args[0], out) if getattr(func.__self__, "__name__", "") == "shape" else out
        if name == "size":
            return self.size(args, kwargs, out)
        read = _READERS.get(name)
        if read is not None:
            read(self, args, kwargs, out)
        elif name not in _NUMBERS:
            for given in (args, kwargs.values()):
                for value in given:
                    if _holds(value):
                        self.pin(value, name)
        return out

    def pin(self, value: Any, name: str) -> None:
        """Note that a function of which no more is known takes an integer, so that it must stay."""
        for number in value if isinstance(value, (tuple, list)) else [value]:
            if type(number) is Observed:
                self.describe(number, leaf(int.__add__(number, 0), f"it is an argument of `{name}`"))

    # ── sizes of tensors ──────────────────────────────────────────────────────────────────────────────────────────

    def shape(self, tensor: Tensor, out: torch.Size) -> torch.Size:
        dims = self.recorder.known(tensor)
        if dims is None or len(dims) != len(out):
            return out
        return torch.Size([observe(size, dim.axis, self.notes, False) for size, dim in zip(out, dims, strict=True)])

    def size(self, args: tuple, kwargs: dict, out: Any) -> Any:
        if isinstance(out, torch.Size):
            return self.shape(args[0], out)
        dims = self.recorder.known(args[0])
        place = args[1] if len(args) > 1 else kwargs.get("dim")
        return observe(out, dims[place].axis, self.notes, False) if dims and isinstance(place, int) else out

    # ── what is found ─────────────────────────────────────────────────────────────────────────────────────────────

    def source(self, value: Any) -> Expression | None:
        """Return where a size came from, if attributes play a part."""
        if type(value) is Observed:
            return value.source if value.held and value.notes is self.notes else None
        if type(value) is int and self.notes.plain:
            return self.notes.plain.get((self.notes.module, value))
        return None

    def describe(self, value: Any, axis: Axis) -> None:
        """Note that a size in the code is the size of an axis."""
        source = self.source(value)
        if source is not None and value == axis.size:
            self.recorder.described.append((source, axis))

    def describe_all(self, values: Sequence[Any], dims: Dims) -> None:
        for value, dim in zip(values, dims, strict=False):
            self.describe(value, dim.axis)

    def describe_start(self, value: Any, axis: Axis) -> None:
        """Note that a size in the code is where an axis is cut."""
        source = self.source(value)
        if source is None or not 0 < abs(value) < axis.size:
            return
        at = int.__add__(value, 0) % axis.size
        before, after = split(axis, [at, axis.size - at], "a slice")
        if value > 0:
            self.recorder.described.append((source, before))
        else:
            negated = isinstance(source, Formula) and source.symbol == "-" and source.left == 0
            self.recorder.described.append((source.right if negated else Formula("-", 0, source), after))


# ── functions that take sizes ─────────────────────────────────────────────────────────────────────────────────────

Reader = Callable[[Observer, tuple, dict, Any], None]


def _argument(args: tuple, kwargs: dict, place: int, *names: str, default: Any = None) -> Any:
    if len(args) > place:
        return args[place]
    return next((kwargs[name] for name in names if name in kwargs), default)


def _sizes(args: tuple, kwargs: dict, place: int) -> Sequence[Any]:
    """Return sizes that are given one by one, or as one tuple."""
    first = _argument(args, kwargs, place, "size", "shape", "sizes", "repeats", "dims")
    if isinstance(first, (tuple, list)):
        return first
    return args[place:] if len(args) > place else () if first is None else (first,)


def _whole(start: int) -> Reader:
    """The sizes are those of the result."""

    def read(observer: Observer, args: tuple, kwargs: dict, out: Any) -> None:
        sizes = _sizes(args, kwargs, start)
        if isinstance(out, Tensor) and any(type(size) is int or type(size) is Observed for size in sizes):
            observer.describe_all(sizes, observer.recorder.known(out) or [])

    return read


def _unflatten(observer: Observer, args: tuple, kwargs: dict, out: Any) -> None:
    place, sizes = _argument(args, kwargs, 1, "dim"), _argument(args, kwargs, 2, "sizes", "unflattened_size")
    if isinstance(place, int) and isinstance(sizes, (tuple, list)):
        observer.describe_all(sizes, (observer.recorder.known(out) or [])[place % args[0].dim() :])


def _split(observer: Observer, args: tuple, kwargs: dict, out: Any) -> None:
    sizes = _argument(args, kwargs, 1, "split_size", "split_size_or_sections", "split_sizes")
    place = _argument(args, kwargs, 2, "dim", default=0)
    if isinstance(sizes, int):
        sizes = [sizes] * len(out)
    for size, piece in zip(sizes, out, strict=False):
        dims = observer.recorder.known(piece)
        if dims and dims[place].size == size:
            observer.describe(size, dims[place].axis)


def _narrow(observer: Observer, args: tuple, kwargs: dict, out: Any) -> None:
    place, start = _argument(args, kwargs, 1, "dim"), _argument(args, kwargs, 2, "start")
    dims, whole = observer.recorder.known(out), observer.recorder.known(args[0])
    if dims and whole:
        observer.describe(_argument(args, kwargs, 3, "length"), dims[place].axis)
        if isinstance(start, int):
            observer.describe_start(start, whole[place].axis)


def _slices(observer: Observer, args: tuple, kwargs: dict, out: Any) -> None:
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not any(isinstance(part, slice) and (_holds(part.start) or _holds(part.stop)) for part in index):
        return
    dims = observer.recorder.known(args[0])
    if dims is None or any(isinstance(part, (Tensor, list, bool)) for part in index):
        return
    taken, place = sum(part is not None and part is not Ellipsis for part in index), 0
    for part in index:
        if part is Ellipsis:
            place += len(dims) - taken
            continue
        if isinstance(part, slice) and part.step in (None, 1):
            for edge in (part.start, part.stop):
                if isinstance(edge, int):
                    observer.describe_start(edge, dims[place].axis)
                    observer.describe(edge, dims[place].axis)
        place += part is not None


def _repeat(observer: Observer, args: tuple, kwargs: dict, out: Any) -> None:
    sizes, dims, before = _sizes(args, kwargs, 1), observer.recorder.known(out), observer.recorder.known(args[0])
    if dims and before is not None:
        before = [None] * (len(dims) - len(before)) + [dim.axis for dim in before]  # type: ignore[assignment]
        for times, dim, axis in zip(sizes, dims, before, strict=False):
            _times(observer, times, dim.axis, axis)  # type: ignore[arg-type]


def _repeat_interleave(observer: Observer, args: tuple, kwargs: dict, out: Any) -> None:
    times, place = _argument(args, kwargs, 1, "repeats"), _argument(args, kwargs, 2, "dim")
    dims, before = observer.recorder.known(out), observer.recorder.known(args[0])
    if dims and before and isinstance(place, int):
        _times(observer, times, dims[place].axis, before[place].axis)


def _times(observer: Observer, times: Any, axis: Axis, before: Axis | None) -> None:
    source = observer.source(times)
    if source is not None:
        whole = source if before is None or before.size == 1 else Formula("*", source, before)
        observer.recorder.described.append((whole, axis))


def _norm(observer: Observer, args: tuple, kwargs: dict, out: Any) -> None:
    shape, dims = _argument(args, kwargs, 1, "normalized_shape"), observer.recorder.known(args[0])
    if dims and isinstance(shape, (tuple, list)) and len(shape) <= len(dims):
        observer.describe_all(shape, dims[len(dims) - len(shape) :])


def _groups(place: int) -> Reader:
    """The rule of the operator noted the axis of the groups last."""

    def read(observer: Observer, args: tuple, kwargs: dict, out: Any) -> None:
        groups = _argument(args, kwargs, place, "groups", "num_groups")
        if _holds(groups) and observer.recorder.sizes and groups > 1:
            observer.describe(groups, observer.recorder.sizes[-1][2])

    return read


def _shuffle(observer: Observer, args: tuple, kwargs: dict, out: Any) -> None:
    groups, dims = _argument(args, kwargs, 1, "groups"), observer.recorder.known(args[0])
    if _holds(groups) and dims and dims[1].size % groups == 0:
        plain = int.__add__(groups, 0)
        observer.describe(groups, regroup([dims[1].axis], [plain, dims[1].size // plain], "a channel shuffle")[0])


def _arange(observer: Observer, args: tuple, kwargs: dict, out: Any) -> None:
    dims = observer.recorder.known(out)
    if dims and len(args) == 1:
        observer.describe(args[0], dims[0].axis)


_ARITHMETIC = "add sub mul div truediv floordiv pow mod eq ne lt le gt ge radd rsub rmul rtruediv rpow"
_NUMBERS = frozenset(
    f"{prefix}{name}{suffix}"
    for name in _ARITHMETIC.split()
    for prefix, suffix in (("", ""), ("__", "__"), ("", "_"), ("__i", "__"))
) | {"tensor", "as_tensor", "masked_fill", "masked_fill_", "clamp", "where", "fill_", "full_like"}
"""Functions to which an integer is a number, not a size."""

_READERS: dict[str, Reader] = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to", "new_zeros", "new_ones", "new_empty"), _whole(1)),
    **dict.fromkeys(("zeros", "ones", "empty", "rand", "randn", "full"), _whole(0)),
    "new_full": _whole(1),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "narrow": _narrow,
    "__getitem__": _slices,
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
    **dict.fromkeys((f"conv{n}" for n in ("1d", "2d", "3d")), _groups(6)),
    **dict.fromkeys((f"conv_transpose{n}" for n in ("1d", "2d", "3d")), _groups(6)),
    "group_norm": _groups(1),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), _shuffle),
    "arange": _arange,
}
"""What each function does with the sizes that it is given."""


def _holds(value: Any) -> bool:
    """Tell whether a value is an integer that depends on attributes, or a list with one."""
    kind = type(value)
    if kind is Observed:
        return value.held
    if kind is tuple or kind is list or kind is torch.Size:
        return any(type(part) is Observed and part.held for part in value)
    return False

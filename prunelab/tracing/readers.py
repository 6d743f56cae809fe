"""What PyTorch's functions do with the sizes that they are given: which argument is the size of which axis.

Flows in: a call that was just made, with its result.  Flows out: facts that the observer notes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prunelab.tracing.axes import Axis, regroup
from prunelab.tracing.integers import Formula, Observed, holds

if TYPE_CHECKING:
    from prunelab.tracing.observe import Observer

Reader = Callable[["Observer", tuple[Any, ...], dict[str, Any], Any], None]


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, *names: str, default: Any = None) -> Any:
    if len(args) > place:
        return args[place]
    return next((kwargs[name] for name in names if name in kwargs), default)


def _sizes(args: tuple[Any, ...], kwargs: dict[str, Any], place: int) -> Sequence[Any]:
    """Return sizes that are given one by one, or as one tuple."""
    first = _argument(args, kwargs, place, "size", "shape", "sizes", "repeats", "dims")
    if isinstance(first, (tuple, list)):
        return first
    return args[place:] if len(args) > place else () if first is None else (first,)


def _whole(start: int) -> Reader:
    """The sizes are those of the result."""

    def read(observer: Observer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        sizes = _sizes(args, kwargs, start)
        if isinstance(out, Tensor) and any(type(size) is int or type(size) is Observed for size in sizes):
            observer.describe_all(sizes, observer.recorder.known(out) or [])

    return read


def _unflatten(observer: Observer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    place, sizes = _argument(args, kwargs, 1, "dim"), _argument(args, kwargs, 2, "sizes", "unflattened_size")
    if isinstance(place, int) and isinstance(sizes, (tuple, list)):
        observer.describe_all(sizes, (observer.recorder.known(out) or [])[place % args[0].dim() :])


def _split(observer: Observer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    sizes = _argument(args, kwargs, 1, "split_size", "split_size_or_sections", "split_sizes")
    place = _argument(args, kwargs, 2, "dim", default=0)
    if isinstance(sizes, int):
        sizes = [sizes] * len(out)
    for size, piece in zip(sizes, out, strict=False):
        dims = observer.recorder.known(piece)
        if dims and dims[place].size == size:
            observer.describe(size, dims[place].axis)


def _narrow(observer: Observer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    place, start = _argument(args, kwargs, 1, "dim"), _argument(args, kwargs, 2, "start")
    dims, whole = observer.recorder.known(out), observer.recorder.known(args[0])
    if dims and whole:
        observer.describe(_argument(args, kwargs, 3, "length"), dims[place].axis)
        if isinstance(start, int):
            observer.describe_start(start, whole[place].axis)


def _slices(observer: Observer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not any(isinstance(part, slice) and (holds(part.start) or holds(part.stop)) for part in index):
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


def _repeat(observer: Observer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    sizes, dims, before = _sizes(args, kwargs, 1), observer.recorder.known(out), observer.recorder.known(args[0])
    if dims and before is not None:
        before = [None] * (len(dims) - len(before)) + [dim.axis for dim in before]  # type: ignore[assignment]
        for times, dim, axis in zip(sizes, dims, before, strict=False):
            _times(observer, times, dim.axis, axis)  # type: ignore[arg-type]


def _repeat_interleave(observer: Observer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    times, place = _argument(args, kwargs, 1, "repeats"), _argument(args, kwargs, 2, "dim")
    dims, before = observer.recorder.known(out), observer.recorder.known(args[0])
    if dims and before and isinstance(place, int):
        _times(observer, times, dims[place].axis, before[place].axis)


def _times(observer: Observer, times: Any, axis: Axis, before: Axis | None) -> None:
    source = observer.source(times)
    if source is not None:
        whole = source if before is None or before.size == 1 else Formula("*", source, before)
        observer.recorder.described.append((whole, axis))


def _norm(observer: Observer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    shape, dims = _argument(args, kwargs, 1, "normalized_shape"), observer.recorder.known(args[0])
    if dims and isinstance(shape, (tuple, list)) and len(shape) <= len(dims):
        observer.describe_all(shape, dims[len(dims) - len(shape) :])


def _groups(place: int) -> Reader:
    """The rule of the operator noted the axis of the groups last."""

    def read(observer: Observer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        groups = _argument(args, kwargs, place, "groups", "num_groups")
        if holds(groups) and observer.recorder.sizes and groups > 1:
            observer.describe(groups, observer.recorder.sizes[-1][2])

    return read


def _shuffle(observer: Observer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    groups, dims = _argument(args, kwargs, 1, "groups"), observer.recorder.known(args[0])
    if holds(groups) and dims and dims[1].size % groups == 0:
        plain = int.__add__(groups, 0)
        observer.describe(groups, regroup([dims[1].axis], [plain, dims[1].size // plain], "a channel shuffle")[0])


def _arange(observer: Observer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    dims = observer.recorder.known(out)
    if dims and len(args) == 1:
        observer.describe(args[0], dims[0].axis)


_ARITHMETIC = "add sub mul div truediv floordiv pow mod eq ne lt le gt ge radd rsub rmul rtruediv rpow"
NUMBERS = frozenset(
    f"{prefix}{name}{suffix}"
    for name in _ARITHMETIC.split()
    for prefix, suffix in (("", ""), ("__", "__"), ("", "_"), ("__i", "__"))
) | {"tensor", "as_tensor", "masked_fill", "masked_fill_", "clamp", "where", "fill_", "full_like"}
"""Functions to which an integer is a number, not a size."""

READERS: dict[str, Reader] = {
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

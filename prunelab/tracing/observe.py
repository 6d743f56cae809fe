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
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prunelab.tracing.axes import Axis, leaf, split
from prunelab.tracing.integers import Expression, Formula, Notes, Observed, holds, observe
from prunelab.tracing.planting import plant, restore
from prunelab.tracing.readers import NUMBERS, READERS
from prunelab.tracing.recorder import Dims, Recorder

T = TypeVar("T")

_CARRIERS = {Observed, tuple, list, torch.Size}


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
def observed(recorder: Recorder) -> Iterator[None]:
    """Watch which attributes of the fake copy its sizes come from; within ``with_or_without`` only."""
    attempt = _ATTEMPT.get(None)
    if attempt is None or not attempt.watch:
        yield
        return
    notes = Notes(recorder.stack)
    values, before = plant(recorder.modules, notes)
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

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        self.recorder.function = name
        out = func(*args, **kwargs)
        self.recorder.function = ""
        if name == "__get__":
            return self.shape(args[0], out) if getattr(func.__self__, "__name__", "") == "shape" else out
        if name == "size":
            return self.size(args, kwargs, out)
        read = READERS.get(name)
        if read is not None:
            read(self, args, kwargs, out)
        elif name not in NUMBERS:
            for value in (*args, *kwargs.values()) if kwargs else args:
                if type(value) in _CARRIERS and holds(value):
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

    def size(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
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
            negated = source.right if isinstance(source, Formula) and source[:2] == ("-", 0) else None
            self.recorder.described.append((Formula("-", 0, source) if negated is None else negated, after))

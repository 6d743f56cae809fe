"""Switches: the settings of the whole process that prunelab changes for a while, all in one place.

PyTorch keeps some settings once per process.  Saved and restored by each call, two threads that overlap leave the
value of the one in place of the value that was there before both.  So threads share a switch: the first to need it sets
it, and the last one puts back what there was.

Flows in: nothing.  Flows out: contexts, to be entered with ``with`` from any thread, one in another if need be.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors


class Switch:
    """A setting of the process: set while at least one thread is inside, then put back.

    Args:
        held: makes the context that sets it and puts it back.
    """

    def __init__(self, held: Callable[[], AbstractContextManager[Any]]) -> None:
        self._held, self._lock, self._inside = held, threading.Lock(), 0
        self._stack = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._stack.enter_context(self._held())
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: types.TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._stack.close()


@contextmanager
def _layer_by_layer() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Do as ``sdpa_kernel(SDPBackend.MATH)``, which one thread cannot enter and another leave."""
    flags = torch.backends.cuda
    fused = ("flash_sdp", "mem_efficient_sdp", "cudnn_sdp")
    wanted = dict.fromkeys(fused, False) | {"math_sdp": True}
    before = {name: getattr(flags, f"{name}_enabled")() for name in wanted}
    try:
        for name, value in wanted.items():
            getattr(flags, f"enable_{name}")(value)
        yield
    finally:
        for name, value in before.items():
            getattr(flags, f"enable_{name}")(value)


@contextmanager
def _silent_fakes() -> Iterator[None]:
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def _uncollected() -> Iterator[None]:
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


_RUNS = threading.local()  # how many runs without data this thread is in


class _Elsewhere:
    """A hook for all modules that does nothing in threads which run a model without data."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if getattr(_RUNS, "number", 0) else self.hook(*args, **kwargs)


@contextmanager
def _no_global_hooks() -> Iterator[None]:
    tables: list[dict[int, Any]] = [
        getattr(modules, f"_global_{name}_hooks")
        for name in (
            *("forward_pre", "forward", "backward_pre", "backward"),
            *("buffer_registration", "module_registration", "parameter_registration"),
        )
    ]
    for table in tables:
        table.update({key: _Elsewhere(hook) for key, hook in table.items()})
    try:
        yield
    finally:
        for table in tables:
            table.update({key: hook.hook for key, hook in table.items() if isinstance(hook, _Elsewhere)})


layer_by_layer = Switch(_layer_by_layer)
"""Transformer layers call their own layers, instead of one operator that hides them (attention's fast path)."""

silent_fakes = Switch(_silent_fakes)
"""PyTorch does not log what fails on tensors without data; prunelab raises it, with the module's name."""

no_global_hooks = Switch(_no_global_hooks)
"""Hooks that are registered for all modules do nothing in runs without data."""

uncollected = Switch(_uncollected)
"""The garbage collector waits."""

plain_attention = Switch(_plain_attention)
"""Attention is computed by operators that have second derivatives, instead of a fused one that has not."""

_DUAL = threading.RLock()  # PyTorch has one level of dual numbers for all threads, and refuses a second
_WARNINGS = threading.RLock()  # Python has one list of filters for all threads, and restores all of it


@contextmanager
def dual_numbers() -> Iterator[None]:
    """Hold PyTorch's one level of dual numbers; another thread waits."""
    with _DUAL, forward_ad.dual_level():
        yield


@contextmanager
def ignoring(message: str = "", category: type[Warning] = Warning) -> Iterator[None]:
    """Ignore some warnings; another thread that wants to ignore any waits.

    Args:
        message: how they begin, a regular expression; any by default.
        category: of the warnings.
    """
    with _WARNINGS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, category)
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave the contexts in which prunelab's own tensors would be others than it means them to be.

    In inference mode no tensor can have a gradient, and those without data are not seen.  With a default device
    (``torch.device("cuda")`` as a context, ``torch.set_default_device``) numbers of units would be made there; the
    user's model and loss keep that default.  Whether gradients are on does not change; they are off in inference mode.
    """
    gradients = torch.is_grad_enabled()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(_OnCPU())
        stack.enter_context(torch.set_grad_enabled(gradients))
        yield


class _OnCPU(TorchFunctionMode):
    """Makes tensors on the CPU where prunelab's own code names no device; other code has the default device."""

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _device_constructors() and kwargs.get("device") is None and _asked_by_us():
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


def _asked_by_us() -> bool:
    """Return whether the code that makes a tensor is prunelab's; modes that hand a call on do not count."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__")).startswith("prunelab.")


@contextmanager
def without_data() -> Iterator[None]:
    """Run a model on tensors without data: layer by layer, with no gradients, no global hooks, nothing logged."""
    with undisturbed(), layer_by_layer, silent_fakes, no_global_hooks, torch.no_grad():
        _RUNS.number = getattr(_RUNS, "number", 0) + 1
        try:
            yield
        finally:
            _RUNS.number -= 1

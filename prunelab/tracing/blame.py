"""Whose fault it is when a run on tensors without data fails, in one sentence that says what to do.

Flows in: an error, and where the run was.  Flows out: a message for a ``TraceError`` or ``PlanError``, with the line of
the user's code.
"""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from types import FrameType, TracebackType

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

_OURS = str(Path(__file__).parent.parent)
_RUNS = (str(Path(_OURS, "tracing")), str(Path(_OURS, "surgery", "rebuilt")))
_OTHERS = (str(Path(torch.__file__).parent), *_RUNS)
"""Where code lives that no user wrote."""
_STARTS = (str(Path(_OURS, "tracing", "trace.py")), str(Path(_OURS, "surgery", "rebuilt", "tape.py")))

_APART = (
    "put that code behind a flag that is off while you trace and cut, or trace a part of the model that does without "
    "it. Tests with isnan, isinf and isfinite may stay."
)
_SAYS = (".numpy() is not supported", ".tolist() is not supported", "data pointer of FakeTensor", "data_ptr")
_NAMES = {"_local_scalar_dense": "item"}


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def looks_at_values(error: BaseException) -> bool:
    """Tell whether code failed since it wanted the values of a tensor that has none."""
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        part in text
        for part in (".numpy() is not supported", "data pointer of FakeTensor", ".tolist() is not supported")
    )


def failed(model: torch.nn.Module, error: BaseException, module: str, operator: str | None = None) -> str:
    """Return why a model cannot run on tensors without data.

    Args:
        model: what ran.
        error: what was raised.
        module: qualified name of the module that ran.
        operator: the operator that failed; ``None`` where it was none.
    """
    line = _running_line() if operator else _raising_line(error.__traceback__)
    place = f" ({line})" if line else ""
    if operator is None:
        what = f"the code of `{module}`{place}" if module else f"its forward{place}"
    else:
        what = f"`{_NAMES.get(operator, operator)}` in " + (f"`{module}`{place}" if module else f"its forward{place}")
    if isinstance(error, DynamicOutputShapeException):
        return (
            f"{what} gives a tensor whose shape depends on values, and there are only shapes here. Use torch.where or "
            f"multiply by the mask, or {_APART}"
        )
    if looks_at_values(error):
        return f"{what} needs the values of a tensor, and there are only shapes here. Decide by shapes, or {_APART}"
    if isinstance(error, (UnsupportedOperatorException, NotImplementedError)) and operator:
        return (
            f"PyTorch does not know the shape of what {what} returns. "
            "Tell it with torch.library.register_fake, or trace a part of the model that does without it."
        )
    if operator is None and _is_ours(error.__traceback__):
        return f"prunelab itself failed at {what} with {type(error).__name__}: {first_line(error)}. Please report it."
    name = f"{type(error).__name__}: " if operator is None else ""
    return f"{what} failed: {name}{first_line(error)}. Check that the model runs on the example inputs."


def _running_line() -> str:
    """Return the innermost line of the user's code that runs now, the model's own at most."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if _starts_model(frame):
            return ""
        if not _is_skipped(name):
            return _line(name, frame.f_lineno)
        frame = frame.f_back
    return ""


def _raising_line(trace: TracebackType | None) -> str:
    """Return the innermost line of the user's code that an error went through."""
    found = ""
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if _starts_model(trace.tb_frame):
            found = ""  # up to here it was not the model's code
        found = found if _is_skipped(name) else _line(name, trace.tb_lineno)
        trace = trace.tb_next
    return found


def _starts_model(frame: FrameType) -> bool:
    """Tell whether a frame is the one that calls the model; it is asked for no locals, which would keep it alive."""
    return frame.f_code.co_name == "_run" and frame.f_code.co_filename in _STARTS


def _is_skipped(name: str) -> bool:
    return name.startswith(_OTHERS) or (name.startswith("<") and not linecache.getlines(name))


def _line(name: str, number: int) -> str:
    text = linecache.getline(name, number).strip()
    return f"{Path(name).name}, line {number}" + (f": `{text}`" if text else "")


def _is_ours(trace: TracebackType | None) -> bool:
    """Tell whether an error was raised by code of ours."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(_RUNS)

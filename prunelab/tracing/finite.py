"""Guards against broken data: what ``isnan``, ``isinf`` and ``isfinite`` say where a model computes as it should.

Flows in: calls of operators.  Flows out: the value of such a test, and whether the model's own code writes infinities
into what is tested (as masks of attention do), so that the test does not look for broken data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

TESTS = {"isnan": False, "isinf": False, "isposinf": False, "isneginf": False, "isfinite": True}
"""What each says of finite data; ``isfinite`` and ``x != x`` may also come as ``eq`` and ``ne``."""

_BOUNDED = {f"aten::{name}" for name in ("_softmax", "_safe_softmax", "sigmoid", "tanh", "nan_to_num")}
"""What these return is finite even where they are given infinities."""


class Step(NamedTuple):
    """One call of an operator, with the tensors that it was given and those that it returned."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[Tensor]
    given: list[Tensor]


class Guard(NamedTuple):
    """A test for broken data: what is tested, what the test says of finite data, and whether it finds infinities."""

    tested: Tensor
    value: bool
    infinity: bool


def guard_in(step: Step) -> Guard | None:
    """Return the test for broken data that a call is, if it is one."""
    name, args = step.func._schema.name.removeprefix("aten::"), step.args
    value, infinity = TESTS.get(name), name != "isnan"
    if name in ("eq", "ne") and len(args) == 2:
        if args[0] is args[1]:
            value, infinity = name == "eq", False
        elif isinstance(args[1], float) and math.isinf(args[1]):
            value = name == "ne"
    if value is None or not step.given or not step.given[0].is_floating_point() or not step.made:
        return None
    return Guard(step.given[0], value, infinity)


def writes_infinities(
    tensor: Tensor, made_by: Mapping[int, list[Step]], value_of: Callable[[Tensor], Tensor | None]
) -> bool:
    """Tell whether code puts infinities into a tensor, as numbers or in a constant.

    Args:
        tensor: where to start; what it was made from is followed back.
        made_by: ``id`` of a tensor -> the calls that made it or wrote to it.
        value_of: gives the data of constants.
    """
    seen: set[int] = set()
    waiting = [tensor]
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen or not tensor.is_floating_point():
            continue
        seen.add(id(tensor))
        data = value_of(tensor)
        if data is not None:
            with torch._C._DisableTorchDispatch():
                if bool(data.isinf().any()):
                    return True
            continue
        for step in made_by.get(id(tensor), []):
            numbers = [value for value in tree_leaves((step.args, step.kwargs)) if isinstance(value, float)]
            if any(math.isinf(number) for number in numbers):
                return True
            name = step.func._schema.name
            if "attention" not in name and name not in _BOUNDED:
                waiting += step.given
    return False

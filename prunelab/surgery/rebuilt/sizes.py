"""Which numbers on a tape follow the inputs: the same model recorded at other sizes, and compared with the first.

Flows in: a model, inputs, and its tape.  Flows out: tapes of the same calls at other sizes and in another type, and one
list of rows in which whatever is not the same on all of them is ``Varying``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prunelab.errors import PlanError
from prunelab.surgery.rebuilt.tape import Row, Tape, record
from prunelab.tracing.recorder import named_tensors


@dataclass(frozen=True)
class Varying:
    """An argument that is not the same on all tapes: its value on each."""

    values: tuple[Any, ...]


def alike(tape: Tape, other: Tape, differ: type = int) -> bool:
    """Tell whether two runs made the same calls, with arguments that differ at most in values of one type."""
    if len(tape.rows) != len(other.rows) or tape.result != other.result or tape.spec != other.spec:
        return False
    if len(tape.constants) != len(other.constants) or (differ is int and not _equal(tape.constants, other.constants)):
        return False
    for one, two in zip(tape.rows, other.rows, strict=True):
        first, second = (tree_leaves((row.args, row.kwargs)) for row in (one, two))
        if one.func is not two.func or len(first) != len(second) or one.shapes.keys() != two.shapes.keys():
            return False
        if not all(type(a) is type(b) and (type(a) is differ or a == b) for a, b in zip(first, second, strict=True)):
            return False
    return True


def _equal(constants: list[Tensor], others: list[Tensor]) -> bool:
    """Tell whether tensors that the code holds, or makes of numbers, are the same in both runs."""
    return all(one.shape == two.shape and torch.equal(one, two) for one, two in zip(constants, others, strict=True))


def merged(tapes: list[Tape]) -> list[Row]:
    """Return the rows of the first tape, with ``Varying`` wherever one of the others has another argument."""

    def merge(*values: Any) -> Any:
        return values[0] if all(value == values[0] for value in values) else Varying(values)

    return [
        replace(rows[0], args=args, kwargs=kwargs)
        for rows in zip(*(tape.rows for tape in tapes), strict=True)
        for args, kwargs in [tree_map(merge, *((row.args, row.kwargs) for row in rows))]
    ]


def resized(inputs: Any, change: Callable[[list[int]], list[int]]) -> Any:
    """Return described inputs with every shape changed by a function of the shape."""
    if isinstance(inputs, list):
        return [resized(value, change) for value in inputs]
    if "named" in inputs:
        return {"named": {name: resized(value, change) for name, value in inputs["named"].items()}}
    return inputs | {"shape": change(list(inputs["shape"]))} if "shape" in inputs else inputs


def shapes_of(inputs: Any) -> Iterator[list[int]]:
    """Yield the shape of every tensor among described inputs."""
    if isinstance(inputs, list):
        for value in inputs:
            yield from shapes_of(value)
    elif "named" in inputs:
        yield from shapes_of(list(inputs["named"].values()))
    elif "shape" in inputs:
        yield list(inputs["shape"])


# ── recording at other sizes ──────────────────────────────────────────────────────────────────────────────────────


def choices(model: nn.Module, inputs: Any, base: Tape, fixed: bool) -> Iterator[tuple[list[Tape], int]]:
    """Yield tapes to tell sizes that follow the inputs by, and the least batch: those that free most come first."""

    def larger(start: int, which: int, shape: list[int]) -> list[int]:
        # odd steps, since code pads by parity; height and width grow by other factors, to be told apart
        return shape[:start] + [n * (1 + (d + which) % 2) + 2 * d + 1 for d, n in enumerate(shape)][start:]

    batch = batch_of(inputs)
    types = _recorded(model, base, [inputs], _other_type(model)) or []
    batches = _recorded(model, base, [with_batch(inputs, number) for number in (batch + 1, batch + 4)])
    if batches:
        least = 1 if batch == 1 or _runs_alone(model, inputs, base) else 2
        for start in (2, 1):
            changed = [resized(inputs, partial(larger, start, which)) for which in (0, 1)]
            images = _recorded(model, base, changed) if changed[0] != inputs else None
            if images:
                yield [*batches, *images, *types], least
                break
        yield [*batches, *types], least
    if fixed:
        yield types, 1
        yield [], 1


def batch_of(inputs: Any) -> int:
    """Return the batch size: the first size of the first tensor."""
    first = next(shapes_of(inputs), [])
    return first[0] if first else 0


def with_batch(inputs: Any, number: int) -> Any:
    """Return described inputs with another batch size, in every tensor that starts with it."""
    batch = batch_of(inputs)
    return resized(inputs, lambda shape: [number, *shape[1:]] if shape[:1] == [batch] else shape)


def _runs_alone(model: nn.Module, inputs: Any, base: Tape) -> bool:
    """Tell whether the code does the same for a batch of one, whose operators may differ by how it lies in memory."""
    try:
        return record(model, with_batch(inputs, 1)).functions == base.functions
    except PlanError:
        return False


def _recorded(model: nn.Module, base: Tape, many: list[Any], dtype: torch.dtype | None = None) -> list[Tape] | None:
    """Return the tapes of the model on other inputs or in another type, ``None`` if one of them makes other calls."""
    tapes = []
    for inputs in many:
        try:
            tape = record(model, inputs, dtype)
        except PlanError:
            return None
        if not alike(base, tape, int if dtype is None else torch.dtype):
            return None
        tapes.append(tape)
    return tapes


def _other_type(model: nn.Module) -> torch.dtype:
    own = next((tensor.dtype for _, tensor in named_tensors(model) if tensor.is_floating_point()), torch.float32)
    return torch.float32 if own == torch.float64 else torch.float64

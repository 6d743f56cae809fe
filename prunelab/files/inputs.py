"""Example inputs in a file: what a plan or scores remember of them is checked when it is written and read."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch

from prunelab.errors import DataError

DEEPEST, MOST_INPUTS, MOST_DIMS, LARGEST = 16, 1000, 16, 2**40
"""How deep example inputs are nested, how many tensors they are, of how many dimensions and elements, at most."""


def check_inputs(inputs: Any) -> None:
    """Check what a plan remembers of its example inputs (``fakes.describe_inputs``).

    Raises:
        DataError: it is something else, or of sizes that no model takes.
    """
    for number, leaf in enumerate(_leaves(inputs, 0)):
        if number >= MOST_INPUTS:
            raise DataError(f"a plan has more than {MOST_INPUTS} example inputs")
        if leaf.keys() == {"value"}:
            if leaf["value"] is not None and type(leaf["value"]) not in (bool, int, float, str):
                kind = type(leaf["value"]).__name__
                raise DataError(f"a plan was made with a {kind} among the example inputs, which is not plain data")
            continue
        if leaf.keys() != {"shape", "dtype"} or not _is_shape(leaf["shape"]):
            raise DataError("a plan has example inputs with an invalid shape")
        if not isinstance(leaf["dtype"], str) or not isinstance(getattr(torch, leaf["dtype"], None), torch.dtype):
            raise DataError("a plan has example inputs with an invalid type")


def _is_shape(shape: Any) -> bool:
    sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    return sizes and len(shape) <= MOST_DIMS and prod(shape) <= LARGEST


def _leaves(inputs: Any, depth: int) -> Iterator[dict[str, Any]]:
    if depth > DEEPEST:
        raise DataError(f"a plan has example inputs that are nested more than {DEEPEST} deep")
    if isinstance(inputs, list):
        for part in inputs:
            yield from _leaves(part, depth + 1)
    elif isinstance(inputs, dict) and inputs.keys() == {"named"} and isinstance(inputs["named"], dict):
        for part in inputs["named"].values():
            yield from _leaves(part, depth + 1)
    elif isinstance(inputs, dict):
        yield inputs
    else:
        raise DataError("a plan has example inputs that cannot be read")

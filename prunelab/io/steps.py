"""The steps that made a model, as plain data, and how they are done again on a fresh one.

Flows in: what a pruned model remembers, or what a file says.  Flows out: plain data for the file, or the steps, checked
and carried out.  A step names parameters, units and ranks; nothing in it is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import nn

from prunelab.errors import DataError, PruneLabError
from prunelab.factorization.factorized import Factorized
from prunelab.planning.plan import Plan
from prunelab.sparsity.masks import Sparsified
from prunelab.surgery.apply import PLANS, apply
from prunelab.tracing import fakes

Step = Plan | Factorized | Sparsified

KINDS: dict[Any, Any] = {"factorize": Factorized, "sparsify": Sparsified}
"""What else than a plan may have made a model, by the word that stands in the file."""

DEEPEST, MOST_INPUTS, MOST_DIMS, LARGEST = 16, 1000, 16, 2**40
"""How deep example inputs are nested, how many tensors they are, of how many dimensions and elements, at most."""


def plain(model: nn.Module) -> tuple[dict[str, Any], ...]:
    """Return the steps that made a model, as plain data.

    Raises:
        DataError: the example inputs of a plan are no plain data.
        TypeError: something else is no plain data.
    """
    steps: list[Step] = [
        replace(step, inputs=fakes.shapes_only(step.inputs)) if isinstance(step, Plan) else step
        for step in getattr(model, PLANS, [])
    ]
    for step in steps:
        if isinstance(step, Plan):
            check_inputs(step.inputs)
    return tuple(json.loads(step.to_json()) for step in steps)


def opened(data: dict[str, Any]) -> Step:
    """Return a step from plain data.

    Raises:
        DataError: it is none.
    """
    action = data.get("action")
    kind = KINDS.get(action, Plan) if isinstance(action, str) else Plan
    try:
        step: Step = kind.from_json(json.dumps(data))
    except (PruneLabError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"one of its steps is none: {error}") from error
    if isinstance(step, Plan):
        check_inputs(step.inputs)
    return step


def redo(model: nn.Module, step: Step) -> nn.Module:
    """Carry a step out again, on ``model`` itself where that is possible; weights are to be loaded afterwards.

    Raises:
        PruneLabError: the step does not fit the model.
    """
    if not isinstance(step, Plan):
        return step.redo(model)
    backend = step.budget.get("backend", "module")
    return apply(model, step, inplace=backend == "module", backend=backend, check=False)  # it was, when it was made


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
                raise DataError(f"a plan was made with a {kind} among the example inputs, which is no plain data")
            continue
        if leaf.keys() != {"shape", "dtype"} or not _is_shape(leaf["shape"]):
            raise DataError("a plan has example inputs of no shape that a tensor has")
        if not isinstance(leaf["dtype"], str) or not isinstance(getattr(torch, leaf["dtype"], None), torch.dtype):
            raise DataError("a plan has example inputs of a type that tensors do not have")


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
        raise DataError("a plan has example inputs that are none")

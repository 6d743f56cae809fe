"""The steps that made a model, as plain data, and how they are done again on a fresh one.

Flows in: what a pruned model remembers, or what a file says.  Flows out: plain data for the file, or the steps, checked
and carried out.  A step names parameters, units and ranks; nothing in it is ever run.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from torch import nn

from prunelab.errors import DataError, PruneLabError
from prunelab.factorization.factorized import Factorized
from prunelab.files.inputs import check_inputs
from prunelab.plans import PLANS, Plan
from prunelab.sparsity.masks import Sparsified
from prunelab.surgery.apply import apply
from prunelab.tracing import fakes

Step = Plan | Factorized | Sparsified

KINDS: dict[Any, Any] = {"factorize": Factorized, "sparsify": Sparsified}
"""What else than a plan may have made a model, by the word for it in the file."""


def plain(model: nn.Module) -> tuple[dict[str, Any], ...]:
    """Return the steps that made a model, as plain data.

    Raises:
        DataError: the example inputs of a plan are not plain data.
        TypeError: something else is not plain data.
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
        raise DataError(f"one of its steps is invalid: {error}") from error
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

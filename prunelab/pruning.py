"""All at once: trace, score, plan, cut and fine-tune, once or in steps, with a report of what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import nn

from prunelab import criteria
from prunelab.batches import Batches
from prunelab.compensation.compensate import Compensation
from prunelab.cost import count
from prunelab.criteria import Criterion
from prunelab.distributed import of_rank_0, weights_of_rank_0
from prunelab.errors import BudgetError
from prunelab.planning.choose import plan
from prunelab.planning.plan import Plan
from prunelab.surgery.apply import apply
from prunelab.tracing import fakes
from prunelab.tracing.trace import trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Report:
    """What happened, one row per stage: before, after every cut, after every fine-tuning.

    Attributes:
        rows: ``step``, ``stage``, ``flops`` and ``params`` (numbers), ``flops_kept`` and ``params_kept`` (shares), and
            whatever ``evaluate`` returned.
        plans: the plan of every step.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)

    def table(self) -> pd.DataFrame:
        """Return the rows as a table."""
        return pd.DataFrame(self.rows)

    def to_json(self) -> str:
        """Return rows and plans as JSON."""
        return json.dumps({"rows": self.rows, "plans": [json.loads(plan.to_json()) for plan in self.plans]})

    def plot(self, metric: str = "accuracy") -> Figure:
        """Return a figure of ``metric`` against the share of FLOPs kept.

        Raises:
            BudgetError: ``evaluate`` gave no such metric.
        """
        from prunelab.plots import trajectory

        if not any(metric in row for row in self.rows):
            raise BudgetError(f"The report has no {metric!r}: pass evaluate=, which must return it.")
        return trajectory(self.table(), metric)


def prune(
    model: nn.Module,
    example_inputs: fakes.Inputs,
    criterion: str | Criterion = "magnitude",
    data: Batches | None = None,
    *,
    flops: float | None = None,
    params: float | None = None,
    ratio: float | None = None,
    steps: int = 1,
    compensate: bool | Compensation = False,
    finetune: Callable[[nn.Module], Any] | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    **options: Any,
) -> tuple[nn.Module, Report]:
    """Prune ``model`` to a budget and return the smaller model with a report; ``model`` stays as it is.

    Args:
        model: any module that can be traced.
        example_inputs: a tensor, a tuple or a dict; shapes and types matter.
        criterion: a name, or a criterion with options.
        data: batches for the criterion, ``(inputs, targets)``; it is read once per step, twice with ``compensate``.
            With ``distributed.Sharded`` every process gives its share and calls this; plans, rows of the report and
            weights are then the same in all of them.
        flops: share of the FLOPs that is kept; or
        params: share of the parameters that is kept; or
        ratio: share of the units that is removed.
        steps: cut in so many steps, each by the same factor, scoring anew before each.
        compensate: refit what is left after every cut, on ``data``; ``Compensation(…)`` for its options.
        finetune: called with the model after every cut; trains it in place.
        evaluate: called with the model before, after every cut and after every fine-tuning; returns metrics by name.
        options: of ``plan`` (scope, max_ratio, round_to, ignore, overrides).

    Returns:
        The pruned model, in the mode of the original, and the report.

    Raises:
        BudgetError: a budget or option is out of range, or cannot be met.
        TraceError: the model cannot be traced.
        BatchError: the batches do not fit the model.
    """
    if not isinstance(steps, int) or steps < 1:
        raise BudgetError(f"steps={steps!r} is no positive whole number.")
    chosen = criteria.get(criterion) if isinstance(criterion, str) else criterion
    refit = Compensation() if compensate is True else compensate or None
    if refit is not None and refit.source is None:
        refit = replace(refit, source=data)
    whole = count(model, example_inputs)
    report = Report()

    def record(current: nn.Module, step: int, stage: str) -> None:
        cost = count(current, example_inputs)
        row = {"step": step, "stage": stage, "flops": cost.flops, "params": cost.params}
        row |= {"flops_kept": cost.flops / whole.flops, "params_kept": cost.params / whole.params}
        report.rows.append(of_rank_0(row | dict(evaluate(current) if evaluate else {}), data))

    record(model, 0, "before")
    current = model
    for step in range(1, steps + 1):
        scores = chosen(trace(current, example_inputs), data)
        budget = _step_budget(report.rows[-1], step, steps, flops=flops, params=params, ratio=ratio)
        made = of_rank_0(plan(scores, **{**budget, **options}), data)
        current = weights_of_rank_0(apply(current, made, compensate=refit), data)
        report.plans.append(made)
        record(current, step, "cut")
        if finetune is not None:
            training = current.training
            finetune(current)
            weights_of_rank_0(current.train(training), data)
            record(current, step, "fine-tuned")
    return current, report


def _step_budget(row: Mapping[str, Any], step: int, steps: int, **asked: float | None) -> dict[str, Any]:
    """Return the budget of one step, relative to the model as it is now."""
    if steps == 1 or sum(value is not None for value in asked.values()) != 1:
        return asked
    name, value = next((name, value) for name, value in asked.items() if value is not None)
    if not 0 < value < 1:
        return asked  # plan says what is wrong with it
    if name == "ratio":
        return {"ratio": 1 - (1 - value) ** (1 / steps)}
    return {name: value ** (step / steps) / row[f"{name}_kept"]}

"""The report of a run: numbers for every stage, and the plans.

Flows in: rows and plans, as the run goes.  Flows out: a table, JSON, a figure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

from prunelab.errors import BudgetError, DataError, OptionError, PlanError
from prunelab.options import plain_number, shown
from prunelab.plans import Plan
from prunelab.runtime.extras import extra

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass
class Report:
    """What happened, one row per stage: before, after every cut, after every fine-tuning.

    Attributes:
        rows: ``step``, ``stage``, ``flops`` and ``params`` (numbers), ``flops_kept`` and ``params_kept`` (shares; also
            of bytes or latency where that is the budget), and whatever ``evaluate`` returned.
        plans: the plan of every step, each for the model as it was before that step.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)

    @property
    def steps(self) -> tuple[Report, ...]:
        """One report per step, with its rows and its plan."""
        return tuple(
            Report([row for row in self.rows if row["step"] == step], [plan]) for step, plan in enumerate(self.plans, 1)
        )

    @property
    def plan(self) -> Plan:
        """All steps as one plan for the first model.

        Raises:
            PlanError: nothing was cut yet.
        """
        if not self.plans:
            raise PlanError("The report has no plan: nothing was cut yet.")
        return reduce(lambda first, later: first.merge(later, after=True), self.plans)

    def table(self) -> pd.DataFrame:
        """Return the rows as a table."""
        return extra("pandas", "tables", "Report.table()").DataFrame(self.rows)

    def to_json(self) -> str:
        """Return rows and plans as JSON."""
        return json.dumps({"rows": self.rows, "plans": [json.loads(plan.to_json()) for plan in self.plans]})

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report back.

        Raises:
            DataError: the text is not a report.
        """
        try:
            data = json.loads(text)
            rows = [dict(row) for row in data["rows"]]
            if any(type(row["step"]) is not int or type(row["stage"]) is not str for row in rows):
                raise DataError("a row says neither step nor stage")
            return cls(rows, [Plan.from_json(json.dumps(plan)) for plan in data["plans"]])
        except (ValueError, KeyError, TypeError, PlanError, DataError) as error:
            raise DataError(f"This is not a report of prunelab: {error!r}.") from error

    def plot(self, metric: str = "accuracy") -> Figure:
        """Return a figure of ``metric`` against the share of FLOPs kept.

        Raises:
            BudgetError: ``evaluate`` gave no such metric.
            MissingExtra: matplotlib is not installed.
        """
        extra("matplotlib", "figures", "Report.plot()")
        from prunelab.drawing.curves import trajectory

        if not any(metric in row for row in self.rows):
            raise BudgetError(f"The report has no {metric!r}: pass evaluate=, which must return it.")
        return trajectory(self.table(), metric)


def metrics_of(found: Any) -> dict[str, Any]:
    """Return what ``evaluate`` gave as numbers that JSON knows, by name.

    Raises:
        OptionError: it is neither a number nor metrics by name.
    """
    number = plain_number(found)
    if number is not None:
        return {"score": number}
    if not isinstance(found, Mapping):
        raise OptionError(
            f"`evaluate` must return metrics by name, as in {{'accuracy': 0.9}}, or one number; it returned "
            f"{shown(found)}."
        )
    metrics: dict[str, Any] = {}
    for name, value in found.items():
        number = plain_number(value)
        if number is None and value is not None and not isinstance(value, (bool, str)):
            raise OptionError(f"`evaluate` must return numbers; its metric {name!r} is {shown(value)}.")
        metrics[str(name)] = value if number is None else number
    return metrics

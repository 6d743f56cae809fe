"""Widgets: figures of ``plots`` with a slider, for a notebook with a running kernel.

Flows in: what a notebook has computed already.  Flows out: an ipywidgets box that redraws a figure; nothing is computed
at a slider's move.  The only module that imports ipywidgets, which ``prunelab[notebooks]`` installs.

Figures are shown in an ``Image``, which changes in one piece, and not in an ``Output``: while nbclient (and with it
papermill and nbconvert) executes a cell that writes to an ``Output``, it misses the kernel's reply now and then, and
waits for it until the cell's time is up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import ipywidgets
import pandas as pd

from prunelab.errors import PruneLabError
from prunelab.groups import Group
from prunelab.plan import Plan
from prunelab.plots import budget_view, png

COLUMNS = ("criterion", "budget", "flops_kept", "params_kept", "accuracy")


class BudgetSlider(ipywidgets.VBox):
    """Choose a budget and a criterion; see what stays of every group, what it costs and how accurate it is.

    Attributes:
        budget: the slider.
        criterion: the buttons.
        image: the figure, as PNG.
        caption: what the figure shows, in words; set after the figure was drawn.
    """

    def __init__(
        self, groups: Iterable[Group], plans: Mapping[tuple[str, float], Plan], table: pd.DataFrame, whole: float | None
    ) -> None:
        self._groups, self._plans, self._table, self._whole = list(groups), plans, table, whole
        budgets = sorted(set(table["budget"]))
        self.budget = ipywidgets.SelectionSlider(
            options=[(f"{budget:.0%}", budget) for budget in budgets],
            value=min(budgets, key=lambda budget: abs(budget - 0.5)),
            description="FLOPs kept",
            continuous_update=False,
            layout=ipywidgets.Layout(width="26em"),
        )
        names = list(dict.fromkeys(table["criterion"]))
        self.criterion = ipywidgets.ToggleButtons(options=names, value=names[-1], description="criterion")
        self.image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%", object_fit="contain"))
        self.caption = ipywidgets.HTML()
        for control in (self.budget, self.criterion):
            control.observe(self._show, names="value")
        super().__init__([self.budget, self.criterion, self.image, self.caption])
        self._show()

    def _show(self, change: object = None) -> None:
        criterion, budget = self.criterion.value, self.budget.value
        rows = self._table[(self._table["criterion"] == criterion) & (self._table["budget"] == budget)]
        flops, params, accuracy = (float(rows[name].mean()) for name in ("flops_kept", "params_kept", "accuracy"))
        plan = self._plans[criterion, budget]
        figure = budget_view(plan, self._groups, self._table, whole=self._whole, mark=(flops, accuracy))
        self.image.value = png(figure)
        units = sum(group.size for group in self._groups)
        left = units - sum(len(removed) for removed in plan.removed.values())
        repeats = f" (means of {len(rows)} draws; the bars show the first)" if len(rows) > 1 else ""
        self.caption.value = (
            f"<b>{criterion}</b>, asked for {budget:.0%} of the FLOPs: {left} of {units} units stay, "
            f"with {flops:.1%} of the FLOPs and {params:.1%} of the parameters; "
            f"accuracy without fine-tuning {accuracy:.1%}{repeats}."
        )


def budget_slider(
    groups: Iterable[Group],
    plans: Mapping[tuple[str, float], Plan],
    table: pd.DataFrame,
    *,
    whole: float | None = None,
) -> BudgetSlider:
    """Return a widget that shows plans by budget and criterion, with accuracies that were measured before.

    Args:
        groups: of the graph that the plans were made for.
        plans: one for every criterion and budget in ``table``.
        table: columns ``criterion``, ``budget`` (share of FLOPs asked for), ``flops_kept``, ``params_kept`` and
            ``accuracy`` (shares); several rows for one criterion and budget are averaged.
        whole: accuracy of the network before any cut.

    Raises:
        PruneLabError: a column or a plan is missing.
    """
    missing = [name for name in COLUMNS if name not in table]
    if missing or table.empty:
        what = f"lacks the columns {', '.join(missing)}" if missing else "is empty"
        raise PruneLabError(f"The table for the budget slider {what}; it needs {', '.join(COLUMNS)}.")
    for criterion, budget in table[["criterion", "budget"]].itertuples(index=False):
        if (criterion, budget) not in plans:
            raise PruneLabError(f"The budget slider has no plan for ({criterion!r}, {budget}), which its table names.")
    return BudgetSlider(groups, plans, table, whole)


__all__ = ["BudgetSlider", "budget_slider"]

"""Surgery: cut what a plan says.

Flows in: a model and a ``Plan``.  Flows out: a smaller model: of the same class (``cut``) where that is possible, else
rebuilt from its operators (``rebuilt``); either is compared with ``pl.masked``.
"""

from __future__ import annotations

import warnings
from typing import Literal, get_args

from torch import nn

from prunelab.errors import PlanError
from prunelab.options import flag, one_of
from prunelab.plans import Plan, check_plan
from prunelab.runtime.stack import user_level
from prunelab.runtime.switches import undisturbed
from prunelab.surgery.cut import cut
from prunelab.surgery.rebuilt.rebuild import Replayed, replay
from prunelab.surgery.refit.options import How

Backend = Literal["auto", "module", "graph"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


@undisturbed()
def apply(
    model: nn.Module,
    plan: Plan,
    *,
    inplace: bool = False,
    backend: Backend = "auto",
    compensate: How = None,
    check: bool = True,
) -> nn.Module:
    """Return ``model`` without the units that ``plan`` removes.

    Parameters and buffers are indexed, sizes that layers and the model's own code keep as integers are set, and the
    result is traced again on tensors without data: every operator must give the shape that the plan says.  Then the cut
    network and ``pl.masked`` run once, in eval mode, and must give the same.

    Args:
        model: the model that the plan was made for, in any mode and on any device.
        plan: what goes.
        inplace: cut ``model`` itself instead of a copy.
        backend: ``"module"`` keeps the model's class and cuts it; ``"graph"`` rebuilds the model from the operators it
            calls (``rebuilt``); ``"auto"`` does the first where it is right, else the second, with a warning.
        compensate: batches, statistics or ``Compensation``: what is left is refitted to make up for what goes.
        check: compare the cut network with ``pl.masked`` by value, on an input of the traced shape: two forward passes,
            and a copy of the model.  Without data (on the meta device) that is left out, with a warning.

    Returns:
        The smaller model: of the same class or a ``torch.fx.GraphModule``, in the same mode, on the same device.

    Raises:
        OptionError: an option is not one of those above.
        PlanError: the plan does not fit the model, or the cut model would not compute what the plan says; ``model`` is
            then as it was.
        BatchError: what ``compensate`` was given does not fit the model.

    >>> import torch, prunelab as pl
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> plan = pl.plan(pl.criteria.get("magnitude")(pl.trace(model, torch.ones(1, 4))), ratio=0.5)
    >>> pl.apply(model, plan)
    Sequential(
      (0): Linear(in_features=4, out_features=4, bias=True)
      (1): ReLU()
      (2): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    one_of("backend", backend, BACKENDS)
    flag("inplace", inplace)
    check_plan(plan)
    known = isinstance(model, Replayed) or plan.budget.get("backend") == "graph"  # needs no second attempt
    if backend == "graph" or (backend == "auto" and known and not inplace):
        if inplace:
            raise PlanError("inplace=True is not possible with backend='graph', which makes a new module.")
        return replay(model, plan, compensate, check=check)
    try:
        return cut(model, plan, inplace=inplace, compensate=compensate, check=check)
    except PlanError as error:
        if inplace or backend == "module":
            raise
        try:
            rebuilt = replay(model, plan, compensate, check=check)
        except PlanError as other:
            raise error from other
        reason = str(error).replace(", so nothing was cut", "")
    warnings.warn(
        f"{type(model).__name__} was rebuilt from its operators as a torch.fx.GraphModule, since its own class cannot "
        f"be cut: {reason}",
        stacklevel=user_level(),
    )
    return rebuilt

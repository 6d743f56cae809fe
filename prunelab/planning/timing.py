"""Budgets in latency: nothing but a clock knows what a cut network takes, so candidates are cut and timed.

Flows in: the removal order and a way to cut.  Flows out: how much of it goes, and what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunelab.batches import device_of
from prunelab.cost import latency
from prunelab.errors import BudgetError
from prunelab.options import function, real
from prunelab.planning.fit import TOLERANCE, Gone, Supply
from prunelab.plans import Plan
from prunelab.runtime.switches import ignoring
from prunelab.surgery.apply import apply
from prunelab.tracing import fakes


@dataclass(frozen=True)
class Timing:
    """How a budget in latency is measured.

    The removal order is divided into ``1 / resolution`` parts, and the place where the time is within the budget is
    found by halving: ``measurements`` networks are timed at most, the whole one and the smallest among them.  Apart
    from the clock nothing is left to chance.

    Args:
        seconds: how long each network is timed.
        resolution: distance between neighbouring places, as a share of all units that may go.
        measure: takes a network in eval mode, returns the seconds of one forward pass: another clock, or one on
            another device.  By default the median of ``latency``, on the model's device, with random inputs of the
            shapes it was traced with (zeros where they are whole numbers).
    """

    seconds: float = 0.3
    resolution: float = 1 / 64
    measure: Callable[[nn.Module], float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", real("seconds", self.seconds, above=0))  # the dataclass is frozen
        object.__setattr__(self, "resolution", real("resolution", self.resolution, above=0, most=0.5))
        if self.measure is not None:
            function("measure", self.measure, "measure(model) -> seconds")

    @property
    def places(self) -> int:
        """Number of parts of the removal order."""
        return math.ceil(1 / self.resolution - 1e-9)

    @property
    def measurements(self) -> int:
        """How many networks are timed at most."""
        return 2 + math.ceil(math.log2(self.places))

    def clock(self, model: nn.Module, inputs: Any) -> Callable[[nn.Module], float]:
        """Return what measures: ``measure``, or this machine on inputs as described.

        Raises:
            BudgetError: the model has no data to run with.
        """
        if self.measure is not None:
            return self.measure
        if any(tensor.is_meta for tensor in model.parameters()):
            raise BudgetError(
                f"{type(model).__name__} has no data (it is on the meta device), so its latency cannot be measured: "
                "load its weights, or give Timing(measure=…)."
            )
        batch = fakes.example(inputs, device_of(model))
        return lambda network: latency(network, batch, seconds=self.seconds).median


def fit_latency(
    model: nn.Module,
    inputs: Any,
    supply: Supply,
    plan_for: Callable[[Gone], Plan],
    target: float,
    timing: Timing,
) -> tuple[Gone, dict[str, Any]]:
    """Return what goes so that the measured latency ends at or just below ``target``, and what was measured.

    Args:
        model: the whole model.
        inputs: description of its example inputs.
        supply: what may go, in which order.
        plan_for: the plan that removes so much.
        target: share of the model's latency that may be left.
        timing: how to measure.

    Returns:
        What goes; and, unless the target is the whole, ``seconds`` (of the ``whole`` model and of the ``cut`` one),
        ``kept`` (the latter as a share of the former), ``before`` (the same at the place before, where it is known),
        ``measurements``, ``resolution``.

    Raises:
        BudgetError: the smallest network still takes longer.
    """
    if target >= 1 and not plan_for(supply.settled({})).cuts:
        return supply.settled({}), {}  # nothing goes, so there is nothing to measure
    clock, places, seen = timing.clock(model, inputs), timing.places, {}

    def measured(place: int) -> float:
        plan = plan_for(supply.settled(supply.at(place / places)))
        with ignoring():  # that a model must be rebuilt is said when it is cut for good
            network = apply(model, plan, check=False) if plan.cuts else model  # the chosen one is checked
        seen[place] = clock(network.eval() if plan.cuts else network)
        return seen[place] / seen.get(0, seen[place])

    measured(0)
    least = measured(places)
    if least > target:
        raise BudgetError(
            f"latency={target:.3g} cannot be met: without all that may go the network still takes {least:.3f} of the "
            "time. Raise the budget or max_ratio, or ignore less."
        )
    low, high = 0, places
    while high - low > 1 and not target * (1 - TOLERANCE) <= seen[high] / seen[0] <= target:
        middle = (low + high) // 2
        low, high = (low, middle) if measured(middle) <= target else (middle, high)
    facts: dict[str, Any] = {
        "seconds": {"whole": seen[0], "cut": seen[high]},
        "kept": seen[high] / seen[0],
        "before": seen[low] / seen[0],
        "measurements": len(seen),
        "resolution": 1 / places,
    }
    return supply.settled(supply.at(high / places)), facts

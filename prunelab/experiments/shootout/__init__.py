"""The shoot-out: one protocol for every criterion, network and data set, in steps that can be read and timed.

Flows in: the parameters of notebook 15_shootout (``Settings``).  Flows out: one row of numbers and a history.

    run = Run(Settings.of(parameters))
    run.measure("before")
    for share in run.shares:
        run.cut(run.score(), share)
        run.measure("cut")
        run.finetune()
    run.row()

``settings`` says what there is to choose, ``protocol`` does it, ``meter`` takes time and memory, ``compare`` ranks what
many such runs have found.  Notebook 15_shootout derives it.
"""

from prunelab.experiments.shootout.compare import mean_ranks, pareto_front
from prunelab.experiments.shootout.meter import Meter
from prunelab.experiments.shootout.protocol import Run
from prunelab.experiments.shootout.settings import KINDS, Settings

__all__ = ["KINDS", "Meter", "Run", "Settings", "mean_ranks", "pareto_front"]

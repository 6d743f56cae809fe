"""prunelab: learn second-order pruning by running it, and prune your own model in five lines.

graph  = pl.trace(model, example_inputs)     # which slices go together
scores = pl.criteria.get("taylor")(graph, batches)
plan   = pl.plan(scores, flops=0.5)          # what goes, as plain data
small  = pl.apply(model, plan)               # your own class, smaller
pl.save(small, "small.safetensors")
"""

from typing import Any

from prunelab import criteria, data, distributed, regularizers, zoo
from prunelab.batches.task import Task
from prunelab.cost import Cost, Latency, count, latency
from prunelab.criteria import Scores
from prunelab.curvature.statistics.collect import Statistics, collect
from prunelab.errors import (
    BatchError,
    BudgetError,
    DataError,
    MissingExtra,
    OptionError,
    PlanError,
    PruneLabError,
    TraceError,
)
from prunelab.factorization.factorize import factorize
from prunelab.io import load, save
from prunelab.planning.choose import plan
from prunelab.planning.timing import Timing
from prunelab.plans import Plan
from prunelab.pruning.prune import prune
from prunelab.pruning.report import Report
from prunelab.sparsity.masks import bake
from prunelab.sparsity.sparsify import sparsify
from prunelab.surgery.apply import apply
from prunelab.surgery.refit.options import Compensation
from prunelab.surgery.silence import masked
from prunelab.tracing.groups import Group, Member
from prunelab.tracing.trace import DependencyGraph, trace

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Return ``pl.sweep``, which is not part of the library: it is in ``prunelab.experiments``."""
    if name == "sweep":
        from prunelab.experiments.sweeping.sweep import sweep

        return sweep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BatchError",
    "BudgetError",
    "Compensation",
    "Cost",
    "DataError",
    "DependencyGraph",
    "Group",
    "Latency",
    "Member",
    "MissingExtra",
    "OptionError",
    "Plan",
    "PlanError",
    "PruneLabError",
    "Report",
    "Scores",
    "Statistics",
    "Task",
    "Timing",
    "TraceError",
    "apply",
    "bake",
    "collect",
    "count",
    "criteria",
    "data",
    "distributed",
    "factorize",
    "latency",
    "load",
    "masked",
    "plan",
    "prune",
    "regularizers",
    "save",
    "sparsify",
    "sweep",
    "trace",
    "zoo",
]

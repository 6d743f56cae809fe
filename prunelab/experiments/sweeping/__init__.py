"""Sweeps: a notebook run over a grid of parameters, on one machine or a cluster, and reports on the results.

Flows in: a notebook and a grid (``grid``).  Flows out: a folder of results (``sweep``), tables, figures, a ranking and
a page (``report``).  ``pl.sweep`` and ``python -m prunelab sweep`` start one; Dask is imported only then.
"""

from prunelab.experiments.sweeping.grid import Grid, GridError, Limits, make_grid, read_grid
from prunelab.experiments.sweeping.records import histories, table
from prunelab.experiments.sweeping.sweep import sweep

__all__ = ["Grid", "GridError", "Limits", "histories", "make_grid", "read_grid", "sweep", "table"]

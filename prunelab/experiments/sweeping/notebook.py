"""The notebook of a report: a few cells to look around in what a sweep has found, with a widget."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunelab.experiments.sweeping.report import Findings

NEAR = """from pathlib import Path

import pandas as pd

from prunelab.experiments.sweeping import analysis, explore

folder = Path(".")  # where compared.csv is: the folder of this notebook
rows = explore.of_table(folder / "compared.csv")
print(f"{len(rows)} runs of {rows['method'].nunique()} methods in {rows['case'].nunique()} cases")"""


def notebook(found: Findings) -> str:
    """Return a notebook without outputs, as JSON; it reads ``compared.csv`` beside it."""
    from nbformat import writes
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    name, metric = found.manifest["name"], found.metric
    lower = ", lower_is_better=True" if "loss" in metric else ""
    cells = [
        new_markdown_cell(
            f"# The sweep `{name}`\n\nOne row per run, with its parameters and its result; a *method* is a criterion "
            "with whatever else was varied for it, a *case* a network, a data set and a budget.",
            id="title",
        ),
        new_code_cell(NEAR, id="rows"),
        new_code_cell(f'analysis.means(rows, "{metric}")', id="means"),
        new_markdown_cell("## Look around\n\nChoose a network, what is left of it, and a criterion.", id="look"),
        new_code_cell(f'explore.explorer(rows, metric="{metric}")', id="widget"),
        new_markdown_cell(
            "## Ranking\n\nMean ranks within blocks, one case with one seed; intervals from a bootstrap over cases, "
            "and over seeds within them.",
            id="ranking-text",
        ),
        new_code_cell(f'analysis.ranking(rows, "{metric}"{lower})', id="ranking"),
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return writes(new_notebook(cells=cells, metadata={"kernelspec": kernel})) + "\n"

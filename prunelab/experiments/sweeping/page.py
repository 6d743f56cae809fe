"""What a report looks like: a self-contained page, and a summary in Markdown.

Flows in: ``Findings``.  Flows out: HTML and Markdown, from the templates ``page.html`` and ``page.md``.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from prunelab.experiments.figures.shootout import NAMES

if TYPE_CHECKING:
    from prunelab.experiments.sweeping.report import Findings

METHOD = (
    "Within every block, one case with one seed, methods are ranked; equal ones share the mean of their ranks. "
    "Shown are means over blocks, with the 95 % interval of a bootstrap in two stages: cases are drawn with "
    "replacement, then seeds within them (10,000 draws). A method that is missing in more than half of the blocks is "
    "not ranked, and a block that lacks one that is ranked is left out."
)
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


def page(found: Findings, place: Path) -> str:
    """Return the report as one HTML file; links to notebooks of failed jobs are relative to ``place``."""
    figures = {name: (base64.b64encode(image).decode(), words) for name, (image, words) in found.figures.items()}
    ranking = figures.pop("ranking", None)
    titled = [(_title(name), *figure) for name, figure in figures.items()]
    failed = [job | {"link": _link(found.folder / "jobs" / job["folder"], place)} for job in found.failed]
    shown = _shown(found) | {"figures": titled, "ranking_figure": ranking, "failed": failed}
    return TEMPLATES.get_template("page.html").render(shown)


def markdown(found: Findings) -> str:
    """Return the means, the ranking and where they come from, as Markdown."""
    return TEMPLATES.get_template("page.md").render(_shown(found))


def _shown(found: Findings) -> dict[str, Any]:
    """Return what both templates show."""
    total = len(found.manifest["jobs"])
    return {
        "name": found.manifest["name"],
        "total": total,
        "done": total - len(found.failed) - len(found.missing),
        "failed": found.failed,
        "missing": found.missing,
        "metric": _header(found.metric),
        "panels": {panel: crossed(found, panel) for panel in found.rows["panel"].unique()},
        "method": METHOD,
        "ranking": ranked(found) if len(found.ranking) > 1 else None,
        "published": published(found) if len(found.published) else None,
        "calls": provenance(found),
        "minutes": found.table.drop_duplicates("job")["seconds"].sum() / 60,
    }


def _link(job: Path, place: Path) -> str:
    notebook = job / "notebook.ipynb"
    return Path(os.path.relpath(notebook, place)).as_posix() if notebook.is_file() else ""


def _title(figure: str) -> str:
    metric, left, *panel = figure.split("-", 2)
    words = f"{metric} against {NAMES.get(left, left)} kept".replace("_", " ")
    return words[:1].upper() + words[1:] + (f": {panel[0]}" if panel else "")


# ── tables, as they are shown ─────────────────────────────────────────────────────────────────────────────────────


def _number(value: Any, name: str) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "–"
    share = "accuracy" in name or name.endswith("_kept")
    return f"{100 * value:.1f}" if share else f"{value:.4g}"


def _header(name: str) -> str:
    return f"{name} (%)" if "accuracy" in name or name.endswith("_kept") else name


def ranked(found: Findings) -> pd.DataFrame:
    """Return the ranking as it is shown: every mean with its interval in brackets."""
    metric, rows = found.metric, []
    for row in found.ranking.to_dict("records"):
        low, high = (_number(row[f"{metric}_{end}"], metric) for end in ("low", "high"))
        rows.append(
            {
                "method": row["method"],
                "mean rank": f"{row['mean_rank']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
                _header(metric): f"{_number(row[metric], metric)} [{low}, {high}]",
                "first in": f"{100 * row['first']:.0f} % of {row['blocks']} blocks",
            }
        )
    return pd.DataFrame(rows)


def crossed(found: Findings, panel: str) -> pd.DataFrame:
    """Return the means of one panel: a row per method, a column per setting, ``mean ± deviation`` over seeds."""
    here = found.means[found.means["panel"] == panel].replace({"setting": {"": _header(found.metric)}})
    texts = [
        _number(mean, found.metric) + (f" ± {_number(std, found.metric)}" if runs > 1 else "")
        for mean, std, runs in zip(here[found.metric], here["std"], here["runs"], strict=True)
    ]
    table = here.assign(text=texts).set_index(["method", "setting"])["text"].unstack(fill_value="–")
    return table.loc[here["method"].unique(), here["setting"].unique()].reset_index()


def published(found: Findings) -> pd.DataFrame:
    """Return published numbers beside ours as they are shown."""
    shown = found.published.copy()
    for name in ("published", "ours", "std", "difference"):
        shown[name] = [_number(value, metric) for value, metric in zip(shown[name], shown["metric"], strict=True)]
    return shown


def provenance(found: Findings) -> pd.DataFrame:
    """Return what was called where, one row per call of the sweep, and how long its jobs took."""
    rows = []
    for call in found.manifest["calls"]:
        seconds = call.get("seconds")
        versions = ", ".join(f"{name} {call[name]}" for name in ("python", "torch", "dask") if name in call)
        version = f"{call['prunelab']}, commit {call['commit']}" if call["commit"] else call["prunelab"]
        took = "was interrupted" if seconds is None else f"{seconds / 60:.1f} minutes"
        rows.append(
            {
                "command": call["command"],
                "started": call["started"],
                "took": took,
                "prunelab": version,
                "versions": versions,
                "hardware": call["hardware"],
            }
        )
    return pd.DataFrame(rows)

"""What a report looks like: a page that stands on its own, and a summary in Markdown.

Flows in: ``Findings``.  Flows out: HTML and Markdown.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from prunelab.experiments.figures.shootout import NAMES

if TYPE_CHECKING:
    from prunelab.experiments.sweeping.report import Findings

METHOD = (
    "Within every block, one case with one seed, methods are ranked; equal ones share the mean of their ranks. "
    "Shown are means over blocks, with the 95 % interval of a bootstrap in two stages: cases are drawn with "
    "replacement, then seeds within them (10,000 draws). A method that is missing in more than half of the blocks is "
    "not ranked, and a block that lacks one that is ranked is left out."
)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #999; }
th.words, td.words { text-align: left; white-space: normal; min-width: 16rem; }
img { max-width: 100%; } figure { margin: 1rem 0; } figcaption { color: #555; }
.state { font-size: 1.1rem; } .bad { color: #a33b00; }
"""
SHOWN = 40
"""Jobs that are listed by name when they are missing."""


def page(found: Findings, place: Path) -> str:
    """Return the report as one HTML file; links to notebooks of failed jobs are relative to ``place``."""
    parts = [f"<h1>{html.escape(found.manifest['name'])}</h1>", f'<p class="state">{_state(found)}</p>']
    if len(found.rows):
        parts += _results(found)
    parts += _published(found)
    parts += _failures(found, place)
    parts.append("<h2>Where the numbers come from</h2>" + _html(provenance(found)))
    body = "\n".join(parts)
    title = html.escape(found.manifest["name"])
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _results(found: Findings) -> Iterable[str]:
    for name, (image, words) in found.figures.items():
        if name != "ranking":
            yield f"<h2>{html.escape(_title(name))}</h2>{_figure(image, words)}"
    if "ranking" in found.figures:
        yield f"<h2>Ranking</h2>{_figure(*found.figures['ranking'])}<p>{METHOD}</p>{_html(ranked(found))}"
    yield "<h2>Means over seeds</h2>"
    for panel in dict.fromkeys(found.rows["panel"]):
        yield f"<h3>{html.escape(panel)}</h3>{_html(crossed(found, panel))}"


def _published(found: Findings) -> Iterable[str]:
    if len(found.published):
        shown = found.published.copy()
        for name in ("published", "ours", "std", "difference"):
            shown[name] = [_number(value, metric) for value, metric in zip(shown[name], shown["metric"], strict=True)]
        yield "<h2>Beside published numbers</h2>" + _html(shown, words=("source",))


def _failures(found: Findings, place: Path) -> Iterable[str]:
    if found.failed:
        rows = []
        for job in found.failed:
            notebook = found.folder / "jobs" / job["folder"] / "notebook.ipynb"
            link = html.escape(job["job"])
            if notebook.is_file():
                way = Path(os.path.relpath(notebook, place)).as_posix()
                link = f'<a href="{html.escape(way)}">{link}</a>'
            error = html.escape(job["message"])
            rows.append(f'<tr><td>{link}</td><td>{job["attempts"]}</td><td class="words">{error}</td></tr>')
        head = "<tr><th>job, with its notebook</th><th>attempts</th><th>error</th></tr>"
        yield f"<h2>Failed</h2><table>{head}{''.join(rows)}</table>"
    if found.missing:
        names = "".join(f"<li>{html.escape(name)}</li>" for name in found.missing[:SHOWN])
        more = f"<p>and {len(found.missing) - SHOWN} more</p>" if len(found.missing) > SHOWN else ""
        yield f"<h2>Missing</h2><ul>{names}</ul>{more}"


def _title(figure: str) -> str:
    metric, left, *panel = figure.split("-", 2)
    words = f"{metric} against {NAMES.get(left, left)} kept".replace("_", " ")
    return words[:1].upper() + words[1:] + (f": {panel[0]}" if panel else "")


def _figure(image: bytes, words: str) -> str:
    data = base64.b64encode(image).decode()
    return f'<figure><img alt="" src="data:image/png;base64,{data}"><figcaption>{words}</figcaption></figure>'


def _html(table: pd.DataFrame, words: tuple[str, ...] = ()) -> str:
    head = "".join(f"<th{' class=words' if name in words else ''}>{html.escape(str(name))}</th>" for name in table)
    lines = []
    for row in table.to_dict("records"):
        cells = (
            f"<td{' class=words' if name in words else ''}>{html.escape(str(value))}</td>"
            for name, value in row.items()
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


# ── tables, as they are shown ─────────────────────────────────────────────────────────────────────────────────────


def _state(found: Findings) -> str:
    total, failed, missing = len(found.manifest["jobs"]), len(found.failed), len(found.missing)
    said = f"{total - failed - missing} of {total} jobs are done"
    said += f', <span class="bad">{failed} failed</span>' if failed else ""
    said += f', <span class="bad">{missing} are missing</span>: call the sweep again to run them' if missing else ""
    return said + "."


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
    here = found.means[found.means["panel"] == panel]
    rows: dict[str, dict[str, str]] = {}
    for row in here.to_dict("records"):
        text = _number(row[found.metric], found.metric)
        if row["runs"] > 1:
            text += f" ± {_number(row['std'], found.metric)}"
        rows.setdefault(row["method"], {})[row["setting"] or _header(found.metric)] = text
    table = pd.DataFrame.from_dict(rows, orient="index").fillna("–")
    return table.rename_axis("method").reset_index()


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


def markdown(found: Findings) -> str:
    """Return the means, the ranking and where they come from, as Markdown."""
    lines = [f"# {found.manifest['name']}", "", _plain(_state(found)), ""]
    for panel in dict.fromkeys(found.rows["panel"]) if len(found.rows) else ():
        lines += [
            f"**{panel}**: {_header(found.metric)}" if panel else f"**{_header(found.metric)}**",
            "",
            _pipes(crossed(found, panel)),
            "",
        ]
    if len(found.ranking) > 1:
        lines += ["**Ranking.** " + METHOD, "", _pipes(ranked(found)), ""]
    if len(found.published):
        shown = found.published.assign(
            **{
                name: [_number(v, m) for v, m in zip(found.published[name], found.published["metric"], strict=True)]
                for name in ("published", "ours", "std", "difference")
            }
        )
        lines += ["**Beside published numbers**", "", _pipes(shown), ""]
    calls = provenance(found)
    last = calls.iloc[-1]
    lines.append(
        f"Command: `{last['command']}`; prunelab {last['prunelab']}; {last['versions']}; {last['hardware']}; jobs took "
        f"{found.table.drop_duplicates('job')['seconds'].sum() / 60:.1f} minutes together, in {len(calls)} calls."
    )
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    return text.replace('<span class="bad">', "").replace("</span>", "")


def _pipes(table: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(str(name) for name in table) + " |", "|---" + "|---:" * (table.shape[1] - 1) + "|"]
    lines += ["| " + " | ".join(str(value) for value in row) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines)

"""Keep what the quick grid found: in sweeps/results/quick, for the notebook, and in the README.

    python -m sweeps.keep out/quick

writes the report of a finished sweep, and from it a table (CSV), figures and a summary (JSON).  The table also goes to
data/shootout, where 15_shootout looks for it; its means and a figure are in the README, between two comments.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pandas as pd

from prunelab.experiments.sweeping import records
from prunelab.experiments.sweeping.report import report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "sweeps" / "results" / "quick"
EXAMPLE = ROOT / "data" / "shootout" / "quick.csv"
FIGURES = ("accuracy-flops_kept-resnet20.png", "ranking.png")
BLOCK = re.compile(r"(<!-- quick: [^\n]*-->\n).*?(<!-- /quick -->)", re.DOTALL)

COLUMNS = (
    *("panel", "setting", "case", "method", "model", "checkpoint", "dataset", "criterion", "options"),
    *("budget", "share", "per", "compensate", "seed", "accuracy_before", "accuracy_cut", "accuracy"),
    *("loss_before", "loss_cut", "loss", "flops_kept", "params_kept", "weights_kept"),
    *("seconds_score", "seconds_cut", "seconds_finetune", "seconds_evaluate", "seconds"),
)
LABELS = {
    ("magnitude", "{}"): "magnitude",
    ("taylor", "{}"): "Taylor",
    ("obd", "{}"): "OBD, empirical Fisher",
    ("kron_obs", "{}"): "Kron-OBS",
    ("oba", '{"signed": true}'): "θ ⊙ Hθ, signed",
    ("gate", "{}"): "gate",
    ("gate", '{"interactions": true, "temperature": 4.0}'): "gate, greedy, softened labels",
    ("eigendamage", '{"fisher": "ggn"}'): "EigenDamage, factorised",
}
"""Criterion and options -> what the README calls it, in the order of its lines."""
SHOWN = {
    "ResNet-20: 70% of the FLOPs": ("resnet20", 0.7, False),
    "50%": ("resnet20", 0.5, False),
    "30%": ("resnet20", 0.3, False),
    "30%, compensated": ("resnet20", 0.3, True),
    "VGG-13: 50%": ("vgg13_narrow", 0.5, False),
    "ViT: 50%": ("vit_small", 0.5, False),
}


def shown(rows: pd.DataFrame) -> str:
    """Return the README's table: accuracy in percent after the cut and after fine-tuning, means over seeds."""
    lines = ["| criterion | " + " | ".join(SHOWN) + " |", "|---" + "|---:" * len(SHOWN) + "|"]
    for (criterion, options), label in LABELS.items():
        cells = []
        for model, share, compensate in SHOWN.values():
            wanted = {"criterion": criterion, "options": options, "model": model, "share": share}
            here = rows[rows["compensate"] == compensate]
            for name, value in wanted.items():
                here = here[here[name] == value]
            means = 100 * here[["accuracy_cut", "accuracy"]].mean()
            cells.append(f"{means['accuracy_cut']:.1f} → {means['accuracy']:.1f}" if len(here) else "–")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def block(rows: pd.DataFrame, about: dict) -> str:
    """Return the README's part: the table, a figure, and how it was measured."""
    whole = ", ".join(f"{100 * value:.1f} % ({name})" for name, value in about["whole"].items())
    calls = about["calls"]
    whole_calls = all("seconds" in call for call in calls)  # one that was stopped has none
    took = f"in {sum(call['seconds'] for call in calls) / 60:.0f} minutes" if whole_calls else "done"
    called = f"{took} by one call" if len(calls) == 1 else f"{took} by {len(calls)} calls"
    last = calls[-1]
    image = (RESULTS / FIGURES[0]).relative_to(ROOT).as_posix()
    return "\n".join(
        [
            shown(rows),
            "",
            f"![Accuracy of ResNet-20 against the FLOPs that are left, a line for each criterion]({image})",
            "",
            f"{about['done']} jobs, {about['minutes_of_all_jobs']:.0f} minutes together, {called}; {last['hardware']}; "
            f"torch {last['torch']}, commit {last['commit']}. Before any cut the networks have {whole}.",
            "",
        ]
    )


def summary(folder: Path, rows: pd.DataFrame) -> dict:
    """Return where the numbers come from: command, commit, versions, hardware, and how long it took."""
    manifest = records.manifest(folder)
    names = ("command", "started", "seconds", "workers", "prunelab", "commit", "python", "torch", "dask", "hardware")
    return {
        "name": manifest["name"],
        "jobs": len(manifest["jobs"]),
        "done": len(rows),
        "minutes_of_all_jobs": round(float(rows["seconds"].sum()) / 60, 1),
        "calls": [{name: call[name] for name in names if name in call} for call in manifest["calls"]],
        "whole": {name: round(float(part["accuracy_before"].mean()), 4) for name, part in rows.groupby("model")},
    }


def main(folder: Path) -> None:
    """Write everything; nothing is kept of a sweep that is not finished."""
    made = folder / "report"
    report(folder, made)
    compared = pd.read_csv(made / "compared.csv", keep_default_na=False, na_values=[""])
    rows = compared[[name for name in COLUMNS if name in compared]].round(4)
    rows = rows.astype({"compensate": bool})
    about = summary(folder, rows)
    if about["done"] < about["jobs"]:
        raise SystemExit(f"{about['jobs'] - about['done']} of {about['jobs']} jobs are not done: call the sweep again.")
    RESULTS.mkdir(parents=True, exist_ok=True)
    EXAMPLE.parent.mkdir(parents=True, exist_ok=True)
    for path in (RESULTS / "table.csv", EXAMPLE):
        rows.to_csv(path, index=False)
    for name in (*FIGURES, "ranking.csv"):
        shutil.copy(made / name, RESULTS / name)
    (RESULTS / "summary.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    fresh, times = BLOCK.subn(lambda found: f"{found[1]}{block(rows, about)}{found[2]}", text)
    if times != 1:
        raise SystemExit("README.md has no place for the results: <!-- quick: … --> and <!-- /quick -->.")
    readme.write_text(fresh, encoding="utf-8")
    print(f"{RESULTS.relative_to(ROOT)}, {EXAMPLE.relative_to(ROOT)} and README.md are up to date.")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/quick"))

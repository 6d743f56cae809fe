"""The command line that all tables share: measure, keep, and write the page.

`bench/peers.json` holds the rows of all tables; a table that is measured again replaces its own rows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.peers import TABLES
from bench.peers.page import markdown, ratio_lines, summary
from bench.peers.setting import Setting, commit, machine, versions
from bench.record import keep

OUT = Path("bench/peers.json")
MARKS = "<!-- peers-table: what `python -m bench.peers --readme` writes -->", "<!-- /peers-table -->"


def load(path: Path) -> dict[str, Any]:
    """Return what was measured so far."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"machine": {}, "versions": {}, "runs": {}, "rows": []}


def run(names: Sequence[str], setting: Setting, out: Path) -> tuple[dict[str, Any], list[str]]:
    """Measure some tables, keep their rows as they come, and return everything, and which tables ended in an error.

    A table that says `RESUMES` and was cut short resumes; the others start again.
    """
    warnings.filterwarnings("ignore")
    kept = load(out)
    kept |= {"machine": machine(), "versions": versions()}
    failed: list[str] = []
    for name in names:
        try:
            measure(name, setting, out, kept)
        except Exception:  # hours of other tables should not be lost to one
            traceback.print_exc()
            failed.append(name)
    return kept, failed


def measure(name: str, setting: Setting, out: Path, kept: dict[str, Any]) -> None:
    """Measure one table and keep its rows, in place and on disk."""
    module = importlib.import_module(f"bench.peers.{name}")
    torch.set_num_threads(getattr(module, "THREADS", 1) or int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    before = [row for row in kept["rows"] if row["table"] == name]
    resumes = getattr(module, "RESUMES", False)
    unfinished = resumes and not kept["runs"].get(name, {}).get("finished", True)
    others = [row for row in kept["rows"] if row["table"] != name]
    start = time.perf_counter() - (kept["runs"][name]["seconds"] if unfinished else 0)
    about = {
        "quick": setting.quick,
        "commit": commit(),
        "processor": machine()["processor"],
        "load": os.getloadavg()[0],
        "finished": False,
    }
    rows: list[dict[str, Any]] = []
    for row in tqdm(module.rows(replace(setting, known=tuple(before if unfinished else ()))), desc=name, unit="row"):
        rows.append({"table": name} | row)
        if resumes:
            kept["rows"] = others + rows
            kept["runs"][name] = about | {"seconds": round(time.perf_counter() - start)}
            keep(out, kept, markdown)
    kept["rows"] = others + rows
    kept["runs"][name] = about | {"seconds": round(time.perf_counter() - start), "finished": True}
    keep(out, kept, markdown)
    if hasattr(module, "finish"):
        module.finish(rows, out.parent)


def show(kept: dict[str, Any], page: Path = Path("README.md")) -> None:
    """Put the summary between its marks in the README."""
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    if not mark:
        sys.exit(f"{page} has no {MARKS[0]} … {MARKS[1]}")
    page.write_text("\n".join([before + MARKS[0], *summary(kept), MARKS[1] + after]), encoding="utf-8")


def main(default: Sequence[str] = TABLES) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="prunelab beside its peers; writes bench/peers.json and peers.md.")
    parser.add_argument("tables", nargs="*", default=list(default), help=f"of {', '.join(TABLES)}")
    parser.add_argument("--quick", action="store_true", help="a few minutes for everything, to see that it works")
    parser.add_argument(
        "--data", default="mini", help="mini, full, or a folder with CIFAR-10: for the table of quality"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--readme", action="store_true", help="measure nothing; put what was measured into README.md")
    args = parser.parse_args()
    if args.readme:
        show(load(args.out))
        return
    unknown = [name for name in args.tables if name not in TABLES]
    if unknown:
        parser.error(f"there is no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    out = args.out.with_name(args.out.stem + "-quick.json") if args.quick and args.out == OUT else args.out
    kept, failed = run(args.tables, Setting(args.quick, args.data), out)
    print("\n".join(ratio_lines(kept)))
    print(f"\n{out.with_suffix('.md')} has all tables.")
    if failed:
        sys.exit(f"These ended in an error, shown above: {', '.join(failed)}.")

"""The command line: run a grid of notebooks, report on it.

python -m prunelab sweep sweeps/quick.yaml --out out/quick
python -m prunelab report out/quick
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prunelab.errors import PruneLabError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 1 after an error or a failed job."""
    parser = argparse.ArgumentParser(
        prog="python -m prunelab", description="Run grids of notebooks, and report on them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("sweep", help="run a grid; called again, run what is missing or has changed")
    running.add_argument("grid", help="a YAML file")
    running.add_argument("--out", help="the folder of the results (default: out/NAME)")
    running.add_argument("--scheduler", help="address or scheduler file of Dask (default: workers on this machine)")
    running.add_argument("--workers", type=int, help="on this machine (default: one per GPU or core; 0: without Dask)")
    running.add_argument(
        "--by-version", action="store_true", help="accept results of other sources of the same version"
    )
    running.add_argument("--list", action="store_true", help="check the grid and list its jobs, run nothing")
    telling = commands.add_parser("report", help="write table, figures, ranking and page of a sweep")
    telling.add_argument("folder", help="of the sweep, which may be unfinished")
    telling.add_argument("--out", help="where the report goes (default: FOLDER/report)")
    telling.add_argument("--metric", default="accuracy", help="column that is compared (default: accuracy)")
    args = parser.parse_args(arguments)
    try:
        return {"sweep": _sweep, "report": _report}[args.command](args)
    except PruneLabError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


def _sweep(args: argparse.Namespace) -> int:
    from prunelab.experiments.sweeping import read_grid, sweep
    from prunelab.experiments.sweeping.jobs import prepared

    grid = read_grid(args.grid)
    if args.list:
        for job in prepared(grid).jobs:
            print(job.name)
        return 0
    out = Path(args.out) if args.out else Path("out") / grid.name
    table = sweep(grid.notebook, grid, out, args.scheduler, workers=args.workers, by_version=args.by_version)
    print(f"Results: {out}; a page of them: python -m prunelab report {out}")
    return 0 if (table["status"] == "done").all() else 1


def _report(args: argparse.Namespace) -> int:
    from prunelab.experiments.sweeping.report import report

    written = report(args.folder, args.out, metric=args.metric)
    print("\n".join(f"{path}" for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())

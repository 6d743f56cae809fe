"""The command line: run notebooks into a folder, run them with other parameters, save them with outputs.

python -m prunelab.course.notebook run notebooks/00_tour.ipynb --out out -p flops 0.7
python -m prunelab.course.notebook vary notebooks/00_tour.ipynb --out out/varied
python -m prunelab.course.notebook save notebooks/00_tour.ipynb
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd

from prunelab.course.notebook.results import readable, result_of
from prunelab.course.notebook.run import run
from prunelab.course.notebook.save import save
from prunelab.errors import PruneLabError


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m prunelab.course.notebook", description="Run notebooks, or refresh them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run a notebook into a folder")
    running.add_argument("notebook")
    running.add_argument("--out", default="out", help="the folder (default: out)")
    running.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    saving = commands.add_parser("save", help="execute notebooks in place and clean them, to commit them with outputs")
    saving.add_argument("notebook", nargs="+")
    varying = commands.add_parser("vary", help="run notebooks with the other parameters that are kept for each")
    varying.add_argument("notebook", nargs="+")
    varying.add_argument("--out", default="out/varied", help="the folder (default: out/varied)")
    varying.add_argument(
        "--seeds", nargs="*", type=int, default=[2, 3], help="and with these seeds, else as they are (default: 2 3)"
    )
    for command in (running, saving, varying):
        command.add_argument("--timeout", type=int, default=600, help="seconds for any one cell (default: 600)")
    args = parser.parse_args(arguments)
    try:
        {"run": _run_and_tell, "save": _save_and_tell, "vary": _vary_and_tell}[args.command](args)
    except PruneLabError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


def _run_and_tell(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    copy = run(args.notebook, args.out, {name: _value(text) for name, text in args.p}, timeout=args.timeout)
    print(f"\n{copy.stem} ran in {time.perf_counter() - start:.0f} s.\n")
    result = result_of(copy)
    if result:
        print(readable(pd.DataFrame(result["table"], columns=result["columns"])).to_string(index=False), "\n")
    print(f"Executed notebook: {copy}\nWeb page:          {copy.with_suffix('.html')}")


def _save_and_tell(args: argparse.Namespace) -> None:
    for notebook in args.notebook:
        start = time.perf_counter()
        save(notebook, timeout=args.timeout)
        print(f"{notebook}: {time.perf_counter() - start:.0f} s, {Path(notebook).stat().st_size / 1000:.0f} kB")


def _vary_and_tell(args: argparse.Namespace) -> None:
    for notebook in map(Path, args.notebook):
        kept = notebook.parent / "parameters" / f"{notebook.stem}.json"
        if not kept.is_file():
            raise PruneLabError(f"There are no other parameters for {notebook}: write some into {kept}.")
        for given in [json.loads(kept.read_text(encoding="utf-8")), *({"seed": seed} for seed in args.seeds)]:
            start = time.perf_counter()
            run(notebook, args.out, given, timeout=args.timeout)
            words = ", ".join(f"{name}={value!r}" for name, value in given.items())
            print(f"{notebook.stem} with {words}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())

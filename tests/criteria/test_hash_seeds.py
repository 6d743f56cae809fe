"""Nothing depends on the order of sets, which is another one in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def found_with(seed: int, *arguments: str) -> dict[str, Any]:
    """Return what ``tests.anywhere`` finds in a process with this hash seed."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.anywhere", *arguments],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_graphs_plans_and_weights_are_the_same_under_every_hash_seed():
    first, *others = (found_with(seed) for seed in (0, 1, 5))
    assert len(first) > 100 and "factorized" in first and first["report"]["plans"]
    for other in others:
        assert [key for key in first if first[key] != other.get(key)] == [] and first.keys() == other.keys()


def test_a_run_that_goes_on_under_another_hash_seed_ends_like_one_that_was_not_stopped(tmp_path):
    assert found_with(2, str(tmp_path / "stopped"), "2") == {}
    assert found_with(3, str(tmp_path / "stopped"), "1") == {}
    whole = found_with(0, str(tmp_path / "whole"))
    assert len(whole["report"]["plans"]) == 4 and found_with(4, str(tmp_path / "stopped")) == whole

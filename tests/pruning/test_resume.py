"""A run that is killed, at any moment and as often as one likes, ends like one that never was."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunelab as pl
from prunelab.files import atomic
from prunelab.pruning.state import FILE, State

INPUTS = torch.ones(1, 3, 8, 8)
OPTIONS = {"criterion": "taylor", "ratio": 0.6, "steps": 4, "schedule": "cubic", "seed": 3, "progress": False}


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 5),
        ).eval()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 5) for _ in range(2)]


def finetune(model: nn.Module) -> None:
    """Train a little, with dropout, and with noise from all three generators."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05, momentum=0.9)
    for _ in range(6):
        inputs = torch.randn(8, 3, 8, 8) + float(np.random.rand()) + random.random()
        loss = F.cross_entropy(model(inputs), torch.randint(5, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def evaluate(model: nn.Module) -> dict[str, float]:
    return {"norm": float(sum(parameter.detach().square().sum() for parameter in model.parameters()))}


def run(state: Path | None, **options) -> tuple[nn.Module, pl.Report]:
    how = {**OPTIONS, "finetune": finetune, "evaluate": evaluate, **options}
    return pl.prune(how.pop("model", None) or network(), INPUTS, data=batches(), state=state, **how)


def same(one: tuple[nn.Module, pl.Report], two: tuple[nn.Module, pl.Report]) -> bool:
    """Return whether two runs ended alike: every plan, every row of the report, every weight, bit by bit."""
    states = [run[0].state_dict() for run in (one, two)]
    weights = states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    return weights and one[1] == two[1] and one[1].plan == two[1].plan


@pytest.fixture(scope="module")
def whole() -> tuple[nn.Module, pl.Report]:
    """What a run without a state ends with."""
    return run(None)


def child(state: str) -> None:
    torch.set_num_threads(1)
    run(Path(state))


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked here, to start them quickly")
def test_a_run_killed_at_random_moments_ends_like_one_that_never_was(whole, tmp_path):
    """SIGKILL, 20 times, each in a process of its own that goes on where the last one was killed."""
    context = multiprocessing.get_context("forkserver")  # it imports everything once and never computes
    context.set_forkserver_preload(["prunelab", "tests.pruning.test_resume"])
    folder, moments, kills = tmp_path / "state", random.Random(0), 0

    def start() -> multiprocessing.process.BaseProcess:
        process = context.Process(target=child, args=(str(folder),))
        process.start()
        return process

    start().join()  # the fork server is warm now
    assert same(run(folder), whole)
    shutil.rmtree(folder)
    begun = time.monotonic()
    start().join()
    longest = time.monotonic() - begun
    shutil.rmtree(folder)
    while kills < 20:
        process = start()
        process.join(timeout=moments.uniform(0, 0.4 * longest))
        if process.exitcode is None:
            process.kill()
            process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
        else:  # it was faster than its murderer: once more from the beginning
            assert process.exitcode == 0 and same(run(folder), whole)
            shutil.rmtree(folder)
    assert same(run(folder), whole)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]


class Killed(BaseException):
    """Stands for a kill: no handler of ours catches it."""


def test_a_run_killed_before_any_change_on_the_disk_ends_like_one_that_never_was(tmp_path, monkeypatch):
    """Every moment at which something on the disk is about to change; after one change is before the next."""
    moments, stop_at = 0, -1

    def killing(change):
        def changed(*args, **kwargs):
            nonlocal moments
            moments += 1
            if moments - 1 == stop_at:
                raise Killed
            return change(*args, **kwargs)

        return changed

    monkeypatch.setattr(atomic.os, "replace", killing(atomic.os.replace))
    monkeypatch.setattr(Path, "unlink", killing(Path.unlink))
    monkeypatch.setattr(atomic, "_to_disk", killing(atomic._to_disk))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    small = {"model": model, "steps": 2, "schedule": "linear", "criterion": "magnitude", "finetune": None}
    wanted = run(None, **small)
    assert same(run(tmp_path / "counted", **small), wanted)
    total = moments
    assert total >= 20  # four changes per file, five files; and old files that go
    for number in range(total):
        moments, stop_at, folder = 0, number, tmp_path / str(number)
        with pytest.raises(Killed):
            run(folder, **small)
        stop_at = -1
        assert same(run(folder, **small), wanted)


def test_what_is_done_is_not_done_again(whole, tmp_path):
    """A run stopped in its third fine-tuning goes on with that; when it has finished it is only read."""
    calls = []

    def stopping(model: nn.Module) -> None:
        calls.append("finetune")
        finetune(model)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "state", finetune=stopping)
    assert [row["stage"] for row in State(tmp_path / "state", found(tmp_path / "state")).report.rows][-1] == "cut"
    assert same(run(tmp_path / "state", finetune=stopping), whole) and len(calls) == 3 + 2
    assert same(run(tmp_path / "state", finetune=stopping), whole) and len(calls) == 5
    steps = whole[1].steps
    assert len(steps) == 4 and all([row["stage"] for row in one.rows] == ["cut", "fine-tuned"] for one in steps)


def found(folder: Path) -> dict:
    return json.loads((folder / FILE).read_text())["run"]


def test_a_seed_that_was_not_given_is_kept(tmp_path):
    torch.manual_seed(5)
    one = run(tmp_path / "one", seed=None)
    torch.manual_seed(6)
    assert same(run(tmp_path / "one", seed=None), one)  # read
    (tmp_path / "two").mkdir()
    torch.manual_seed(6)
    assert not same(run(tmp_path / "two", seed=None), one)


def test_the_users_own_random_numbers_go_on_as_if_nothing_had_been():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)

    seed()
    wanted = draw()
    seed()
    run(None, steps=1)
    assert draw() == wanted


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"criterion": "magnitude"}, "criterion is .*Taylor.* there and .*Magnitude.* here"),
        ({"criterion": pl.criteria.Taylor(multivariable=True)}, "criterion is"),
        ({"ratio": 0.5}, "budget is .*0.6.* there and .*0.5.* here"),
        ({"ratio": None, "params": 0.4}, "budget is"),
        ({"steps": 3}, "steps is"),
        ({"schedule": "linear"}, "steps is"),
        ({"scope": "layer"}, "options is"),
        ({"ignore": ["3"]}, "options is"),
        ({"compensate": True}, "compensate is"),
        ({"seed": 4}, "seed is 3 there and 4 here"),
        ({"finetune": None}, "finetune is true there and false here"),
    ],
)
def test_the_folder_of_another_run_is_refused(begun, other, message):
    before = {path.name: path.read_bytes() for path in begun.iterdir()}
    with pytest.raises(pl.DataError, match=f"another run: {message}"):
        run(begun, **other)
    assert {path.name: path.read_bytes() for path in begun.iterdir()} == before


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """The folder of a run that was stopped after its first cut."""
    folder = tmp_path_factory.mktemp("begun") / "state"

    def stop(model: nn.Module) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, finetune=stop)
    return folder


def test_a_model_with_other_weights_is_another_run(begun):
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(pl.DataError, match="another run: model is"):
        run(begun, model=model)


def test_damage_and_foreign_folders_are_errors(begun, tmp_path):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(begun, tmp_path / name))

    folder = copy("cut off")
    (folder / FILE).write_text((folder / FILE).read_text()[:-40])
    with pytest.raises(pl.DataError, match="damaged.*delete it to start again"):
        run(folder)
    folder = copy("other version")
    (folder / FILE).write_text((folder / FILE).read_text().replace('{"format": 1', '{"format": 99', 1))
    with pytest.raises(pl.DataError, match="another version"):
        run(folder)
    folder = copy("outside")
    data = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps(data | {"weights": "../elsewhere.safetensors"}))
    with pytest.raises(pl.DataError, match="damaged"):
        run(folder)
    for name, change in [("gone", Path.unlink), ("broken", lambda path: path.write_bytes(path.read_bytes()[:-9]))]:
        folder = copy(name)
        change(folder / data["weights"])
        with pytest.raises(pl.DataError, match="safetensors"):
            run(folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(pl.DataError, match="thesis.tex"):
        run(tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(pl.DataError, match="cannot hold the state"):
        run(tmp_path / "file")


def test_nothing_is_pickled(begun):
    kinds = {path.suffix: path.read_bytes() for path in begun.iterdir()}
    assert kinds.keys() == {".json", ".safetensors"}
    assert all(b"PK\x03\x04" not in content and b"\x80\x04\x95" not in content for content in kinds.values())


def test_a_network_that_was_pruned_before_can_be_pruned_in_a_run_on_disk(tmp_path):
    model = pl.apply(network(), pl.plan(pl.criteria.Random()(pl.trace(network(), INPUTS)), ratio=0.25))
    options = {"steps": 2, "model": model, "finetune": None}
    assert same(run(tmp_path / "state", **options), run(None, **options))
    small, _ = run(tmp_path / "state", **options)
    pl.save(small, tmp_path / "small.safetensors")
    again = pl.load(network(), tmp_path / "small.safetensors")
    assert torch.equal(again(INPUTS), small(INPUTS))

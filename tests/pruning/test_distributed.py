"""Several processes, here two on gloo: the same scores as one process, the same plan and weights in both."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import prunelab as pl
from prunelab.distributed import Sharded, rank, same_everywhere
from tests.cases import perturb

ROOT = Path(__file__).resolve().parents[2]
IMAGES = (1, 3, 8, 8)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten()),
        *(nn.Linear(32, 10), nn.ReLU(), nn.Linear(10, 4)),
    )
    return perturb(model).eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    """Five unequal batches; rank 0 gets three of them."""
    generator = torch.Generator().manual_seed(1)
    sizes = (24, 40, 16, 32, 8)
    return [
        (torch.randn(size, *IMAGES[1:], generator=generator), torch.randint(0, 4, (size,), generator=generator))
        for size in sizes
    ]


SHARES = (slice(0, 3), slice(3, 5))

CRITERIA = {
    "taylor": {},
    "obd": {"fisher": "empirical"},
    "obd mc": {"fisher": "mc"},
    "obd ggn": {"fisher": "ggn"},
    "obs": {"damping": 1e-2},
    "kron_obd": {},
    "kron_obs": {"fisher": "mc"},
    "eigendamage": {"correction": "ekfac"},
    "oba": {},
    "quadratic": {},
    "gate": {},
    "oracle": {},
    "magnitude": {},
    "random": {},
}


def scores_of(model: nn.Module, data: object) -> dict[str, dict[str, Tensor]]:
    graph = pl.trace(model, torch.randn(IMAGES))
    return {
        name: dict(pl.criteria.get(name.split()[0], **options)(graph, data).by_name)
        for name, options in CRITERIA.items()
    }


def finetune(model: nn.Module) -> None:
    """Train in DDP, for what DDP does: gradients are means over the processes, batch norm's statistics are not."""
    wrapped = DistributedDataParallel(model.train())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    for inputs, targets in batches()[rank() : 4 : 2]:  # equally many, as DDP demands
        optimizer.zero_grad()
        F.cross_entropy(wrapped(inputs), targets).backward()
        optimizer.step()


def pruned(data: object, tune: Callable | None = None) -> tuple[nn.Module, pl.Report]:
    return pl.prune(
        net(), torch.randn(IMAGES), criterion="kron_obs", data=data, ratio=0.5, steps=2, compensate=True, finetune=tune
    )


# ── what the two processes do, in this order; every function is given the folder for what it found ────────────────


def score_together(folder: str) -> None:
    share = Sharded(batches()[SHARES[rank()]])
    torch.save(scores_of(net(), share), f"{folder}/scores{rank()}.pt")
    together = pl.collect(net(), share, {"grad", "moments", "kronecker"}, fisher="mc")
    torch.save(together.state_dict(), f"{folder}/statistics{rank()}.pt")
    seen = [len(targets) for _, targets in share]
    assert seen == [len(targets) for _, targets in batches()]  # rank 0's first, in every process


def prune_together(folder: str) -> None:
    small, report = pruned(Sharded(batches()[SHARES[rank()]]))
    torch.save({"state": small.state_dict(), "plans": report.to_json()}, f"{folder}/pruned{rank()}.pt")
    torch.manual_seed(rank())  # what differs by process must not tell them apart
    tuned, report = pruned(Sharded(batches()[SHARES[rank()]]), finetune)
    if rank() == 0:
        pl.save(tuned, f"{folder}/tuned.safetensors")
    torch.save({"state": tuned.state_dict(), "plans": report.to_json()}, f"{folder}/tuned{rank()}.pt")


def train_a_sparse_model(folder: str) -> None:
    model = net()
    sparse = pl.sparsify(model, pl.criteria.Magnitude().elementwise(model), 0.5)
    penalty = pl.regularizers.GroupLasso(pl.trace(net(), torch.randn(IMAGES)), 1e-3)
    finetune(sparse)
    same_everywhere(sparse)
    wrapped = DistributedDataParallel(penalty.model)
    (F.cross_entropy(wrapped(batches()[rank()][0]), batches()[rank()][1]) + penalty.loss()).backward()
    gradients = {name: parameter.grad for name, parameter in penalty.model.named_parameters()}
    torch.save({"sparse": sparse.state_dict(), "gradients": gradients}, f"{folder}/sparse{rank()}.pt")


def go_wrong(folder: str) -> None:
    good = batches()[SHARES[rank()]]
    bad = good if rank() == 0 else [(inputs[:, :2], targets) for inputs, targets in good]
    graph = pl.trace(net(), torch.randn(IMAGES))
    with pytest.raises(pl.BatchError, match="Rank 1 failed.*cannot take inputs of shape"):
        pl.criteria.get("obd")(graph, Sharded(bad))
    with pytest.raises(pl.BatchError, match="Rank 1 failed.*empty loader"):
        pl.collect(graph, Sharded(good if rank() == 0 else []), {"moments"})

    class Broken:
        def __iter__(self):
            yield good[0]
            raise OSError("the disk is gone")

    with pytest.raises(pl.BatchError, match="Rank 1 could not read its batches: OSError: the disk is gone"):
        pl.criteria.get("gate")(graph, Sharded(good if rank() == 0 else Broken()))
    with pytest.raises(pl.PlanError, match="hold Sequentials of different shapes"):
        same_everywhere(net() if rank() == 0 else nn.Sequential(nn.Linear(2, 2)))
    torch.save(True, f"{folder}/told{rank()}.pt")


WORKS = (score_together, prune_together, train_a_sparse_model, go_wrong)


def one_of_two(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = {"init_method": f"file://{folder}/meet", "timeout": timedelta(seconds=300)}
    dist.init_process_group("gloo", rank=number, world_size=2, **meeting)
    for work in WORKS:
        try:
            work(folder)
        except BaseException:
            Path(folder, f"failed{number}").write_text(f"{work.__name__}: {traceback.format_exc()}")
            os._exit(1)  # the other one would wait
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes do all of it once: most of the time goes into starting them."""
    folder = tmp_path_factory.mktemp("two")
    processes = mp.spawn(one_of_two, (str(folder),), nprocs=2, join=False)
    with contextlib.suppress(mp.ProcessExitedException):
        while not processes.join():
            pass
    return folder


def found_by_both(folder: Path, what: str) -> tuple[Any, Any]:
    failures = "".join(file.read_text() for file in sorted(folder.glob("failed*")))
    assert all((folder / f"{what}{number}.pt").exists() for number in range(2)), failures
    first, second = (torch.load(folder / f"{what}{number}.pt") for number in range(2))
    return first, second


def test_two_processes_score_like_one(folder):
    first, second = found_by_both(folder, "scores")
    alone = scores_of(net(), batches())
    for name, by_group in alone.items():
        for group, wanted in by_group.items():
            scale = float(wanted.abs().max())
            torch.testing.assert_close(first[name][group], wanted, rtol=0, atol=1e-6 * max(scale, 1), msg=f"{name}")
            assert float((first[name][group] - wanted).abs().max()) <= 1e-4 * scale, name  # small ones too
            assert torch.equal(first[name][group], second[name][group]), name
    wanted = pl.collect(net(), batches(), {"grad", "moments", "kronecker"}, fisher="mc")
    for state in found_by_both(folder, "statistics"):
        found = pl.Statistics.from_state_dict(state)
        assert found.samples == wanted.samples == 120
        for name, value in wanted.moments.items():
            torch.testing.assert_close(found.moments[name], value, rtol=1e-5, atol=1e-6)


def test_two_processes_make_one_plan_and_one_model(folder):
    first, second = found_by_both(folder, "pruned")
    small, report = pruned(batches())
    assert first["plans"] == second["plans"]
    for found, wanted in zip(json.loads(first["plans"])["plans"], json.loads(report.to_json())["plans"], strict=True):
        assert found["cuts"] == wanted["cuts"]
    for name, value in small.state_dict().items():
        assert torch.equal(first["state"][name], second["state"][name])
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-5)  # a system of equations on top
    first, second = found_by_both(folder, "tuned")
    assert first["plans"] == second["plans"]
    again = pl.load(net(), folder / "tuned.safetensors").state_dict()
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]) and torch.equal(value, again[name])


def test_masks_and_penalties_train_in_ddp(folder):
    first, second = found_by_both(folder, "sparse")
    start = net()
    sparse = pl.sparsify(start, pl.criteria.Magnitude().elementwise(start), 0.5).state_dict()
    for name, value in first["sparse"].items():
        assert torch.equal(value, second["sparse"][name])
        assert not name.endswith(".mask") or torch.equal(value, sparse[name])
    assert (first["sparse"]["0.parametrizations.weight.original"] != sparse["0.parametrizations.weight.original"]).any()
    model = net()
    halves = sum(F.cross_entropy(model(inputs), targets) for inputs, targets in batches()[:2]) / 2
    (halves + pl.regularizers.GroupLasso(pl.trace(model, torch.randn(IMAGES)), 1e-3).loss()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(first["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_what_goes_wrong_in_one_process_is_told_in_both(folder):
    assert found_by_both(folder, "told") == (True, True)


def test_without_other_processes(small):
    with pytest.raises(pl.BatchError, match="init_process_group"):
        Sharded(batches())
    assert rank() == 0 and same_everywhere(small[0]) is small[0]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_model_is_refused_with_the_way_to_the_model_inside(small, tmp_path, wrap):
    model, inputs = small
    wrapped, scores = wrap(model), pl.criteria.Magnitude().elementwise(model)
    plan = pl.plan(pl.criteria.Magnitude()(pl.trace(model, inputs)), ratio=0.5)
    pl.save(model, tmp_path / "file")
    inner = r"`model\.(module|_orig_mod)`, and wrap the result again"
    for work in (
        lambda: pl.trace(wrapped, inputs),
        lambda: pl.apply(wrapped, plan),
        lambda: pl.prune(wrapped, inputs, flops=0.5),
        lambda: pl.sparsify(wrapped, scores, 0.5),
        lambda: pl.save(wrapped, tmp_path / "file"),
        lambda: pl.load(wrapped, tmp_path / "file"),
    ):
        with pytest.raises(pl.PruneLabError, match=inner):
            work()


def test_the_example_runs_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "examples" / "ddp_prune.py"), "--images", "64", "--out", str(tmp_path / "small.safetensors")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fine-tuned") == 1, done.stdout  # one table, by rank 0
    small = pl.load(pl.zoo.build("resnet20"), tmp_path / "small.safetensors")
    images = torch.randn(1, 3, 32, 32)
    assert pl.count(small, images).flops <= 0.5 * pl.count(pl.zoo.build("resnet20"), images).flops

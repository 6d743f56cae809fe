"""The grids of sweeps/: what they name exists, what they quote has a source, a job of each kind runs at tiny size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import prunelab as pl
from prunelab.experiments.shootout.protocol import Run
from prunelab.experiments.shootout.settings import Settings
from prunelab.experiments.sweeping.grid import Grid, read_grid
from prunelab.experiments.sweeping.jobs import prepared
from prunelab.training.checkpoints import weights_path
from sweeps import keep
from sweeps.table import lines

SWEEPS = Path(__file__).parents[2] / "sweeps"
GRIDS = {path.stem: path for path in sorted(SWEEPS.glob("*.yaml"))}


def options_of(job: dict) -> dict:
    given = job.get("options", {})
    return json.loads(given or "{}") if isinstance(given, str) else given


@pytest.fixture(params=GRIDS)
def grid(request) -> Grid:
    return read_grid(GRIDS[request.param])


def test_there_is_a_grid_for_every_experiment():
    assert set(GRIDS) == {
        *("eigendamage-cifar", "eigendamage-iterative", "eigendamage-small", "eigendamage-tiny"),
        *("oba-oneshot", "oba-iterative", "oba-imagenet", "oba-unstructured", "quick"),
    }


def test_every_parameter_is_one_of_the_notebook_and_of_its_type(grid):
    """``prepared`` compares names and values with the cell of parameters in 15_shootout."""
    assert grid.name == Path(grid.source).stem and len(prepared(grid).jobs) == len(grid.jobs())


def test_criteria_networks_and_data_sets_exist(grid):
    seen = set()
    for job in grid.jobs():
        pl.criteria.get(job["criterion"], **options_of(job))
        assert job["dataset"] in pl.data.NAMES
        seen.add(job["model"])
    with torch.device("meta"):
        for model in seen:
            assert isinstance(pl.zoo.build(model, num_classes=10), torch.nn.Module)


def test_checkpoints_have_the_names_that_training_gives_them(grid):
    for job in grid.jobs():
        if job.get("checkpoint"):
            assert job["checkpoint"] == weights_path(Path(), job["model"], job["dataset"]).name


def test_grids_say_how_long_they_train_and_on_what_they_test(grid):
    """The notebook's own defaults are small."""
    for job in grid.jobs():
        assert job.keys() >= {"epochs", "test_images", "scoring"}


def test_published_numbers_stand_beside_a_job_and_name_their_source(grid):
    for row in grid.published:
        beside = [job for job in grid.jobs() if row["match"].items() <= job.items()]
        assert len(beside) == 1 and "table" in row["source"]
        assert 0 < row["accuracy"] < row["accuracy_before"] < 1 and row["flops_kept"] == pytest.approx(
            beside[0]["share"], rel=0.01
        )


def test_shares_in_text_end_at_the_share(grid):
    for job in grid.jobs():
        if " " in job.get("schedule", ""):
            left = [float(share) for share in job["schedule"].split()]
            assert left == sorted(left, reverse=True) and (left[-1], len(left)) == (job["share"], job["steps"])


def test_the_readme_shows_the_table_of_grids():
    assert "\n".join(lines()) in (SWEEPS / "README.md").read_text(encoding="utf-8")


# ── what the quick grid found ─────────────────────────────────────────────────────────────────────────────────────


def test_what_the_quick_grid_found_is_kept_and_shown():
    """`python -m prunelab sweep sweeps/quick.yaml`, then `python -m sweeps.keep out/quick`, write all of it."""
    if not keep.RESULTS.is_dir():
        pytest.skip("the quick grid has not been run for this version: make it with the two commands above")
    rows = pd.read_csv(keep.RESULTS / "table.csv", keep_default_na=False, na_values=[""])
    about = json.loads((keep.RESULTS / "summary.json").read_text(encoding="utf-8"))
    assert keep.EXAMPLE.read_bytes() == (keep.RESULTS / "table.csv").read_bytes()
    readme = (SWEEPS.parent / "README.md").read_text(encoding="utf-8")
    assert keep.BLOCK.search(readme)[0].split("-->\n", 1)[1] == keep.block(rows, about) + "<!-- /quick -->"
    assert len(rows) == about["done"] == about["jobs"] == len(read_grid(GRIDS["quick"]).jobs())
    assert all((keep.RESULTS / name).stat().st_size < 100_000 for name in keep.FIGURES)
    assert (rows["flops_kept"] <= rows["share"] * 1.001).all(), "more FLOPs are left than were asked for"


def test_a_table_has_the_means_over_seeds_and_a_dash_where_nothing_was_run():
    rows = pd.DataFrame(
        {
            "criterion": ["obd", "obd", "magnitude"],
            "options": "{}",
            "model": ["resnet20", "resnet20", "vit_small"],
            "share": 0.5,
            "compensate": False,
            "accuracy_cut": [0.1, 0.3, 0.6],
            "accuracy": [0.7, 0.8, 0.65],
        }
    )
    lines = {line.split("|")[1].strip(): line for line in keep.shown(rows).splitlines()}
    assert lines["OBD, empirical Fisher"] == "| OBD, empirical Fisher | – | 20.0 → 75.0 | – | – | – | – |"
    assert lines["magnitude"].endswith("| – | 60.0 → 65.0 |")


# ── a job of each kind, with small networks on a few random images ────────────────────────────────────────────────


def small_resnet(num_classes: int) -> torch.nn.Module:
    """torchvision's own classes, as resnet50 and vit_b_16 are."""
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=num_classes, width_per_group=16)


def small_vit(num_classes: int) -> torch.nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=num_classes)


SMALL = {
    "vgg19": lambda classes: pl.zoo.VGG((16, 16, "M", 32, 32), classes),
    "resnet32_wide": lambda classes: pl.zoo.ResNet(8, classes, width=24),
    "resnet20": lambda classes: pl.zoo.ResNet(8, classes, width=16),
    "vgg13_narrow": lambda classes: pl.zoo.VGG((16, 16, "M", 32, 32), classes),
    "vit_small": lambda classes: pl.zoo.VisionTransformer(16, 32, 2, 4, 64, classes),
}
ELSEWHERE = {
    "torchvision:resnet50@IMAGENET1K_V1": "tests.experiments.test_sweep_grids:small_resnet",
    "torchvision:vit_b_16@IMAGENET1K_V1": "tests.experiments.test_sweep_grids:small_vit",
}
CLASSES = {"cifar100": 12, "tiny-imagenet": 12, "imagenet": 12}


def few_images(name: str) -> pl.data.TrainTest:
    classes, size = CLASSES.get(name, 10), 32 if name == "imagenet" else 16
    spec = replace(pl.data.CIFAR10, classes=tuple(map(str, range(classes))), size=size)
    generator = torch.Generator().manual_seed(0)

    def some(number: int) -> pl.data.ImageSet:
        images = torch.randint(256, (number, 3, size, size), generator=generator, dtype=torch.uint8)
        return pl.data.ImageSet(images, torch.arange(number) % classes, spec=spec)

    return pl.data.TrainTest(some(96), some(48))


@pytest.fixture
def scaled_down(tmp_path, monkeypatch):
    """Small networks and data sets under the names of the large ones."""
    for name, make in SMALL.items():
        monkeypatch.setitem(pl.zoo.MODELS, name, make)
    monkeypatch.setattr(pl.data, "get", few_images)
    monkeypatch.setenv("PRUNELAB_DATASETS", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()

    def scale(job: dict) -> dict:
        torch.manual_seed(0)
        model = ELSEWHERE.get(job["model"], job["model"])
        name = job.get("checkpoint") or "any.safetensors"
        classes = few_images(job["dataset"]).classes
        save_file(pl.zoo.build(model, classes).state_dict(), tmp_path / "checkpoints" / name)
        less = {"scoring": min(job["scoring"], 48), "test_images": 32, "images": 64, "batch_size": 16}
        steps = min(job.get("steps", 1), 2)
        schedule = " ".join(job.get("schedule", "geometric").split()[-steps:])
        less |= {"steps": steps, "schedule": schedule, "epochs": min(job["epochs"], 0.5 * steps)}
        less |= {"latency_images": 0, "precision": "float32"}
        return job | less | {"model": model, "checkpoint": name, "device": "cpu"}

    return scale


def defaults(notebook: Path) -> dict:
    """Return the values of the notebook's cell of parameters."""
    cells = nbformat.read(notebook, 4).cells
    values: dict = {}
    exec(next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", ())), values)
    return values


def kinds(grid: Grid) -> list[dict]:
    """Return one job for each network and method, each time another criterion if there is one."""
    found: dict[tuple, dict] = {}
    used: set[str] = set()
    for job in grid.jobs():
        key = (job["model"], job["method"])
        if key not in found or (found[key]["criterion"] in used and job["criterion"] not in used):
            found[key] = job
    return list(found.values())


@pytest.mark.filterwarnings("ignore::UserWarning")  # small networks have coarse units, few images give low ranks
@pytest.mark.parametrize("name", GRIDS)
def test_a_job_of_each_kind_runs_at_tiny_size(name, scaled_down):
    grid = read_grid(GRIDS[name])
    for job in kinds(grid):
        given = scaled_down(job) | {"options": json.dumps(options_of(job))}
        settings = Settings.of(defaults(grid.notebook) | given)
        run = Run(settings)
        run.measure("before")
        for share in run.shares:
            run.cut(run.score(), share)
            run.measure("cut")
            run.finetune()
            run.measure("fine-tuned")
        row = run.row()
        left = row["weights_kept"] if settings.budget == "density" else row[f"{settings.budget}_kept"]
        assert 0 < left <= settings.share * 1.02 + 0.01, (name, job, left)
        assert 0 <= row["accuracy"] <= 1 and row["loss"] > 0

"""Training: it learns, it is seeded, and a run that was stopped ends like one that was not."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import prunelab as pl
from prunelab.training import Recipe, evaluate, fit, train_checkpoint

RECIPE = Recipe(epochs=3, lr=0.05, weight_decay=5e-4, batch_size=50)


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)
    )


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


def test_training_lowers_the_loss_and_is_seeded(mini):
    images, models = mini.train.subset(300), [tiny(), tiny(), tiny()]
    logs = [
        fit(model, images, RECIPE, seed=seed, progress=False) for model, seed in zip(models, (0, 0, 1), strict=True)
    ]
    assert logs[0][-1]["loss"] < logs[0][0]["loss"]
    assert same(models[0], models[1]) and not same(models[0], models[2])
    assert not models[0].training


def test_a_run_that_was_stopped_ends_like_one_that_was_not(mini, tmp_path):
    images, whole, stopped = mini.train.subset(300), tiny(), tiny()
    fit(whole, images, RECIPE, progress=False)

    class Stop(Exception):
        pass

    def stop(epoch: int) -> dict[str, float]:
        if epoch == 2:
            raise Stop
        return {}

    with pytest.raises(Stop):
        fit(stopped, images, RECIPE, state=tmp_path / "state", after_epoch=stop, progress=False)
    resumed = tiny(seed=9)
    log = fit(resumed, images, RECIPE, state=tmp_path / "state", progress=False)
    assert [row["epoch"] for row in log] == [1, 2, 3] and same(resumed, whole)


def test_a_damaged_state_is_an_error(mini, tmp_path):
    (tmp_path / "state").write_text("nonsense")
    with pytest.raises(pl.DataError, match="delete it to start again"):
        fit(tiny(), mini.train.subset(50), RECIPE, state=tmp_path / "state", progress=False)


def test_evaluation_counts_samples_not_batches(mini):
    model, images = tiny().eval(), mini.test.subset(100)
    one = evaluate(model, pl.data.loader(images, 100))
    many = evaluate(model, pl.data.loader(images, 7))
    assert many["accuracy"] == one["accuracy"] and many["loss"] == pytest.approx(one["loss"], rel=1e-5)
    with pytest.raises(pl.DataError, match="nothing to evaluate"):
        evaluate(model, [])


def test_a_checkpoint_is_written_with_its_log(mini, tmp_path, monkeypatch):
    monkeypatch.setitem(pl.zoo.MODELS, "tiny", lambda num_classes: tiny())
    monkeypatch.setattr(pl.data, "cifar10", lambda _: pl.data.TrainTest(mini.train.subset(200), mini.test.subset(100)))
    report = train_checkpoint("tiny", "mini", tmp_path, tmp_path / "state", RECIPE, seed=0)
    assert json.loads((tmp_path / "tiny.json").read_text()) == report and len(report["log"]) == 3
    monkeypatch.setattr(pl.zoo, "checkpoint", lambda name: tmp_path / f"{name}.safetensors")
    found = evaluate(pl.zoo.load("tiny"), pl.data.loader(mini.test.subset(100), 100))
    assert found["accuracy"] == report["accuracy"]["mini test set"]

"""The zoo: trained networks are as good as their logs say, and what is missing says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import prunelab as pl
from prunelab import training, zoo

WANTED = {"resnet20": 0.90, "vgg13_narrow": 0.90, "vit_small": 0.75}


@pytest.mark.parametrize("name", WANTED)
def test_a_checkpoint_is_as_good_as_its_log_says(name, mini):
    log = json.loads(zoo.checkpoint(name).with_suffix(".json").read_text())
    assert log["accuracy"]["10000 test images"] >= WANTED[name] and log["training_images"] == 50_000
    assert zoo.checkpoint(name).stat().st_size <= 2.5e6
    model = zoo.load(name)
    assert not model.training and all(parameter.dtype == torch.float32 for parameter in model.parameters())
    found = training.evaluate(model, pl.data.loader(mini.test, 500))["accuracy"]
    # Kernels of another machine may decide a close call otherwise: two images of 2,000.
    assert found == pytest.approx(log["accuracy"]["mini test set"], abs=1e-3)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_networks_have_as_many_outputs_as_asked(name):
    with torch.no_grad():
        assert zoo.build(name, num_classes=7).eval()(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_the_readme_shows_what_the_logs_say():
    """`python -m prunelab.zoo` prints the table."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert zoo.table() in readme


def test_every_network_has_a_recipe():
    assert training.RECIPES.keys() == zoo.MODELS.keys()


def test_what_is_missing_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(pl.DataError, match="no network 'resnet50'.*resnet20"):
        pl.zoo.load("resnet50")
    monkeypatch.setattr(zoo, "checkpoint", lambda name: tmp_path / f"{name}.safetensors")
    with pytest.raises(pl.DataError, match="missing.*prunelab.training resnet20"):
        pl.zoo.load("resnet20")
    (tmp_path / "resnet20.safetensors").write_bytes(b"nonsense")
    with pytest.raises(pl.DataError, match="damaged"):
        pl.zoo.load("resnet20")

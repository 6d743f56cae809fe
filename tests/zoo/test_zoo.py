"""The zoo: trained networks are as good as their logs say, and what is missing says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

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
    readme = (Path(__file__).parents[2] / "README.md").read_text()
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


# ── networks from elsewhere ───────────────────────────────────────────────────────────────────────────────────────


def of_three(num_classes: int) -> torch.nn.Module:
    return torch.nn.Linear(3, num_classes)


def no_network() -> int:
    return 3


def test_networks_of_torchvision_timm_and_of_your_own_are_named_by_where_they_come_from():
    assert zoo.build("torchvision:resnet18", num_classes=5).fc.out_features == 5
    assert zoo.build("tests.zoo.test_zoo:of_three", num_classes=4).out_features == 4
    pytest.importorskip("timm")
    assert zoo.build("timm:resnet18", num_classes=6).fc.out_features == 6


def test_a_checkpoint_is_found_here_or_among_the_data_sets(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = zoo.build("resnet20", num_classes=7)
    monkeypatch.setenv("PRUNELAB_DATASETS", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    state = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "checkpoints" / "seven.safetensors")
    for where in ("seven.safetensors", tmp_path / "checkpoints" / "seven.safetensors"):
        found = zoo.load("resnet20", where, num_classes=7)
        assert torch.allclose(found.fc.weight, model.fc.weight, atol=1e-3) and not found.training
    with pytest.raises(pl.DataError, match="of another network .* is it of this network and number of classes"):
        zoo.load("resnet20", "seven.safetensors", num_classes=10)
    with pytest.raises(pl.DataError, match="no checkpoint eight.*, neither here nor.*prunelab.training resnet20"):
        zoo.load("resnet20", "eight.safetensors", num_classes=7)


def test_published_weights_are_asked_for_by_name(monkeypatch):
    asked = []

    def fetch(url, **_):
        asked.append(url)
        return torchvision.models.resnet18().state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    assert not zoo.load("torchvision:resnet18@IMAGENET1K_V1", num_classes=1000).training
    assert asked == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet17", "torchvision has no network 'resnet17'.*list_models"),
        ("torchvision:resnet18@V7", "no weights 'V7' of resnet18.*It has IMAGENET1K_V1"),
        ("torchvision:resnet18@IMAGENET1K_V1", "cannot be downloaded .*no network.*by hand into .*checkpoints"),
        ("tests.zoo.test_zoo:nothing", "tests.zoo.test_zoo:nothing cannot be found"),
        ("no.such.package:f", "no.such.package:f cannot be found"),
        ("tests.zoo.test_zoo:no_network", "returned a int, not a torch.nn.Module"),
    ],
)
def test_what_is_not_elsewhere_says_what_to_do(name, message, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(pl.DataError, match=message):
        zoo.load(name, num_classes=1000)


def test_a_trained_network_of_other_classes_is_an_error():
    with pytest.raises(pl.DataError, match="resnet20 knows 10 classes, not 100.*prunelab.training resnet20"):
        zoo.load("resnet20", num_classes=100)
    with pytest.raises(pl.DataError, match="resnet50 knows 1000 classes, not 10"):
        zoo.load("torchvision:resnet50")


def test_without_timm_its_networks_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(pl.DataError, match="needs timm, which is not installed: pip install timm"):
        zoo.build("timm:resnet18")

"""The embedded images: complete, balanced, normalised, and never silently wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import prunelab as pl
from prunelab import data


def test_the_embedded_images_are_complete_and_balanced(mini):
    assert torch.bincount(mini.train.targets).tolist() == [500] * 10
    assert torch.bincount(mini.test.targets).tolist() == [200] * 10
    assert mini.train.images.shape == (5000, 3, 32, 32) and mini.train.images.dtype == torch.uint8


def test_the_first_images_are_those_of_cifar10(mini):
    """The first training image of CIFAR-10 is a frog, the first test image a cat; their pixels are known."""
    assert data.CLASSES[mini.train.targets[0]] == "frog" and data.CLASSES[mini.test.targets[0]] == "cat"
    assert mini.train.images[0, :, 0, 0].tolist() == [59, 62, 63]
    assert mini.test.images[0, :, 0, 0].tolist() == [158, 112, 49]


def test_images_come_normalised_and_back(mini):
    images, targets = next(iter(data.loader(mini.train, 1000)))
    assert images.mean().abs() < 0.1 and (images.std() - 1).abs() < 0.1 and targets.dtype == torch.int64
    shown = (data.denormalize(images) * 255).round().to(torch.uint8)
    assert torch.equal(shown, mini.train.images[:1000])


def test_no_image_is_in_both_sets(mini):
    rows = {bytes(image.numpy().tobytes()) for image in mini.train.images}
    assert len(rows) == 5000 and not any(bytes(image.numpy().tobytes()) in rows for image in mini.test.images)


def test_shuffling_and_subsets_are_seeded(mini):
    part = mini.train.subset(100, seed=3)
    assert torch.equal(part.targets, mini.train.subset(100, seed=3).targets)
    assert not torch.equal(part.targets, mini.train.subset(100, seed=4).targets)
    orders = [torch.cat([y for _, y in data.loader(part, 32, shuffle=True, seed=seed)]) for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    with pytest.raises(pl.DataError, match="6000 images was asked of 5000"):
        mini.train.subset(6000)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(data.root() / "cifar10-mini", tmp_path / "images")


def test_a_folder_of_sheets_is_read(folder, mini):
    assert torch.equal(pl.data.cifar10(folder).test.images, mini.test.images)


def test_all_of_cifar10_may_be_a_folder_that_our_script_wrote(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNELAB_DATASETS", str(tmp_path / "store"))
    (tmp_path / "store").mkdir()
    folder.rename(tmp_path / "store" / "cifar10")
    assert len(pl.data.cifar10("full").test) == len(pl.data.get("cifar10").test) > 0


def test_damage_is_an_error_that_names_the_file(folder):
    sheet = folder / "train-3.webp"
    whole = sheet.read_bytes()
    sheet.write_bytes(whole[:1000] + b"x" + whole[1001:])
    with pytest.raises(pl.DataError, match="train-3.webp is damaged"):
        pl.data.cifar10(folder)
    sheet.unlink()
    with pytest.raises(pl.DataError, match="train-3.webp is missing"):
        pl.data.cifar10(folder)
    sheet.write_bytes(whole)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["test"]["labels"] = manifest["test"]["labels"][:-1]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(pl.DataError, match="2000 images but 1999 labels"):
        pl.data.cifar10(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(pl.DataError, match="manifest.json cannot be read"):
        pl.data.cifar10(folder)


def test_what_is_missing_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(pl.DataError, match="neither manifest.json nor.*'mini' and 'full'"):
        pl.data.cifar10(tmp_path)
    monkeypatch.setenv("PRUNELAB_DATA", str(tmp_path))
    with pytest.raises(pl.DataError, match="PRUNELAB_DATA"):
        pl.data.cifar10("mini")


def test_the_full_set_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(data.Path, "home", lambda: tmp_path)
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", offline)
    with pytest.raises(pl.DataError, match="needs a network.*by hand.*'mini'"):
        pl.data.cifar10("full")

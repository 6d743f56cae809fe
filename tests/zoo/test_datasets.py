"""The data sets of the papers, read from their own layouts, and errors that say what belongs where."""

from __future__ import annotations

import hashlib
import pickle
import tarfile

import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100

import prunelab as pl
from prunelab.training import Recipe, evaluate, fit

NAMES = ("n01443537", "n01629819", "n01641577")


def picture(path, size, colour) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def colour(number: int) -> tuple[int, int, int]:
    return 80 * number, 255 - 80 * number, 10


@pytest.fixture
def tiny(tmp_path):
    """Tiny-ImageNet as its archive has it, with three classes and six validation images."""
    root = tmp_path / "tiny-imagenet-200"
    for number, name in enumerate(NAMES):
        for index in range(4):
            picture(root / "train" / name / "images" / f"{name}_{index}.JPEG", (64, 64), colour(number))
    lines = []
    for index in range(6):
        number = (2 * index) % 3  # not in the order of their names
        picture(root / "val" / "images" / f"val_{index}.JPEG", (64, 64), colour(number))
        lines.append(f"val_{index}.JPEG\t{NAMES[number]}\t0\t0\t63\t63\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def test_tiny_imagenet_is_read_with_its_annotations(tiny, monkeypatch):
    monkeypatch.setenv("PRUNELAB_DATASETS", str(tiny.parent))
    images = pl.data.get("tiny-imagenet")
    assert (len(images.train), len(images.test), images.size, images.classes) == (12, 6, 64, 3)
    assert images.inputs().shape == (1, 3, 64, 64) and images.test.targets.tolist() == [0, 2, 1, 0, 2, 1]
    for image, target in images.test:
        shown = 255 * images.test.spec.denormalize(image).mean((1, 2))
        assert shown == pytest.approx(colour(target), abs=4)  # JPEG rounds


def test_tiny_imagenet_sorted_into_folders_is_the_same(tiny):
    wanted = pl.data.get(tiny).test.targets
    for index, number in enumerate(wanted.tolist()):
        home = tiny / "val" / NAMES[number] / f"val_{index}.JPEG"
        home.parent.mkdir(exist_ok=True)
        (tiny / "val" / "images" / f"val_{index}.JPEG").rename(home)
    (tiny / "val" / "images").rmdir()
    (tiny / "val" / "val_annotations.txt").unlink()
    assert sorted(pl.data.tiny_imagenet(tiny).test.targets.tolist()) == sorted(wanted.tolist())


def test_annotations_that_do_not_fit_are_errors(tiny):
    (tiny / "val" / "images" / "val_3.JPEG").unlink()
    with pytest.raises(pl.DataError, match=r"val_3.JPEG is missing, but val_annotations.txt names it"):
        pl.data.get(tiny)
    (tiny / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99999999\t0\t0\t1\t1\n")
    with pytest.raises(pl.DataError, match="gives val_0.JPEG the class 'n99999999', which the training set lacks"):
        pl.data.get(tiny)


@pytest.fixture
def own(tmp_path):
    """A folder of large images of different sizes."""
    for part, number in (("train", 8), ("val", 3)):
        for place, name in enumerate(("cat", "dog")):
            for index in range(number):
                picture(tmp_path / part / name / f"{index}.png", (300 + 10 * index, 260), colour(place))
    return tmp_path


def test_a_folder_of_large_images_is_cut_to_one_size(own):
    images = pl.data.get(own)
    assert images.size == 224 and images.train.spec.classes == ("cat", "dog")
    inputs, targets = next(iter(pl.data.loader(images.test, 6)))
    assert inputs.shape == (6, 3, 224, 224) and targets.tolist() == [0, 0, 0, 1, 1, 1]
    taken = images.train.augmented()[0][0]
    assert taken.shape == (3, 224, 224)


def test_a_folder_named_imagenet_is_numbered_by_its_folders(own, monkeypatch):
    monkeypatch.setenv("PRUNELAB_DATASETS", str(own.parent))
    own.rename(own.parent / "imagenet")
    images = pl.data.get("imagenet")
    assert images.classes == 2 and images.train.targets.bincount().tolist() == [8, 8]


def test_archives_of_imagenet_are_unpacked_by_torchvision(own, tmp_path, monkeypatch):
    """Three large archives, of which torchvision checks the sums; here a stand-in moves folders into place."""
    from prunelab.data import files

    root, asked = tmp_path / "archives", []
    root.mkdir()
    (root / files.DEVKIT).write_text("")

    def unpack(place, split):
        asked.append(split)
        (own / split).rename(root / split)

    monkeypatch.setattr("torchvision.datasets.ImageNet", unpack)
    assert pl.data.imagenet(root).classes == 2 and asked == ["train", "val"]
    assert len(pl.data.imagenet(root).test) == 6 and asked == ["train", "val"]  # unpacked once


def test_damaged_archives_of_imagenet_are_an_error(tmp_path):
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_text("nonsense")
    with pytest.raises(pl.DataError, match="archives in .* cannot be unpacked: .*corrupted"):
        pl.data.imagenet(tmp_path)


def test_an_unknown_class_in_the_test_set_is_an_error(own):
    picture(own / "val" / "emu" / "0.png", (300, 300), (0, 0, 0))
    with pytest.raises(pl.DataError, match="val has a class 'emu' that the training set in .*train lacks"):
        pl.data.get(own)


def test_small_images_of_two_sizes_are_an_error_that_names_the_file(own, tmp_path):
    for place in ("train", "val"):
        picture(tmp_path / "small" / place / "cat" / "0.png", (32, 32), (0, 0, 0))
    picture(tmp_path / "small" / "val" / "cat" / "1.png", (40, 40), (0, 0, 0))
    images = pl.data.folder(tmp_path / "small")
    assert images.size == 32 and len(list(images.train)) == 1
    with pytest.raises(pl.DataError, match="1.png is 40 × 40 pixels, but the first image of the set is 32 × 32"):
        list(images.test)


def test_a_file_that_is_no_image_is_an_error_that_names_it(own):
    images = pl.data.get(own)
    (own / "val" / "dog" / "1.png").write_bytes(b"nonsense")
    with pytest.raises(pl.DataError, match="1.png is not an image that can be read"):
        list(images.test)


def test_subsets_and_augmentation_of_files_are_seeded(own):
    train = pl.data.get(own).train
    part = train.subset(5, seed=1)
    assert len(part) == 5 and part.files == train.subset(5, seed=1).files != train.subset(5, seed=2).files
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seen.append(torch.cat([inputs for inputs, _ in pl.data.loader(part.augmented(), 2, shuffle=True, seed=seed)]))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_networks_train_on_files_as_on_images_in_memory(tiny):
    torch.manual_seed(0)
    images = pl.data.get(tiny)
    model = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten(), torch.nn.Linear(12, images.classes))
    fit(model, images.train, Recipe(8, lr=0.3, weight_decay=0.0, batch_size=4), progress=False)
    assert evaluate(model, pl.data.loader(images.test, 4))["accuracy"] == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12 on: this process has threads
def test_other_processes_prepare_the_same_batches(own):
    images = pl.data.get(own).train.subset(6)
    alone, beside = (torch.cat([x for x, _ in pl.data.loader(images, 2, workers=number)]) for number in (0, 2))
    assert torch.equal(alone, beside)
    seen = [
        torch.cat([x for x, _ in pl.data.loader(images.augmented(), 2, shuffle=True, seed=seed, workers=2)])
        for seed in (0, 0, 1)
    ]
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("tiny-imagenet", "train and val: get tiny-imagenet-200.zip .* or set PRUNELAB_DATASETS"),
        ("imagenet", "train and val: get the ILSVRC 2012 archives .* or set PRUNELAB_DATASETS"),
    ],
)
def test_what_cannot_be_downloaded_says_what_belongs_where(name, advice, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNELAB_DATASETS", str(tmp_path))
    with pytest.raises(pl.DataError, match=f"is not in {tmp_path / name}, .*{advice}"):
        pl.data.get(name)


def test_an_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(pl.DataError, match="no data set or folder 'cifar11'; the names are cifar10-mini, cifar10, "):
        pl.data.get("cifar11")
    with pytest.raises(pl.DataError, match="train should have a folder with images for every class"):
        pl.data.get(tmp_path)


# ── CIFAR-100, in a copy of four images ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hundred(tmp_path, monkeypatch):
    """torchvision's CIFAR-100 with two images in each part, its checksums those of the files."""
    root = tmp_path / "hundred" / "cifar-100-python"
    root.mkdir(parents=True)
    pixels = torch.arange(2 * 3072).remainder(256).byte().view(2, 3072).numpy()
    for part, labels in (("train", [3, 4]), ("test", [7, 99])):
        (root / part).write_bytes(pickle.dumps({"data": pixels, "fine_labels": labels}))
    names = [f"class {number}" for number in range(100)]
    (root / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    archive = root.parent / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(root, root.name)
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in (*root.iterdir(), archive)}
    for part in ("train", "test"):
        monkeypatch.setattr(CIFAR100, f"{part}_list", [[part, sums[part]]])
    meta = {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]}
    monkeypatch.setattr(CIFAR100, "meta", meta)
    monkeypatch.setattr(CIFAR100, "tgz_md5", sums[archive.name])
    return root.parent


def offline(*_, **__):
    raise OSError("no network")


def test_cifar100_has_its_own_classes_and_normalisation(hundred):
    images = pl.data.get(hundred)
    assert images.classes == 100 and images.test.targets.tolist() == [7, 99]
    assert images.train.spec.mean != pl.data.CIFAR10.mean and images.train.spec.classes[99] == "class 99"
    image, _ = images.train[0]
    shown = (255 * images.train.spec.denormalize(image)).round().byte()
    assert torch.equal(shown, images.train.images[0])


def test_an_archive_that_was_fetched_by_hand_is_unpacked(hundred, tmp_path, monkeypatch):
    store = tmp_path / "store"
    store.mkdir()
    (hundred / "cifar-100-python.tar.gz").rename(store / "cifar-100-python.tar.gz")
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", offline)
    monkeypatch.setenv("PRUNELAB_DATASETS", str(store))
    assert pl.data.get("cifar100").train.targets.tolist() == [3, 4]
    assert sorted(path.name for path in store.iterdir()) == ["cifar-100-python", "cifar-100-python.tar.gz"]


def test_a_download_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """A job that is stopped while it fetches leaves nothing that another takes for the data set."""
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", offline)
    monkeypatch.setenv("PRUNELAB_DATASETS", str(tmp_path))
    with pytest.raises(pl.DataError, match="No readable CIFAR-100 .*no network.*cifar-100-python.tar.gz by hand"):
        pl.data.get("cifar100")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_of_cifar100_is_an_error(hundred):
    (hundred / "cifar-100-python" / "test").write_bytes(b"nonsense")
    with pytest.raises(pl.DataError, match="No readable CIFAR-100 in"):
        pl.data.get(hundred)

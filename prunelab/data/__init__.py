"""Real images: the CIFAR-10 subset that travels with prunelab, the data sets of the papers, or a folder of your own.

Flows in: a name or a path.  Flows out: a training and a test set, each a plain ``torch`` data set of
``(image [3, H, W], label)`` pairs, normalised by the mean and standard deviation of its kind.

    images = pl.data.get("cifar100")
    model = pl.zoo.build("resnet32", num_classes=images.classes)
    for inputs, targets in pl.data.loader(images.train.augmented(), 128, shuffle=True): …

``sets`` says what a data set is, ``cifar`` and ``files`` know the layouts.
"""

from __future__ import annotations

from pathlib import Path

import torch

from prunelab import options
from prunelab.data.cifar import MANIFEST, cifar10, cifar100
from prunelab.data.files import ANNOTATIONS, folder, imagenet, tiny_imagenet
from prunelab.data.sets import CIFAR10, FileSet, Images, ImageSet, Spec, TrainTest, loader, store
from prunelab.errors import DataError
from prunelab.files.embedded import root

__all__ = [
    "CLASSES",
    "MANIFEST",
    "MEAN",
    "NAMES",
    "STD",
    "FileSet",
    "ImageSet",
    "Images",
    "Spec",
    "TrainTest",
    "augmentation",
    "cifar10",
    "cifar100",
    "denormalize",
    "folder",
    "get",
    "imagenet",
    "loader",
    "normalize",
    "root",
    "store",
    "tiny_imagenet",
]

CLASSES = CIFAR10.classes
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR10.mean, CIFAR10.std))
normalize, denormalize, augmentation = CIFAR10.normalize, CIFAR10.denormalize, CIFAR10.augmentation
"""Those of CIFAR-10; the ``spec`` of a set has its own."""

NAMES = ("cifar10-mini", "cifar10", "cifar100", "tiny-imagenet", "imagenet")


def get(name: str | Path) -> TrainTest:
    """Return a training and a test set by name, or from a folder.

    Args:
        name: ``"cifar10-mini"`` comes with prunelab; ``"cifar10"`` and ``"cifar100"`` are downloaded once;
            ``"tiny-imagenet"`` and ``"imagenet"`` must be put into ``$PRUNELAB_DATASETS`` (or ``~/.cache/prunelab``)
            first; or a folder with any of these, or with ``train`` and ``val`` and a folder in each for every class.

    Raises:
        DataError: there is no such set, or its files are missing or damaged; the message says what to do.

    >>> images = get("cifar10-mini")
    >>> len(images.train), images.classes, images.size
    (5000, 10, 32)
    """
    if name == "cifar10-mini":
        return cifar10("mini")
    if name == "cifar10":
        return cifar10("full")
    if name == "cifar100":
        return cifar100("full")
    if name == "tiny-imagenet":
        return tiny_imagenet()
    if name == "imagenet":
        return imagenet()
    path = options.path("name", name)
    if not path.is_dir():
        raise DataError(f"There is no data set or folder {str(name)!r}; the names are {', '.join(NAMES)}.")
    if (path / MANIFEST).is_file() or (path / "cifar-10-batches-py").is_dir():
        return cifar10(path)
    if (path / "cifar-100-python").is_dir():
        return cifar100(path)
    if (path / "val" / ANNOTATIONS).is_file():
        return tiny_imagenet(path)
    return folder(path)

"""Real images: the CIFAR-10 subset that travels with prunelab, the whole of CIFAR-10, or a folder of your own.

Flows in: ``"mini"``, ``"full"`` or a path.  Flows out: a training and a test set, each a plain ``torch`` data set of
``(image [3, 32, 32], label)`` pairs, normalised by CIFAR-10's own mean and standard deviation.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from prunelab.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
MANIFEST = "manifest.json"


def root() -> Path:
    """Return the folder that holds the embedded images and checkpoints.

    It is ``$PRUNELAB_DATA`` if set, else ``data/`` of the repository, else the copy inside the installed package.

    Raises:
        DataError: no such folder exists.
    """
    package = Path(__file__).resolve().parent
    named = os.environ.get("PRUNELAB_DATA")
    candidates = [Path(named)] if named else [package.parent / "data", package / "_data"]
    for folder in candidates:
        if (folder / "cifar10-mini").is_dir():
            return folder
    looked = " and ".join(str(folder) for folder in candidates)
    raise DataError(f"No data folder with cifar10-mini in {looked}; install prunelab again or set PRUNELAB_DATA to it.")


class ImageSet(Dataset):
    """Images as bytes, handed out normalised.

    Args:
        images: uint8 ``[N, 3, H, W]``.
        targets: int64 ``[N]``, class numbers.
        augment: applied to every image, as bytes, when it is taken (random crops and flips while training).
    """

    def __init__(self, images: Tensor, targets: Tensor, augment: Callable[[Tensor], Tensor] | None = None) -> None:
        self.images, self.targets, self.augment = images, targets, augment

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return normalize(self.augment(image) if self.augment else image), int(self.targets[index])

    def subset(self, size: int, seed: int = 0) -> ImageSet:
        """Return ``size`` images drawn without replacement, the same for the same seed.

        Raises:
            DataError: more images are asked for than there are.
        """
        if not 0 < size <= len(self):
            raise DataError(f"A subset of {size} images was asked of {len(self)}.")
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:size]
        return ImageSet(self.images[chosen], self.targets[chosen], self.augment)


class TrainTest(NamedTuple):
    """A training set and a test set."""

    train: ImageSet
    test: ImageSet


def normalize(images: Tensor) -> Tensor:
    """Turn bytes ``[..., 3, H, W]`` into floats of about zero mean and unit deviation."""
    return (images.float() / 255 - MEAN.to(images.device)) / STD.to(images.device)


def denormalize(images: Tensor) -> Tensor:
    """Invert ``normalize``, to floats in [0, 1] that can be shown."""
    return (images * STD.to(images.device) + MEAN.to(images.device)).clamp(0, 1)


def augmentation() -> Callable[[Tensor], Tensor]:
    """Return the usual augmentation for CIFAR: a random crop after padding by 4 pixels, and a random mirror."""
    return v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])


def loader(images: ImageSet, batch_size: int = 128, *, shuffle: bool = False, seed: int = 0) -> DataLoader:
    """Return batches ``(inputs [B, 3, H, W], targets [B])``; shuffling is seeded."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(images, batch_size, shuffle=shuffle, generator=generator)


def cifar10(source: str | Path = "mini") -> TrainTest:
    """Load CIFAR-10 as a training and a test set.

    Args:
        source: ``"mini"``, 5,000 training and 2,000 test images that come with prunelab;
            ``"full"``, all 60,000, downloaded once by torchvision into ``~/.cache/prunelab`` and checked;
            or a folder: one written by ``data/make_cifar10.py``, or one that torchvision's ``CIFAR10`` can read.

    Raises:
        DataError: a file is missing or damaged, or cannot be downloaded; the message says what to do.

    Source: Krizhevsky 2009, *Learning Multiple Layers of Features from Tiny Images*.
    """
    if source == "mini":
        return _read_sheets(root() / "cifar10-mini")
    if source == "full":
        return _read_torchvision(Path.home() / ".cache" / "prunelab", download=True)
    folder = Path(source)
    if (folder / MANIFEST).is_file():
        return _read_sheets(folder)
    return _read_torchvision(folder, download=False)


def _read_torchvision(folder: Path, *, download: bool) -> TrainTest:
    try:
        parts = [CIFAR10(str(folder), train=train, download=download) for train in (True, False)]
    except Exception as error:
        if download:
            advice = (
                "Downloading needs a network: fetch cifar-10-python.tar.gz by hand into that folder, or use 'mini'."
            )
        else:
            advice = f"It holds neither {MANIFEST} nor torchvision's cifar-10-batches-py; 'mini' and 'full' also work."
        raise DataError(f"No readable CIFAR-10 in {folder} ({error}). {advice}") from error
    return TrainTest(*(ImageSet(_channels_first(part.data), torch.tensor(part.targets)) for part in parts))


def _read_sheets(folder: Path) -> TrainTest:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        train, test = (_read_split(folder, manifest[split]) for split in ("train", "test"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read ({error!r}); restore it from the repository.") from error
    return TrainTest(train, test)


def _read_split(folder: Path, split: dict) -> ImageSet:
    targets = torch.tensor([int(digit) for digit in split["labels"]])
    sheets = []
    for name, checksum in split["sheets"].items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing; restore it from the repository.")
        if hashlib.sha256(path.read_bytes()).hexdigest() != checksum:
            raise DataError(f"{path} is damaged: its SHA-256 differs from {MANIFEST}; restore it from the repository.")
        pixels = np.asarray(Image.open(path).convert("RGB"))
        height, width = pixels.shape[0] // 32, pixels.shape[1] // 32
        tiles = pixels.reshape(height, 32, width, 32, 3).transpose(0, 2, 1, 3, 4)
        sheets.append(_channels_first(tiles.reshape(-1, 32, 32, 3)))
    images = torch.cat(sheets)
    if len(images) != len(targets):
        raise DataError(f"{folder}: {len(images)} images but {len(targets)} labels; restore it from the repository.")
    return ImageSet(images, targets)


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

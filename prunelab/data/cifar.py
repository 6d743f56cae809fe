"""CIFAR-10 and CIFAR-100, whole or the part of CIFAR-10 that comes with prunelab, in memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunelab.data.sets import CIFAR10, ImageSet, Spec, TrainTest, datasets, store
from prunelab.errors import DataError
from prunelab.files.embedded import root
from prunelab.options import path
from prunelab.runtime.extras import extra

MANIFEST = "manifest.json"
CIFAR100 = Spec((), size=32, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
"""Its class names come with the files."""


class CifarSplits(TrainTest):
    """A training set and a test set, both in memory."""

    train: ImageSet
    test: ImageSet


def cifar10(source: str | Path = "mini") -> CifarSplits:
    """Load CIFAR-10 as a training and a test set.

    Args:
        source: ``"mini"``, 5,000 training and 2,000 test images that come with prunelab;
            ``"full"``, all 60,000, downloaded once by torchvision into ``$PRUNELAB_DATASETS`` or ``~/.cache/prunelab``
            and checked, unless ``data/make_cifar10.py`` has written them into the folder ``cifar10`` there;
            or a folder: one written by ``data/make_cifar10.py``, or one that torchvision's ``CIFAR10`` can read.

    Raises:
        DataError: a file is missing or damaged, or cannot be downloaded; the message says what to do.

    Source: Krizhevsky 2009, *Learning Multiple Layers of Features from Tiny Images*.
    """
    path("source", source)
    if source == "mini":
        return _read_sheets(root() / "cifar10-mini")
    if source == "full" and not (store() / "cifar10" / MANIFEST).is_file():
        return _read_torchvision("CIFAR10", store(), download=True)
    folder = store() / "cifar10" if source == "full" else Path(source)
    if (folder / MANIFEST).is_file():
        return _read_sheets(folder)
    return _read_torchvision("CIFAR10", folder, download=False)


def cifar100(source: str | Path = "full") -> CifarSplits:
    """Load CIFAR-100, 50,000 training and 10,000 test images of 100 classes.

    Args:
        source: ``"full"`` downloads it once, as ``cifar10`` does; or a folder that torchvision's ``CIFAR100`` can read.

    Raises:
        DataError: a file is missing or damaged, or cannot be downloaded; the message says what to do.

    Source: Krizhevsky 2009, *Learning Multiple Layers of Features from Tiny Images*.
    """
    if source == "full":
        return _read_torchvision("CIFAR100", store(), download=True)
    return _read_torchvision("CIFAR100", Path(source), download=False)


def _read_torchvision(which: str, folder: Path, *, download: bool) -> CifarSplits:
    small, kind = which == "CIFAR10", getattr(datasets(), which)
    try:
        if download:
            _download(kind, folder)
        parts = [kind(str(folder), train=train) for train in (True, False)]
    except Exception as error:
        if download:
            advice = f"Downloading needs a network: fetch {kind.filename} by hand into that folder"
            advice += ", or use 'mini', which comes with prunelab." if small else "."
        elif small:
            advice = f"It holds neither {MANIFEST} nor torchvision's {kind.base_folder}; 'mini' and 'full' also work."
        else:
            advice = f"It does not hold torchvision's {kind.base_folder}; 'full' also works."
        raise DataError(f"No readable {which.replace('R1', 'R-1')} in {folder} ({error}). {advice}") from error
    spec = CIFAR10 if small else replace(CIFAR100, classes=tuple(parts[0].classes))
    train, test = (ImageSet(_channels_first(part.data), torch.tensor(part.targets), spec=spec) for part in parts)
    return CifarSplits(train, test)


def _download(kind: Any, folder: Path) -> None:
    """Let torchvision fetch the files, unless they are there; jobs that start together do not disturb each other."""
    if (folder / kind.base_folder).is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        if (folder / kind.filename).is_file():  # fetched by hand
            shutil.copy(folder / kind.filename, fresh)
        kind(fresh, download=True)
        try:
            os.rename(Path(fresh) / kind.base_folder, folder / kind.base_folder)
        except OSError:
            if not (folder / kind.base_folder).is_dir():  # another job was faster
                raise


def _read_sheets(folder: Path) -> CifarSplits:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        train, test = (_read_split(folder, manifest[split]) for split in ("train", "test"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read ({error!r}); restore it from the repository.") from error
    return CifarSplits(train, test)


def _read_split(folder: Path, split: dict[str, Any]) -> ImageSet:
    image = extra("PIL.Image", "vision", "pl.data")
    targets = torch.tensor([int(digit) for digit in split["labels"]])
    sheets = []
    for name, checksum in split["sheets"].items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing; restore it from the repository.")
        if hashlib.sha256(path.read_bytes()).hexdigest() != checksum:
            raise DataError(f"{path} is damaged: its SHA-256 differs from {MANIFEST}; restore it from the repository.")
        pixels = np.asarray(image.open(path).convert("RGB"))
        height, width = pixels.shape[0] // 32, pixels.shape[1] // 32
        tiles = pixels.reshape(height, 32, width, 32, 3).transpose(0, 2, 1, 3, 4)
        sheets.append(_channels_first(tiles.reshape(-1, 32, 32, 3)))
    images = torch.cat(sheets)
    if len(images) != len(targets):
        raise DataError(f"{folder}: {len(images)} images but {len(targets)} labels; restore it from the repository.")
    return ImageSet(images, targets)


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

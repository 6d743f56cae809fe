"""Tiny-ImageNet, ImageNet and folders of your own: images in files, a folder for each class.

Nothing here is downloaded: the sets are large, and ImageNet asks for an account.  Errors say what belongs where.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prunelab.data.sets import FileSet, Spec, TrainTest, datasets, opened, store
from prunelab.errors import DataError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What torchvision's and timm's pretrained networks of ImageNet mostly expect."""
TINY_MEAN, TINY_STD = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)
"""Of Tiny-ImageNet's training images, as EigenDamage's code has them."""
ANNOTATIONS = "val_annotations.txt"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
SMALL = 64
"""Images up to this side are taken as they are; larger ones are resized, and 224 × 224 pixels cut out."""


def tiny_imagenet(source: str | Path | None = None) -> TrainTest:
    """Load Tiny-ImageNet: 200 classes, 100,000 training and 10,000 validation images of 64 × 64 pixels.

    Its archive has the validation images in one folder, with their classes in ``val_annotations.txt``; that is read.
    Validation images sorted into folders of classes work as well.

    Args:
        source: the folder that holds ``train`` and ``val``; by default ``tiny-imagenet`` or ``tiny-imagenet-200`` in
            ``$PRUNELAB_DATASETS`` or ``~/.cache/prunelab``.

    Raises:
        DataError: the images are not there, or do not fit their annotations; the message says what to do.

    Source: Le & Yang 2015, *Tiny ImageNet Visual Recognition Challenge*.
    """
    root = _place(
        source,
        ("tiny-imagenet", "tiny-imagenet-200"),
        "Tiny-ImageNet",
        "get tiny-imagenet-200.zip (http://cs231n.stanford.edu/tiny-imagenet-200.zip) and unpack it there",
    )
    train = _folder(root / "train")
    spec = Spec(tuple(train.classes), 64, TINY_MEAN, TINY_STD)
    if (root / "val" / ANNOTATIONS).is_file():
        held_out = _annotated(root / "val", train.class_to_idx)
    else:
        held_out = _samples(root / "val", train.class_to_idx)
    return TrainTest(_set(train.samples, spec), _set(held_out, spec))


def imagenet(source: str | Path | None = None) -> TrainTest:
    """Load ImageNet's 1,000 classes: about 1.28 million training and 50,000 validation images, cut to 224 × 224 pixels.

    Classes are numbered as pretrained networks number them: in the order of their WordNet names.

    Args:
        source: the folder that holds ``train`` and ``val``, each with a folder for every class, or the three archives
            of ILSVRC 2012, which torchvision then unpacks there, once; by default ``imagenet`` in
            ``$PRUNELAB_DATASETS`` or ``~/.cache/prunelab``.

    Raises:
        DataError: the images are not there; the message says what to do.

    Source: Russakovsky et al. 2015, *ImageNet Large Scale Visual Recognition Challenge*.
    """
    root = _place(
        source,
        ("imagenet",),
        "ImageNet",
        "get the ILSVRC 2012 archives (https://image-net.org, an account is needed) and put them there",
        unless=DEVKIT,
    )
    if not (root / "train").is_dir() or not (root / "val").is_dir():
        try:
            for split in ("train", "val"):
                datasets().ImageNet(str(root), split=split)
        except (OSError, RuntimeError) as error:
            raise DataError(f"ImageNet's archives in {root} cannot be unpacked: {error}") from error
    return _as_imagenet(root)


def folder(source: str | Path) -> TrainTest:
    """Load images of your own: ``train`` and ``val`` (or ``test``), each with a folder for every class.

    Small images (up to 64 pixels) are taken as they are and must be of one size; larger ones are treated as those of
    ImageNet: resized to 256 pixels at the shorter side, of which the middle 224 × 224 are cut out.  Both are normalised
    by ImageNet's mean and standard deviation.

    Args:
        source: the folder.

    Raises:
        DataError: a folder is missing, or has other classes than the other; the message says what to do.
    """
    root = Path(source)
    held_out = root / "test" if not (root / "val").is_dir() and (root / "test").is_dir() else root / "val"
    train = _folder(root / "train")
    width, height = opened(train.samples[0][0]).size
    spec = Spec(tuple(train.classes), 224, IMAGENET_MEAN, IMAGENET_STD, resize=256)
    if width == height <= SMALL:
        spec = Spec(tuple(train.classes), width, IMAGENET_MEAN, IMAGENET_STD)
    return TrainTest(_set(train.samples, spec), _set(_samples(held_out, train.class_to_idx), spec))


def _as_imagenet(root: Path) -> TrainTest:
    train = _folder(root / "train")
    spec = Spec(tuple(train.classes), 224, IMAGENET_MEAN, IMAGENET_STD, resize=256)
    return TrainTest(_set(train.samples, spec), _set(_samples(root / "val", train.class_to_idx), spec))


def _place(source: str | Path | None, names: Sequence[str], title: str, advice: str, unless: str = "") -> Path:
    """Return the folder of a set that has ``train`` and ``val``, or else the file ``unless``."""
    candidates = [Path(source)] if source is not None else [store() / name for name in names]
    for path in candidates:
        if all((path / part).is_dir() for part in ("train", "val")) or (unless and (path / unless).is_file()):
            return path
    raise DataError(
        f"{title} is not in {candidates[0]}, which should have the folders train and val: {advice}, "
        f"or set PRUNELAB_DATASETS to the folder that holds {names[0]}."
    )


def _folder(path: Path) -> Any:
    try:
        return datasets().ImageFolder(str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path} should have a folder with images for every class: {error}") from error


def _samples(path: Path, numbers: dict[str, int]) -> list[tuple[str, int]]:
    """Return the images of folders of classes, numbered as the training set's."""
    found = _folder(path)
    unknown = sorted(set(found.classes) - set(numbers))
    if unknown:
        raise DataError(f"{path} has a class {unknown[0]!r} that the training set in {path.parent / 'train'} lacks.")
    return [(file, numbers[found.classes[target]]) for file, target in found.samples]


def _annotated(path: Path, numbers: dict[str, int]) -> list[tuple[str, int]]:
    """Return the validation images of Tiny-ImageNet: lines of file, class and a bounding box."""
    samples = []
    for line in (path / ANNOTATIONS).read_text().splitlines():
        name, label = line.split("\t")[:2] if line.count("\t") else (line, "")
        file = path / "images" / name
        if label not in numbers:
            raise DataError(f"{path / ANNOTATIONS} gives {name} the class {label!r}, which the training set lacks.")
        if not file.is_file():
            raise DataError(f"{file} is missing, but {ANNOTATIONS} names it; unpack the archive again.")
        samples.append((str(file), numbers[label]))
    return samples


def _set(samples: Sequence[tuple[str, int]], spec: Spec) -> FileSet:
    return FileSet([file for file, _ in samples], torch.tensor([target for _, target in samples]), None, spec)

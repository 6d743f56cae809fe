"""What a data set is: images with their numbers of class, in memory or in files, handed out normalised.

Flows in: bytes, or the names of image files.  Flows out: ``torch`` data sets of ``(image [3, H, W], label)`` pairs, and
loaders of batches ``(inputs [B, 3, H, W], targets [B])``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prunelab.errors import DataError
from prunelab.runtime.devices import cores
from prunelab.runtime.extras import extra

Transform = Callable[[Tensor], Tensor]
Kind = TypeVar("Kind", bound="Images")


def transforms() -> Any:
    """Return torchvision's transforms."""
    return extra("torchvision.transforms.v2", "vision", "pl.data")


def datasets() -> Any:
    """Return torchvision's data sets."""
    return extra("torchvision.datasets", "vision", "pl.data")


def opened(path: str) -> Any:
    """Return an image file as PIL has it, in three channels."""
    return extra("torchvision.datasets.folder", "vision", "pl.data").default_loader(path)


@dataclass(frozen=True)
class Spec:
    """What all images of a data set have in common.

    Args:
        classes: their names, in the order of their numbers.
        size: height and width of what a network sees, in pixels.
        mean: of the training images, per channel, in [0, 1].
        std: their standard deviation.
        resize: the shorter side after resizing, before the middle of ``size`` is cut out; none if images are of
            ``size`` already.
    """

    classes: tuple[str, ...]
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: int | None = None

    def normalize(self, images: Tensor) -> Tensor:
        """Turn bytes ``[..., 3, H, W]`` into floats of about zero mean and unit deviation."""
        mean, std = self._columns(images.device)
        return (images.float() / 255 - mean) / std

    def denormalize(self, images: Tensor) -> Tensor:
        """Invert ``normalize``, to floats in [0, 1] that can be shown."""
        mean, std = self._columns(images.device)
        return (images * std + mean).clamp(0, 1)

    def augmentation(self) -> Transform:
        """Return what is done at random to training images, as bytes.

        Images of ``size``: a random crop after padding by 4 pixels, and a random mirror, as is usual for CIFAR.
        Larger ones: a random part of 8 to 100 % of the area, resized, and a random mirror, as is usual for ImageNet.
        """
        v2 = transforms()
        if self.resize is None:
            return v2.Compose([v2.RandomCrop(self.size, padding=4), v2.RandomHorizontalFlip()])
        return v2.Compose([v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip()])

    def framing(self) -> Transform:
        """Return what is done to images that are only looked at."""
        v2 = transforms()
        if self.resize is None:
            return v2.Identity()
        return v2.Compose([v2.Resize(self.resize, antialias=True), v2.CenterCrop(self.size)])

    def _columns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (self.mean, self.std))
        return mean, std


class Images(Dataset[Any]):
    """A data set of images; the two kinds below differ in where the images are.

    Args:
        targets: int64 ``[N]``, numbers of classes.
        spec: what the images have in common.
        augment: applied to every image, as bytes, when it is taken.
    """

    targets: Tensor
    spec: Spec
    augment: Transform | None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.spec.classes)

    def augmented(self: Kind) -> Kind:
        """Return the same images, changed at random whenever one is taken: for training.

        Images that have their own ``augment`` are returned as they are.
        """
        return self if self.augment else self._with(torch.arange(len(self)), self.spec.augmentation())

    def subset(self: Kind, size: int, seed: int = 0) -> Kind:
        """Return ``size`` images drawn without replacement, the same for the same seed.

        Raises:
            DataError: more images are asked for than there are.
        """
        if not 0 < size <= len(self):
            raise DataError(f"A subset of {size} images was asked of {len(self)}.")
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:size]
        return self.at(chosen)

    def at(self: Kind, positions: Tensor) -> Kind:
        """Return the images at these positions, int64 ``[n]``, in their order."""
        return self._with(positions, self.augment)

    def workers(self) -> int:
        """Return how many processes should prepare batches, where nobody says."""
        raise NotImplementedError

    def _with(self: Kind, chosen: Tensor, augment: Transform | None) -> Kind:
        raise NotImplementedError


CIFAR10 = Spec(
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    size=32,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)


class ImageSet(Images):
    """Images in memory, as bytes.

    Args:
        images: uint8 ``[N, 3, H, W]``.
        targets: int64 ``[N]``, numbers of classes.
        augment: applied to every image, as bytes, when it is taken (random crops and flips while training).
        spec: what the images have in common.
    """

    def __init__(self, images: Tensor, targets: Tensor, augment: Transform | None = None, spec: Spec = CIFAR10) -> None:
        self.images, self.targets, self.augment, self.spec = images, targets, augment, spec

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return self.spec.normalize(self.augment(image) if self.augment else image), int(self.targets[index])

    def workers(self) -> int:
        """Return 0, unless a GPU would wait for the augmentation of many images."""
        return min(8, cores()) if torch.cuda.is_available() and self.augment and len(self) >= 10_000 else 0

    def _with(self, chosen: Tensor, augment: Transform | None) -> ImageSet:
        return ImageSet(self.images[chosen], self.targets[chosen], augment, self.spec)


class FileSet(Images):
    """Images in files, each read when it is taken: for what does not fit in memory.

    Args:
        files: their paths.
        targets: int64 ``[N]``, numbers of classes.
        augment: applied to every image, as bytes ``[3, H, W]``, instead of resizing it and cutting out its middle.
        spec: what the images have in common.
    """

    def __init__(self, files: Sequence[str], targets: Tensor, augment: Transform | None, spec: Spec) -> None:
        self.files, self.targets, self.augment, self.spec = list(files), targets, augment, spec

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.files[index]
        try:
            image = transforms().functional.pil_to_tensor(opened(path))
        except OSError as error:
            raise DataError(f"{path} is not an image that can be read ({error}); restore or remove it.") from error
        image = (self.augment or self.spec.framing())(image)
        if image.shape[1:] != (self.spec.size, self.spec.size):
            raise DataError(
                f"{path} is {image.shape[2]} × {image.shape[1]} pixels, but the first image of the set is "
                f"{self.spec.size} × {self.spec.size}; small images must all be of one size."
            )
        return self.spec.normalize(image), int(self.targets[index])

    def workers(self) -> int:
        """Return one process for every thousand images, up to the number of cores and 8."""
        return min(8, cores(), len(self) // 1000)

    def _with(self, chosen: Tensor, augment: Transform | None) -> FileSet:
        return FileSet([self.files[index] for index in chosen.tolist()], self.targets[chosen], augment, self.spec)


class TrainTest(NamedTuple):
    """A training set and a test set."""

    train: Images
    test: Images

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.train.classes

    @property
    def size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.train.spec.size

    def inputs(self) -> Tensor:
        """Return an example of what a network takes, ``[1, 3, size, size]``, to trace it with."""
        return torch.ones(1, 3, self.size, self.size)


def loader(
    images: Dataset[Any], batch_size: int = 128, *, shuffle: bool = False, seed: int = 0, workers: int | None = None
) -> DataLoader[Any]:
    """Return batches ``(inputs [B, 3, H, W], targets [B])``; the order and the augmentation are seeded.

    Args:
        images: the set.
        batch_size: images per batch; the last may have fewer.
        shuffle: draw a new order in every pass.
        seed: of the order, and of the augmentation in other processes.  With ``workers=0`` images are augmented in this
            process, by PyTorch's generator.
        workers: processes that prepare batches; by default what suits the set, 0 for a small one.
    """
    generator = torch.Generator().manual_seed(seed)
    if workers is None:
        workers = images.workers() if isinstance(images, Images) else 0
    return DataLoader(
        images,
        batch_size,
        shuffle=shuffle,
        generator=generator,
        num_workers=workers,
        pin_memory=workers > 0 and torch.cuda.is_available(),
    )


def store() -> Path:
    """Return the folder of the data sets that do not come with prunelab: ``$PRUNELAB_DATASETS``, or a cache."""
    named = os.environ.get("PRUNELAB_DATASETS")
    return Path(named) if named else Path.home() / ".cache" / "prunelab"

"""Held out: score on some images, measure the truth on others, draw again, and show the spread.

Flows in: images, numbers from several draws.  Flows out: disjoint draws, rank correlations, a mean with its spread.
Every empirical statement of the notebooks goes through here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeVar

import pandas as pd
import torch
from torch import Tensor

from prunelab.data import Images
from prunelab.errors import DataError, OptionError

Kind = TypeVar("Kind", bound=Images)


def draws(images: Kind, size: int, number: int, seed: int = 0) -> list[Kind]:
    """Return ``number`` sets of ``size`` images each; no image is in two of them.

    Args:
        images: the images to draw from.
        size: images per draw.
        number: how many draws.
        seed: the same seed returns the same draws.

    Raises:
        DataError: there are not that many images.

    >>> import prunelab as pl
    >>> first, second = draws(pl.data.cifar10("mini").train, 100, number=2)
    >>> len(first), len(second)
    (100, 100)
    """
    if number < 1 or size < 1:
        raise OptionError(f"`number` and `size` of the draws must be positive integers, got {number} and {size}.")
    if size * number > len(images):
        raise DataError(f"{number} draws of {size} images each were asked of {len(images)} images.")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return [images.at(part) for part in order[: size * number].split(size)]


def ranks(values: Tensor) -> Tensor:
    """Return the ranks of ``values`` ``[n]``, from 0, as float64 ``[n]``; equal values share their mean rank.

    >>> ranks(torch.tensor([30.0, 10.0, 30.0])).tolist()
    [1.5, 0.0, 1.5]
    """
    return torch.tensor(pd.Series(values.detach().cpu().numpy()).rank().to_numpy() - 1)


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of two tensors of one size; not a number where one of them is constant.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 0.2, 0.3]))
    1.0
    """
    both = torch.stack([ranks(first.flatten()), ranks(second.flatten())])
    return round(float(torch.corrcoef(both)[0, 1]), 12)


def within_groups(first: Mapping[str, Tensor], second: Mapping[str, Tensor], smallest: int = 16) -> dict[str, float]:
    """Return the rank correlation inside every group that both have, by group.

    Args:
        first: scores ``[units]`` by group.
        second: another score of the same units.
        smallest: groups with fewer units are left out, since a rank correlation of few units says little.
    """
    shared = [name for name in first if name in second and first[name].numel() >= smallest]
    return {name: rank_correlation(first[name], second[name]) for name in shared}


@dataclass(frozen=True)
class Spread:
    """A mean over draws, with how far the draws are apart.

    Attributes:
        mean: over the draws.
        deviation: standard deviation of single draws; 0 where there is one draw alone.
        number: of draws.

    >>> print(spread([0.4, 0.5, 0.6]))
    0.50 ± 0.10
    """

    mean: float
    deviation: float
    number: int

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return self.deviation / self.number**0.5

    def __str__(self) -> str:
        return f"{self:.2f}"

    def __format__(self, how: str) -> str:
        return f"{self.mean:{how or '.2f'}} ± {self.deviation:{how or '.2f'}}"


def spread(values: Iterable[float]) -> Spread:
    """Return mean and standard deviation of what several draws measured.

    Raises:
        OptionError: there are no values.
    """
    found = [float(value) for value in values]
    if not found:
        raise OptionError("A spread needs at least one value; there are none.")
    return Spread(fmean(found), stdev(found) if len(found) > 1 else 0.0, len(found))


def paired(better: Sequence[float], worse: Sequence[float]) -> Spread:
    """Return the spread of the differences ``better − worse``, draw by draw: the draws' common luck cancels.

    Raises:
        OptionError: the two have different numbers of draws.
    """
    if len(better) != len(worse):
        raise OptionError(f"Paired draws must be equally many; there are {len(better)} and {len(worse)}.")
    return spread(one - other for one, other in zip(better, worse, strict=True))


__all__ = ["Spread", "draws", "paired", "rank_correlation", "ranks", "spread", "within_groups"]

"""Collect: several statistics of a model on data in one pass, to share between criteria.

Flows in: a dependency graph and batches.  Flows out: ``Statistics``, sums over samples that add up over batches, stop
and resume, and reduce over processes.  Notebook 07_kfac shows what is in them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from prunelab.batches import Batches, Loss
from prunelab.curvature.kronecker import Factors
from prunelab.trace import DependencyGraph


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was measured on data: sums over samples, and their means under their names.

    Attributes:
        samples: how many samples.
        fisher: which Fisher the moments and factors are of: ``"empirical"``, ``"mc"`` or ``"ggn"``.
        sums: what -> name -> sum over samples.
        batches: what they were collected from, where it can be read again.
    """

    samples: int
    fisher: str
    sums: dict[str, dict[str, Tensor]]
    batches: Batches | None = None
    meta: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def what(self) -> frozenset[str]:
        """Which statistics these are."""
        return frozenset(self.sums)

    @property
    def gradient(self) -> dict[str, Tensor]:
        """``E[g_n]`` by parameter name (``what="grad"``)."""
        raise NotImplementedError

    @property
    def moments(self) -> dict[str, Tensor]:
        """``E[g_n²]`` by parameter name, g_n the gradient of one sample's loss (``what="moments"``)."""
        raise NotImplementedError

    @property
    def kronecker(self) -> dict[str, Factors]:
        """``Factors`` by weight name, ``name[start:stop]`` for slices (``what="kronecker"``; EKFAC: ``"ekfac"``)."""
        raise NotImplementedError

    @property
    def inputs(self) -> dict[str, Any]:
        """``InputMoment`` by weight name (``what="inputs"``)."""
        raise NotImplementedError


def collect(
    graph: DependencyGraph,
    batches: Batches | None,
    what: Collection[str] = ("grad", "moments", "kronecker"),
    *,
    fisher: str = "empirical",
    loss: Loss = F.cross_entropy,
    seed: int = 0,
    factor: str = "channel",
) -> Statistics:
    """Collect statistics over all batches in one pass; ``"ekfac"`` takes a second one."""
    raise NotImplementedError


def statistics_for(
    graph: DependencyGraph,
    batches: Batches | Statistics | None,
    what: Collection[str],
    *,
    fisher: str = "empirical",
    loss: Loss = F.cross_entropy,
    seed: int = 0,
    factor: str = "channel",
) -> Statistics:
    """Return the given statistics if they hold what is needed, else collect it from the given batches."""
    raise NotImplementedError

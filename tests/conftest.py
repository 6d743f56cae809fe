"""Fixtures that several test files share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunelab as pl


@pytest.fixture
def small() -> tuple[nn.Module, torch.Tensor]:
    """A convolutional network with one group of 8 units, and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return model.eval(), torch.randn(6, 3, 8, 8)


@pytest.fixture(scope="session")
def mini() -> pl.data.TrainTest:
    """The embedded images."""
    return pl.data.cifar10("mini")

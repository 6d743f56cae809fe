"""The networks and images that all tables share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import prunelab as pl

Batches = list[tuple[Tensor, Tensor]]
TRAINED = ("resnet20", "vgg13_narrow", "vit_small")
"""The trained networks that come with the repository, for real images of CIFAR-10."""
NETWORKS = (*TRAINED, "resnet18")
"""What curvature is measured on; resnet18 is torchvision's, untrained, on noise of 64 × 64 pixels."""


def problem(network: str, images: int, batch: int, device: str = "cpu") -> tuple[nn.Module, Batches]:
    """Return a network in eval mode and batches of images with labels, the same for the same arguments."""
    if network in TRAINED:
        model = pl.zoo.load(network)
        batches = list(pl.data.loader(pl.data.cifar10("mini").train.subset(images), batch))
    else:
        torch.manual_seed(0)
        model = tv.get_model(network, weights=None, num_classes=10)
        noise, labels = torch.randn(images, 3, 64, 64), torch.arange(images) % 10
        batches = list(zip(noise.split(batch), labels.split(batch), strict=True))
    return model.eval().to(device), [(inputs.to(device), targets.to(device)) for inputs, targets in batches]


def forward_backward(model: nn.Module, batches: Batches) -> None:
    """Do what one epoch of training does without its steps: the floor of everything that needs gradients."""
    parameters = list(model.parameters())
    for inputs, targets in batches:
        torch.autograd.grad(F.cross_entropy(model(inputs), targets), parameters)


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Use the attention that has a second derivative, which a fused one has not."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def classifier(model: nn.Module) -> nn.Module:
    """Return the last linear layer, whose outputs are the classes."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]

"""The networks that tests share, small inputs for them, and ways to make a test mean something."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import prunelab as pl
from prunelab import zoo


class Grouped(nn.Module):
    """Grouped and depthwise convolutions, group norm, concatenation and a chunk, on 8×8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=3)
        self.norm = nn.GroupNorm(4, 24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.transposed = nn.ConvTranspose2d(24, 10, 2, stride=2)
        self.last = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.relu(self.grouped(F.relu(self.first(x)))))
        x = F.relu(self.transposed(F.silu(self.depthwise(x))))
        left, right = x.chunk(2, dim=1)
        joined = torch.cat([left * right, left + right, x], dim=1)
        return self.last(joined.mean((2, 3)))


class Embedded(nn.Module):
    """Token embedding tied to the output, a raw position parameter, LayerNorm, attention in plain matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.position = nn.Parameter(torch.randn(5, 12))
        self.norm = nn.LayerNorm(12)
        self.query, self.key, self.value = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 6)
        self.out = nn.Linear(6, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        normed = self.norm(x)
        weights = (self.query(normed) @ self.key(normed).transpose(1, 2) / 8**0.5).softmax(-1)
        x = x + self.out(weights @ self.value(normed))
        return x @ self.embedding.weight.t()


@dataclass(frozen=True)
class Case:
    """A network in float64 and a batch for it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]

    def make(self, seed: int = 0) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(seed)
        model = perturb(self.build()).double().eval()
        inputs = self.inputs()
        return model, inputs.double() if inputs.is_floating_point() else inputs


def images(size: int, batch: int = 2) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, 3, size, size)


ZOO = [Case(name, lambda name=name: zoo.build(name), images(32)) for name in ("resnet20", "resnet32", "vgg13_narrow")]
ZOO += [Case("vit_small", zoo.vit_small, images(32)), Case("vgg19", zoo.vgg19, images(32))]
OWN = [Case("grouped", Grouped, images(8)), Case("embedded", Embedded, lambda: torch.randint(0, 11, (3, 5)))]
TORCHVISION = [
    Case("resnet18", lambda: tv.resnet18(weights=None), images(64)),
    Case("vgg16_bn", lambda: narrow_vgg16_bn(), images(32)),
]
CASES = ZOO + OWN + TORCHVISION


def narrow_vgg16_bn() -> nn.Module:
    """Return torchvision's vgg16_bn, whose 4096-wide classifier is narrowed so that tests stay quick."""
    model = tv.vgg16_bn(weights=None)
    model.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
    return model


def perturb(model: nn.Module) -> nn.Module:
    """Give norms and biases values that matter: fresh networks have zeros and ones there, which hide mistakes."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() == 1 and tensor.is_floating_point():
            positive = name.endswith(("weight", "running_var"))
            tensor.data = torch.rand_like(tensor) + 0.5 if positive else 0.2 * torch.randn_like(tensor)
        elif tensor.is_floating_point() and not tensor.any():
            tensor.data = 0.2 * torch.randn_like(tensor)
    return model


def permuted(model: nn.Module, group: pl.Group, order: Tensor) -> nn.Module:
    """Return a copy in which the units of a group stand in another order, in every member."""
    model = copy.deepcopy(model)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for member in group.members:
        index = torch.arange(len(member.unit))
        for unit in range(group.size):
            index[member.positions(unit)] = member.positions(int(order[unit]))
        tensors[member.name].data = tensors[member.name].data.index_select(member.dim, index)
    return model


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, relative to the largest entry."""
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


def random_plan(model: nn.Module, inputs: Tensor, share: float = 0.5, seed: int = 0) -> pl.Plan:
    """Return a plan that takes a random share of the units of every group."""
    scores = pl.criteria.Random(seed)(pl.trace(model, inputs))
    return pl.plan(scores, overrides={g.name: min(share, 1 - 1 / g.size) for g in scores.graph.groups}, ratio=0.5)


def _asks_for_a_driver() -> bool:
    """Tell whether this PyTorch cannot make tensors without data on a GPU that is not there, as 2.6 cannot."""
    try:
        with FakeTensorMode(), torch.device("cuda"):
            torch.empty(2).uniform_()
    except RuntimeError:
        return True
    return False


imagined_gpu = pytest.mark.skipif(_asks_for_a_driver(), reason="this PyTorch asks for a driver to imagine a GPU")

"""How networks are trained: optimizer, learning rate and its schedule, for the zoo's checkpoints and as in the papers.

Flows in: a name.  Flows out: a ``Recipe``, which ``fit`` follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR

from prunelab.errors import BudgetError

Optimizer = Literal["sgd", "momentum", "adamw"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
Decay = Literal["cycle", "steps"]
DECAYS: tuple[Decay, ...] = get_args(Decay)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: cross-entropy, crops and mirrors, and a learning rate that falls.

    Args:
        epochs: passes over the images; of the last one only a part if this is not a whole number.
        lr: the highest learning rate.
        weight_decay: of every parameter.
        optimizer: ``"sgd"`` (Nesterov momentum 0.9), ``"momentum"`` (0.9, without Nesterov) or ``"adamw"``.
        batch_size: images per step.
        warmup: share of the steps in which the learning rate rises; with ``"cycle"`` only.
        decay: ``"cycle"``, one warm-up and cosine; or ``"steps"``, the learning rate divided by ten at each of
            ``milestones``, without a warm-up.
        milestones: shares of the training after which the learning rate is divided by ten.

    Raises:
        BudgetError: there is no such optimizer or decay, the epochs are not above 0, or the milestones are not
            rising shares.
    """

    epochs: float
    lr: float
    weight_decay: float
    optimizer: Optimizer = "sgd"
    batch_size: int = 128
    warmup: float = 0.15
    decay: Decay = "cycle"
    milestones: tuple[float, ...] = (0.5, 0.75)

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("decay", DECAYS)):
            if getattr(self, name) not in known:
                raise BudgetError(f"There is no {name} {getattr(self, name)!r}; there are {', '.join(known)}.")
        if not 0 < self.epochs < float("inf"):
            raise BudgetError(f"`epochs` must be a number above 0, got {self.epochs!r}.")
        ends = (0.0, *self.milestones, 1.0)
        if any(early >= late for early, late in pairwise(ends)):
            raise BudgetError(f"`milestones` must be rising shares between 0 and 1, got {self.milestones!r}.")

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer for ``model``."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        nesterov = self.optimizer == "sgd"
        return torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=0.9, nesterov=nesterov, weight_decay=self.weight_decay
        )

    def make_schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        """Return what sets the learning rate, to be called after each of so many steps."""
        if self.decay == "steps":
            return MultiStepLR(optimizer, [round(share * steps) for share in self.milestones], gamma=0.1)
        return OneCycleLR(optimizer, self.lr, total_steps=max(steps, 2), pct_start=self.warmup, cycle_momentum=False)


RECIPES = {
    "resnet20": Recipe(epochs=36, lr=0.1, weight_decay=5e-4),
    "resnet32": Recipe(epochs=36, lr=0.1, weight_decay=5e-4),
    "resnet32_wide": Recipe(epochs=36, lr=0.1, weight_decay=5e-4),
    "vgg13_narrow": Recipe(epochs=30, lr=0.1, weight_decay=5e-4),
    "vgg19": Recipe(epochs=60, lr=0.05, weight_decay=5e-4),
    "vit_small": Recipe(epochs=20, lr=1e-3, weight_decay=0.05, optimizer="adamw"),
}
"""Our own, short, for each network of the zoo."""

PAPERS = {
    "eigendamage": Recipe(200, lr=0.1, weight_decay=2e-4, optimizer="momentum", decay="steps"),
    "eigendamage-tiny": Recipe(300, lr=0.1, weight_decay=2e-4, optimizer="momentum", decay="steps"),
    "oba": Recipe(
        200, lr=0.1, weight_decay=5e-4, optimizer="momentum", batch_size=64, decay="steps", milestones=(0.3, 0.5, 0.75)
    ),
}
"""How the papers' networks were trained before they were pruned: EigenDamage (Wang et al. 2019) on CIFAR and on
Tiny-ImageNet, OBA (Sun et al. 2025) on CIFAR.

Source: the README and ``main_pretrain.py`` of alecwangcq/EigenDamage-Pytorch; ``train_prune.py`` of NEU-REAL/OBA.
"""

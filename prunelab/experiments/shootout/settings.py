"""What a run of the shoot-out can choose, and what goes with what.

Flows in: the parameters of a notebook.  Flows out: ``Settings``, or an error that names the parameter, before any
network is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from prunelab import criteria
from prunelab.course.notebook.parameters import Between, Expected
from prunelab.errors import PruneLabError
from prunelab.factorization.factorize import RANK_PERS
from prunelab.planning import pools
from prunelab.planning.options import PERS
from prunelab.planning.pools import Scope
from prunelab.pruning.schedule import SCHEDULES, shares
from prunelab.runtime.devices import named_device
from prunelab.sparsity.sparsify import WEIGHT_SCOPES
from prunelab.training.loop import PRECISIONS, Precision
from prunelab.training.recipes import DECAYS, OPTIMIZERS, Decay, Optimizer, Recipe

METHODS: dict[str, tuple[str, ...]] = {
    "channels": ("flops", "params", "bytes", "latency"),
    "factorize": ("flops", "params"),
    "weights": ("density",),
}
"""What is removed, and the budgets that it knows."""
SCOPES = {"channels": pools.SCOPES, "factorize": ("global",), "weights": WEIGHT_SCOPES}
PER = {
    "channels": PERS,
    "factorize": RANK_PERS,
    "weights": (),
}

KINDS: dict[str, Expected] = {
    "model": str,
    "checkpoint": str,
    "dataset": str,
    "method": list(METHODS),
    "criterion": list(criteria.names()),
    "options": str,
    "scope": list(pools.SCOPES),
    "budget": ["flops", "params", "bytes", "latency", "density"],
    "share": Between(0.001, 0.999),
    "per": ["", *PERS, "auto"],
    "max_ratio": Between(0.01, 1.0),
    "steps": Between(1, 1000),
    "schedule": str,
    "compensate": bool,
    "recalibrate": bool,
    "scoring": Between(0, 10**8),
    "epochs": Between(0.0, 10_000.0),
    "images": Between(0, 10**8),
    "optimizer": list(OPTIMIZERS),
    "learning_rate": Between(1e-8, 10.0),
    "weight_decay": Between(0.0, 1.0),
    "decay": list(DECAYS),
    "batch_size": Between(1, 100_000),
    "test_images": Between(0, 10**8),
    "evaluate_every": Between(0, 10_000),
    "latency_images": Between(0, 10_000),
    "seed": Between(0, 10**6),
    "device": str,
    "scale": ["small", "full"],
    "precision": list(PRECISIONS),
    "sweep": str,
    "result_path": str,
}
"""What each parameter of the notebook may be, for ``notebook.validate``."""


@dataclass(frozen=True)
class Settings:
    """The parameters of notebook 15_shootout that the protocol uses; ``KINDS`` says what each may be.

    Raises:
        PruneLabError: two of them contradict each other; the message names both.
    """

    model: str
    checkpoint: str
    dataset: str
    method: str
    criterion: str
    options: str
    scope: Scope
    budget: str
    share: float
    per: str
    max_ratio: float
    steps: int
    schedule: str
    compensate: bool
    recalibrate: bool
    scoring: int
    epochs: float
    images: int
    optimizer: Optimizer
    learning_rate: float
    weight_decay: float
    decay: Decay
    batch_size: int
    test_images: int
    evaluate_every: int
    latency_images: int
    seed: int
    device: str
    precision: Precision

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Settings:
        """Return the settings among a notebook's parameters."""
        return cls(**{field.name: parameters[field.name] for field in fields(cls)})

    def __post_init__(self) -> None:
        self._one_of("budget", self.budget, METHODS[self.method])
        self._one_of("scope", self.scope, SCOPES[self.method])
        if self.per:
            self._one_of("per", self.per, PER[self.method])
        if self.compensate and self.method != "channels":
            raise PruneLabError(
                f"`compensate` refits layers that lose inputs: it needs method='channels', not {self.method!r}."
            )
        if self.method == "factorize" and self.criterion != "eigendamage":
            raise PruneLabError(f"method='factorize' needs criterion='eigendamage', not {self.criterion!r}.")
        if self.method == "weights" and not hasattr(self.scorer(), "elementwise"):
            able = [name for name, kind in criteria.CRITERIA.items() if hasattr(kind, "elementwise")]
            raise PruneLabError(f"`{self.criterion}` scores no single weights; those that do: {', '.join(able)}.")
        self.scorer(), self.torch_device(), self.shares()

    def _one_of(self, name: str, value: str, known: tuple[str, ...]) -> None:
        if value not in known:
            there = f"knows {name} {', '.join(known)}" if known else f"has no `{name}`"
            raise PruneLabError(f"`{name}` is {value!r}, but method={self.method!r} {there}.")

    def scorer(self) -> criteria.Criterion:
        """Return the criterion with its options.

        Raises:
            PruneLabError: the options are not a JSON object, or unknown.
        """
        try:
            options = json.loads(self.options or "{}")
        except ValueError as error:
            raise PruneLabError(f"`options` is {self.options!r}, which is not JSON ({error}).") from error
        if not isinstance(options, dict):
            raise PruneLabError(f'`options` is {self.options!r}, but should be a JSON object such as {{"p": 1}}.')
        return criteria.get(self.criterion, **options)

    def shares(self) -> list[float]:
        """Return what is to be left after each step: of a schedule by name, or written out as text.

        Raises:
            PruneLabError: there is no such schedule, or its numbers do not fall.
        """
        if self.schedule in SCHEDULES:
            return shares(self.schedule, self.steps, self.share)
        try:
            listed = [float(word) for word in self.schedule.split()]
        except ValueError:
            listed = []
        falling = all(early > late for early, late in zip([1.0, *listed], listed, strict=False))
        if not listed or not falling or listed[-1] <= 0:
            raise PruneLabError(
                f"`schedule` is {self.schedule!r}, but should be one of {', '.join(SCHEDULES)}, or falling shares "
                'such as "0.8 0.6 0.5".'
            )
        return listed

    def torch_device(self) -> torch.device:
        """Return the device to run on.

        Raises:
            OptionError: there is no such device here.
        """
        return named_device(self.device)

    def recipe(self) -> Recipe:
        """Return how the network is fine-tuned after each step; the epochs are divided among the steps."""
        return Recipe(
            self.epochs / len(self.shares()),
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            optimizer=self.optimizer,
            batch_size=self.batch_size,
            decay=self.decay,
        )

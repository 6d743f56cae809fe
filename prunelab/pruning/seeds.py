"""Randomness that depends on the place in a run, not on what happened before: a run that is resumed draws the same.

Flows in: a seed and a place.  Flows out: a block of code with its own random numbers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from prunelab.batches import device_of
from prunelab.runtime.devices import forked_rng


@contextmanager
def seeded(model: torch.nn.Module, *place: int) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's generators by ``place`` for a while; each then continues where it was.

    Args:
        model: on whose device there may be another generator.
        place: numbers of at least 0 that say where this is.
    """
    device = device_of(model)
    own, others = random.getstate(), np.random.get_state()
    with forked_rng(device):
        number = int(np.random.SeedSequence(place).generate_state(1)[0])
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(others)

"""Memory that runs out is said to have run out: no other way is tried, and no batch is blamed for its shape."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import prunelab as pl
from prunelab.curvature.second import hvp
from prunelab.runtime.devices import raise_out_of_memory

WITH_DATA = [name for name in pl.criteria.names() if name not in ("random", "magnitude", "bn_scale", "fpgm")]


class Full(nn.Module):
    """A network that runs out of memory when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.when = "never"
        self.error: type[Exception] = torch.OutOfMemoryError

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        dual = forward_ad._current_level >= 0
        if self.when == "always" or (self.when == "dual" and dual):
            raise self.error("MPS backend out of memory (tried to allocate 1 GiB)")
        return self.last(x)


@pytest.fixture
def full() -> Full:
    torch.manual_seed(0)
    return Full().eval()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(12, 5), torch.arange(12) % 3)]


def noted(error: BaseException) -> bool:
    """Return whether an error says what to do, where this Python can."""
    return sys.version_info < (3, 11) or "smaller batches" in " ".join(error.__notes__)


@pytest.mark.parametrize("name", WITH_DATA)
def test_a_model_without_memory_raises_that(full, batches, name):
    graph = pl.trace(full, batches[0][0])
    full.when = "always"
    with pytest.raises(torch.OutOfMemoryError) as caught:
        pl.criteria.get(name)(graph, batches)
    assert noted(caught.value)
    assert full.first.weight.requires_grad and isinstance(full.first.weight, nn.Parameter)


@pytest.mark.parametrize("name", WITH_DATA)
def test_a_loss_without_memory_raises_that(full, batches, name):
    def loss(outputs: Any, targets: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    criterion = pl.criteria.get(name, loss=loss)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        criterion(pl.trace(full, batches[0][0]), batches)
    assert noted(caught.value)


def test_a_product_that_has_no_memory_is_not_computed_in_a_way_that_takes_more(full, batches):
    full.when = "dual"
    with pytest.raises(torch.OutOfMemoryError) as caught:
        hvp.self_product(full, batches)
    assert noted(caught.value)


def test_a_product_that_fails_for_another_reason_is_computed_by_differentiating_twice(full, batches):
    wanted = hvp.self_product(full, batches)
    full.when, full.error = "dual", NotImplementedError
    full.forward = lambda x: _not_implemented(full, x)  # type: ignore[method-assign]
    for name, value in hvp.self_product(full, batches).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6)  # float32, two orders of summation


def _not_implemented(full: Full, x: Tensor) -> Tensor:
    if forward_ad._current_level >= 0:
        raise NotImplementedError("Trying to use forward AD with an operator that does not support it")
    return full.last(F.relu(full.first(x)))


@pytest.mark.parametrize("run", ["quadratic", "product"])
def test_a_chunk_without_memory_is_not_done_one_by_one(full, batches, run, monkeypatch):
    def vmap(*_: Any, **__: Any) -> Any:
        def full_up(*_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        return full_up

    graph = pl.trace(full, batches[0][0])
    directions = {"first.weight": torch.randn(4, 6, 5)}
    monkeypatch.setattr(torch.func, "vmap", vmap)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        if run == "quadratic":
            pl.criteria.get("quadratic", chunk=4)(graph, batches)
        else:
            hvp.hessian_product(full, batches, directions, chunk=4)
    assert sys.version_info < (3, 11) or "a smaller chunk" in " ".join(caught.value.__notes__)


def test_devices_without_a_class_for_it_are_understood_by_what_they_say():
    for text in ("MPS backend out of memory", "[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"):
        with pytest.raises(RuntimeError, match="memory"):
            raise_out_of_memory(RuntimeError(text))
    with pytest.raises(MemoryError):
        raise_out_of_memory(MemoryError())
    raise_out_of_memory(RuntimeError("shapes do not match"))
    raise_out_of_memory(ValueError("out of memory of what came before"))


def test_an_error_is_noted_once(full, batches):
    full.when = "always"
    with pytest.raises(torch.OutOfMemoryError) as caught:
        hvp.self_product(full, batches)
    assert sys.version_info < (3, 11) or len(caught.value.__notes__) == 1

"""What a model costs: FLOPs, parameters, bytes, seconds.

Flows in: a model and example inputs.  Flows out: a ``Cost``, counted on tensors without data, or a measured latency.
"""

from __future__ import annotations

import math
import statistics
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prunelab.batches import call
from prunelab.errors import BatchError
from prunelab.options import module, real
from prunelab.runtime.devices import synchronize
from prunelab.runtime.isolation import eval_mode
from prunelab.runtime.switches import without_data
from prunelab.tracing import fakes
from prunelab.tracing.answering import Answering
from prunelab.tracing.axes import size_with
from prunelab.tracing.trace import DependencyGraph

BLOCK = 0.005
"""Seconds that a latency is measured at a time."""


@dataclass(frozen=True)
class Cost:
    """What one forward pass costs.

    Attributes:
        flops: floating-point operations of convolutions, matrix products and attention for the given inputs, one
            multiply-add counted as 2.
        params: number of parameters, tied ones once.
        bytes: size of parameters and buffers in memory.
    """

    flops: int
    params: int
    bytes: int

    def to_dict(self) -> dict[str, int]:
        """Return the cost as plain data."""
        return asdict(self)


def _cpu_attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    batch, heads, tokens, width = query
    flops: int = 2 * batch * heads * tokens * key[-2] * (width + value[-1])
    return flops


_MISSING_FLOPS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops}


class _Whole:
    """Takes the place of what counts by module, with hooks on all modules of the process; only the sum is asked for."""

    parents, is_bw = frozenset({"Global"}), False

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


def count(model: nn.Module, example_inputs: fakes.Inputs) -> Cost:
    """Count what one forward pass of ``model`` costs, without computing it.

    Args:
        model: any module; counted in eval mode, not changed.
        example_inputs: a tensor, a tuple or a dict; FLOPs are those of this batch.

    Returns:
        FLOPs (one multiply-add counts as 2), number of parameters, and bytes of parameters and buffers.

    Raises:
        BatchError: the model cannot take the inputs.

    >>> count(nn.Linear(3, 4), torch.ones(2, 3))
    Cost(flops=48, params=16, bytes=64)
    """
    mode = fakes.fake_mode()
    copy = fakes.fake_model(model, mode).eval()
    args, kwargs = fakes.fake_inputs(example_inputs, mode, copy)
    counter = FlopCounterMode(display=False, custom_mapping=_MISSING_FLOPS)
    counter.mod_tracker = _Whole()  # type: ignore[assignment]
    try:
        with without_data(), mode, Answering(mode), counter:
            copy(*args, **kwargs)
    except Exception as error:
        raise BatchError(f"{type(model).__name__} cannot run on the example inputs: {error}") from error
    tensors = [*model.parameters(), *model.buffers()]
    return Cost(
        flops=int(counter.get_total_flops()),
        params=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


@dataclass(frozen=True)
class Latency:
    """Measured time of one forward pass.

    Attributes:
        median: seconds.
        spread: seconds between the first and the third quartile.
    """

    median: float
    spread: float


@torch.no_grad()
def latency(model: nn.Module, example_inputs: fakes.Inputs, *, seconds: float = 1.0) -> Latency:
    """Measure one forward pass of ``model`` in eval mode, on its own device and with the current number of threads.

    Args:
        model: any module, left in the mode it is in.
        example_inputs: what to call it with, on the model's device.
        seconds: how long to go on measuring.

    Returns:
        Median and spread of the time of one forward pass, in seconds.

    Raises:
        BatchError: the model cannot take the inputs.
        OptionError: ``seconds`` is not a number, or ``model`` not a module.

    >>> small, large = (nn.Sequential(nn.Linear(width, width)) for width in (8, 1024))
    >>> latency(small, torch.ones(64, 8), seconds=0.1).median < latency(large, torch.ones(64, 1024), seconds=0.1).median
    True
    """
    seconds = real("seconds", seconds, least=0)
    with eval_mode(module("model", model)):
        call(model, example_inputs)
        times = _blocks(lambda: call(model, example_inputs), seconds)
    quarter, _, three = statistics.quantiles(times) if len(times) > 1 else (0.0, 0.0, 0.0)
    return Latency(median=statistics.median(times), spread=three - quarter)


def _blocks(run: Callable[[], object], seconds: float) -> list[float]:
    """Return the seconds that a call takes, block by block, where a block is long beside what the clock itself takes.

    PyTorch has such a timer, but importing it looks for a compiler and, in older ones, for setuptools.
    """
    timer = timeit.Timer(run, timer=_clock)
    number = 1
    times: list[float] = []
    while timer.timeit(number) < min(BLOCK, seconds):
        number *= 2
    end = _clock() + seconds
    while not times or _clock() < end:
        times.append(timer.timeit(number) / number)
    return times


def _clock() -> float:
    synchronize()  # an accelerator works on after a call has returned
    return time.perf_counter()


class CostModel:
    """What a traced model costs when only some units are kept, without cutting it.

    The FLOPs of every operator, and the entries of every tensor, are products of axis sizes, so they follow from the
    number of kept units alone.
    """

    def __init__(self, graph: DependencyGraph) -> None:
        self._leaf_of = {group.name: id(group.axis) for group in graph.groups}
        axes = {name: tuple(dim.axis for dim in dims) for name, dims in graph.dims.items()}
        parameters = dict(graph.model.named_parameters())
        tensors = parameters | dict(graph.model.named_buffers())
        self._terms = {
            "flops": graph.flop_terms,
            "params": [(1, axes[name]) for name in axes if name in parameters],
            "bytes": [(tensors[name].element_size(), axes[name]) for name in axes if name in tensors],
        }

    def __call__(self, kept: Mapping[str, int]) -> dict[str, int]:
        """Return ``flops``, ``params`` and ``bytes`` for a number of kept units by group name.

        Groups that are not named are whole.
        """
        sizes = {self._leaf_of[name]: number for name, number in kept.items()}

        def total(terms: list[Any]) -> int:
            return sum(constant * math.prod(size_with(axis, sizes) for axis in axes) for constant, axes in terms)

        return {kind: total(terms) for kind, terms in self._terms.items()}

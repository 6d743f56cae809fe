"""Input moments: the second moment of what a weight multiplies, from which its remaining columns are refitted.

A layer is a matrix times columns: the rows of its input for a linear layer, patches for a convolution.  With U the
columns of all samples and positions and a constant one below each, the moment is C = E[u uᵀ], ``[n + 1, n + 1]``.

Flows in: the layer calls that ``LayerCalls`` sees.  Flows out: one ``InputMoment`` per weight.  Notebook
11_compensation derives their use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from prunelab.curvature.statistics.per_sample import as_float
from prunelab.curvature.watching.layer_calls import LayerCall, restored
from prunelab.curvature.watching.patches import coverage, patches
from prunelab.curvature.watching.weight_view import WeightView
from prunelab.runtime.devices import exact_on
from prunelab.tracing.axes import factors_of, is_frozen
from prunelab.tracing.trace import DependencyGraph

MEMORY = 2**28
"""Bytes that the moment of one weight may take; where patches would need more, it is taken over channels."""

CHUNK = {"cpu": 2**20}
"""Numbers that one chunk of patches may hold; on other devices 2²⁵."""


class Layer(Protocol):
    """Which rows of which weight are used, and how they are laid out: a layer call, an input moment, factors."""

    @property
    def weight(self) -> str: ...
    @property
    def rows(self) -> slice: ...
    @property
    def view(self) -> WeightView: ...


@dataclass(frozen=True, eq=False)
class InputMoment:
    """The second moment of the inputs of one weight, as a sum over samples and positions.

    Attributes:
        weight: qualified name of the parameter.
        rows: which rows of it: a fused projection may be used slice by slice.
        view: how the weight is laid out; each group of a convolution has a moment of its own.
        over: ``"patches"``: n counts channels × kernel positions, in the order of ``matrix``; ``"channels"``: n counts
            channels, and a pixel enters once per patch and kernel position that sees it.
        padded: whether some patches hold padding, on which the constant of ``"channels"`` is not defined.
        bias: name of the bias, if it is a parameter.
        bias_rows: which entries of it.
        total: float64 ``[groups, n + 1, n + 1]``, the sum of u uᵀ; the last entry of u is one.
    """

    weight: str
    rows: slice
    view: WeightView
    over: str
    padded: bool
    bias: str | None
    bias_rows: slice
    total: Tensor

    @property
    def count(self) -> float:
        """Over how many columns."""
        return float(self.total[0, -1, -1])

    @property
    def moment(self) -> Tensor:
        """``C = E[u uᵀ]``, float64 ``[groups, n + 1, n + 1]``."""
        return self.total / self.total[:, -1:, -1:]

    @property
    def mean(self) -> Tensor:
        """``E[u]``, float64 ``[groups, n]``."""
        return self.moment[:, :-1, -1]


def read(sums: Mapping[str, Tensor], meta: Mapping[str, Mapping[str, Any]]) -> dict[str, InputMoment]:
    """Return the moments from their sums and what ``describe`` said of them."""
    return {name: InputMoment(**restored(about), total=sums[name]) for name, about in meta.items()}


def describe(call: LayerCall, weight: Tensor, taps: int = 1, memory: int = MEMORY) -> dict[str, Any]:
    """Return what the sum of a call is of, as plain values: the attributes of ``InputMoment``.

    Args:
        call: of a linear layer or a convolution.
        weight: its parameter.
        taps: how many inputs of a linear layer belong to one channel (a flattened image).
        memory: bytes that the sum may take; where patches would need more, it is over channels.
    """
    width = matrix(call, weight).shape[-1]
    taps = {"linear": taps, "conv": math.prod(call.view.kernel)}.get(call.kind, 1)
    over = "channels" if taps > 1 and call.view.groups * (width + 1) ** 2 * 8 > memory else "patches"
    return {**call.described(), "over": over, "padded": any(call.padding) or call.kind == "conv_transpose"}


def summed(call: LayerCall, over: str, taps: int = 1) -> Tensor:
    """Return ``Σ u uᵀ`` over the batch and positions of a call, ``[groups, n + 1, n + 1]`` in float64.

    Products are summed in the input's precision over chunks, and the chunks in float64 (on the CPU where the device has
    none).  Cost: n² multiplications per position; for a 3×3 convolution with as many outputs as inputs nine times its
    own forward pass.
    """
    total = torch.zeros((), dtype=torch.float64, device=exact_on(call.input.device))
    for chunk, one in columns(call) if over == "patches" else channels(call, taps):
        below = one.expand(chunk.shape[0], 1, chunk.shape[2])
        sums = chunk @ below.mT
        grams = torch.cat([torch.cat([chunk @ chunk.mT, sums], 2), torch.cat([sums.mT, below @ below.mT], 2)], 1)
        total = total + grams.to(total)
    return total


def consumers(graph: DependencyGraph) -> dict[str, int]:
    """Return the parameters that consume units of some group, with how many inputs each channel of theirs has.

    That is one, except where a layer consumes a flattened image: then the positions of a channel are neighbours.
    """
    found = {}
    for member in (member for group in graph.groups for member in group.members if member.role == "consumes"):
        factors = factors_of(graph.dims[member.name][member.dim].axis)
        last = max(place for place, part in enumerate(factors) if not is_frozen(part))
        found[member.name] = math.prod(part.size for part in factors[last + 1 :])
    return found


# ── layers as matrices ────────────────────────────────────────────────────────────────────────────────────────────


def matrix(layer: Layer, weight: Tensor) -> Tensor:
    """Return the rows of a weight that a call used as a matrix, ``[groups, out / groups, n]``."""
    return layer.view.as_matrix(weight[layer.rows]).flatten(2)


def columns(call: LayerCall, keep: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what the matrix of a call multiplies, over its batch and all positions, and the constant one.

    In chunks ``[groups, n, columns]`` and ``[1]``; the columns are in the order of the output, samples outermost.
    ``keep`` (int64) takes these input channels only, without groups.
    """
    x = as_float(call.input)
    one = x.new_ones(1)
    if call.kind == "linear":
        rows = x.reshape(-1, x.shape[-1])
        for chunk in rows.split(_chunk(x, rows.shape[1])):
            yield (chunk if keep is None else chunk.index_select(1, keep)).mT[None], one
        return
    assert call.output is not None
    kernel, places = call.view.kernel, call.output.shape[2:]
    transposed = call.kind == "conv_transpose"
    slid = _as_convolution(call) if transposed else call
    for chunk in x.split(_chunk(x, x.shape[1] * math.prod(kernel) * math.prod(places))):
        chunk = chunk if keep is None else chunk.index_select(1, keep)
        images = _spread(call, chunk) if transposed else chunk
        seen = patches(images, slid, places).movedim(0, 1 + len(kernel))  # [C, *kernel, N, *positions]
        if transposed:  # the kernel of the convolution is that of the layer, turned round
            seen = seen.flip([1 + place for place in range(len(kernel))])
        yield seen.flatten(1 + len(kernel)).flatten(0, len(kernel)).unflatten(0, (call.view.groups, -1)), one


def channels(call: LayerCall, taps: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the input of a call in chunks ``[groups, channels, pixels]``, and the constant one ``[pixels]``.

    Each pixel counts once per patch and kernel position that sees it: it is multiplied by the root of that number.
    """
    x, root = as_float(call.input), torch.ones(())
    if call.kind == "linear":
        x = x.reshape(-1, x.shape[-1] // taps, taps)
    else:
        assert call.output is not None
        root = coverage(call, x.shape[2:], call.output.shape[2:]).sqrt()
    root = root.to(x)
    for chunk in x.split(_chunk(x, x[0].numel())):
        flat = (chunk * root).movedim(1, 0).flatten(1)
        yield flat.unflatten(0, (call.view.groups, -1)), root.expand(len(chunk), *x.shape[2:]).flatten()


def _chunk(x: Tensor, size: int) -> int:
    """Return how many samples, of ``size`` numbers each, go into one chunk."""
    return max(1, CHUNK.get(x.device.type, 2**25) // max(1, size))


def _as_convolution(call: LayerCall) -> LayerCall:
    """Return the convolution that a transposed one is, over its input spread out by the stride."""
    ones = (1,) * len(call.stride)
    return replace(call, kind="conv", stride=ones, padding=(0,) * len(ones))


def _spread(call: LayerCall, x: Tensor) -> Tensor:
    """Return the input of a transposed convolution with zeros between its pixels and around it."""
    wide = x.new_zeros(*x.shape[:2], *((n - 1) * step + 1 for n, step in zip(x.shape[2:], call.stride, strict=True)))
    places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in call.stride))
    wide[places] = x
    sides = []
    for place, size in reversed(list(enumerate(call.view.kernel))):
        side = call.dilation[place] * (size - 1) - call.padding[place]
        sides += [side, side + call.output_padding[place]]
    return F.pad(wide, sides)

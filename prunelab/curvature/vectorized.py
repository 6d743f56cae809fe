"""Vectorised: per-sample gradients of parameters that are used in some other way than by a layer call.

A table of position biases, a weight that is transposed first, the parameters of a recurrent layer: no output of a layer
call holds their gradients by sample.  ``torch.func.vmap`` over the gradient of one sample does, at the price of one
more forward and backward pass.

Flows in: a model, parameter names, a batch and what is sent back from the outputs.  Flows out: ``Σ_n g_n²`` by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from prunelab.curvature.per_sample import as_float
from prunelab.devices import raise_out_of_memory
from prunelab.errors import BatchError
from prunelab.isolation import replaced
from prunelab.switches import ignoring, plain_attention

CHUNK = 32
"""Samples at a time, as long as their gradients hold no more than ``NUMBERS`` numbers."""

NUMBERS = 2**25


def floating(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors among a model's outputs."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def squared_sums_by_vmap(
    model: nn.Module, names: Collection[str], inputs: Any, column: list[Tensor], samples: int
) -> dict[str, Tensor]:
    """Return ``Σ_n g_n²`` of some parameters, from vectorised gradients of single samples.

    Where vmap cannot take the model, samples follow one another, after a warning.  Cost: one forward and one backward
    pass over the samples, each as a batch of its own.

    Args:
        model: the network, in eval mode.
        names: of the parameters.
        inputs: of the model.
        column: what is sent back from every floating output, ``[samples, …]``.
        samples: how many samples.

    Raises:
        BatchError: an output that the loss depends on has no row for each sample.
    """
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[name].detach() for name in sorted(names)}
    rows = [place for place, value in enumerate(column) if value.dim() and len(value) == samples]
    for place, value in enumerate(column):
        if place not in rows and bool(value.any()):
            raise BatchError(f"Output {place}, of shape {list(value.shape)}, has no row for each of {samples} samples.")
    leaves, structure = tree_flatten(inputs)
    batched = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim()]

    def outputs_of(values: dict[str, Tensor], filled: list[Any]) -> list[Tensor]:
        x = tree_unflatten(filled, structure)
        args, kwargs = ((), x) if isinstance(x, dict) else (tuple(x) if isinstance(x, (tuple, list)) else (x,), {})
        with replaced(model, values):
            return floating(model(*args, **kwargs))

    def product(values: dict[str, Tensor], given: list[Tensor], back: list[Tensor]) -> Tensor:
        filled = list(leaves)
        for place, leaf in zip(batched, given, strict=True):
            filled[place] = leaf[None]
        found = outputs_of(values, filled)
        return torch.stack([(found[place][0] * v).sum() for place, v in zip(rows, back, strict=True)]).sum()

    many = vmap(grad(product), in_dims=(None, 0, 0))

    def together(step: int) -> Iterator[dict[str, Tensor]]:
        for start in range(0, samples, step):
            n = slice(start, start + step)
            yield many(chosen, [leaves[place][n] for place in batched], [column[place][n] for place in rows])

    def one_by_one() -> Iterator[dict[str, Tensor]]:
        """Go through autograd alone, which takes any model: also one that writes to its buffers."""
        for n in range(samples):
            own = {name: value.clone().requires_grad_() for name, value in chosen.items()}
            with torch.enable_grad():
                value = product(own, [leaves[place][n] for place in batched], [column[place][n] for place in rows])
                found: Any = [torch.zeros_like(part) for part in own.values()]
                if value.requires_grad:
                    found = torch.autograd.grad(value, list(own.values()), materialize_grads=True)
            yield {name: part.detach()[None] for name, part in zip(own, found, strict=True)}

    step = max(1, min(CHUNK, NUMBERS // max(1, sum(value.numel() for value in chosen.values()))))
    with torch.no_grad(), plain_attention:
        try:
            with ignoring("There is a performance drop because we have not yet implemented the batching"):
                return _squares(together(step) if step > 1 else one_by_one(), chosen)
        except (RuntimeError, ValueError) as error:
            raise_out_of_memory(error)
            warnings.warn(
                f"torch.func.vmap cannot take {type(model).__name__}, so that the gradients of {', '.join(chosen)} are "
                f"computed one sample after the other: {error}",
                stacklevel=2,
            )
            return _squares(one_by_one(), chosen)


def _squares(chunks: Iterator[dict[str, Tensor]], like: dict[str, Tensor]) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(as_float(value)) for name, value in like.items()}
    for chunk in chunks:
        for name, value in chunk.items():
            total[name] += as_float(value).square().sum(0)
    return total

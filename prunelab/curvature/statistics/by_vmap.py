"""Vectorised: per-sample gradients of parameters that are used in some other way than by a layer call.

A table of position biases, a weight that is transposed first, the parameters of a recurrent layer: no output of a layer
call holds their gradients by sample.  ``torch.func.vmap`` over the gradient of one sample does, at the price of one
more forward and backward pass.

Flows in: a model, parameter names, a batch and what is sent back from the outputs.  Flows out: ``Σ_n g_n²`` by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from prunelab.batches import Batch, batch_of
from prunelab.batches.trees import tree_flatten, tree_leaves, tree_unflatten
from prunelab.curvature.statistics.per_sample import as_float
from prunelab.errors import BatchError
from prunelab.runtime.devices import raise_out_of_memory
from prunelab.runtime.isolation import replaced
from prunelab.runtime.switches import ignoring, plain_attention

CHUNK = 32
"""Samples at a time, as long as their gradients hold no more than ``NUMBERS`` numbers."""

NUMBERS = 2**25


def floating(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors among a model's outputs."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def squared_sums_by_vmap(
    model: nn.Module, names: Collection[str], batch: Any, column: list[Tensor], samples: int | None = None
) -> dict[str, Tensor]:
    """Return ``Σ_n g_n²`` of some parameters, from vectorised gradients of single samples.

    Where vmap cannot take the model, samples follow one another, after a warning.  Cost: one forward and one backward
    pass over the samples, each as a batch of its own.

    Args:
        model: the network, in eval mode.
        names: of the parameters.
        batch: a batch, or the inputs of one.
        column: what is sent back from every floating output, ``[samples, …]``.
        samples: how many samples; by default those of the batch.

    Raises:
        BatchError: an output that the loss depends on has no row for each sample.
    """
    batch = batch if isinstance(batch, Batch) else batch_of(batch)
    samples = batch.size if samples is None else samples
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[name].detach() for name in sorted(names)}
    rows = [place for place, value in enumerate(column) if value.dim() and len(value) == samples]
    for place, value in enumerate(column):
        if place not in rows and bool(value.any()):
            raise BatchError(f"Output {place}, of shape {list(value.shape)}, has no row for each of {samples} samples.")
    leaves, structure = tree_flatten(batch.inputs)
    dims = batch.places[0]
    batched = [] if isinstance(dims, str) else [place for place, dim in enumerate(dims) if dim is not None]

    def outputs_of(values: dict[str, Tensor], filled: list[Any]) -> list[Tensor]:
        x = tree_unflatten(filled, structure)
        args, kwargs = ((), x) if isinstance(x, Mapping) else (tuple(x) if isinstance(x, (tuple, list)) else (x,), {})
        with replaced(model, values):
            return floating(batch.picked(model(*args, **dict(kwargs))))

    def product(values: dict[str, Tensor], given: list[Tensor], back: list[Tensor]) -> Tensor:
        filled = list(leaves)
        for place, leaf in zip(batched, given, strict=True):
            filled[place] = leaf.unsqueeze(dims[place])
        found = outputs_of(values, filled)
        return torch.stack([(found[place][0] * v).sum() for place, v in zip(rows, back, strict=True)]).sum()

    many = vmap(grad(product), in_dims=(None, [dims[place] for place in batched], 0))

    def together(step: int) -> Iterator[dict[str, Tensor]]:
        for start in range(0, samples, step):
            n = slice(start, start + step)
            given = [leaves[place].narrow(dims[place], start, min(step, samples - start)) for place in batched]
            yield many(chosen, given, [column[place][n] for place in rows])

    step = max(1, min(CHUNK, NUMBERS // max(1, sum(value.numel() for value in chosen.values()))))
    with torch.no_grad(), plain_attention:
        if batched and step > 1:
            try:
                with ignoring("There is a performance drop because we have not yet implemented the batching"):
                    return _squares(together(step), chosen)
            except (RuntimeError, NotImplementedError, ValueError, BatchError) as error:
                raise_out_of_memory(error)
                warnings.warn(
                    f"torch.func.vmap cannot take {type(model).__name__}, so that the gradients of "
                    f"{', '.join(chosen)} are computed one sample after the other: {error}",
                    stacklevel=2,
                )
        return _squares(_one_by_one(model, list(chosen), batch, column, rows), chosen)


def _one_by_one(
    model: nn.Module, names: list[str], batch: Batch, column: list[Tensor], rows: list[int]
) -> Iterator[dict[str, Tensor]]:
    """Yield the gradients of one sample after the other, by ordinary backward passes, which any model can take."""
    parameters = dict(model.named_parameters())
    ends = [parameters[name] for name in names]
    for number, one in enumerate(batch.singles()):
        with torch.enable_grad():
            found = floating(one.run(model, check=False))
            pairs = [(found[place], column[place][number : number + 1]) for place in rows]
            pairs = [(value, back) for value, back in pairs if value.requires_grad]
            if not pairs:
                continue
            roots, backs = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(roots, ends, backs, materialize_grads=True)
        yield {name: value[None] for name, value in zip(names, gradients, strict=True)}


def _squares(chunks: Iterator[dict[str, Tensor]], like: dict[str, Tensor]) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(as_float(value)) for name, value in like.items()}
    for chunk in chunks:
        for name, value in chunk.items():
            total[name] += as_float(value).square().sum(0)
    return total

"""Second moments of the inputs of the layers that are refitted, in one forward pass over the batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.batches import Batches, call, checked
from prunelab.curvature.statistics.factor_sums import key
from prunelab.curvature.statistics.input_moments import MEMORY, InputMoment, describe, read, summed
from prunelab.curvature.watching.layer_calls import LayerCall, LayerCalls
from prunelab.errors import BatchError
from prunelab.runtime.isolation import evaluating


def input_moments(
    model: nn.Module, batches: Batches | None, weights: Mapping[str, int], memory: int = MEMORY
) -> dict[str, InputMoment]:
    """Return the input moments of the given weights (see ``InputMoment``); ``weights`` is what ``consumers`` returns.

    Cost: one forward pass, and n² multiplications per position of each layer.

    Raises:
        BatchError: the batches do not fit the model, or an input is not finite.
    """
    parameters = dict(model.named_parameters())
    sums: dict[str, Tensor] = {}
    meta: dict[str, dict[str, Any]] = {}
    number = -1

    def add_sum(seen: LayerCall) -> None:
        if seen.weight in weights:
            weight = parameters[seen.weight]
            name = key(seen, weight)
            meta[name] = describe(seen, weight, weights[seen.weight], memory)
            total = summed(seen, meta[name]["over"], weights[seen.weight])
            if not total.isfinite().all():
                raise BatchError(
                    f"The input of the layer of `{seen.weight}` is not finite in batch {number}: check the batch's "
                    "inputs and the weights up to there."
                )
            sums[name] = sums[name] + total if name in sums else total

    with evaluating(model), torch.no_grad():
        for batch in checked(model, batches, "compensation", None):
            number += 1
            with LayerCalls(model, after=add_sum, keep=False):
                call(model, batch.inputs)
    return read(sums, meta)

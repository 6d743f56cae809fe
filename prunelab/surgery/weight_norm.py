"""Weight norm under a cut: what is left of a row keeps its weights, although its norm is taken over fewer of them.

A layer with weight norm computes with ``w = g · v / ‖v‖``, a norm for every row.  Without some columns the norm is
smaller and all other weights would grow, so ``g`` is multiplied by ``‖v without them‖ / ‖v‖``: ``w`` is then as it was.

Flows in: the axes of a model, what stays of them, and its parameters.  Flows out: new values for every ``g``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from prunelab.errors import PlanError
from prunelab.kept import Kept
from prunelab.tracing.trace import DependencyGraph


def scaled_rows(graph: DependencyGraph) -> set[tuple[str, int]]:
    """Return the dimensions of every ``v`` whose entries a zero in ``g`` silences; without values they have no norm."""
    return {(name, place) for name, _, place in graph.weight_norms}


def folded(graph: DependencyGraph, kept: Kept, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what every length ``g`` must be for a cut of columns of its ``v`` to leave the other weights alone.

    ``g' = g · ‖v · kept‖ / ‖v‖``, in the shape of the whole ``g``.

    Args:
        graph: of the whole model.
        kept: which entries of every axis stay.
        tensors: the parameters by name, before the cut.

    Raises:
        PlanError: all weights that are left of a row are zero, so that it has no norm.
    """
    found: dict[str, Tensor] = {}
    for name, length, place in dict.fromkeys(graph.weight_norms):
        whole, dims = tensors[name], graph.dims[name]
        cut = [d for d, dim in enumerate(dims) if d != place and kept.size(dim.axis) != dim.size]
        if not cut or isinstance(whole, FakeTensor):  # a fake has no values, and no shape changes
            continue
        left = whole.detach()
        for d in cut:
            mask = kept.mask(dims[d].axis).to(left.device)
            left = left * mask.view([-1 if other == d else 1 for other in range(left.dim())])
        columns = [d for d in range(left.dim()) if d != place]
        before, after = (torch.linalg.vector_norm(v, dim=columns, keepdim=True) for v in (whole.detach(), left))
        rows = kept.mask(dims[place].axis).to(left.device)
        if ((after.flatten() == 0) & (before.flatten() > 0) & rows).any():
            raise PlanError(
                f"Cannot cut `{name}`: all weights that are left of one of its rows are zero, so weight norm cannot "
                "divide by their norm. Fold it first, with torch.nn.utils.parametrize.remove_parametrizations."
            )
        share = torch.where(before > 0, after / before, torch.ones_like(before))
        found[length] = tensors[length].detach() * share.view_as(tensors[length])
    return found

"""Unknown layers: what Kronecker criteria do where a weight is used in some other way than by a layer.

Flows in: scores, and what is known of each weight.  Flows out: scores without infinity for groups that have matrices.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunelab.criteria.base import sum_by_unit
from prunelab.curvature.statistics.collect import Statistics, collect
from prunelab.errors import BatchError
from prunelab.runtime.stack import user_level
from prunelab.tracing.groups import Group
from prunelab.tracing.trace import DependencyGraph


def with_unknown(
    criterion: str, graph: DependencyGraph, scores: dict[str, Tensor], known: Mapping[str, Any], statistics: Statistics
) -> dict[str, Tensor]:
    """Return the scores, with those of groups whose matrices have no factors replaced, and a warning that names these.

    They are ``½ Σ w² E[g_n²]`` over the parameters of the unit, the same predicted change of the loss by its diagonal.
    Where the batches cannot be read again, they are the largest score that is known: such units go last.

    Args:
        criterion: its name.
        graph: of the model.
        scores: group name -> ``[size]``.
        known: weight name -> what is known of it.
        statistics: from which the scores are.
    """
    parameters = {name: p for name, p in graph.model.named_parameters() if p.is_floating_point()}
    odd: dict[str, list[str]] = {}
    for group in graph.groups:
        matrices = [m.name for m in group.members if m.name in parameters and parameters[m.name].dim() > 1]
        missing = [name for name in dict.fromkeys(matrices) if name not in known]
        if matrices and bool(scores[group.name].isinf().any()):
            odd[group.name] = missing or matrices
    if not odd:
        return scores
    moments, how = _moments(graph, statistics)
    finite = [score[score.isfinite()] for score in scores.values()]
    top = max((float(score.max()) for score in finite if len(score)), default=1.0)
    out = dict(scores)
    for group in (group for group in graph.groups if group.name in odd):
        out[group.name] = (
            torch.full((group.size,), top) if moments is None else _by_diagonal(group, moments, parameters)
        )
    names = "; ".join(f"`{name}` ({', '.join(f'`{one}`' for one in odd[name][:3])})" for name in list(odd)[:5])
    warnings.warn(
        f"`{criterion}` knows linear layers and convolutions, and these groups have weights that are used in another "
        f"way: {names}{'; …' if len(odd) > 5 else ''}.  Their units are {how}.",
        stacklevel=user_level(),
    )
    return out


def _moments(graph: DependencyGraph, statistics: Statistics) -> tuple[dict[str, Tensor] | None, str]:
    """Return ``E[g_n²]`` by parameter and what scores are then, in words."""
    by_diagonal = "scored by ½ Σ w² E[g²]"
    if "moments" in statistics.what:
        return statistics.moments, by_diagonal
    if statistics.batches is None or statistics.loss is None:
        return None, "given the largest known score, so that they go last: give a loader that can be read again"
    try:
        options: dict[str, Any] = {"fisher": statistics.fisher, "loss": statistics.loss}
        return collect(graph, statistics.batches, {"moments"}, **options).moments, by_diagonal
    except BatchError as error:
        return None, f"given the largest known score, so that they go last ({error})"


def _by_diagonal(group: Group, moments: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros(group.size)
    for member in group.members:
        if member.name in moments and member.name in parameters:
            values = parameters[member.name].detach().square() * moments[member.name].to(parameters[member.name]) / 2
            total += sum_by_unit(values, member, group.size).float().cpu()
    return total

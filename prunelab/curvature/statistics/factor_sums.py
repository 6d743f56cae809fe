"""Factor sums: what the Kronecker factors are made of, added up call by call.

Flows in: calls and the gradients of their outputs.  Flows out: sums by weight, from which ``kronecker.Factors`` are
made. No patches and no weight gradients are computed (only ``factor="full"`` needs patches).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from prunelab.curvature.statistics.kronecker import Factors
from prunelab.curvature.statistics.per_sample import Part, as_float, conv_part, linear_part
from prunelab.curvature.statistics.squared_products import ranges
from prunelab.curvature.watching.layer_calls import LayerCall
from prunelab.curvature.watching.patches import coverage, patches
from prunelab.curvature.watching.samples import Layout

Factor = Literal["channel", "full"]
FACTORS: tuple[Factor, ...] = get_args(Factor)


def key(call: LayerCall, weight: Tensor) -> str:
    """Return the name under which the factors of a call are kept: its weight, and its rows if not all; or ``.T``."""
    rows = call.rows
    if call.other:
        return f"{call.weight}.T"
    return call.weight if rows == slice(0, len(weight)) else f"{call.weight}[{rows.start}:{rows.stop}]"


def description(call: LayerCall, factor: str) -> dict[str, Any]:
    """Return what is known about a weight's factors without data, as plain values."""
    return {**call.described(), "kind": call.kind, "factor": factor if call.kind == "conv" else "channel"}


def input_sums(call: LayerCall, factor: str) -> dict[str, Tensor]:
    """Return the sums over all inputs of a call: ``A [groups, n, n]``, ``mean [groups, n]``, ``positions []``."""
    kernel, groups, x = call.view.kernel, call.view.groups, as_float(call.input)
    assert call.output is not None
    if call.kind == "linear":
        rows = x.reshape(-1, x.shape[-1])
        return {"A": gram(rows)[None], "mean": rows.sum(0)[None], "positions": _number(len(rows))}
    places = call.output.shape[2:]
    count = len(x) * math.prod(places)
    if call.kind == "conv" and factor == "full" and math.prod(kernel) > 1:
        a, mean = _over_patches(call, x, places)
        return {"A": a, "mean": mean, "positions": _number(count)}
    if call.kind == "conv_transpose":
        a, mean = _over_pixels(x, groups, None)
        return {"A": a, "mean": mean, "positions": _number(len(x) * math.prod(x.shape[2:]))}
    seen = coverage(call, x.shape[2:], places)
    a, mean = _over_pixels(x, groups, seen)
    return {"A": a, "mean": mean, "positions": _number(count * math.prod(kernel))}


def weighted(
    call: LayerCall, layout: Layout, factor: str, weights: Tensor, plain: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what ``input_sums`` does, with each sample counting ``weights [samples]`` times.

    Args:
        call: of the layer.
        layout: where its samples are.
        factor: ``"channel"`` or ``"full"``.
        weights: what each sample counts.
        plain: the sums without weights.
    """

    def scaled(by: Tensor) -> dict[str, Tensor]:
        split = call.input.unflatten(layout.dim, (layout.before, -1, layout.after))
        shape = [1] * split.dim()
        shape[layout.dim + 1] = len(by)
        rows = (split * by.to(split).view(shape)).flatten(layout.dim, layout.dim + 2)
        return input_sums(replace(call, input=rows), factor)

    positions = plain["positions"] * float(weights.double().mean() if weights.device.type != "mps" else weights.mean())
    return {"A": scaled(weights.sqrt())["A"], "mean": scaled(weights)["mean"], "positions": positions}


def gradient_sums(call: LayerCall, gradient: Tensor) -> Tensor:
    """Return ``Σ g gᵀ`` over all samples and positions, ``[groups, out / groups, out / groups]``."""
    g = as_float(gradient)
    if call.kind == "linear":
        rows = g.reshape(-1, g.shape[-1])
        return gram(rows)[None]
    if call.kind == "conv":
        return _over_pixels(g, call.view.groups, None)[0]
    seen = coverage(call, g.shape[2:], call.input.shape[2:])
    return _over_pixels(g, call.view.groups, seen)[0] / math.prod(call.view.kernel)


def gram(rows: Tensor) -> Tensor:
    """Return ``Σ r rᵀ`` over the rows ``[count, n]``: the blocks above the diagonal, and their mirror images."""
    width = rows.shape[1]
    step = 48 if rows.device.type == "cpu" else 512
    if width < 2 * step:
        return rows.mT @ rows
    total = rows.new_empty(width, width)
    for start in range(0, width, step):
        stop = min(width, start + step)
        block = rows[:, start:stop].mT @ rows[:, start:]
        total[start:stop, start:], total[start:, start:stop] = block, block.mT
    return total


def _over_pixels(images: Tensor, groups: int, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ``Σ_q seen_q x_q x_qᵀ``, ``[groups, n, n]``, and ``Σ_q seen_q x_q``; seen is 1 by default."""
    width = images.shape[1] // groups
    a, mean = images.new_zeros(groups, width, width), images.new_zeros(groups, width)
    root: Tensor | None = None
    if seen is not None:
        for dim in range(seen.dim()):  # pixels between the strides of a small kernel are never seen
            used = seen.movedim(dim, 0).reshape(seen.shape[dim], -1).any(1).nonzero().flatten()
            if len(used) < seen.shape[dim]:
                seen, images = seen.index_select(dim, used), images.index_select(dim + 2, used.to(images.device))
        root = None if bool((seen == 1).all()) else seen.to(images).sqrt()
    if groups == 1 and images[0, 0].numel() <= 4 * width:  # long rows: one large product instead of one per image
        x = images if root is None else images * root
        rows = x.movedim(1, -1).reshape(-1, width)
        weights = None if root is None else root.flatten().repeat(len(images))
        return gram(rows)[None], (rows.sum(0) if weights is None else weights @ rows)[None]
    for n in ranges(len(images), images[0].numel(), images.device):
        x = images[n] if root is None else images[n] * root
        flat = x.flatten(2).unflatten(1, (groups, width))
        a += (flat @ flat.mT).sum(0)
        mean += flat.sum((0, 3)) if root is None else (flat @ root.flatten()).sum(0)
    return a, mean


def _over_patches(call: LayerCall, images: Tensor, places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return ``Σ u uᵀ`` ``[groups, n · K, n · K]`` and ``Σ u`` ``[groups, n · K]`` over all patches u."""
    groups, kernel = call.view.groups, call.view.kernel
    width = images.shape[1] // groups * math.prod(kernel)
    a, mean = images.new_zeros(groups, width, width), images.new_zeros(groups, width)
    for n in ranges(len(images), images.shape[1] * math.prod(kernel) * math.prod(places), images.device):
        seen = patches(images[n], call, places).movedim(0, 1 + len(kernel))
        columns = seen.reshape(groups, width, -1)
        a.baddbmm_(columns, columns.mT)  # one large product instead of one per image
        mean += columns.sum(-1)
    return a, mean


def _number(count: int) -> Tensor:
    return torch.tensor(float(count), dtype=torch.float64)


def rotated_part(call: LayerCall, layout: Layout, gradient: Tensor, weight: Tensor, key: str, factors: Factors) -> Part:
    """Return the per-sample gradients of a call's weight in the eigenbasis, ``Q_Sᵀ G_n Q_A`` as ``factors.matrices``.

    Inputs and output gradients are rotated, not their products, except where ``factor="full"`` has more patches than
    the gradient has rows: then Q_A rotates the gradient.
    """
    basis = factors.eigen()
    q_a, q_s = (q if factors.view.groups > 1 else q[None] for q in (basis.Q_A, basis.Q_S))
    a, g = as_float(layout.by_sample(call.input)), as_float(layout.by_sample(gradient))
    turn = False
    if call.kind == "linear":
        turned = a.flatten(1, -2) @ q_a[0].to(a), g.flatten(1, -2) @ q_s[0].to(g)
        part = linear_part(call, *turned)
    elif factors.factor == "full":
        turn = g[0].numel() > g.shape[2] * basis.Q_S.shape[-1]
        part = conv_part(call, a, _rotated(g, q_s), basis=None if turn else q_a)
    else:
        part = conv_part(call, _rotated(a, q_a), _rotated(g, q_s))

    def gradients(n: slice) -> Tensor:
        found = torch.vmap(factors.split)(part.gradients(n))
        return found @ basis.Q_A.to(found) if turn else found

    def squares() -> Tensor:
        assert part.squares is not None
        return factors.split(part.squares())

    rows = slice(0, factors.split(weight[call.rows]).shape[0])
    return replace(part, name=key, rows=rows, gradients=gradients, squares=None if turn else squares)


def _rotated(images: Tensor, vectors: Tensor) -> Tensor:
    """Return ``Qᵀ x`` for every pixel of ``[B, R, channels, *space]``, Q ``[groups, n, n]``."""
    grouped = images.unflatten(2, (len(vectors), -1))
    return torch.einsum("brgc...,gcd->brgd...", grouped, vectors.to(images)).flatten(2, 3)

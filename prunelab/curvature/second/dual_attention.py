"""Dual attention: softmax(s q kᵀ) v and its derivative along a direction, without keeping anything of size tokens².

Flows in: q, k, v and q̇, k̇, v̇.  Flows out: o and ȯ, and derivatives as in `dual_layers.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class Attention(Function):
    """o = P v, P the softmax of S = s q kᵀ by rows: ȯ = Ṗ v + P v̇, Ṗ = P ∘ (Ṡ − r), r the row sums of P ∘ Ṡ.

    On the way back P and Ṡ are computed again.  A matrix of which each row has one number added changes nothing in what
    comes out of a softmax's derivative; so Ṡ − r serves as Ṡ.
    """

    @staticmethod
    def forward(ctx: Any, scale: float, mask: Tensor | None, *six: Tensor) -> tuple[Tensor, Tensor]:
        heads = six[0].shape[:-2]
        q, k, v, qt, kt, vt = flat = [value.contiguous().flatten(0, -3) for value in six]
        ctx.save_for_backward(mask, *flat)
        ctx.scale, ctx.heads = scale, heads
        p, moved = _shares(q, k, qt, kt, scale, mask)
        moved.mul_(p)
        moved.addcmul_(p, moved.sum(-1, keepdim=True), value=-1)
        return p.bmm(v).unflatten(0, heads), moved.bmm(v).baddbmm_(p, vt).unflatten(0, heads)

    @staticmethod
    def backward(ctx: Any, a: Tensor, c: Tensor) -> tuple[Tensor | None, ...]:
        mask, q, k, v, qt, kt, vt = ctx.saved_tensors
        a, c = (value.contiguous().flatten(0, -3) for value in (a, c))
        p, slope = _shares(q, k, qt, kt, ctx.scale, mask)
        moved = p * slope
        rows = moved.sum(-1, keepdim=True)
        slope -= rows
        moved.addcmul_(p, rows, value=-1)
        grad_v, grad_vt = p.mT.bmm(a).baddbmm_(moved.mT, c), p.mT.bmm(c)
        turned, straight = c.bmm(v.mT), a.bmm(v.mT).baddbmm_(c, vt.mT)  # the derivatives in Ṗ, and in P without Ṗ
        turned -= torch.mul(p, turned, out=moved).sum(-1, keepdim=True)
        straight.addcmul_(turned, slope).mul_(p)
        straight.addcmul_(p, straight.sum(-1, keepdim=True), value=-1)  # in S
        turned.mul_(p)  # in Ṡ
        found = (
            straight.bmm(k).baddbmm_(turned, kt).mul_(ctx.scale),
            straight.mT.bmm(q).baddbmm_(turned.mT, qt).mul_(ctx.scale),
            grad_v,
            turned.bmm(k).mul_(ctx.scale),
            turned.mT.bmm(q).mul_(ctx.scale),
            grad_vt,
        )
        return None, None, *(value.unflatten(0, ctx.heads) for value in found)


class Softmax(Function):
    """y = softmax(x), ẏ = y ∘ (ẋ − r), r the sum of y ∘ ẋ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, xt: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        y = x.softmax(dim)
        ctx.save_for_backward(y, xt)
        ctx.dim = dim
        return y, _slope(y, xt, dim)

    @staticmethod
    def backward(ctx: Any, a: Tensor, c: Tensor) -> tuple[Tensor | None, ...]:
        y, xt = ctx.saved_tensors
        turned = c - (y * c).sum(ctx.dim, keepdim=True)
        return _slope(y, torch.addcmul(a, turned, xt - (y * xt).sum(ctx.dim, keepdim=True)), ctx.dim), y * turned, None


def causal(queries: int, keys: int, like: Tensor) -> Tensor:
    """Return the mask that hides the keys after each query's place."""
    return torch.full((queries, keys), -math.inf, dtype=like.dtype, device=like.device).triu_(1)


def _shares(q: Tensor, k: Tensor, qt: Tensor, kt: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return P and Ṡ, ``[batch · heads, queries, keys]``."""
    scaled = q * scale
    logits = scaled.bmm(k.mT) if mask is None else torch.baddbmm(mask, scaled, k.mT)
    return logits.softmax(-1), (qt * scale).bmm(k.mT).baddbmm_(scaled, kt.mT)


def _slope(y: Tensor, u: Tensor, dim: int) -> Tensor:
    """Return the softmax's derivative times a vector."""
    found = y * u
    return found.addcmul_(y, found.sum(dim, keepdim=True), value=-1)

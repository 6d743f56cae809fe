"""Products: sums of squared matrix products, one per sample, in pieces that the caches hold.

With L_n ``[m, P]`` and R_n ``[k, P]`` of every sample n, over its P positions, the per-sample gradients are L_n
R_nᵀ.  For few positions their squares need not be made one by one:

    Σ_n (L_n R_nᵀ)² = Σ_{p ≤ q} c_pq Σ_n (l_np l_nq) (r_np r_nq)ᵀ,     c_pp = 1, c_pq = 2,

elementwise products of columns, and one matrix product over all samples and pairs; with P = 1, (l²)ᵀ(r²).

Flows in: two functions that give L and R for a range of samples.  Flows out: one matrix.  Notebook 04_obd derives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK = {"cpu": 2**19}
"""How many numbers a chunk may hold, by device: on a CPU about what its caches hold."""

FEW = 4
"""Up to so many positions, pairs of positions are cheaper than samples."""

Stack = Callable[[slice], Tensor]


def limit(device: torch.device) -> int:
    """Return how many numbers a chunk may hold on a device."""
    return CHUNK.get(device.type, 2**25)


def ranges(samples: int, size: int, device: torch.device) -> Iterator[slice]:
    """Yield ranges of samples such that ``size`` numbers for each of them fill a chunk."""
    step = max(1, limit(device) // max(1, size))
    for start in range(0, samples, step):
        yield slice(start, min(samples, start + step))


def squared_products(left: Stack, right: Stack, samples: int, shape: tuple[int, int, int, int]) -> Tensor:
    """Return ``Σ_n (L_n R_nᵀ)²``, ``[groups, m, k]``.

    Args:
        left: a range of b samples -> L ``[b, groups, m, positions]``.
        right: the same -> R ``[b, groups, k, positions]``.
        samples: how many samples.
        shape: groups, m, k, positions.
    """
    groups, rows, columns, positions = shape
    like = left(slice(0, 1))
    total = like.new_zeros(groups, rows, columns)
    if positions <= FEW:
        pairs = torch.triu_indices(positions, positions, device=like.device)
        twice = 1 + (pairs[0] != pairs[1]).to(like)
        for n in ranges(samples, groups * (rows + columns) * pairs.shape[1], like.device):
            l_pairs, r_pairs = (_pairs(stack(n), pairs) for stack in (left, right))
            total += (l_pairs * twice.repeat(n.stop - n.start)) @ r_pairs.mT
        return total.clamp_min_(0)
    share = limit(like.device) // max(1, groups * columns)  # rows of gradients that fit a chunk
    for n in ranges(samples, groups * columns * max(positions, min(rows, 64)), like.device):
        l_chunk, r_chunk = left(n), right(n).mT
        count = n.stop - n.start
        step = max(8, share // count)
        for start in range(0, rows, step):
            gradients = l_chunk[:, :, start : start + step] @ r_chunk
            block = total[:, start : start + step]
            if count == 1:
                block.addcmul_(gradients[0], gradients[0])
            else:
                block += gradients.square_().sum(0)
    return total


def _pairs(stack: Tensor, pairs: Tensor) -> Tensor:
    """Return the products of all pairs of positions: ``[b, groups, m, positions]`` to ``[groups, m, b · pairs]``."""
    products = stack.index_select(3, pairs[0]) * stack.index_select(3, pairs[1])
    return products.permute(1, 2, 0, 3).flatten(2)

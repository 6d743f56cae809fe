"""Checkers for the exercises of ``14_unstructured``: N:M masks, bytes of a sparse matrix, what a fast kernel brings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, answer_of, compare


def n_m_mask(function: Callable[[Tensor, int, int], Tensor]) -> Verdict:
    """Check ``function(weight, n, m)``: the mask ``[rows, columns]`` of the n largest of every m neighbours of a row.

    Args:
        function: of the reader; ``weight`` is ``[rows, columns]``, columns a multiple of m; largest by absolute value.
    """

    def blocks(weight: Tensor, n: int, m: int, *, smallest: bool = False) -> Tensor:
        parts = weight.unflatten(1, (-1, m))
        order = parts.argsort(dim=-1, descending=not smallest)[..., :n]
        return torch.zeros_like(parts).scatter_(-1, order, 1.0).flatten(1)

    def whole_rows(weight: Tensor, n: int, m: int) -> Tensor:
        columns = weight.shape[1]
        return blocks(weight.abs(), n * columns // m, columns)

    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (4, 8), generator=generator) * 2 - 1
    numbers = torch.randperm(32, generator=generator).view(4, 8) + 1.0  # all different
    cases = [(numbers * signs, n, m) for n, m in ((2, 4), (1, 4), (1, 2))]
    answer, verdict = answer_of(function, cases[0][0].clone(), 2, 4)
    if verdict is not None:
        return verdict
    if not isinstance(answer, Tensor):
        return Verdict(False, f"it should return a mask, a tensor like the weight, not {type(answer).__name__}.")
    mistakes: dict[str, Callable[[Tensor, int, int], Tensor]] = {
        "these are the smallest of every block; the mask should be True where a weight stays": (
            lambda weight, n, m: blocks(weight.abs(), n, m, smallest=True)
        ),
        "it ranks the signed values, so that large negative weights go; take absolute values first": blocks,
        "it ranks whole rows; every block of m neighbours should keep n of its own": whole_rows,
        "the blocks run down the columns; m neighbours of the same row belong together": (
            lambda weight, n, m: blocks(weight.abs().T, n, m).T
        ),
        "the mask is inverted: True should mean that a weight stays": (
            lambda weight, n, m: 1 - blocks(weight.abs(), n, m)
        ),
        "these are the weights that stay, and not where they are: return the mask alone": (
            lambda weight, n, m: weight * blocks(weight.abs(), n, m)
        ),
    }
    return compare(
        function,
        cases,
        lambda weight, n, m: blocks(weight.abs(), n, m),
        mistakes,
        praise="every block of m neighbours keeps its own n largest, so a small weight may stay and a larger one go.",
        hint="Give the rows a third dimension of size m, and find the n largest along it.",
    )


def csr_bytes(function: Callable[[int, int, float, int, int], float]) -> Verdict:
    """Check ``function(rows, columns, density, value_bytes, index_bytes)``: the bytes of a matrix stored as CSR."""
    mistakes: dict[str, Callable[[int, int, float, int, int], float]] = {
        "it counts the values alone; every value also needs the number of its column": (
            lambda rows, columns, density, value, index: rows * columns * density * value
        ),
        "it leaves out where every row begins: rows + 1 more indices": (
            lambda rows, columns, density, value, index: rows * columns * density * (value + index)
        ),
        "there are rows + 1 row pointers, since the end of the last row is stored too": (
            lambda rows, columns, density, value, index: rows * columns * density * (value + index) + rows * index
        ),
        "every value has two indices here, its row and its column; that is COO, and CSR stores one pointer per row": (
            lambda rows, columns, density, value, index: rows * columns * density * (value + 2 * index)
        ),
        "it stores an index for every weight; zeros are not stored at all": (
            lambda rows, columns, density, value, index: rows * columns * (density * value + index) + (rows + 1) * index
        ),
    }
    return compare(
        function,
        [(64, 576, 0.1, 4, 8), (10, 20, 0.5, 4, 4), (128, 128, 0.25, 2, 4)],
        lambda rows, columns, density, value, index: rows * columns * density * (value + index) + (rows + 1) * index,
        mistakes,
        praise="a value and a column each, and rows + 1 pointers; an index as large as its value doubles the price.",
        hint="Count three arrays: the values, their columns, and where every row begins.",
    )


def network_speedup(function: Callable[[float, float], float]) -> Verdict:
    """Check ``function(share, factor)``: how much faster a network gets if a part of it does.

    Layers that take the ``share`` of its time become ``factor`` times faster; the rest stays as it is.
    """
    mistakes: dict[str, Callable[[float, float], float]] = {
        "that is the time that is left; the speed-up is one over it": lambda share, factor: 1 - share + share / factor,
        "it weights the speeds; but it is times that add up": lambda share, factor: 1 - share + share * factor,
        "it forgets the time of everything else, which is still there": lambda share, factor: factor / share,
        "it forgets the time of all other layers, which is still there": lambda share, factor: factor,
        "that is the limit for a factor without end; this factor leaves a part of the time": (
            lambda share, factor: 1 / (1 - share)
        ),
    }
    return compare(
        function,
        [(0.5, 2.0), (0.9, 4.0), (0.25, 10.0)],
        lambda share, factor: 1 / (1 - share + share / factor),
        mistakes,
        praise="times add up: what was not made faster soon takes most of what is left.",
        hint="Take one second before. How many seconds do both parts take afterwards?",
    )


__all__ = ["csr_bytes", "n_m_mask", "network_speedup"]

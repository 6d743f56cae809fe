"""Checkers for the exercises of ``14_unstructured``: a published score, N:M masks, OBS with a mask, bytes as CSR."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, answer_of, compare, solved_by


def _n_m_mask(weight: Tensor, n: int, m: int) -> Tensor:
    blocks = weight.abs().unflatten(1, (-1, m))
    largest = blocks.topk(n, dim=-1).indices
    return torch.zeros_like(blocks, dtype=torch.bool).scatter(-1, largest, True).flatten(1)


@solved_by(_n_m_mask)
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


def _csr_bytes(rows: int, columns: int, density: float, value_bytes: int, index_bytes: int) -> float:
    return rows * columns * density * (value_bytes + index_bytes) + (rows + 1) * index_bytes


@solved_by(_csr_bytes)
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


def _published_score(products: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    top = max(weight.abs().max() for weight in weights.values())
    score = {}
    for name, product in products.items():
        own = product.abs() / product.abs().max().clamp_min(1e-20)
        score[name] = own + weights[name].abs() / top
    return score


@solved_by(_published_score)
def published_score(
    function: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]],
) -> Verdict:
    """Check ``function(products, weights)``: OBA's score of single weights as its code has it, by layer.

    Absolute products over the largest of their layer, plus absolute weights over the largest of the network.
    """
    generator = torch.Generator().manual_seed(0)
    cases = []
    for sizes in ((3, 2), (2, 4)):
        parts = [torch.randn(size, generator=generator).mul(scale) for size in sizes for scale in (1.0, 4.0)]
        cases.append(({"first": parts[0], "last": parts[2]}, {"first": parts[1], "last": parts[3]}))

    def made(
        products: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        *,
        signed: bool = False,
        layers: bool = True,
        own: bool = False,
        plus: bool = True,
    ) -> dict[str, Tensor]:
        every = torch.cat([product.abs() for product in products.values()]).max()
        top = torch.cat([weight.abs() for weight in weights.values()]).max()
        score = {}
        for name, product in products.items():
            first = (product if signed else product.abs()) / (product.abs().max() if layers else every)
            largest = weights[name].abs().max() if own else top
            score[name] = first + weights[name].abs() / largest if plus else first
        return score

    mistakes: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]]] = {
        "products keep their sign; take absolute values first": lambda p, w: made(p, w, signed=True),
        "products are divided by the largest of the network; take that of their own layer": (
            lambda p, w: made(p, w, layers=False)
        ),
        "weights are divided by the largest of their layer; the second term divides by the largest of the network": (
            lambda p, w: made(p, w, own=True)
        ),
        "the second term, |w| over the largest |w|, is missing": lambda p, w: made(p, w, plus=False),
        "those are magnitudes alone; add the products": (
            lambda p, w: {n: v - made(p, w, plus=False)[n] for n, v in made(p, w).items()}
        ),
    }
    rights = [_published_score(*case) for case in cases]
    answers = []
    for case, right in zip(cases, rights, strict=True):
        answer, verdict = answer_of(function, *case)
        if verdict is not None:
            return verdict
        if not isinstance(answer, Mapping) or set(answer) != set(right):
            return Verdict(False, f"it should return a dict with one tensor for each of {', '.join(right)}.")
        answers.append(answer)

    def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
        return all(one[n].shape == v.shape and torch.allclose(one[n].to(v), v, rtol=1e-4) for n, v in other.items())

    if all(same(answer, right) for answer, right in zip(answers, rights, strict=True)):
        return Verdict(True, "every layer's largest product counts 1, so no layer is emptied for its small products.")
    for words, mistake in mistakes.items():
        if all(same(answer, mistake(*case)) for answer, case in zip(answers, cases, strict=True)):
            return Verdict(False, f"the scores are not right: {words}.")
    return Verdict(False, "the scores are not right. Add two terms, each of them an absolute value over a maximum.")


def _masked_surgeon(weight: Tensor, factor: Tensor, n: int, m: int, priced: bool = True) -> Tensor:
    weight = weight.clone()
    for start in range(0, weight.shape[1], m):
        price = weight[:, start : start + m] ** 2
        if priced:
            price = price / factor.diagonal()[start : start + m] ** 2
        gone = torch.ones_like(price).scatter(1, price.topk(n, 1).indices, 0.0)
        for c in range(start, start + m):
            lost = weight[:, c] * gone[:, c - start]
            weight[:, c:] -= torch.outer(lost / factor[c, c], factor[c, c:])
            weight[:, c] *= 1 - gone[:, c - start]
    return weight


@solved_by(_masked_surgeon)
def masked_surgeon(function: Callable[[Tensor, Tensor, int, int, bool], Tensor]) -> Verdict:
    """Check ``function(weight, factor, n, m, priced)``: N of every M weights stay, and what is to the right moves.

    ``weight`` is ``[rows, columns]``, ``factor`` the upper Cholesky factor U of the inverse UᵀU.  Blocks of m columns
    come from left to right; in each, every row keeps the n of highest w²/U_cc², or w² where ``priced`` is False.
    """

    def made(
        weight: Tensor,
        factor: Tensor,
        n: int,
        m: int,
        priced: bool,
        *,
        move: bool = True,
        early: bool = False,
        root: bool = False,
        smallest: bool = False,
        times: bool = False,
        plus: bool = False,
    ) -> Tensor:
        first, weight = weight, weight.clone()
        for start in range(0, weight.shape[1], m):
            scale = factor.diagonal()[start : start + m] ** (1 if root else 2)
            price = (first if early else weight)[:, start : start + m] ** 2
            price = price / scale if priced else price
            gone = torch.ones_like(price).scatter(1, price.topk(n, 1, largest=not smallest).indices, 0.0)
            for c in range(start, start + m):
                lost = weight[:, c] * gone[:, c - start]
                step = torch.outer(lost if times else lost / factor[c, c], factor[c, c:])
                weight[:, c:] -= (-step if plus else step) * (1 if move else 0)
                weight[:, c] *= 1 - gone[:, c - start]
        return weight

    generator = torch.Generator().manual_seed(1)
    cases = []
    for n, m, priced in ((2, 4, True), (1, 4, True), (2, 4, False)):
        weight = torch.randn(12, 8, generator=generator, dtype=torch.float64)
        inputs = torch.randn(8, 20, generator=generator, dtype=torch.float64).cumsum(0)
        factor = torch.linalg.cholesky(torch.linalg.inv(inputs @ inputs.T / 20), upper=True)
        cases.append((weight, factor, n, m, priced))
    mistakes: dict[str, Callable[[Tensor, Tensor, int, int, bool], Tensor]] = {
        "nothing moves; what goes is to be made up for by the weights to its right": (
            lambda *case: made(*case, move=False)
        ),
        "it keeps the cheapest weights of each block; the cheapest go": lambda *case: made(*case, smallest=True),
        "all blocks are chosen from the first weights; choose from what the moves before have left": (
            lambda *case: made(*case, early=True)
        ),
        "the move has the wrong sign": lambda *case: made(*case, plus=True),
        "the move is not divided by U_cc": lambda *case: made(*case, times=True),
        "the price is divided by U_cc once; it is w² over the square of U_cc": lambda *case: made(*case, root=True),
        "it chooses by w² even where `priced` is True": lambda w, u, n, m, _: made(w, u, n, m, False),
        "it chooses by price even where `priced` is False": lambda w, u, n, m, _: made(w, u, n, m, True),
    }
    return compare(
        function,
        cases,
        _masked_surgeon,
        mistakes,
        praise="one inverse serves all rows, since what is left of a column is never touched again.",
        hint="Choose once per block, then go through its columns: move all that is to the right, then write the zero.",
    )


__all__ = ["csr_bytes", "masked_surgeon", "n_m_mask", "published_score"]

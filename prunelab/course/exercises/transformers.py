"""Checkers for the exercises of ``13_transformers``: the rows of a head, the scale, what attention costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, compare, solved_by


def _rows(head: int, heads: int, d: int) -> Tensor:
    return (torch.arange(3)[:, None] * heads * d + head * d + torch.arange(d)).flatten()


@solved_by(_rows)
def head_rows(function: Callable[[int, int, int], Tensor]) -> Verdict:
    """Check ``function(head, heads, d)``: the rows of a head in a fused projection, ``[3 d]`` in ascending order."""
    mistakes: dict[str, Callable[..., Any]] = {
        "these are 3·d neighbouring rows, as if all rows of a head were neighbours; the parts come first": (
            lambda head, heads, d: head * 3 * d + torch.arange(3 * d)
        ),
        "these are its queries; the head has keys and values too": lambda head, heads, d: head * d + torch.arange(d),
        "this takes every row of one place in the heads; a place is the last factor, the head the middle one": (
            lambda head, heads, d: torch.arange(3 * d) * heads + head
        ),
        "parts are heads·d rows apart, not d": lambda head, heads, d: (
            torch.arange(3)[:, None] * d + head * d + torch.arange(d)
        ).flatten(),
    }

    @wraps(function)
    def as_tensor(*given: Any) -> object:
        answer: object = function(*given)
        return torch.tensor(answer) if isinstance(answer, (list, range)) and len(answer) else answer

    return compare(
        as_tensor,
        [(1, 4, 2), (2, 3, 4)],
        _rows,
        mistakes,
        praise="three runs of d rows, one in the queries, one in the keys, one in the values.",
        hint="Row i is part i // (heads·d), head i // d % heads, place i % d.",
    )


def _query_factor(old: int, new: int) -> float:
    return (new / old) ** 0.5


@solved_by(_query_factor)
def query_factor(function: Callable[[int, int], float]) -> Verdict:
    """Check ``function(old, new)``: what the query rows that stay are multiplied by when heads become narrower."""
    mistakes: dict[str, Callable[..., Any]] = {
        "it is inverted: the code divides by a smaller root than before, so the queries have to shrink": (
            lambda old, new: (old / new) ** 0.5
        ),
        "the scale holds the square root of the width": lambda old, new: new / old,
        "this is the new scale itself; the code applies it already, so only the ratio to the old one is missing": (
            lambda old, new: new**-0.5
        ),
        "the factor goes into the queries alone; this one would do if the keys got it too": lambda old, new: (
            (new / old) ** 0.25
        ),
    }
    return compare(
        function,
        [(24, 16), (64, 8)],
        lambda old, new: (new / old) ** 0.5,
        mistakes,
        praise="with it the scores of attention stay what they were, up to what was removed.",
        hint="Which f makes f / √new equal to 1 / √old?",
    )


def _flops(tokens: int, width: int, heads: int, d: int) -> int:
    return 2 * tokens * heads * d * (4 * width + 2 * tokens)


@solved_by(_flops)
def attention_flops(function: Callable[[int, int, int, int], float]) -> Verdict:
    """Check ``function(tokens, width, heads, d)``: FLOPs of the four matrix products of attention, for one image."""
    mistakes: dict[str, Callable[..., Any]] = {
        "a multiply-add counts as two FLOPs": lambda t, w, h, d: _flops(t, w, h, d) / 2,
        "the products between tokens are missing, queries times keys and weights times values": (
            lambda t, w, h, d: 8 * t * w * h * d
        ),
        "the projection back to the width of the tokens is missing": lambda t, w, h, d: 2 * t * h * d * (3 * w + 2 * t),
        "weights times values are missing": lambda t, w, h, d: 2 * t * h * d * (4 * w + t),
        "the two inner products are done for every head": lambda t, w, h, d: 8 * t * w * h * d + 4 * t * t * d,
        "the fused projection makes queries, keys and values: three times as many rows": (
            lambda t, w, h, d: 2 * t * h * d * (2 * w + 2 * t)
        ),
    }
    return compare(
        function,
        [(64, 96, 4, 24), (10, 8, 2, 3)],
        _flops,
        mistakes,
        praise="all four are proportional to the number of heads: a head less saves the same everywhere.",
        hint="Add up 2·n·m·k for the four products; the two inner ones count once for each head.",
    )


__all__ = ["attention_flops", "head_rows", "query_factor"]

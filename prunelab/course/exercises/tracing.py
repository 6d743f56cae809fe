"""Checkers for the exercises of ``01_tracing``: what goes together, where a head sits, how two sums agree."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, answer_of, compare, solved_by

Pairs = Sequence[tuple[str, str]]


def _closure(pairs: Pairs, start: str) -> set[str]:
    found = {start}
    for _ in pairs:
        found |= {name for pair in pairs if found & set(pair) for name in pair}
    return found


@solved_by(_closure)
def coupled(function: Callable[[Pairs, str], Collection[str]]) -> Verdict:
    """Check ``function(pairs, start)``: the names that go together with ``start``.

    ``pairs`` are equations between names; asked for is the set of all names that they tie to ``start``, directly or by
    way of others, ``start`` included.
    """
    chain = [("a", "b"), ("b", "c"), ("x", "y"), ("c", "d")]
    late = [("c", "d"), ("a", "b"), ("b", "c")]
    for pairs, start in ((chain, "a"), (late, "a"), (chain, "d"), (chain, "y"), (chain, "alone")):
        answer, verdict = answer_of(function, list(pairs), start)
        if verdict is not None:
            return verdict
        if isinstance(answer, str) or not isinstance(answer, Collection):
            return Verdict(False, f"it should return a set of names, not {type(answer).__name__}.")
        found, right = set(answer), _closure(pairs, start)
        if found != right:
            call = f"for {list(pairs)} and start={start!r} it returns {sorted(found)}, and {sorted(right)} is right"
            return Verdict(False, f"{call}: {_why_not_coupled(found, pairs, start)}")
    return Verdict(True, "equations are followed in both directions and to the end; that is what `find` does.")


def _why_not_coupled(found: set[str], pairs: Pairs, start: str) -> str:
    neighbours = {name for pair in pairs if start in pair for name in pair}
    forward, once = {start}, {start}
    for _ in pairs:
        forward |= {second for first, second in pairs if first in forward}
    for pair in pairs:
        once |= set(pair) if once & set(pair) else set()
    if found == _closure(pairs, start) - {start}:
        return "the name to start from belongs to its own group."
    if found in (neighbours, neighbours - {start}):
        return "these are the direct neighbours; what they are tied to goes too."
    if found == once:
        return "one pass over the pairs misses what a later pair ties to an earlier one: go on until nothing is new."
    if found == forward:
        return "an equation has no direction: a = b also leads from b to a."
    return "begin with the name, and add both ends of every pair that touches what you have, until nothing changes."


def _head_rows(width: int, heads: int, head: int) -> Tensor:
    return torch.arange(3 * width).view(3, heads, width // heads)[:, head].flatten()


@solved_by(_head_rows)
def head_rows(function: Callable[[int, int, int], Tensor]) -> Verdict:
    """Check ``function(width, heads, head)``: the rows of a fused query-key-value weight that belong to one head.

    The weight has ``3 × width`` rows, viewed by the code as ``(3, heads, width // heads)``; asked for is an int64
    tensor of row numbers in ascending order.
    """
    mistakes: dict[str, Callable[[int, int, int], Tensor]] = {
        "these are the head's queries alone; its keys and values lie in the second and the third part": (
            lambda width, heads, head: torch.arange(width).view(heads, -1)[head]
        ),
        "this takes the parts in the order (heads, 3, head width); in this code the three comes first": (
            lambda width, heads, head: torch.arange(3 * width).view(heads, -1)[head]
        ),
        "this is every row of one place within a head: heads are the outer factor and the width within one the inner": (
            lambda width, heads, head: torch.arange(3 * width).view(3, -1, heads)[..., head].flatten()
        ),
        "the rows are right, but in another order: sort them": (
            lambda width, heads, head: torch.arange(3 * width).view(3, heads, -1)[:, head].t().flatten()
        ),
    }
    return compare(
        function,
        [(8, 2, 1), (12, 3, 0), (12, 2, 1)],
        _head_rows,
        mistakes,
        praise="three runs of consecutive rows, one each for its queries, its keys and its values.",
        hint="Number the rows from 0, view the numbers as the code views the rows, and pick the head.",
    )


def _breakpoints(first: list[int], second: list[int]) -> list[int]:
    ends = sorted({*accumulate(first), *accumulate(second)})
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


@solved_by(_breakpoints)
def breakpoints(function: Callable[[list[int], list[int]], Sequence[int]]) -> Verdict:
    """Check ``function(first, second)``: the segment sizes into which two sums of equal size refine each other."""
    for first, second in (([6, 4], [2, 8]), ([3, 3, 4], [5, 5]), ([7], [1, 6]), ([4, 4], [4, 4])):
        answer, verdict = answer_of(function, list(first), list(second))
        if verdict is not None:
            return verdict
        if isinstance(answer, Tensor):
            answer = answer.tolist()
        if isinstance(answer, str) or not isinstance(answer, Sequence):
            return Verdict(False, f"it should return a list of sizes, not {type(answer).__name__}.")
        right = _breakpoints(first, second)
        if list(answer) == right:
            continue
        call = f"for {first} and {second} it returns {list(answer)}, and {right} is right"
        if list(answer) == list(accumulate(right)):
            words = "these are the places where a segment ends; the sizes are the steps between them."
        elif list(answer) == right[:-1]:
            words = "the last segment is missing."
        elif list(answer) in (first + second, sorted(first + second)):
            words = "these are the segments of both, side by side; but the two sums lie on top of each other."
        elif sum(answer) != sum(first):
            words = f"the sizes have to add up to {sum(first)}."
        else:
            words = "a new segment begins wherever a segment of either sum ends."
        return Verdict(False, f"{call}: {words}")
    return Verdict(True, "the common refinement ends wherever one of the two ends; product and product do the same.")


__all__ = ["breakpoints", "coupled", "head_rows"]

"""Checkers for the exercises of ``00_tour``: what a cut saves, and a plan by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, answer_of, compare, shown, solved_by


@solved_by(lambda kept_in, kept_out: kept_in * kept_out)
def kept_flops(function: Callable[[float, float], float]) -> Verdict:
    """Check ``function(kept_in, kept_out)``: the share of a convolution's FLOPs that is left.

    The convolution keeps the share ``kept_in`` of its input channels and ``kept_out`` of its output channels; what is
    asked for is the product.
    """
    mistakes: dict[str, Callable[[float, float], float]] = {
        "it looks at the output channels alone, but every output channel also sums over fewer input channels": (
            lambda kept_in, kept_out: kept_out
        ),
        "it looks at the input channels alone, but there are also fewer output channels to compute": (
            lambda kept_in, kept_out: kept_in
        ),
        "it averages the two shares; but every pair of an input and an output channel costs the same, so count the "
        "pairs that are left": lambda kept_in, kept_out: (kept_in + kept_out) / 2,
        "it adds what both sides lose, which counts the pairs that lose both ends twice": (
            lambda kept_in, kept_out: kept_in + kept_out - 1
        ),
        "that is the share that goes; the share that is left was asked for": (
            lambda kept_in, kept_out: 1 - kept_in * kept_out
        ),
    }
    return compare(
        function,
        [(0.5, 0.75), (1.0, 0.25), (0.5, 0.5), (0.3, 0.9)],
        kept_flops.solution,
        mistakes,
        praise="every pair of a kept input and a kept output channel costs the same, so the shares multiply.",
        hint="How many pairs of an input and an output channel are left?",
    )


Removed = Mapping[str, Sequence[int]]


def _lowest(scores: Mapping[str, Tensor], number: int, *, sign: int = 1, spare: bool = True) -> dict[str, list[int]]:
    order = sorted(
        (sign * value, name, unit) for name, row in scores.items() for unit, value in enumerate(row.tolist())
    )
    chosen: dict[str, list[int]] = {name: [] for name in scores}
    for _, name, unit in order:
        full = spare and len(chosen[name]) == len(scores[name]) - 1
        if not full and sum(map(len, chosen.values())) < number:
            chosen[name].append(unit)
    return {name: sorted(units) for name, units in chosen.items()}


@solved_by(_lowest)
def lowest_units(function: Callable[[Mapping[str, Tensor], int], Removed]) -> Verdict:
    """Check ``function(scores, number)``: which units go when all groups compete.

    ``scores`` maps a group's name to its scores ``[units]``.  Asked for is a dict from every group's name to the list
    of its units among the ``number`` lowest scores of all groups, where every group keeps at least one unit.
    """
    plain = {"a": torch.tensor([0.5, 0.1, 0.9, 0.7]), "b": torch.tensor([0.2, 0.8, 0.3, 0.6])}
    uneven = {"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.tensor([0.4, 0.6, 0.5, 0.9])}
    for scores, number in ((plain, 3), (uneven, 2), (uneven, 4)):
        answer, verdict = answer_of(function, {name: score.clone() for name, score in scores.items()}, number)
        if verdict is not None:
            return verdict
        if not isinstance(answer, Mapping):
            return Verdict(False, f"it should return a dict from group names to lists, not {type(answer).__name__}.")
        try:
            found = {name: sorted(int(unit) for unit in answer.get(name, ())) for name in scores}
        except (TypeError, ValueError):
            return Verdict(False, f"the values of the dict should be lists of units, but it returned {answer!r}.")
        right = _lowest(scores, number)
        if found == right:
            continue
        call = f"for {shown(scores)} and number={number} it removes {found}, and {right} is right"
        return Verdict(False, f"{call}: {_why_not(found, scores, number)}")
    return Verdict(True, "the lowest scores of all groups go first, and no group loses its last unit.")


def _why_not(found: dict[str, list[int]], scores: Mapping[str, Tensor], number: int) -> str:
    total = sum(map(len, found.values()))
    emptied = [name for name, units in found.items() if len(set(units)) == len(scores[name])]
    if found == _lowest(scores, number, sign=-1):
        return "these are the highest scores; a low score means that the unit is cheap to remove."
    if emptied:
        return f"group `{emptied[0]}` loses all its units, and nothing would pass through it any more: leave one."
    if total != number:
        return f"these are {total} units and not {number}."
    sizes = [len(units) for units in found.values()]
    if max(sizes) - min(sizes) <= 1 and sizes != [len(units) for units in _lowest(scores, number).values()]:
        return "every group loses about as many; let all groups compete, so that one may lose more than another."
    return "sort the scores of all groups together, and take the lowest."


__all__ = ["kept_flops", "lowest_units"]

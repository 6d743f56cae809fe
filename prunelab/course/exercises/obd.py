"""Checkers for the exercises of ``04_obd``: saliencies, squared gradients, LeCun's recursion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, answer_of, compare, solved_by


def _saliency(w: Tensor, h: Tensor) -> Tensor:
    return h * w**2 / 2


@solved_by(_saliency)
def obd_saliency(function: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """Check ``function(w, h)``: the price ``½ h w²`` of every weight, h its curvature; both of any one shape."""
    mistakes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "the factor ½ of the Taylor series is missing": lambda w, h: h * w**2,
        "the square of the weight is missing: the step is −w, and it enters the second order twice": (
            lambda w, h: h * w / 2
        ),
        "it takes |w| where w² is meant": lambda w, h: h * w.abs() / 2,
        "it divides by h: a weight in a flat direction would be expensive": lambda w, h: w**2 / h / 2,
        "the curvature is squared too; it enters the second order once": lambda w, h: (h * w) ** 2 / 2,
        "that is magnitude; the curvature is missing": lambda w, h: w**2 / 2,
        "that is the price of all weights together; every weight's own is asked for": lambda w, h: (h * w**2).sum() / 2,
        "the sign is turned around; removing a weight costs something": lambda w, h: -h * w**2 / 2,
    }
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(3,), (2, 2), (2, 1, 2, 2)]
    cases = [
        (torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) + 0.1) for shape in shapes
    ]
    return compare(
        function,
        cases,
        _saliency,
        mistakes,
        praise="half the curvature times the square of the weight, entry by entry.",
        hint="Put δ = −w for one weight, 0 for all others, into ½ δᵀHδ.",
    )


def _per_sample(inputs: Tensor, slopes: Tensor) -> Tensor:
    return (slopes.mT @ inputs).square().mean(0)


@solved_by(_per_sample)
def squared_gradients(function: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """Check ``function(inputs, slopes)``: the mean over samples of squared gradients of a layer that tokens share.

    ``inputs`` is ``[N, tokens, in]``, ``slopes`` ``[N, tokens, out]``; asked for is ``[out, in]``.
    """
    mistakes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "it squares before it sums over the tokens; a sample's gradient is the sum over its tokens": (
            lambda a, s: (s**2).flatten(0, 1).T @ (a**2).flatten(0, 1) / len(a)
        ),
        "that is the square of the mean gradient; the gradients of different samples cancel before it squares": (
            lambda a, s: (s.mT @ a).mean(0).square()
        ),
        "that is the mean gradient; its samples should be squared first": lambda a, s: (s.mT @ a).mean(0),
        "it adds the samples up; their mean is asked for": lambda a, s: (s.mT @ a).square().sum(0),
        "it is transposed: rows belong to outputs, columns to inputs": lambda a, s: _per_sample(a, s).T,
        "it divides by the number of tokens too; a sample's gradient is their sum": (
            lambda a, s: (s.mT @ a / a.shape[1]).square().mean(0)
        ),
        "it sums inputs and slopes over the tokens separately, which mixes every token with every other": (
            lambda a, s: (s.sum(1)[:, :, None] * a.sum(1)[:, None, :]).square().mean(0)
        ),
    }
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 2, 3), (5, 2, 4, 4)]  # samples, tokens, outputs, inputs
    cases = [
        (torch.randn(n, t, i, generator=generator), torch.randn(n, t, o, generator=generator)) for n, t, o, i in shapes
    ]
    return compare(
        function,
        cases,
        _per_sample,
        mistakes,
        praise="first the sum over the tokens of a sample, then the square, then the mean over samples.",
        hint="The gradient of one sample is Σ_r s_r a_rᵀ, over its tokens r.",
    )


Layers = Sequence[Tensor]


def _backwards(
    weights: Layers,
    inputs: Layers,
    slopes: Layers,
    top: Tensor,
    *,
    over: Callable[[Tensor], Tensor] = torch.square,
    through: Callable[[Tensor], Tensor] = torch.square,
    times: Callable[[Tensor], Tensor] = torch.square,
    total: bool = False,
) -> list[Tensor]:
    """Return LeCun's recursion, or the result if a square is left out or a sum taken for the mean."""
    found: list[Tensor] = []
    bend = top
    for place in reversed(range(len(weights))):
        found.insert(0, bend.T @ times(inputs[place]) / (1 if total else len(top)))
        if place:
            bend = through(slopes[place - 1]) * (bend @ over(weights[place]))
    return found


def _recursion(weights: Layers, inputs: Layers, slopes: Layers, top: Tensor) -> list[Tensor]:
    return _backwards(weights, inputs, slopes, top)


@solved_by(_recursion)
def lecun_diagonal(function: Callable[[Layers, Layers, Layers, Tensor], Sequence[Tensor]]) -> Verdict:
    """Check ``function(weights, inputs, slopes, top)``: the diagonal of the curvature, layer by layer.

    ``weights`` are ``[out, in]`` from the first layer to the last, ``inputs`` ``[N, in]`` what each of them reads,
    ``slopes`` ``[N, units]`` f'(a) of the hidden layers (one fewer), ``top`` ``[N, out]`` ∂²ℓ/∂a² of the outputs.
    Asked for is a list of tensors like the weights.
    """

    def flat(answer: Callable[..., Sequence[Tensor]]) -> Callable[..., Tensor]:
        def joined(*case: Tensor) -> Tensor:
            depth = (len(case) - 1 + 1) // 3
            weights, inputs, slopes = case[:depth], case[depth : 2 * depth], case[2 * depth : -1]
            found = answer(list(weights), list(inputs), list(slopes), case[-1])
            return torch.cat([torch.as_tensor(one).flatten() for one in found])

        return joined

    generator = torch.Generator().manual_seed(0)

    def case(samples: int, *sizes: int) -> tuple[Tensor, ...]:
        draw = [(after, before) for before, after in pairwise(sizes)] + [(samples, size) for size in sizes[:-1]]
        draw += [(samples, size) for size in sizes[1:-1]]
        return *[torch.randn(shape, generator=generator) for shape in draw], torch.rand(
            samples, sizes[-1], generator=generator
        )

    cases = [case(7, 4, 5, 3), case(5, 3, 5, 4, 4)]
    few = [list(cases[0][:2]), list(cases[0][2:4]), list(cases[0][4:5]), cases[0][5]]
    _, verdict = answer_of(function, *few)
    if verdict is not None:
        return Verdict(False, verdict.message.replace(verdict.message.partition(" r")[0], f"{function.__name__}(…)", 1))
    named = flat(function)
    named.__name__ = function.__name__
    return compare(
        named,
        cases,
        flat(_recursion),
        {
            "the weights on the way back are squared: ∂²ℓ/∂a_i² takes w_li², not w_li": flat(
                lambda *given: _backwards(*given, over=lambda value: value)
            ),
            "f'(a) is squared on the way back: the chain rule meets it twice": flat(
                lambda *given: _backwards(*given, through=lambda value: value)
            ),
            "f'(a) is left out on the way back": flat(lambda *given: _backwards(*given, through=torch.ones_like)),
            "a weight's curvature is ∂²ℓ/∂a² times its input squared": flat(
                lambda *given: _backwards(*given, times=lambda value: value)
            ),
            "it adds the samples up; their mean is asked for": flat(lambda *given: _backwards(*given, total=True)),
            "the layers are in the wrong order; the first layer's comes first": flat(
                lambda *given: _backwards(*given)[::-1]
            ),
        },
        praise="one pass backwards, with squares of weights and slopes where the gradient has them plain.",
        hint="Last layer: topᵀ @ inputs² / N. One layer down: slopes² * (bend @ weights²).",
    )


__all__ = ["lecun_diagonal", "obd_saliency", "squared_gradients"]

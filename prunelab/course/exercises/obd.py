"""Checkers for the exercises of ``04_obd``: saliencies, squared gradients of shared weights, Hutchinson."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, answer_of, compare


def obd_saliency(function: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """Check ``function(weights, hessian)``: ``½ h_qq w_q²`` for weights ``[n]`` and a dense Hessian ``[n, n]``."""
    mistakes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "the factor ½ of the Taylor series is missing": lambda w, h: h.diagonal() * w**2,
        "the square of the weight is missing: the step is −w, and it enters the second order twice": (
            lambda w, h: h.diagonal() * w / 2
        ),
        "it takes |w| where w² is meant": lambda w, h: h.diagonal() * w.abs() / 2,
        "that is ½ w ⊙ (Hw), which charges pairs as if all weights went at once; OBD drops them": (
            lambda w, h: w * (h @ w) / 2
        ),
        "it sums rows of H; the diagonal alone is asked for": lambda w, h: h.sum(1) * w**2 / 2,
        "it divides by h: a weight in a flat direction would be dear": lambda w, h: w**2 / h.diagonal() / 2,
        "it uses the inverse of H, so the other weights adapt; that is OBS, in the next notebook": (
            lambda w, h: w**2 / torch.linalg.inv(h).diagonal() / 2
        ),
        "that is the cost of removing all weights together; every weight alone is asked for": lambda w, h: (
            w @ h @ w / 2
        ),
    }
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, 4, generator=generator)
    cases = [(torch.randn(3, generator=generator), one @ one.T + torch.eye(3)) for one in root]
    return compare(
        function,
        cases,
        lambda w, h: h.diagonal() * w**2 / 2,
        mistakes,
        praise="half the curvature times the square of the weight; what is off the diagonal never enters.",
        hint="Put δ = −w_q for one weight, 0 for all others, into ½ δᵀHδ.",
    )


def squared_gradients(function: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """Check ``function(inputs, slopes)``: the mean over samples of squared gradients of a layer that tokens share.

    ``inputs`` is ``[N, tokens, in]``, ``slopes`` ``[N, tokens, out]``; asked for is ``[out, in]``.
    """

    def truth(inputs: Tensor, slopes: Tensor) -> Tensor:
        return (slopes.mT @ inputs).square().mean(0)

    mistakes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "it squares before it sums over the tokens; a sample's gradient is the sum over its tokens": (
            lambda a, s: (s**2).flatten(0, 1).T @ (a**2).flatten(0, 1) / len(a)
        ),
        "that is the square of the mean gradient; the gradients of different samples cancel before it squares": (
            lambda a, s: (s.mT @ a).mean(0).square()
        ),
        "that is the mean gradient; its samples should be squared first": lambda a, s: (s.mT @ a).mean(0),
        "it adds the samples up; their mean is asked for": lambda a, s: (s.mT @ a).square().sum(0),
        "it is transposed: rows belong to outputs, columns to inputs": lambda a, s: truth(a, s).T,
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
        truth,
        mistakes,
        praise="first the sum over the tokens of a sample, then the square, then the mean over samples.",
        hint="The gradient of one sample is Σ_r s_r a_rᵀ, over its tokens r.",
    )


Product = Callable[[Tensor], Tensor]


def hutchinson_diagonal(function: Callable[[Tensor, Product], Tensor]) -> Verdict:
    """Check ``function(signs, product)``: the mean of ``ε ⊙ Hε`` over sign vectors ``[K, n]``."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 4, 4, generator=generator)
    matrices = [one + one.T for one in root]
    signs = [torch.randint(2, (number, 4), generator=generator).float() * 2 - 1 for number in (3, 5)]

    def asked(vector: Tensor, matrix: Tensor) -> Tensor:
        if vector.shape != (4,):
            raise ValueError(f"product takes one vector [4], not {list(vector.shape)}")
        return matrix @ vector

    _, verdict = answer_of(function, signs[0].clone(), lambda vector: asked(vector, matrices[0]))
    if verdict is not None:
        return verdict

    def named(signs: Tensor, matrix: Tensor) -> Tensor:
        return function(signs, lambda vector: asked(vector, matrix))

    named.__name__ = function.__name__
    mistakes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "it averages Hε without multiplying by ε again, and the signs cancel": lambda z, m: (z @ m).mean(0),
        "that is the mean of εᵀHε, an estimate of the trace; multiply entry by entry": lambda z, m: (
            (z * (z @ m)).sum(1).mean()
        ),
        "it adds the sign vectors up; their mean is asked for": lambda z, m: (z * (z @ m)).sum(0),
        "it uses one sign vector only; take the mean over all of them": lambda z, m: z[0] * (z[0] @ m),
        "it takes absolute values; a diagonal may be negative": lambda z, m: (z * (z @ m)).abs().mean(0),
    }
    return compare(
        named,
        list(zip(signs, matrices, strict=True)),
        lambda z, m: (z * (z @ m)).mean(0),
        mistakes,
        praise="ε_q ε_q is 1, and ε_q ε_r averages to 0: only the diagonal survives.",
        hint="For one ε, entry q of ε ⊙ Hε is h_qq plus terms whose signs are random.",
    )


__all__ = ["hutchinson_diagonal", "obd_saliency", "squared_gradients"]

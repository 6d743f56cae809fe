"""Checkers for the exercises of ``12_iterative``: a schedule, the budget of one step, the loss of distillation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prunelab.course.exercises.verdict import Verdict, compare


def cubic_schedule(function: Callable[[int, int, float], float]) -> Verdict:
    """Check ``function(step, steps, share)``: the share of the whole that is left after a step of the cubic schedule.

    It goes from 1 at step 0 to ``share`` at the last step; what is still to go shrinks with the cube of the way left.
    """
    mistakes: dict[str, Callable[[int, int, float], float]] = {
        "it ends at zero; what is to stay, `share`, has to be left at the last step": (
            lambda step, steps, share: (1 - step / steps) ** 3
        ),
        "that is the linear schedule; take the cube of the way that is left": (
            lambda step, steps, share: share + (1 - share) * (1 - step / steps)
        ),
        "it starts slowly and ends with large cuts; the cube belongs to the way that is left, and not to the way that "
        "is done": lambda step, steps, share: 1 - (1 - share) * (step / steps) ** 3,
        "that is the geometric schedule, which cuts by the same factor": (
            lambda step, steps, share: share ** (step / steps)
        ),
        "that is what is gone; what is left was asked for": (
            lambda step, steps, share: (1 - share) * (1 - (1 - step / steps) ** 3)
        ),
        "it raises the whole linear schedule to the third power, so that it ends at the cube of `share`": (
            lambda step, steps, share: (share + (1 - share) * (1 - step / steps)) ** 3
        ),
    }
    return compare(
        function,
        [(1, 4, 0.2), (2, 4, 0.5), (0, 3, 0.3), (3, 3, 0.3)],
        lambda step, steps, share: share + (1 - share) * (1 - step / steps) ** 3,
        mistakes,
        praise="large cuts while there is much to spare, small ones at the end.",
        hint="Start from `share` and add a part of `1 - share` that goes from 1 to 0.",
    )


def step_budget(function: Callable[[int, int, float], float]) -> Verdict:
    """Check ``function(step, steps, share)``: the share that a step of the linear schedule keeps of what is there.

    After step t of T, counted from 1, the linear schedule has ``1 - (1 - share) * t / T`` of the whole left.
    """

    def left(step: int, steps: int, share: float) -> float:
        return 1 - (1 - share) * step / steps

    mistakes: dict[str, Callable[[int, int, float], float]] = {
        "that is the share of the whole network; the network of this step is smaller already": left,
        "it keeps as much in every step, which is the geometric schedule": (
            lambda step, steps, share: share ** (1 / steps)
        ),
        "it takes the difference; a share of what is there is a quotient": (
            lambda step, steps, share: 1 - (left(step - 1, steps, share) - left(step, steps, share))
        ),
        "the quotient is upside down": lambda step, steps, share: (
            left(step - 1, steps, share) / left(step, steps, share)
        ),
        "it compares with the next step; compare with the one before": lambda step, steps, share: (
            left(step + 1, steps, share) / left(step, steps, share)
        ),
    }
    return compare(
        function,
        [(1, 2, 0.5), (2, 2, 0.5), (3, 4, 0.2)],
        lambda step, steps, share: left(step, steps, share) / left(step - 1, steps, share),
        mistakes,
        praise="what is left after the step, of what was left before it; the last steps cut deepest.",
        hint="How much of the whole is left before the step, and how much after it?",
    )


def distillation_loss(function: Callable[[Tensor, Tensor, float], Tensor]) -> Verdict:
    """Check ``function(student, teacher, temperature)``: the loss of distillation for logits ``[batch, classes]``.

    It is T² KL(p ‖ q), the mean over the batch, with the softmax p of the teacher's and q of the student's logits,
    both at temperature T.
    """

    def loss(student: Tensor, teacher: Tensor, temperature: float, hot: float | None = None) -> Tensor:
        q = F.log_softmax(student / temperature, dim=1)
        p = F.log_softmax(teacher / (hot or temperature), dim=1)
        return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)

    mistakes: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
        "the factor T² is missing, without which gradients shrink as the temperature grows": (
            lambda student, teacher, t: loss(student, teacher, t) / t**2
        ),
        "one factor T is missing: gradients shrink with its square": (
            lambda student, teacher, t: loss(student, teacher, t) / t
        ),
        "it is KL(q ‖ p); the teacher's distribution comes first": lambda student, teacher, t: loss(
            teacher, student, t
        ),
        "the teacher's logits are not divided by the temperature": (
            lambda student, teacher, t: loss(student, teacher, t, hot=1.0)
        ),
        "it is the mean over images and classes; sum over the classes": (
            lambda student, teacher, t: loss(student, teacher, t) / student.shape[1]
        ),
        "it is the sum over the batch; take the mean": lambda student, teacher, t: (
            loss(student, teacher, t) * len(student)
        ),
        "the logits are multiplied by the temperature; divide by it": (
            lambda student, teacher, t: loss(student * t**2, teacher * t**2, t)
        ),
        "it is the cross-entropy −Σ p log q, which differs by the entropy of p": (
            lambda student, teacher, t: (
                -(t**2) * (F.softmax(teacher / t, 1) * F.log_softmax(student / t, 1)).sum(1).mean()
            )
        ),
    }
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, generator=generator).mul(2).round(decimals=1) for _ in range(2))
    return compare(
        function,
        [(student, teacher, 2.0), (student, teacher, 4.0), (teacher, student, 1.5)],
        loss,
        mistakes,
        praise="soft targets say which wrong classes are nearly right, and T² keeps their gradients comparable.",
        hint="Write the softmax of both at temperature T, then Σ p (log p − log q) for each image.",
    )


__all__ = ["cubic_schedule", "distillation_loss", "step_budget"]

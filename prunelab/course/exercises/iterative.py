"""Checkers for the exercises of ``12_iterative``: the fine-tuning loop, the loss of distillation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.course.exercises.verdict import Verdict, answer_of, compare, solved_by


def _fine_tune(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], lr: float) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    model.train()
    for inputs, targets in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@solved_by(_fine_tune)
def fine_tune(function: Callable[[nn.Module, Sequence[tuple[Tensor, Tensor]], float], nn.Module]) -> Verdict:
    """Check ``function(model, batches, lr)``: one pass over the batches; the model, trained and in evaluation mode.

    SGD with momentum 0.9, the cross-entropy, and a learning rate from ``lr`` to zero along a cosine.
    """
    generator = torch.Generator().manual_seed(0)
    first = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).double()
    for value in first.parameters():
        value.data.copy_(torch.randn(value.shape, generator=generator).double())
    batches = []
    for _ in range(6):
        inputs = torch.randn(8, 3, generator=generator).double()
        batches.append((inputs, torch.randint(2, (8,), generator=generator)))
    trained: list[Any] = []

    def train(lr: float) -> Tensor | None:
        trained.append(function(copy.deepcopy(first).eval(), batches, lr))
        return _flat(trained[-1]) if isinstance(trained[-1], nn.Module) else None

    train.__name__ = "fine_tune"
    answer, verdict = answer_of(train, 0.2)
    if verdict is not None and trained and trained[-1] not in (None, ...):
        return Verdict(False, f"it should return the model, not {type(trained[-1]).__name__}.")
    if verdict is not None:
        return verdict

    def made(
        zero: bool = True, training: bool = True, cosine: bool = True, momentum: float = 0.9, steps: bool = True
    ) -> Tensor:
        model = copy.deepcopy(first).train(training)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=momentum)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
        for inputs, targets in batches:
            if zero:
                optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            if steps:
                optimizer.step()
            if cosine and steps:
                schedule.step()
        return _flat(model)

    if torch.allclose(answer, made()):
        if trained[-1].training:
            return Verdict(False, "the model is still in training mode; call `model.eval()` at the end.")
        return Verdict(True, "eight lines, and every criterion of this chapter is trained by them.")
    mistakes = {
        "gradients add up from batch to batch: `optimizer.zero_grad()` is missing": made(zero=False),
        "batch norm still uses the statistics of the whole network: call `model.train()` first": made(training=False),
        "the learning rate does not fall: call `schedule.step()` after every batch": made(cosine=False),
        "there is no momentum; it is 0.9": made(momentum=0.0),
        "nothing was trained: `optimizer.step()` is missing": made(training=True, steps=False),
        "the model is unchanged": _flat(first),
    }
    for words, mistake in mistakes.items():
        if torch.allclose(answer, mistake):
            return Verdict(False, f"the weights are not right: {words}.")
    return Verdict(False, "the weights are not right. One pass, one step per batch, momentum 0.9 and a cosine.")


def _flat(model: nn.Module) -> Tensor:
    """Return parameters and the statistics of batch norms as one vector."""
    return torch.cat([value.detach().double().flatten() for value in model.state_dict().values()])


def _distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_p = F.log_softmax(teacher / temperature, dim=1)
    log_q = F.log_softmax(student / temperature, dim=1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1).mean()


@solved_by(_distillation_loss)
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


__all__ = ["distillation_loss", "fine_tune"]

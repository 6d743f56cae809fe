"""Learning from a teacher: a loss towards what another model says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.errors import BudgetError
from prunelab.runtime.isolation import modes_kept


@dataclass(frozen=True)
class Distillation:
    """A loss towards what a teacher says, beside that towards the labels; the unpruned model as a rule.

    With logits v of the teacher and z of the student, and T the temperature,

        loss = (1 − weight) · CE(z, labels) + weight · T² · KL(softmax(v / T) ‖ softmax(z / T)),

    in nats per image.  A high temperature shows the student what the teacher takes for similar; T² keeps the size of
    the gradients.

    Args:
        teacher: takes what the student takes; used in eval mode, without gradients, and not changed.
        temperature: above 0.
        weight: of the teacher, in [0, 1].

    Raises:
        BudgetError: a number is out of range.

    Source: Hinton, Vinyals & Dean 2015, *Distilling the Knowledge in a Neural Network*, section 2.
    """

    teacher: nn.Module
    temperature: float = 4.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise BudgetError(f"`temperature` must be a number above 0, got {self.temperature!r}.")
        if not 0 <= self.weight <= 1:
            raise BudgetError(f"weight={self.weight!r} is outside [0, 1].")

    def __call__(self, logits: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of the student's ``logits [B, classes]`` on ``inputs``."""
        with torch.no_grad(), modes_kept(self.teacher):
            self.teacher.eval()
            wanted = self.teacher(inputs)
        one, two = ((scores.float() / self.temperature).log_softmax(1) for scores in (logits, wanted))
        apart = F.kl_div(one, two, reduction="batchmean", log_target=True)
        return (1 - self.weight) * F.cross_entropy(logits, targets) + self.weight * self.temperature**2 * apart

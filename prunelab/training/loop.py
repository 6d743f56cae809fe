"""The loop: train a network by a recipe, and measure how good it is.

Flows in: a model and a set of images.  Flows out: the same model, trained, and a log of its epochs.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunelab import data
from prunelab.errors import BudgetError, DataError
from prunelab.runtime.devices import accelerator
from prunelab.runtime.isolation import eval_mode
from prunelab.training.distillation import Distillation
from prunelab.training.recipes import Recipe

Precision = Literal["float32", "mixed"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def default_device() -> torch.device:
    """Return the accelerator of this machine, or the CPU."""
    return accelerator()


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, precision: Precision = "float32"
) -> dict[str, float]:
    """Return the mean cross-entropy ``loss`` (nats) and ``accuracy`` (share in [0, 1]) over the batches, in eval mode.

    Args:
        model: gives logits ``[B, classes]``.
        batches: ``(inputs, targets)``.
        precision: ``"float32"``, or ``"mixed"`` as ``fit`` does it.

    Raises:
        DataError: there is no batch.
    """
    device = next(model.parameters()).device
    seen, loss, correct = 0, 0.0, 0
    with eval_mode(model):
        for inputs, targets in batches:
            targets = targets.to(device)
            with mixed_precision(device, precision):
                logits = model(inputs.to(device))
            logits = logits.float() if logits.dtype == torch.bfloat16 else logits
            loss += F.cross_entropy(logits, targets, reduction="sum").item()
            correct += int((logits.argmax(1) == targets).sum())
            seen += len(targets)
    if not seen:
        raise DataError("There is nothing to evaluate on: the loader gave no batch.")
    return {"loss": loss / seen, "accuracy": correct / seen}


def fit(
    model: nn.Module,
    images: data.Images,
    recipe: Recipe,
    *,
    distill: Distillation | None = None,
    seed: int = 0,
    state: Path | None = None,
    after_epoch: Callable[[int], dict[str, float]] | None = None,
    progress: bool = True,
    precision: Precision = "mixed",
) -> list[dict[str, float]]:
    """Train ``model`` in place, where it is, and return one row per epoch.

    Every epoch draws its randomness from ``seed`` and its own number, so a run that was stopped and resumed from
    ``state`` ends like one that was not.

    Args:
        model: takes ``[B, 3, H, W]``, gives logits ``[B, classes]``; left in eval mode.
        images: the training set; crops and mirrors are added unless it has its own ``augment``.
        recipe: epochs, optimizer and learning rate.
        distill: what to learn from besides the labels.
        seed: of the order of images and the augmentation.
        state: file to keep the state of the run in after every epoch, and to resume from.
        after_epoch: called with the epoch's number in eval mode; what it returns is added to the row.
        progress: show a progress bar.
        precision: ``"mixed"``, which GPUs that can multiply in bfloat16 then do; or ``"float32"``.

    Raises:
        BudgetError: there is no such precision.
        DataError: ``state`` is not that of this run.
    """
    device = next(model.parameters()).device
    images = images.augmented()
    optimizer = recipe.make_optimizer(model)
    per_epoch = math.ceil(len(images) / recipe.batch_size)
    steps = max(1, round(recipe.epochs * per_epoch))
    epochs = math.ceil(steps / per_epoch)
    schedule = recipe.make_schedule(optimizer, steps)
    log: list[dict[str, float]] = []
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if state is not None and state.is_file():
        log = _resume(state, parts, device)
    model.to(memory_format=torch.channels_last)  # about a third faster on CPUs and GPUs, same numbers to rounding
    begun = min(steps, per_epoch * len(log))
    bar = tqdm(total=steps, initial=begun, desc="training", unit="step", delay=1, leave=False, disable=not progress)
    for epoch in range(len(log), epochs):
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 10_000 + epoch)
            batches = data.loader(images, recipe.batch_size, shuffle=True, seed=seed * 10_000 + epoch)
            left = islice(batches, steps - epoch * per_epoch)  # the last pass may be a part
            loss = _train_epoch(model, left, optimizer, schedule, distill, bar, precision)
        model.eval()
        row = {"epoch": epoch + 1, "loss": loss, "seconds": round(time.perf_counter() - start, 2)}
        log.append(row | (after_epoch(epoch + 1) if after_epoch else {}))
        bar.set_postfix({key: f"{value:.3f}" for key, value in log[-1].items() if key not in ("epoch", "seconds")})
        if state is not None:
            _keep(state, parts, log)
    bar.close()
    model.eval().to(memory_format=torch.contiguous_format)
    return log


def _train_epoch(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: Any,
    schedule: Any,
    distill: Distillation | None,
    bar: tqdm,
    precision: Precision,
) -> float:
    """Train for one epoch and return the mean loss."""
    device = next(model.parameters()).device
    model.train()
    seen, total = 0, torch.zeros((), device=device)
    for inputs, targets in batches:
        inputs, targets = inputs.to(device, memory_format=torch.channels_last), targets.to(device)
        with mixed_precision(device, precision):
            logits = model(inputs)
            loss = distill(logits, inputs, targets) if distill else F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seen, total = seen + len(targets), total + loss.detach() * len(targets)
        bar.update()
    return total.item() / seen


def mixed_precision(device: torch.device, precision: Precision = "mixed") -> torch.autocast:
    """Return a context in which a GPU that can multiplies in bfloat16; weights and sums stay in float32.

    With bfloat16's range of exponents gradients need no scaling.  GPUs before NVIDIA's Ampere, and CPUs, compute in
    float32; so do all with ``precision="float32"``.

    Raises:
        BudgetError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise BudgetError(f"There is no precision {precision!r}; there are {', '.join(PRECISIONS)}.")
    able = precision == "mixed" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=able)


def _keep(path: Path, parts: dict[str, Any], log: list[dict[str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    torch.save({key: part.state_dict() for key, part in parts.items()} | {"log": log}, fresh)
    os.replace(fresh, path)


def _resume(path: Path, parts: dict[str, Any], device: torch.device) -> list[dict[str, float]]:
    try:
        kept = torch.load(path, map_location=device, weights_only=True)
        for key, part in parts.items():
            part.load_state_dict(kept[key])
        log: list[dict[str, float]] = kept["log"]
    except Exception as error:
        raise DataError(f"{path} is not the state of this run ({error}); delete it to start again.") from error
    return log

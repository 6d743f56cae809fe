"""Train the zoo's checkpoints, fine-tune pruned networks, measure accuracy.

Flows in: a model and a set of images.  Flows out: the same model, trained, and a log of its epochs.

    python -m prunelab.training resnet20 --data full

trains one network by its recipe, goes on where an interrupted run stopped, and writes ``NAME.safetensors`` (fp16) and
``NAME.json`` (recipe, seed, log, accuracies).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunelab import data, zoo
from prunelab.batches import eval_mode
from prunelab.errors import DataError


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: one warm-up and cosine cycle of the learning rate, cross-entropy, crops and mirrors.

    Args:
        epochs: passes over the images.
        lr: the highest learning rate.
        weight_decay: of every parameter.
        optimizer: ``"sgd"`` (Nesterov momentum 0.9) or ``"adamw"``.
        batch_size: images per step.
        warmup: share of the steps in which the learning rate rises.
    """

    epochs: int
    lr: float
    weight_decay: float
    optimizer: str = "sgd"
    batch_size: int = 128
    warmup: float = 0.15

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer for ``model``."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=0.9, nesterov=True, weight_decay=self.weight_decay
        )


RECIPES = {
    "resnet20": Recipe(epochs=36, lr=0.1, weight_decay=5e-4),
    "resnet32": Recipe(epochs=36, lr=0.1, weight_decay=5e-4),
    "vgg13_narrow": Recipe(epochs=30, lr=0.1, weight_decay=5e-4),
    "vgg19": Recipe(epochs=60, lr=0.05, weight_decay=5e-4),
    "vit_small": Recipe(epochs=20, lr=1e-3, weight_decay=0.05, optimizer="adamw"),
}


def default_device() -> torch.device:
    """Return the accelerator of this machine, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return the mean cross-entropy ``loss`` (nats) and ``accuracy`` (share in [0, 1]) over the batches, in eval mode.

    Raises:
        DataError: there is no batch.
    """
    device = next(model.parameters()).device
    seen, loss, correct = 0, 0.0, 0
    with eval_mode(model):
        for inputs, targets in batches:
            targets = targets.to(device)
            logits = model(inputs.to(device))
            loss += F.cross_entropy(logits, targets, reduction="sum").item()
            correct += int((logits.argmax(1) == targets).sum())
            seen += len(targets)
    if not seen:
        raise DataError("There is nothing to evaluate on: the loader gave no batch.")
    return {"loss": loss / seen, "accuracy": correct / seen}


def fit(
    model: nn.Module,
    images: data.ImageSet,
    recipe: Recipe,
    *,
    seed: int = 0,
    state: Path | None = None,
    after_epoch: Callable[[int], dict[str, float]] | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train ``model`` in place, where it is, and return one row per epoch.

    Every epoch draws its randomness from ``seed`` and its own number, so a run that was stopped and resumed from
    ``state`` ends like one that was not.

    Args:
        model: takes ``[B, 3, 32, 32]``, gives logits ``[B, classes]``; left in eval mode.
        images: the training set; crops and mirrors are added unless it has its own ``augment``.
        recipe: epochs, optimizer and learning rate.
        seed: of the order of images and the augmentation.
        state: file to keep the state of the run in after every epoch, and to resume from.
        after_epoch: called with the epoch's number in eval mode; what it returns is added to the row.
        progress: show a progress bar.
    """
    device = next(model.parameters()).device
    images = data.ImageSet(images.images, images.targets, images.augment or data.augmentation())
    optimizer = recipe.make_optimizer(model)
    steps = recipe.epochs * -(-len(images) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=max(steps, 2), pct_start=recipe.warmup, cycle_momentum=False
    )
    log: list[dict[str, float]] = []
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if state is not None and state.is_file():
        log = _resume(state, parts, device)
    model.to(memory_format=torch.channels_last)  # about a third faster on CPUs and GPUs, same numbers to rounding
    bar = tqdm(total=steps, initial=steps * len(log) // recipe.epochs, unit="step", disable=not progress)
    for epoch in range(len(log), recipe.epochs):
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 10_000 + epoch)
            loss = _train_epoch(model, images, recipe, optimizer, schedule, bar, seed * 10_000 + epoch)
        model.eval()
        row = {"epoch": epoch + 1, "loss": loss, "seconds": round(time.perf_counter() - start, 2)}
        log.append(row | (after_epoch(epoch + 1) if after_epoch else {}))
        bar.set_postfix({key: f"{value:.3f}" for key, value in log[-1].items() if key not in ("epoch", "seconds")})
        if state is not None:
            _keep(state, parts, log)
    bar.close()
    model.eval().to(memory_format=torch.contiguous_format)
    return log


def _train_epoch(model, images, recipe, optimizer, schedule, bar, seed) -> float:
    device = next(model.parameters()).device
    model.train()
    total = torch.zeros((), device=device)
    for inputs, targets in data.loader(images, recipe.batch_size, shuffle=True, seed=seed):
        inputs = inputs.to(device, memory_format=torch.channels_last)
        loss = F.cross_entropy(model(inputs), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.detach() * len(targets)
        bar.update()
    return total.item() / len(images)


def _keep(path: Path, parts: dict, log: list[dict[str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    torch.save({key: part.state_dict() for key, part in parts.items()} | {"log": log}, fresh)
    os.replace(fresh, path)


def _resume(path: Path, parts: dict, device: torch.device) -> list[dict[str, float]]:
    try:
        kept = torch.load(path, map_location=device, weights_only=True)
        for key, part in parts.items():
            part.load_state_dict(kept[key])
    except Exception as error:
        raise DataError(f"{path} is not the state of this run ({error}); delete it to start again.") from error
    return kept["log"]


def train_checkpoint(name: str, source: str, out: Path, state: Path, recipe: Recipe, seed: int) -> dict:
    """Train ``name`` from scratch, write ``out/NAME.safetensors`` in fp16 and ``out/NAME.json``, return the latter."""
    device = default_device()
    images = data.cifar10(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = zoo.build(name).to(device)
    test = data.loader(images.test, 500)

    def measure(epoch: int) -> dict[str, float]:
        return {f"test_{key}": value for key, value in evaluate(model, test).items()}

    log = fit(model, images.train, recipe, seed=seed, state=state, after_epoch=measure)
    weights = {key: _half(value).contiguous().cpu() for key, value in model.state_dict().items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / f"{name}.safetensors", metadata={"network": name, "dtype": "float16"})
    model.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    )
    report = {
        "network": name,
        "command": f"python -m prunelab.training {name} --data {'full' if len(images.train) == 50_000 else source}",
        "seed": seed,
        "recipe": asdict(recipe),
        "device": str(device),
        "torch": torch.__version__,
        "training_images": len(images.train),
        "accuracy": {
            f"{len(images.test)} test images": evaluate(model, test)["accuracy"],
            "mini test set": evaluate(model, data.loader(data.cifar10("mini").test, 500))["accuracy"],
        },
        "log": log,
    }
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _half(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m prunelab.training", description="Train a network of the zoo.")
    parser.add_argument("name", choices=sorted(zoo.MODELS))
    parser.add_argument("--data", default="full", help="mini, full, or a folder with CIFAR-10 (default: full)")
    parser.add_argument("--out", type=Path, default=Path("checkpoints"), help="where the checkpoint goes")
    parser.add_argument("--state", type=Path, help="where the state of the run is kept (default: OUT/NAME.state)")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = RECIPES[args.name]
    if args.epochs:
        recipe = replace(recipe, epochs=args.epochs)
    state = args.state or args.out / f"{args.name}.state"
    report = train_checkpoint(args.name, args.data, args.out, state, recipe, args.seed)
    print(f"{args.name}: {report['accuracy']}")


if __name__ == "__main__":
    main()

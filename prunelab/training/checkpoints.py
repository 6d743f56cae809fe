"""Train a network from scratch and keep it: the zoo's checkpoints, and what the papers start from.

    python -m prunelab.training resnet20
    python -m prunelab.training resnet32_wide --data cifar100 --recipe eigendamage --out baselines/

trains one network, resumes an interrupted run, and writes its weights (safetensors, fp16) and beside them
their history (JSON: recipe, seed, log, accuracies).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prunelab import data, zoo
from prunelab.data.sets import CIFAR10
from prunelab.files.atomic import replacing
from prunelab.training.loop import default_device, evaluate, fit
from prunelab.training.recipes import PAPERS, RECIPES, Recipe

OLD_NAMES = {"full": "cifar10", "mini": "cifar10-mini"}
"""What ``--data`` was called when there was CIFAR-10 alone."""


def train_checkpoint(name: str, source: str, out: Path, state: Path, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Train ``name`` from scratch, write its weights in fp16 and beside them its log as JSON, and return the latter.

    Args:
        name: of a network of the zoo.
        source: a data set, by name or folder, as ``data.get`` takes it.
        out: the file to write, ``….safetensors``; or a folder, in which it is named after the network, and after the
            data set if that is not CIFAR-10.
        state: file to keep the state of the run in, and to resume from.
        recipe: how it is trained.
        seed: of the first weights, the order of images and the augmentation.

    Raises:
        DataError: the data set is not there, or ``state`` is not that of this run.
    """
    device, source = default_device(), OLD_NAMES.get(source, source)
    images = data.get(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = zoo.build(name, num_classes=images.classes).to(device)
    test = data.loader(images.test, 500)

    def measure(epoch: int) -> dict[str, float]:
        return {f"test_{key}": value for key, value in evaluate(model, test).items()}

    log = fit(model, images.train, recipe, seed=seed, state=state, after_epoch=measure)
    weights = {key: _half(value).contiguous().cpu() for key, value in model.state_dict().items()}
    path = weights_path(out, name, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"network": name, "dtype": "float16", "classes": str(images.classes)}
    with replacing(path) as fresh:
        save_file(weights, fresh, metadata=about)
    model.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    )
    accuracy = {f"{len(images.test)} test images": evaluate(model, test)["accuracy"]}
    if images.train.spec is CIFAR10:
        accuracy["mini test set"] = evaluate(model, data.loader(data.get("cifar10-mini").test, 500))["accuracy"]
    report = {
        "network": name,
        "command": f"python -m prunelab.training {name} --data {source}",
        "seed": seed,
        "recipe": asdict(recipe) | {"milestones": list(recipe.milestones)},
        "device": str(device),
        "torch": torch.__version__,
        "training_images": len(images.train),
        "accuracy": accuracy,
        "log": log,
    }
    with replacing(path.with_suffix(".json")) as fresh:
        fresh.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def weights_path(out: Path, name: str, source: str) -> Path:
    """Return where the weights of a network go: ``out`` itself if it is a file, else a file in that folder.

    >>> str(weights_path(Path("baselines"), "vgg19", "cifar100"))
    'baselines/vgg19-cifar100.safetensors'
    """
    if out.suffix == ".safetensors":
        return out
    of_cifar10 = source in ("cifar10", "cifar10-mini") or (Path(source) / data.MANIFEST).is_file()
    return out / (f"{name}.safetensors" if of_cifar10 else f"{name}-{Path(source).name}.safetensors")


def _half(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m prunelab.training", description="Train a network of the zoo.")
    parser.add_argument("name", choices=sorted(zoo.MODELS))
    named = ", ".join(data.NAMES)
    parser.add_argument("--data", default="cifar10", help=f"{named}, or a folder (default: cifar10)")
    parser.add_argument(
        "--recipe",
        default="own",
        choices=["own", *PAPERS],
        help="the zoo's own for this network, or that of a paper (default: own)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("checkpoints"), help="where the checkpoint goes: a folder or .safetensors file"
    )
    parser.add_argument("--state", type=Path, help="where the run is kept after every epoch (default: beside it)")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = RECIPES[args.name] if args.recipe == "own" else PAPERS[args.recipe]
    if args.epochs:
        recipe = replace(recipe, epochs=args.epochs)
    state = args.state or weights_path(args.out, args.name, OLD_NAMES.get(args.data, args.data)).with_suffix(".state")
    report = train_checkpoint(args.name, args.data, args.out, state, recipe, args.seed)
    print(f"{args.name}: {report['accuracy']}")

"""Networks by name: those of the zoo, with trained checkpoints, and those of torchvision, timm or your own code.

Flows in: a name.  Flows out: a ``torch.nn.Module``, with ``load`` trained.
Every notebook uses these networks; ``python -m prunelab.training NAME`` trains the checkpoints again.
"""

from __future__ import annotations

import importlib
import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from prunelab import data
from prunelab.cost import count
from prunelab.errors import DataError
from prunelab.networks import VGG, Attention, BasicBlock, EncoderBlock, ResNet, VisionTransformer
from prunelab.options import shown
from prunelab.runtime.extras import extra

__all__ = [
    "MODELS",
    "VGG",
    "Attention",
    "BasicBlock",
    "EncoderBlock",
    "ResNet",
    "VisionTransformer",
    "build",
    "checkpoint",
    "load",
    "resnet20",
    "resnet32",
    "resnet32_wide",
    "table",
    "vgg13_narrow",
    "vgg19",
    "vit_small",
]

VGG13_NARROW = (32, 32, "M", 64, 64, "M", 96, 96, "M", 128, 128, "M", 128, 128)
VGG19 = (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4)


def resnet20(num_classes: int = 10) -> ResNet:
    """ResNet-20: 0.27 M parameters."""
    return ResNet(20, num_classes)


def resnet32(num_classes: int = 10) -> ResNet:
    """ResNet-32: 0.47 M parameters."""
    return ResNet(32, num_classes)


def resnet32_wide(num_classes: int = 10) -> ResNet:
    """ResNet-32 with four times the channels, 64, 128 and 256, as pruned in the EigenDamage paper: 7.4 M parameters.

    Source: ``models/resnet.py`` of alecwangcq/EigenDamage-Pytorch.
    """
    return ResNet(32, num_classes, width=64)


def vgg13_narrow(num_classes: int = 10) -> VGG:
    """VGG-13 at a quarter to a half of its width: 0.76 M parameters."""
    return VGG(VGG13_NARROW, num_classes)


def vgg19(num_classes: int = 10) -> VGG:
    """VGG-19 as pruned in the EigenDamage paper: 20 M parameters."""
    return VGG(VGG19, num_classes)


def vit_small(num_classes: int = 10) -> VisionTransformer:
    """Vision Transformer of 6 blocks, 4 heads and width 96: 0.48 M parameters."""
    return VisionTransformer(num_classes=num_classes)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet32_wide": resnet32_wide,
    "vgg13_narrow": vgg13_narrow,
    "vgg19": vgg19,
    "vit_small": vit_small,
}
CLASSES_OF_IMAGENET = 1000


def build(name: str, num_classes: int = 10) -> nn.Module:
    """Return the network of that name, untrained.

    Args:
        name: of the zoo (``"resnet20"``), of torchvision (``"torchvision:resnet50"``), of timm (``"timm:NAME"``), or
            of a function of yours (``"package.module:function"``), which is called with ``num_classes=`` if it
            takes that.
        num_classes: number of outputs.

    Raises:
        DataError: there is no such network; the message lists the names, or says what is missing.

    >>> build("torchvision:resnet18", num_classes=3).fc.out_features
    3
    """
    source, _, rest = name.rpartition(":")
    if source == "torchvision":
        return _torchvision(rest.partition("@")[0], num_classes=num_classes)
    if source == "timm":
        return _timm(rest, pretrained=False, num_classes=num_classes)
    if source:
        return _own(source, rest, num_classes)
    if name not in MODELS:
        raise DataError(
            f"The zoo has no network {name!r}; it has {', '.join(MODELS)}. Others are named by where they come from: "
            "torchvision:resnet50, timm:NAME or package.module:function."
        )
    return MODELS[name](num_classes)


def checkpoint(name: str) -> Path:
    """Return the path of the trained checkpoint of ``name``; its training log is next to it, as JSON."""
    return data.root() / "checkpoints" / f"{name}.safetensors"


def load(name: str, checkpoint: str | Path | None = None, num_classes: int = 10) -> nn.Module:
    """Return the network of that name, trained, in eval mode on the CPU.

    Args:
        name: as ``build`` takes it.  ``torchvision:NAME@WEIGHTS`` takes these weights of torchvision's, for example
            ``torchvision:resnet50@IMAGENET1K_V1``.
        checkpoint: a file of weights, as ``python -m prunelab.training`` writes it, here or in ``checkpoints`` of
            ``$PRUNELAB_DATASETS`` (or ``~/.cache/prunelab``).  By default the zoo's own, trained on CIFAR-10; the
            weights that torchvision or timm publish, downloaded once; or a function's network as it comes.
        num_classes: number of outputs.

    Raises:
        DataError: there is no such network or checkpoint, or the file is damaged or of another network.
    """
    if not isinstance(name, str):
        raise DataError(f"`name` must be the name of a network, such as 'resnet20', got {shown(name)}.")
    if checkpoint:
        path = Path(checkpoint)
        path = path if path.is_file() else data.store() / "checkpoints" / path
        if not path.is_file():
            raise DataError(
                f"There is no checkpoint {checkpoint}, neither here nor in {path.parent}; a network of the zoo is "
                f"trained with `python -m prunelab.training {name} --data DATA --out {path}`."
            )
        return _filled(build(name, num_classes), path, "is it of this network and number of classes?")
    source, _, rest = name.rpartition(":")
    if source == "torchvision":
        name, _, weights = rest.partition("@")
        _whole_head(name, CLASSES_OF_IMAGENET, num_classes)
        return _torchvision(name, weights=weights or "DEFAULT").eval()
    if source == "timm":
        model = _timm(rest, pretrained=True)
        _whole_head(rest, int(getattr(model, "num_classes", num_classes)), num_classes)
        return model.eval()
    if source:
        return _own(source, rest, num_classes).eval()
    return _of_zoo(name, num_classes)


def _of_zoo(name: str, num_classes: int) -> nn.Module:
    model = build(name, num_classes)
    path = checkpoint(name)
    _whole_head(name, len(data.CLASSES), num_classes)
    if not path.is_file():
        have = ", ".join(sorted(file.stem for file in path.parent.glob("*.safetensors"))) or "none"
        raise DataError(
            f"{path} is missing (there: {have}); train it with `python -m prunelab.training {name}` and name the file "
            f"(checkpoint=…), or take the untrained network, zoo.build({name!r})."
        )
    return _filled(model, path, "restore it from the repository.")


def _filled(model: nn.Module, path: Path, advice: str) -> nn.Module:
    """Return ``model`` with the weights of a file, as float32, in eval mode."""
    try:
        state = load_file(path)
        model.load_state_dict(
            {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        )
    except (SafetensorError, RuntimeError, OSError) as error:
        why = textwrap.shorten(str(error), 300)  # PyTorch lists every tensor, a line for each
        raise DataError(f"{path} is damaged or of another network ({why}); {advice}") from error
    return model.eval()


def _whole_head(name: str, there: int, wanted: int) -> None:
    if there != wanted:
        raise DataError(
            f"The trained {name} knows {there} classes, not {wanted}: train it on your data "
            f"(networks of the zoo: `python -m prunelab.training {name} --data DATA`) and name the file, checkpoint=…"
        )


def _torchvision(name: str, weights: str | None = None, **options: int) -> nn.Module:
    models = extra("torchvision.models", "vision", f"torchvision:{name}")
    try:
        return models.get_model(name, weights=weights, **options)
    except (ValueError, KeyError) as error:
        known = name in models.list_models()
        if not known:
            advice = "torchvision.models.list_models() lists them."
        else:
            advice = f"It has {', '.join(one.name for one in models.get_model_weights(name))}."
        what = f"weights {weights!r} of {name}" if known else f"network {name!r}"
        raise DataError(f"torchvision has no {what} ({error}). {advice}") from error
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise DataError(
            f"The weights of {name} cannot be downloaded ({error}): fetch them by hand into {folder}."
        ) from error


def _timm(name: str, **options: bool | int) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise DataError(f"timm:{name} needs timm, which is not installed: pip install timm.") from error
    try:
        return timm.create_model(name, **options)
    except (RuntimeError, ValueError, OSError) as error:
        raise DataError(f"timm cannot make {name!r} ({error}); timm.list_models() lists its networks.") from error


def _own(module: str, function: str, num_classes: int) -> nn.Module:
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"{module}:{function} cannot be found ({error}); it means `from {module} import {function}`."
        ) from error
    model = make(num_classes=num_classes) if "num_classes" in inspect.signature(make).parameters else make()
    if not isinstance(model, nn.Module):
        raise DataError(f"{module}:{function} returned a {type(model).__name__}, not a torch.nn.Module.")
    return model


def table() -> str:
    """Return what the trained networks are and how good, as a Markdown table, from their logs."""
    rows = ["| name | parameters | MFLOPs | accuracy, 10,000 test images | the 2,000 in `data/` | epochs | file |"]
    rows.append("|---|---:|---:|---:|---:|---:|---:|")
    for path in sorted((data.root() / "checkpoints").glob("*.json")):
        log = json.loads(path.read_text())
        cost = count(build(path.stem), torch.empty(1, 3, 32, 32, device="meta"))
        full, mini = log["accuracy"]["10000 test images"], log["accuracy"]["mini test set"]
        size = path.with_suffix(".safetensors").stat().st_size / 1e6
        rows.append(
            f"| `{path.stem}` | {cost.params / 1e6:.2f} M | {cost.flops / 1e6:.0f} | {full:.1%} | {mini:.1%} "
            f"| {len(log['log'])} | {size:.1f} MB |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())

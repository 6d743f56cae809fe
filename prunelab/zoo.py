"""CIFAR-size networks, written as their papers draw them, with trained checkpoints.

Flows in: a name.  Flows out: a ``torch.nn.Module``, with ``load`` trained on CIFAR-10.
Every notebook uses these networks; ``python -m prunelab.training NAME`` trains the checkpoints again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prunelab import data
from prunelab.cost import count
from prunelab.errors import DataError


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: ``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR ResNet of depth 6n+2: three stages of n blocks with 16, 32 and 64 channels.

    Input ``[B, 3, 32, 32]``, output logits ``[B, num_classes]``.

    Source: He et al. 2016, *Deep Residual Learning*, section 4.2, with projection shortcuts (option B).
    """

    def __init__(self, depth: int, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"a CIFAR ResNet has depth 6n+2 (20, 32, 44, …), not {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, stride=1)
        self.layer2 = self._stage(width, 2 * width, blocks, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, stride=2)
        self.fc = nn.Linear(4 * width, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class VGG(nn.Module):
    """3×3 convolutions with batch norm, max pooling between stages, one linear classifier.

    ``config`` lists output channels, and ``"M"`` for a 2×2 max pooling.
    Input ``[B, 3, 32, 32]``, output logits ``[B, num_classes]``.

    Source: Simonyan & Zisserman 2015, table 1; the CIFAR variant with one linear layer is that of Wang et al. 2019.
    """

    def __init__(self, config: tuple[int | str, ...], num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for item in config:
            if isinstance(item, str):
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, item, 3, padding=1, bias=False), nn.BatchNorm2d(item), nn.ReLU()]
                channels = item
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """Pre-norm Transformer block: ``x + attention(norm1(x))``, then ``x + mlp(norm2(x))``."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A small Vision Transformer: convolutional stem, position embedding, encoder blocks, mean over tokens, linear.

    Two strided convolutions make the patches, which lets it learn from CIFAR-10 alone in a few epochs.
    Input ``[B, 3, image_size, image_size]``, output logits ``[B, num_classes]``.

    Source: Dosovitskiy et al. 2021; the stem of Xiao et al. 2021, *Early Convolutions Help Transformers See Better*;
    mean pooling instead of a class token as in Beyer et al. 2022, *Better plain ViT baselines for ImageNet-1k*.
    """

    def __init__(
        self,
        image_size: int = 32,
        width: int = 96,
        depth: int = 6,
        heads: int = 4,
        mlp_width: int = 192,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *(nn.Conv2d(3, width // 4, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width // 4), nn.ReLU()),
            *(nn.Conv2d(width // 4, width // 2, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width // 2), nn.ReLU()),
            nn.Conv2d(width // 2, width, 1),
        )
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (image_size // 4) ** 2, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads, mlp_width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.norm(self.blocks(x)).mean(1))


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


def build(name: str, num_classes: int = 10) -> nn.Module:
    """Return the network of that name, untrained.

    Raises:
        DataError: there is no such network; the message lists the names.
    """
    if name not in MODELS:
        raise DataError(f"The zoo has no network {name!r}; it has {', '.join(MODELS)}.")
    return MODELS[name](num_classes)


def checkpoint(name: str) -> Path:
    """Return the path of the trained checkpoint of ``name``; its training log stands beside it as JSON."""
    return data.root() / "checkpoints" / f"{name}.safetensors"


def load(name: str) -> nn.Module:
    """Return the network of that name, trained on CIFAR-10, in eval mode on the CPU.

    Raises:
        DataError: there is no such network or checkpoint, or the file is damaged.
    """
    model = build(name)
    path = checkpoint(name)
    if not path.is_file():
        have = ", ".join(sorted(file.stem for file in path.parent.glob("*.safetensors"))) or "none"
        raise DataError(
            f"{path} is missing (there: {have}); train it with `python -m prunelab.training {name}`, "
            f"or take the untrained network, zoo.build({name!r})."
        )
    try:
        state = load_file(path)
        model.load_state_dict(
            {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        )
    except (SafetensorError, RuntimeError, OSError) as error:
        raise DataError(
            f"{path} is damaged or of another network ({error}); restore it from the repository."
        ) from error
    return model.eval()


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

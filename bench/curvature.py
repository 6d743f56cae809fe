"""What curvature costs: time and memory, as multiples of one forward and backward pass over the same data.

    python -m bench.curvature [--networks resnet20 …] [--images 256] [--batch 128] [--out bench/curvature.md]

All in one process, in turns, on trained networks and real images; a time is the median of the repeats over the median
of the floor, the forward and backward pass of the same batches; seconds are those of the processor, on one thread.
Memory is by how much the largest resident set of a process of its own grows, over that of the floor (on Linux).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import prunelab as pl
from prunelab.curvature.hvp import hessian_product, self_product

Batches = list[tuple[Tensor, Tensor]]


def floor(model: nn.Module, batches: Batches) -> None:
    """One forward and backward pass, as in training."""
    for images, labels in batches:
        torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters()))


def own(model: nn.Module, batches: Batches) -> None:
    """θ ⊙ Hθ."""
    parameters = dict(model.named_parameters())
    for name, value in self_product(model, batches).items():
        value.mul_(parameters[name].detach())


def product(model: nn.Module, batches: Batches) -> None:
    """Hv, for a vector that is not θ."""
    hessian_product(model, batches, {name: torch.ones_like(p) for name, p in model.named_parameters()})


def loop(model: nn.Module, batches: Batches) -> None:
    """Moments by one backward pass per sample."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            gradients = torch.autograd.grad(F.cross_entropy(model(image[None]), label[None]), parameters)
            for sums, gradient in zip(total, gradients, strict=True):
                sums += gradient.square()


WHAT: dict[str, Callable[[nn.Module, Batches], object]] = {
    "forward and backward": floor,
    "moments": lambda model, batches: pl.collect(model, batches, {"moments"}),
    "moments, one sample at a time": loop,
    "K-FAC factors": lambda model, batches: pl.collect(model, batches, {"kronecker"}),
    "moments and factors": lambda model, batches: pl.collect(model, batches, {"moments", "kronecker"}),
    "θ⊙Hθ": own,
    "Hv": product,
}


def problem(network: str, images: int, batch: int) -> tuple[nn.Module, Batches]:
    """Return a trained network and batches of real images."""
    loader = pl.data.loader(pl.data.cifar10("mini").train.subset(images), batch)
    return pl.zoo.load(network).eval(), list(loader)


def memory(network: str, what: str, images: int, batch: int) -> float:
    """Return by how many megabytes a process grows, above what it has once everything is loaded."""
    command = [sys.executable, "-m", "bench.curvature", "--images", str(images), "--batch", str(batch)]
    done = subprocess.run([*command, "--grow", network, what], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def grow(network: str, what: str, images: int, batch: int) -> None:
    """Print the growth of this process in megabytes."""
    model, batches = problem(network, images, batch)
    WHAT[what](model, [(batches[0][0][:2], batches[0][1][:2])])
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew: loading the images had raised it
    before = high_water()
    WHAT[what](model, batches)
    print(max(high_water() - before, 1024) / 1024)


def high_water() -> int:
    """Return the largest resident set of this process so far, in kilobytes."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(network: str, images: int, batch: int, repeats: int) -> dict[str, object]:
    """Return one row of the table: multiples of the floor."""
    model, batches = problem(network, images, batch)
    times: dict[str, list[float]] = {what: [] for what in WHAT}
    for number in range(repeats + 1):
        for what, function in WHAT.items():
            if function is loop and number > 1:
                continue
            start = time.process_time()
            function(model, batches)
            if number:  # the first round warms up
                times[what].append(time.process_time() - start)
    medians = {what: statistics.median(values) for what, values in times.items()}
    whole = medians["forward and backward"]
    grown = {what: memory(network, what, images, batch) for what in WHAT if what != "moments, one sample at a time"}
    row: dict[str, object] = {"network": network, "floor": f"{whole:.2f} s, {grown['forward and backward']:.0f} MB"}
    for what in WHAT:
        if what == "forward and backward":
            continue
        share = grown[what] / grown["forward and backward"] if what in grown else None
        row[what] = f"{medians[what] / whole:.1f}×" + (f", {share:.1f}× memory" if share is not None else "")
    return row


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg13_narrow", "vit_small"])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--grow", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.grow:
        grow(*args.grow, args.images, args.batch)
        return
    torch.set_num_threads(1)
    networks = tqdm(args.networks, unit="network")
    rows = [measure(network, args.images, args.batch, args.repeats) for network in networks]
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
        args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

"""What curvature costs: time and memory, as multiples of one forward and backward pass over the same data.

    python -m bench.curvature [--networks resnet20 …] [--images 256] [--batch 128] [--out bench/curvature.md]

All in one process, in turns, on trained networks and real images; a time is the median of the repeats over the median
of the floor, the forward and backward pass of the same batches; seconds are those of the processor, on one thread.
Memory is by how much the largest resident set of a process of its own grows, over that of the floor (on Linux).

Two networks of real width, `vit_s_16` and `resnet50`, have random weights and take eight images, enlarged to 224×224.
What is named is measured again, each ratio in one run with its floor; the rest of OUT.json stays.
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
from torchvision.models import VisionTransformer, resnet50
from tqdm import tqdm

import prunelab as pl
from bench.record import keep
from prunelab.curvature.second.hvp import hessian_product, self_product

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


WIDE: dict[str, Callable[[], nn.Module]] = {
    "vit_s_16": lambda: VisionTransformer(224, 16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536),
    "resnet50": resnet50,
}
"""Networks of real width, with random weights."""


FLOOR = "forward and backward"


def problem(network: str, images: int, batch: int) -> tuple[nn.Module, Batches]:
    """Return a network and batches of real images; eight images for a network of real width."""
    train = pl.data.cifar10("mini").train
    if network not in WIDE:
        return pl.zoo.load(network).eval(), list(pl.data.loader(train.subset(images), batch))
    torch.manual_seed(0)
    large = [(F.interpolate(x, 224, mode="bilinear"), y) for x, y in pl.data.loader(train.subset(8), 8)]
    return WIDE[network]().eval(), large


def memory(network: str, what: str, images: int, batch: int) -> float:
    """Return by how many megabytes a process grows, above what it has once everything is loaded."""
    command = [sys.executable, "-m", "bench.curvature", "--images", str(images), "--batch", str(batch)]
    done = subprocess.run([*command, "--grow", network, what], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def grow(network: str, what: str, images: int, batch: int) -> None:
    """Print the growth of this process in megabytes."""
    model, batches = problem(network, images, batch)
    WHAT[what](model, [(batches[0][0][:2], batches[0][1][:2])])
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark: loading the images had raised it
    before = high_water()
    WHAT[what](model, batches)
    print(max(high_water() - before, 1024) / 1024)


def high_water() -> int:
    """Return the largest resident set of this process so far, in kilobytes."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(network: str, columns: list[str], images: int, batch: int, repeats: int) -> dict[str, object]:
    """Return one row of the table: multiples of the floor."""
    model, batches = problem(network, images, batch)
    chosen = [what for what in WHAT if what in columns or what == FLOOR]
    times: dict[str, list[float]] = {what: [] for what in chosen}
    for number in range(repeats + 1):
        for what in chosen:
            if WHAT[what] is loop and number > 1:
                continue
            start = time.process_time()
            WHAT[what](model, batches)
            if number:  # the first round warms up
                times[what].append(time.process_time() - start)
    medians = {what: statistics.median(values) for what, values in times.items()}
    whole = medians[FLOOR]
    grown = {what: memory(network, what, images, batch) for what in chosen if WHAT[what] is not loop}
    row: dict[str, object] = {"network": network, "floor": f"{whole:.2f} s, {grown[FLOOR]:.0f} MB"}
    for what in chosen:
        if what == FLOOR:
            continue
        share = grown[what] / grown[FLOOR] if what in grown else None
        row[what] = f"{medians[what] / whole:.1f}×" + (f", {share:.1f}× memory" if share is not None else "")
    return row


def table(rows: list[dict[str, object]]) -> str:
    """Return the table of the README."""
    head = ["network", "floor", *(what for what in WHAT if what != FLOOR)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(str(row.get(name, "–")) for name in head) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def page(rows: list[dict[str, object]]) -> str:
    """Return the table with what it means."""
    return f"""\
`python -m bench.curvature` measures these on one thread, in processor time: how many times one forward and
backward pass over the same images (the floor) each of them takes, and how much more memory. Small networks are trained
ones, on 256 images in batches of 128; `vit_s_16` has random weights and takes eight images of 224×224.

{table(rows)}
`Hv` and `θ⊙Hθ` go once forward, with every activation's derivative along the direction beside it, and once back. A
linear layer then takes eight products for any direction, and six for θ itself; the floor takes three. A
Transformer adds attention to that: the floor's is fused, the derivative's is not and computes the softmax again in the
backward pass. With several directions at once one double backward pass is shared, which is not in this table.
The smaller the images of a wide network, the more its weights count beside its activations, and the larger both ratios.
"""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg13_narrow", "vit_small", *WIDE])
    parser.add_argument("--columns", nargs="+", default=list(WHAT), help="what to measure; other columns stay")
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
    path = args.out.with_suffix(".json") if args.out else None
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path and path.is_file() else []
    for network in tqdm(args.networks, unit="network"):
        row = measure(network, args.columns, args.images, args.batch, args.repeats)
        found = {old["network"]: old for old in rows}
        rows = [*(found | {network: found.get(network, {}) | row}).values()]
        if path:
            keep(path, {"torch": torch.__version__, "rows": rows}, lambda kept: page(kept["rows"]))
    print(table(rows))


if __name__ == "__main__":
    main()

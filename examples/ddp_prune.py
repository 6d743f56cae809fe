"""Prune a trained ResNet-20 in several processes and fine-tune it in DistributedDataParallel.

    torchrun --nproc-per-node=2 examples/ddp_prune.py

runs on GPUs (nccl) or CPUs (gloo).  Every process measures the curvature on its share of the images; the sums are those
of all images, so every process makes the same plan.  Rank 0 prints the report and writes the file.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import prunelab as pl
from prunelab.training import evaluate


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Prune and fine-tune in several processes.")
    parser.add_argument("--criterion", default="kron_obs")
    parser.add_argument("--flops", type=float, default=0.5, help="share of the FLOPs that is kept")
    parser.add_argument("--images", type=int, default=2048, help="training images to measure and fine-tune on")
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning")
    parser.add_argument("--out", default="small.safetensors")
    args = parser.parse_args()

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    images = pl.data.cifar10("mini")
    train, test = images.train.subset(args.images), images.test.subset(args.images // 4)

    # Without shuffling every process always measures on the same images; the last ones are left out rather than some
    # counted twice, so that the sums are those of single images.
    share = DataLoader(train, 64, sampler=DistributedSampler(train, shuffle=False, drop_last=True))

    def finetune(model: nn.Module) -> None:
        sampler = DistributedSampler(train, seed=0)
        wrapped = DistributedDataParallel(model.train())
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        for epoch in range(args.epochs):
            sampler.set_epoch(epoch)
            for inputs, targets in DataLoader(train, 32, sampler=sampler):
                optimizer.zero_grad()
                F.cross_entropy(wrapped(inputs.to(device)), targets.to(device)).backward()
                optimizer.step()

    small, report = pl.prune(
        pl.zoo.load("resnet20").to(device),
        torch.randn(1, 3, 32, 32),
        criterion=args.criterion,
        data=pl.distributed.Sharded(share),
        flops=args.flops,
        finetune=finetune,
        evaluate=lambda model: evaluate(model, pl.data.loader(test, 256)),
    )
    if pl.distributed.rank() == 0:
        print(report.table().to_string(index=False))
        pl.save(small, args.out)
    dist.barrier()  # while a worker thread of PyTorch 2.6 still lets go of tensors, the next line may not return
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

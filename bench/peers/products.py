"""Products of the Hessian with a vector, and with the weights themselves.

python -m bench.peers.products [--quick]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.command import main
from bench.peers.libraries import peer
from bench.peers.page import Ratio, Row, chosen, median, multiples, unique
from bench.peers.problems import NETWORKS, Batches, differentiable_attention, forward_backward, problem
from bench.peers.setting import Setting, devices
from bench.peers.timing import clock, interleaved
from prunelab.curvature.second.hvp import hessian_product, self_product

TITLE = "Hessian products"
FLOOR = "forward and backward"
OURS, OWN, PLAIN, THEIRS = "prunelab, Hv", "prunelab, θ⊙Hθ", "double backward, Hv", "curvlinops, Hv"


def directions(model: nn.Module) -> dict[str, Tensor]:
    """Return a direction for every parameter."""
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    return {name: value.to(next(model.parameters()).device) for name, value in found.items()}


def ours(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Return Hv by prunelab."""
    return hessian_product(model, batches, directions(model))


def own(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Return θ ⊙ Hθ by prunelab."""
    parameters = dict(model.named_parameters())
    return {name: value.mul_(parameters[name].detach()) for name, value in self_product(model, batches).items()}


def double_backward(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Return Hv as any page on PyTorch has it: the gradient of gradient times vector."""
    parameters, vectors = dict(model.named_parameters()), directions(model)
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    number = sum(len(targets) for _, targets in batches)
    for inputs, targets in batches:
        with differentiable_attention():
            loss = F.cross_entropy(model(inputs), targets, reduction="sum") / number
            slopes = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            inner = sum((slope * v).sum() for slope, v in zip(slopes, vectors.values(), strict=True))
            for value, part in zip(total.values(), torch.autograd.grad(inner, list(parameters.values())), strict=True):
                value += part
    return total


def curvlinops(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Return Hv by curvlinops, without its checks and extra passes, with attention that can be differentiated twice."""
    parameters, vectors = dict(model.named_parameters()), directions(model)
    number = sum(len(targets) for _, targets in batches)
    with differentiable_attention():
        operator = peer("curvlinops").HessianLinearOperator(
            model, nn.CrossEntropyLoss(), list(parameters.values()), batches, check_deterministic=False, num_data=number
        )
        found = operator @ list(vectors.values())
    return dict(zip(parameters, found, strict=True))


METHODS: dict[str, Callable[[nn.Module, Batches], object]] = {
    FLOOR: forward_backward,
    OURS: ours,
    OWN: own,
    PLAIN: double_backward,
    THEIRS: curvlinops,
}


def rows(setting: Setting) -> Iterator[Row]:
    """Time all on every network and device, and compare the products."""
    images, batch = (32, 16) if setting.quick else (128, 64)
    for device in devices():
        for network in NETWORKS[:1] if setting.quick else NETWORKS:
            model, batches = problem(network, images, batch, device)
            named = {name: partial(function, model, batches) for name, function in METHODS.items()}
            wanted = torch.cat([value.flatten() for value in double_backward(model, batches).values()])
            for method, found in interleaved(named, setting.repeats).items():
                row = {"network": network, "device": device, "method": method, "images": images, "batch": batch} | found
                if method in (OURS, THEIRS) and "error" not in row:
                    product = torch.cat([value.flatten() for value in named[method]().values()])  # type: ignore[attr-defined]
                    row["difference"] = float((product - wanted).norm() / wanted.norm())
                yield row


def about() -> Iterator[str]:
    """Yield what is compared."""
    yield (
        "Hv of the mean loss for one vector over all parameters: `hessian_product`, curvlinops' "
        "`HessianLinearOperator @ v` (told the number of samples, and not to check for determinism), and double "
        "backward as PyTorch's users write it. θ⊙Hθ is what OBA needs. Where a network has attention, the peers get "
        "the one that has a second derivative, and the floor the fast one, as in training."
    )


def markdown(found: list[Row]) -> Iterator[str]:
    """Yield a table of multiples of the floor per device."""
    yield from multiples(found, FLOOR)
    worst = max((row["difference"] for row in found if "difference" in row), default=float("nan"))
    yield f"All products agree with double backward to {worst:.0e} of its norm."


def ratios(found: list[Row]) -> list[Ratio]:
    """Return what goes into the table of ratios."""
    lines = []
    for device in unique(found, "device"):
        here = chosen(found, device=device)
        where = "" if device == "cpu" else f", {device}"
        by = {(row["network"], row["method"]): row.get(clock(row), float("nan")) for row in here}
        networks = unique(here, "network")
        cost = {name: by[name, OWN] / by[name, FLOOR] for name in networks}
        worst = max(cost, key=cost.__getitem__)
        over = f"{len(networks)} networks"
        met = cost[worst] <= 3.5
        lines += [
            Ratio(f"Hv{where}", THEIRS, median(by[n, THEIRS] / by[n, OURS] for n in networks), over=over),
            Ratio(f"Hv{where}", PLAIN, median(by[n, PLAIN] / by[n, OURS] for n in networks), over=over),
            Ratio(f"θ⊙Hθ{where}, cost", f"{FLOOR} = 1", median(cost.values()), over=over),
            Ratio(
                f"θ⊙Hθ{where}, cost", f"{FLOOR} = 1", cost[worst], "≤ 3.5×", met, f"the most expensive network, {worst}"
            ),
        ]
    return lines


if __name__ == "__main__":
    main(["products"])

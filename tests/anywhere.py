"""What must come out the same in every process: ``python -m tests.anywhere [STATE [STEPS]]`` prints it as JSON."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import prunelab as pl


class Net(nn.Module):
    """A residual, a chunked and a grouped stage, so that groups have several members and some are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.body = nn.Sequential(nn.Conv2d(16, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1))
        self.halves, self.left, self.right = nn.Conv2d(16, 16, 1), nn.Conv2d(8, 10, 1), nn.Conv2d(8, 10, 1)
        self.grouped, self.last = nn.Conv2d(10, 12, 3, groups=2, padding=1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.body(x)
        left, right = self.halves(x).relu().chunk(2, dim=1)
        return self.last(self.grouped(self.left(left) + self.right(right)).relu().mean((2, 3)))


def network() -> tuple[nn.Module, Tensor, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    images = torch.randn(12, 3, 8, 8)
    return Net().eval(), images[:1], [(images[:8], torch.arange(8) % 4), (images[8:], torch.arange(4))]


def digest(value: Any) -> str:
    """Return a checksum of weights, or of anything that JSON knows."""
    if isinstance(value, nn.Module):
        parts = [(name, hashlib.sha256(v.numpy().tobytes()).hexdigest()) for name, v in value.state_dict().items()]
        value = [*parts, str(value)]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"flops": 0.6},
    "overridden": {"flops": 0.6, "overrides": {"stem": 0.25, "body.0": 0.5, "left": 0.3, "halves": 0.25}},
    "by name": {"ratio": 0.3, "overrides": {"body": 0.5, "body.0": 0.25, "stem": 0.2}, "ignore": ["last", "left"]},
    "layer": {"params": 0.6, "scope": "layer", "overrides": {"grouped": 0.5, "stem": 0.5}},
    "isomorphic": {"flops": 0.7, "scope": "isomorphic", "per": "flops", "max_ratio": {"body": 0.5, "stem": 0.6}},
    "rounded": {"flops": 0.6, "round_to": 2, "overrides": {"stem": 0.25, "body.0": 0.5}},
}


def everything() -> dict[str, Any]:
    model, inputs, batches = network()
    graph = pl.trace(model, inputs)
    found: dict[str, Any] = {
        "graph": [[g.name, g.size, [[m.name, m.dim, m.role] for m in g.members]] for g in graph.groups]
    }
    found["bundles"] = [[group.name for group in bundle] for bundle in graph.bundles]
    found["frozen"] = [[*place, reason] for place, reason in graph.frozen.items()]
    criteria = [pl.criteria.get(name) for name in pl.criteria.names() if name != "bn_scale"]
    criteria += [pl.criteria.BNScale(fallback="keep"), pl.criteria.Magnitude(normalizer="lamp")]
    criteria += [pl.criteria.Gate(interactions=True), pl.criteria.Gate(interactions=True, linear=True, curvature="mc")]
    for number, criterion in enumerate(criteria):
        scores = criterion(graph, batches)
        for name, options in OPTIONS.items():
            plan = pl.plan(scores, **options)
            found[f"{number} {criterion} {name}"] = digest(json.loads(plan.to_json()))
            if number in (1, len(criteria) - 1):
                found[f"{number} {criterion} {name} cut"] = digest(pl.apply(model, plan, compensate=batches))
        if isinstance(criterion, pl.criteria.EigenDamage):
            found["factorized"] = digest(pl.factorize(model, scores, flops=0.7))
        if hasattr(criterion, "elementwise") and not isinstance(criterion, pl.criteria.BNScale):
            sparse = pl.sparsify(model, criterion.elementwise(model, batches), 0.5)
            found[f"{number} {criterion} sparse"] = digest(pl.bake(sparse))
    return found


def run(state: str | None, steps: int | None) -> dict[str, Any]:
    """Prune in four steps; with ``steps`` stop, as if killed, after so many have been scored."""
    model, inputs, batches = network()
    scored = []

    class Stopping(pl.criteria.Gate):
        def __call__(self, graph, batches=None):
            if steps is not None and len(scored) == steps:
                raise KeyboardInterrupt
            scored.append(graph)
            return super().__call__(graph, batches)

    criterion = Stopping(interactions=True)
    options = {"overrides": {"stem": 0.25, "body.0": 0.5, "left": 0.4}, "max_ratio": {"halves": 0.5}}
    try:
        small, report = pl.prune(
            model, inputs, criterion, batches, flops=0.4, steps=4, seed=3, state=state, progress=False, **options
        )
    except KeyboardInterrupt:
        return {}
    return {"report": json.loads(report.to_json()), "model": digest(small)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of blocks that are too large to come within 1 % of the budget
    state, steps = (sys.argv[1:] + [None, None])[:2]
    print(json.dumps(run(state, steps and int(steps)) if state else everything() | run(None, None)))

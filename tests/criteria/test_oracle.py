"""The oracle: what it measures is what the silenced network loses, whatever the model's code does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import prunelab as pl
from prunelab.criteria.oracle import loss_changes
from prunelab.plans import Cut
from tests.cases import OWN, Case, images


class InPlace(nn.Module):
    """Writes in place in every way: modules, operators, statements that keep no result."""

    def __init__(self, statements: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(4, 5, 1)
        self.norm, self.relu, self.last = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Linear(5, 3)
        self.shift = nn.Parameter(torch.randn(5, 1, 1))
        self.statements = statements

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        y = self.second(x)
        y += self.third(x)
        y += self.shift
        if self.statements:
            y.mul_(1.5)
            y[:, :, 0] = 0.1
        return self.last(self.relu(y).mean((2, 3)))


class Normed(nn.Module):
    """Group norm in the middle, layer norm on tokens, rows as tokens: norms whose axes lose entries."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 3)
        self.tokens, self.last = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.relu(self.norm(self.first(x)))).flatten(2).transpose(1, 2)
        return self.last(self.tokens(x).mean(1))


def tiny_vit() -> nn.Module:
    return pl.zoo.VisionTransformer(image_size=16, width=16, depth=2, heads=2, mlp_width=12, num_classes=3)


def tiny_resnet() -> nn.Module:
    return pl.zoo.ResNet(8, num_classes=3, width=4)


CASES = [
    Case("resnet", tiny_resnet, images(16)),
    Case("vit", tiny_vit, images(16)),
    Case("norms", Normed, images(8)),
    Case("in place", lambda: InPlace(False), images(8)),
    Case("in place, statements", lambda: InPlace(True), images(8)),
    OWN[0],
    Case(
        "encoder layer",
        lambda: nn.Sequential(
            nn.Linear(3, 12),
            nn.TransformerEncoderLayer(12, 3, 10, dropout=0.0, batch_first=True, norm_first=True),
            nn.Flatten(),
            nn.Linear(48, 3),
        ),
        lambda: torch.randn(2, 4, 3),
    ),
]


def batches_for(case: Case, sizes: tuple[int, ...] = (3, 2)) -> list[tuple[Tensor, Tensor]]:
    generator, shape = torch.Generator().manual_seed(5), case.inputs().shape[1:]
    return [
        (torch.randn(n, *shape, generator=generator).double(), torch.randint(0, 3, (n,), generator=generator))
        for n in sizes
    ]


def mean_loss(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return F.cross_entropy(torch.cat([model(x) for x, _ in batches]), torch.cat([y for _, y in batches])).item()


def silenced(graph: pl.DependencyGraph, group: pl.Group, unit: int) -> nn.Module:
    cut = Cut(group.name, group.size, (unit,), tuple((m.name, m.dim) for m in group.members))
    return pl.masked(graph.model, pl.Plan((cut,), graph.inputs))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_the_loss_of_the_masked_network_minus_that_of_the_whole(case, cache):
    model, inputs = case.make()
    graph, batches = pl.trace(model, inputs), batches_for(case)
    whole = mean_loss(model, batches)
    units = {group.name: sorted({0, group.size // 2, group.size - 1}) for group in graph.groups}
    found = loss_changes(graph, batches, units, cache=cache, progress=False)
    assert graph.groups and max(float(change.abs().max()) for change in found.values()) > 1e-4
    for group in graph.groups:
        for unit, change in zip(units[group.name], found[group.name].tolist(), strict=True):
            wanted = mean_loss(silenced(graph, group, unit), batches) - whole
            assert change == pytest.approx(wanted, abs=1e-12), (group.name, unit)


@pytest.mark.parametrize("case", CASES[:5], ids=lambda case: case.name)
def test_what_comes_before_a_unit_is_not_computed_again(case):
    """Statements that write in place switch the cache off: then it costs one forward pass more than without."""
    model, inputs = case.make()
    graph, batches = pl.trace(model, inputs), batches_for(case, (2,))
    units = {graph.groups[-1].name: list(range(graph.groups[-1].size))}
    flops = {}
    for cache in (True, False):
        with FlopCounterMode(display=False) as counter:
            loss_changes(graph, batches, units, cache=cache, progress=False)
        flops[cache] = counter.get_total_flops()
    forward = flops[False] / (1 + graph.groups[-1].size)
    if case.name == "in place, statements":
        assert flops[True] == flops[False] + forward
    else:
        assert flops[True] < 0.8 * flops[False] + forward


def test_all_units_are_scored_and_the_model_stays(small):
    model, inputs = small
    model.train()
    before = copy.deepcopy(model.state_dict())
    graph, batches = pl.trace(model, inputs), [(inputs, torch.arange(6) % 4)]
    scores = pl.criteria.get("oracle", progress=False)(graph, batches)
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval()
    wanted = [mean_loss(silenced(graph, graph.groups[0], unit), batches) for unit in range(8)]
    torch.testing.assert_close(scores["0"], torch.tensor(wanted) - mean_loss(model, batches), atol=1e-6, rtol=1e-4)


def test_batch_size_does_not_matter():
    case = CASES[0]
    model, inputs = case.make()
    graph, whole = pl.trace(model, inputs), batches_for(case, (5,))
    split = [(whole[0][0][:4], whole[0][1][:4]), (whole[0][0][4:], whole[0][1][4:])]
    units = {group.name: [1] for group in graph.groups}
    first, second = (loss_changes(graph, batches, units, progress=False) for batches in (whole, split))
    for name, change in first.items():
        torch.testing.assert_close(change, second[name], rtol=0, atol=1e-13)


def test_bad_requests_are_errors(small):
    model, inputs = small
    graph = pl.trace(model, inputs)
    batches = [(inputs, torch.arange(6) % 4)]
    for units in ({"0": [8]}, {"layer9": [0]}, {"0": [-1]}):
        with pytest.raises(pl.PlanError, match="no such units"):
            loss_changes(graph, batches, units)
    with pytest.raises(pl.BatchError, match="batch 0 is nan"):
        loss_changes(graph, [(inputs * float("nan"), batches[0][1])], {"0": [0]}, progress=False)
    with pytest.raises(pl.BatchError, match="needs batches"):
        pl.criteria.Oracle()(graph)

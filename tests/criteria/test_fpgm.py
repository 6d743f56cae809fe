"""FPGM: distances to the geometric median, against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunelab as pl
from prunelab.criteria.fpgm import filters_by_unit, geometric_median
from tests.cases import Grouped, permuted


def sum_of_distances(x: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    return (x - points).norm(dim=1).sum()


@pytest.mark.parametrize("seed", range(5))
def test_the_geometric_median_is_the_minimum(seed):
    """At a minimum that is no point itself the unit vectors towards the points cancel; and no step goes down."""
    points = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed)).double()
    median = geometric_median(points)
    difference = points - median
    pull = (difference / difference.norm(dim=1, keepdim=True)).sum(0)
    at_point = difference.norm(dim=1).min() < 1e-6
    assert at_point or pull.norm() < 1e-6
    best = sum_of_distances(median, points)
    for step in (1e-1, 1e-3):
        for direction in torch.randn(50, 3, generator=torch.Generator().manual_seed(1)).double():
            assert sum_of_distances(median + step * direction, points) >= best - 1e-9


def test_a_median_that_is_one_of_the_points_is_found():
    """The middle of a cross, and a point that the start of the iteration falls on but that is not the median."""
    cross = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]]).double()
    torch.testing.assert_close(geometric_median(cross), torch.zeros(2).double())
    line = torch.tensor([[0.0], [0.1], [0.2], [1], [3.7]]).double()  # the mean is 1, the median 0.2
    torch.testing.assert_close(geometric_median(line), torch.tensor([0.2]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(geometric_median(torch.ones(3, 2)), torch.ones(2))


@pytest.mark.parametrize("exact", [False, True])
def test_the_filter_in_the_middle_is_the_one_that_goes(exact):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 5, bias=False), nn.ReLU(), nn.Linear(5, 2))
    filters = torch.tensor([[9.0, 0.0], [0.0, 9.0], [-9.0, 0.0], [0.0, -9.0], [0.1, 0.2]])
    model[0].weight.data = filters + 100  # large filters: magnitude would say nothing
    scores = pl.criteria.FPGM(exact=exact)(pl.trace(model, torch.ones(1, 2)))["0"]
    assert scores.argmin() == 4 and (scores[:4] > 3 * scores[4] if exact else scores[:4] > scores[4]).all()


def test_without_the_median_the_score_is_the_mean_distance_to_all_filters(small):
    model, inputs = small
    filters = model[0].weight.detach().flatten(1)
    wanted = torch.stack([sum_of_distances(one, filters) / len(filters) for one in filters])
    found = pl.criteria.get("fpgm", normalizer="none")(pl.trace(model, inputs))["0"]
    torch.testing.assert_close(found, wanted)


def test_only_what_produces_the_units_counts():
    torch.manual_seed(0)
    model, inputs = Grouped().eval(), torch.randn(1, 3, 8, 8)
    graph = pl.trace(model, inputs)
    before = pl.criteria.FPGM()(graph)
    with torch.no_grad():
        model.norm.weight.mul_(3)
        model.last.weight.mul_(torch.rand(20))
    after = pl.criteria.FPGM()(graph)
    assert all(torch.equal(before[group], after[group]) for group in graph.groups)


def test_permuting_units_permutes_their_scores():
    torch.manual_seed(0)
    model, inputs = pl.zoo.vit_small().eval(), torch.randn(1, 3, 32, 32)
    graph = pl.trace(model, inputs)
    group = max(graph.groups, key=lambda group: group.size)
    order = torch.randperm(group.size)
    moved = pl.trace(permuted(model, group, order), inputs)
    for exact in (False, True):
        criterion = pl.criteria.FPGM(exact=exact, normalizer="none")
        torch.testing.assert_close(criterion(moved)[group.name], criterion(graph)[group.name][order])


def test_a_unit_with_several_rows_is_one_long_filter():
    """Heads own a block of rows each: the filter of a head is all of them."""
    torch.manual_seed(0)
    graph = pl.trace(pl.zoo.vit_small(), torch.randn(1, 3, 32, 32))
    seen = 0
    for group in graph.groups:
        for member in group.members:
            positions = [member.positions(unit) for unit in range(group.size)]
            if len(positions[0]) > 1 and member.name in dict(graph.model.named_parameters()):
                value = graph.model.get_parameter(member.name).detach()
                wanted = torch.stack([value.index_select(member.dim, at).movedim(member.dim, 0) for at in positions])
                assert torch.equal(filters_by_unit(value, member, group.size), wanted.flatten(1))
                seen += 1
    assert seen

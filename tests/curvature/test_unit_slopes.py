"""Unit slopes: all units in one backward pass, against one unit after the other, on layers of every kind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab.criteria import quadratic
from prunelab.curvature.second.unit_slopes import UnitSlopes
from prunelab.curvature.statistics.one_pass import evaluating
from tests.cases import Embedded, Grouped, perturb


class InPlace(nn.Module):
    """Outputs of layers that are changed in place: by ReLU, and by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.stem(x))
        out = self.norm(self.conv(x))
        out += x.mean()
        return self.head(F.relu(out, inplace=True).mean((2, 3)))


class Windows(nn.Module):
    """Rows that are windows of samples, a layer that runs twice, and samples that stand in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.twice = nn.Linear(3, 4), nn.Linear(4, 4)
        self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.reshape(-1, 2, 3))  # [B · 2, 2, …]
        x = self.twice(F.gelu(self.twice(x).tanh())).reshape(-1, 4, 4).transpose(0, 1)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(0))


class Transposed(nn.Module):
    """Grouped convolutions, plain and transposed, over one dimension; an instance norm; a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv1d(2, 4, 1), nn.Conv1d(4, 6, 2, groups=2, bias=False)
        self.norm, self.back = nn.InstanceNorm1d(6, affine=True), nn.ConvTranspose1d(6, 4, 2, groups=2)
        self.scale, self.head = nn.Parameter(torch.randn(4, 1)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.grouped(F.silu(self.first(x)))))
        return self.head((F.silu(self.back(x)) * self.scale).mean(2))


class Tokens(nn.Module):
    """An embedding of its own, padded, and batch norm over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 4, padding_idx=0), nn.BatchNorm1d(4)
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.body(x).tanh().mean(1))


HEADS = {"attention.in_proj_weight:heads", "attention.in_proj_weight:head_width"}
NETWORKS = {
    "in place": (InPlace, lambda: torch.randn(5, 2, 4, 4), {"conv:0", "conv:1"}),
    "windows": (Windows, lambda: torch.randn(5, 4, 3), {*HEADS, "attention.out_proj"}),
    "transposed": (Transposed, lambda: torch.randn(5, 2, 4), {"first:0", "first:1", "grouped:1", "back"}),
    "grouped": (Grouped, lambda: torch.randn(5, 3, 4, 4), {"first", "transposed"}),
    "embedded": (Embedded, lambda: torch.randint(0, 11, (5, 5)), {"query:head_width", "value"}),
    "tokens": (Tokens, lambda: torch.randint(0, 7, (5, 4)), {"embedding", "body"}),
}


def make(name: str) -> tuple[pl.DependencyGraph, list[tuple[Tensor, Tensor]]]:
    build, inputs, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = perturb(build()).double().eval()
    x = inputs().double() if inputs().is_floating_point() else inputs()
    targets = torch.arange(5) % 3
    if name == "embedded":
        targets = torch.randint(0, 11, (5, 5))
    return pl.trace(model, x), [(x, targets)]


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@pytest.mark.parametrize("name", NETWORKS)
def test_all_units_at_once_are_each_unit_by_itself(name, monkeypatch):
    graph, batches = make(name)
    with evaluating(graph.model):
        at_once = {group.name for group in UnitSlopes(graph.model, graph.groups, batches[0][0]).groups}
    assert at_once == NETWORKS[name][2]
    criterion = pl.criteria.Quadratic(curvature="ggn", loss=loss)
    found = criterion.terms(graph, batches)
    monkeypatch.setattr(quadratic.UnitSlopes, "_goes", lambda *_: False)
    wanted = criterion.terms(graph, batches)
    for key, pair in wanted.items():
        assert pair[0].abs().max() > 1e-6 and pair[1].abs().max() > 1e-6
        torch.testing.assert_close(found[key], pair)


def test_no_unit_is_visited_alone_where_all_go_at_once(monkeypatch):
    graph, batches = make("tokens")
    monkeypatch.setattr(quadratic.Quadratic, "_group", None)
    scores = pl.criteria.Quadratic(curvature="ggn")(graph, batches)
    assert all(bool(scores[group].any()) for group in scores)


def test_outputs_with_more_numbers_than_units_and_several_outputs_go_the_other_way():
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.left, self.right = nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.body(x).tanh()
            return self.left(hidden), self.right(hidden)

    class One(Wide):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat(super().forward(x), 1)

    torch.manual_seed(0)
    two, one = Wide().double(), One().double()
    one.load_state_dict(two.state_dict())
    batch = [(torch.randn(5, 2).double(), torch.randn(5, 8).double())]
    mean = F.mse_loss
    scores = [
        pl.criteria.Quadratic(curvature="ggn", loss=of)(pl.trace(model, batch[0][0]), batch)["body"]
        for model, of in ((two, lambda outputs, targets: mean(torch.cat(outputs, 1), targets)), (one, mean))
    ]
    torch.testing.assert_close(*scores)

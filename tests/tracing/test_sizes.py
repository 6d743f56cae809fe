"""One example is not the model: what the trace says holds at other sizes of the inputs too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from tests.cases import CASES, Case, error, random_plan


class Positions(nn.Module):
    """A table of 20 positions, of which the inputs use as many as they are long."""

    def __init__(self, parameter: bool = True) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(30, 16), nn.Linear(16, 30)
        table = torch.randn(20, 16)
        self.table = nn.Parameter(table) if parameter else nn.Embedding.from_pretrained(table)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        table = self.table(torch.arange(length)) if isinstance(self.table, nn.Embedding) else self.table[:length]
        return self.out((self.embedding(tokens) + table).relu())


@pytest.mark.parametrize("parameter", [True, False])
@pytest.mark.parametrize("length", [7, 19, 20])
def test_rows_that_the_example_did_not_reach_stay(parameter: bool, length: int):
    torch.manual_seed(0)
    model = Positions(parameter).double().eval()
    tokens = torch.randint(30, (2, length))
    graph = pl.trace(model, tokens)
    assert [group.size for group in graph.groups] == [16]
    plan = random_plan(model, tokens)
    cut, silent = pl.apply(model, plan), pl.masked(model, plan)
    for other in (1, 3, length, 20):
        inputs = torch.randint(30, (5, other))
        assert error(cut(inputs), silent(inputs)) < 1e-12


class Rows(nn.Module):
    """A gate per position, of which nothing is read but by a product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.gate = nn.Parameter(torch.rand(12, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * self.gate[: x.shape[1]])


def test_what_no_layer_makes_or_reads_is_no_group():
    graph = pl.trace(Rows(), torch.randn(2, 5, 4))
    assert [group.name for group in graph.groups] == ["first"]
    assert ("gate", 0) in graph.frozen


class Coincidence(nn.Module):
    """Channels-last code that reshapes where it should permute: 8×8 pixels and 64 channels factor alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 64, 1), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        batch, channels, height, wide = x.shape
        return self.last(x.reshape(batch, height, wide, channels).relu().mean((1, 2)))


def test_sizes_that_factor_by_chance_free_nothing():
    graph = pl.trace(Coincidence(), torch.randn(1, 3, 8, 8))
    assert not graph.groups
    assert "view" in graph.frozen["first.weight", 0]


class Square(nn.Module):
    """As many tokens as features in the example: which of the two a view means is seen at another length alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x.transpose(1, 2).reshape(len(x), 4, 4, -1).flatten(1, 2).transpose(1, 2))


def test_a_width_stays_free_where_both_sizes_agree():
    torch.manual_seed(0)
    model, x = Square().double().eval(), torch.randn(2, 16, 6).double()
    graph = pl.trace(model, x)
    assert graph.groups
    for group in graph.groups:
        assert {member.role for member in group.members} & {"produces", "consumes"}


def test_a_model_that_takes_one_size_only_is_traced_at_that():
    torch.manual_seed(0)

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(36, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape != (4, 6, 6):
                raise ValueError("only this size")
            return self.last(F.relu(self.first(x.flatten(1))))

    assert [group.size for group in pl.trace(Fixed(), torch.randn(4, 6, 6)).groups] == [8]


OTHER = {"vgg13_narrow": (3, 32), "vgg19": (3, 32), "vit_small": (3, 32), "embedded": None, "vgg16_bn": (3, 32)}
"""Cases that take images of one size only: another batch is all that can be tried."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_cut_network_is_the_silenced_one_at_another_size_and_batch(case: Case):
    model, inputs = case.make()
    plan = random_plan(model, inputs, share=0.4)
    cut, silent = pl.apply(model, plan), pl.masked(model, plan)
    sizes = [tuple(inputs.shape[1:])] if case.name in OTHER else [tuple(inputs.shape[1:]), (3, 41, 47)]
    for size in sizes:
        other = torch.randint(0, 11, (5, *size)) if not inputs.is_floating_point() else torch.randn(5, *size).double()
        with torch.no_grad():
            assert error(cut(other), silent(other)) < 1e-9


class Remembered(nn.Module):
    """A bias per head that is looked up once and kept, added at the one size that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.bias = nn.Parameter(torch.randn(2, 9))
        self.register_buffer("places", torch.arange(12) % 9)
        self.heads = 2
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias[:, self.places]
        heads = self.first(x).view(len(x), x.shape[1], self.heads, -1) + self.kept["bias"].mT[:, :, None]
        return self.last(heads.relu().flatten(2))

    def train(self, mode: bool = True) -> Remembered:
        self.kept = {}
        return super().train(mode)


def test_what_a_model_keeps_for_its_next_run_is_still_known():
    """A run at another size that fails leaves no tensor behind, and ``masked`` may run again."""
    torch.manual_seed(0)
    model, x = Remembered().double().eval(), torch.randn(2, 12, 6, dtype=torch.float64)
    graph = pl.trace(model, x)
    assert [group.size for group in graph.groups] == [2, 4]
    assert ("bias", 0) not in graph.frozen
    plan = pl.plan(pl.criteria.Magnitude()(graph), ratio=0.5, overrides={group.name: 0.5 for group in graph.groups})
    with torch.no_grad():
        cut, silent = pl.apply(model, plan), pl.masked(model, plan)
        for _ in range(3):
            assert error(cut(x), silent(x)) < 1e-12
            x = torch.randn(3, 12, 6, dtype=torch.float64)

"""What a model computes from constants alone is known in a trace; what depends on inputs or weights is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import prunelab as pl
from prunelab.errors import PlanError, TraceError
from tests.cases import error, imagined_gpu, random_plan


class Step(nn.Module):
    """Two layers with something in between that looks at values."""

    def __init__(self, between) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 32), nn.Linear(32, 5)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x).relu()))


def cut_is_masked(model: nn.Module, inputs: Tensor, backend: str) -> None:
    """The same products in another order: float32 differs by some 1e-7."""
    plan = random_plan(model.eval(), inputs)
    assert plan.cuts
    small, silent = pl.apply(model, plan, backend=backend), pl.masked(model, plan)
    with torch.no_grad():
        assert error(small(inputs), silent(inputs)) < 1e-5


def counts_a_mask(y: Tensor) -> Tensor:
    mask = torch.zeros(7, dtype=torch.bool)
    mask[2:5] = True
    return y * int(mask.sum())


def branches_on_a_range(y: Tensor) -> Tensor:
    steps = torch.arange(4)
    return y * 2 if (steps == torch.tensor([0, 1, 2, 3])).all() and steps.max() == 3 else y


def lists_what_it_picked(y: Tensor) -> Tensor:
    picked = torch.where(torch.tensor([3.0, 0.0, 1.0]) > 0.5)[0]
    assert picked.tolist() == [0, 2]
    assert torch.arange(3).repeat_interleave(torch.tensor([1, 0, 2])).tolist() == [0, 2, 2]
    assert torch.equal(torch.unique(torch.tensor([2, 1, 2])), torch.tensor([1, 2]))
    return y * picked.numel()


def writes_through_a_view(y: Tensor) -> Tensor:
    table = torch.zeros(4)
    part = table[1:3]
    table.add_(torch.arange(4))
    part[1] = 7
    assert table.tolist() == [0.0, 1.0, 7.0, 3.0]
    table[0] = y.sum()  # unknown from here on
    return y


def picks_rows_by_a_mask(y: Tensor) -> Tensor:
    return y[torch.tensor([True, False, True])]


def picks_places_by_a_mask(y: Tensor) -> Tensor:
    places = y[:, None, None, :] * torch.ones(1, 2, 3, 1)
    return places[:, torch.eye(2, 3, dtype=torch.bool)].sum(1)


def selects_by_a_mask(y: Tensor) -> Tensor:
    return y + y.new_ones(1, 4).masked_select(torch.tensor([False, True, False, False]))


CONSTANTS = [
    counts_a_mask,
    branches_on_a_range,
    lists_what_it_picked,
    writes_through_a_view,
    picks_rows_by_a_mask,
    picks_places_by_a_mask,
    selects_by_a_mask,
]


@pytest.mark.parametrize("backend", ["module", "graph"])
@pytest.mark.parametrize("between", CONSTANTS)
def test_code_may_look_at_its_constants(between, backend):
    torch.manual_seed(0)
    cut_is_masked(Step(between), torch.randn(3, 6), backend)


@imagined_gpu
def test_constants_are_known_on_a_gpu_that_is_not_there():
    def between(y: Tensor) -> Tensor:
        steps, on = torch.arange(4, device=y.device), torch.zeros(7, dtype=torch.bool, device=y.device)
        on[2:5] = True
        assert (steps == torch.tensor([0, 1, 2, 3], device=y.device)).all()
        rows = y[on[1:4]]
        assert rows.device.type == "cuda" and not torch.isnan(rows).any()
        return rows * int(on.sum())

    with FakeTensorMode(), torch.device("cuda"):
        model, x = Step(between), torch.empty(3, 6)
    graph = pl.trace(model, x)
    assert graph.tape[-1].outputs[0].device.type == "cuda"
    assert [group.size for group in graph.groups] == [32]


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 32)
        self.body = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)
        self.out = nn.Linear(32, 30)

    def forward(self, x: Tensor) -> Tensor:
        causal = self.body.generate_square_subsequent_mask(x.shape[1])
        return self.out(self.body.decoder(self.words(x), self.words(x), tgt_mask=causal))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 32)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1)
        self.out = nn.Linear(32, 30)

    def forward(self, x: Tensor) -> Tensor:
        causal = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        return self.out(self.body(self.words(x), mask=causal))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("kind", "backend"), [(Encoder, "module"), (Encoder, "graph"), (Transformer, "graph")])
def test_pytorchs_transformers_take_a_causal_mask(kind, backend):
    torch.manual_seed(0)
    cut_is_masked(kind(), torch.randint(30, (2, 6)), backend)


class Detector(nn.Module):
    """Keeps anchors and strides from the last size of image, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 24, 3, 2, 1)
        self.heads = nn.ModuleList([nn.Conv2d(16, 6, 1), nn.Conv2d(24, 6, 1)])
        self.stride = torch.tensor([2.0, 4.0])
        self.shape: torch.Size | None = None

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x).relu()
        maps = [head(found) for head, found in zip(self.heads, (first, self.b(first).relu()), strict=True)]
        if self.shape != x.shape:
            self.shape = x.shape
            sizes = [found.shape[2] * found.shape[3] for found in maps]
            self.strides = torch.cat([torch.full((n, 1), s) for n, s in zip(sizes, self.stride, strict=True)])
        return torch.cat([found.flatten(2) for found in maps], 2).transpose(1, 2) * self.strides


@pytest.mark.parametrize("backend", ["module", "graph"])
def test_a_detector_iterates_over_its_strides(backend):
    torch.manual_seed(0)
    cut_is_masked(Detector(), torch.randn(2, 3, 16, 16), backend)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 32), nn.Linear(32, 5)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        if not self.ready:
            self.ready.fill_(True)
        assert self.ready and self.calls == 1
        return self.b(self.a(x).relu())


def test_counters_count_in_a_copy_alone():
    model = Counting()
    assert [group.size for group in pl.trace(model, torch.ones(2, 6)).groups] == [32]
    assert int(model.calls) == 0 and not bool(model.ready)


def test_random_numbers_are_not_known_and_the_generator_stays_as_it_was():
    model = Step(lambda y: y if torch.rand(()) > 2 else y * 2)
    torch.manual_seed(0)
    wanted = torch.rand(2)
    torch.manual_seed(0)
    with pytest.raises(TraceError, match="needs the values"):
        pl.trace(model, torch.ones(3, 6))
    assert torch.equal(torch.rand(2), wanted)


def test_what_inputs_were_written_to_is_not_known():
    def between(y: Tensor) -> Tensor:
        table = torch.zeros(4)
        part = table[1:3]
        table[0] = y.sum()
        return y if part[0] > 0 else y * 2

    with pytest.raises(TraceError, match="needs the values"):
        pl.trace(Step(between), torch.ones(3, 6))


class Scaled(Step):
    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale.item()


def test_a_graph_does_not_freeze_the_value_of_a_weight():
    model = Scaled().eval()
    plan = random_plan(model, torch.randn(3, 6))
    with pytest.raises(PlanError, match="looks at the value of `scale`"):
        pl.apply(model, plan, backend="graph")


@pytest.mark.parametrize("backend", ["module", "graph"])
@pytest.mark.parametrize("kind", [Encoder, Detector])
def test_costs_are_counted_where_code_looks_at_constants(kind, backend):
    inputs = torch.randint(30, (2, 6)) if kind is Encoder else torch.randn(2, 3, 16, 16)
    model = kind().eval()
    small = pl.apply(model, random_plan(model, inputs), backend=backend)
    assert 0 < pl.count(small, inputs).flops < pl.count(model, inputs).flops


# ── guards against broken data ────────────────────────────────────────────────────────────────────────────────────

GUARDS = {
    "isnan": lambda y: torch.isnan(y).any(),
    "isinf": lambda y: y.isinf().any().item(),
    "isfinite": lambda y: not torch.isfinite(y).all(),
    "either": lambda y: (torch.isnan(y) | torch.isinf(y)).any(),
    "differs from itself": lambda y: (y != y).any() or not (y == y).all(),
    "counted": lambda y: torch.isnan(y).sum() > 0,
    "of a mean": lambda y: torch.isnan(y.mean()),
    "in place": lambda y: torch.isnan(y).logical_or_(torch.isinf(y)).any(),
}


@pytest.mark.parametrize("backend", ["module", "graph"])
@pytest.mark.parametrize("name", list(GUARDS))
def test_guards_against_broken_data_do_not_stop_a_trace(name, backend):
    def between(y: Tensor) -> Tensor:
        if GUARDS[name](y):
            raise ValueError("broken")
        return y

    torch.manual_seed(0)
    cut_is_masked(Step(between), torch.randn(3, 6), backend)


def test_a_mask_that_went_through_a_softmax_leaves_no_infinities():
    def between(y: Tensor) -> Tensor:
        if y.masked_fill(y > 0, -torch.inf).softmax(1).isinf().any():
            raise ValueError("broken")
        return y

    pl.trace(Step(between), torch.randn(3, 6))


def test_infinities_that_code_writes_itself_are_not_taken_for_broken_data():
    def by_number(y: Tensor) -> Tensor:
        return y if torch.isinf(y.masked_fill(y > 0, -torch.inf)).any() else y * 2

    def by_constant(y: Tensor) -> Tensor:
        mask = torch.zeros(32)
        mask[3] = -torch.inf
        return y if torch.isinf(y + mask).any() else y * 2

    def in_place(y: Tensor) -> Tensor:
        y = y * 1
        y.masked_fill_(y > 0, torch.inf)
        return y if not torch.isfinite(y).all() else y * 2

    for between in (by_number, by_constant, in_place):
        with pytest.raises(TraceError, match="needs the values"):
            pl.trace(Step(between), torch.ones(3, 6))


def test_a_guard_counts_what_is_whole_in_a_mask_of_removed_units_too():
    def between(y: Tensor) -> Tensor:
        assert bool((y == y).all()) and torch.isfinite(y).all(1).all()
        return y

    torch.manual_seed(0)
    cut_is_masked(Step(between), torch.randn(3, 6), "module")


def test_infinities_of_a_constant_are_seen():
    def between(y: Tensor) -> Tensor:
        mask = torch.full((4, 4), -torch.inf).triu(1)
        assert torch.isinf(mask).sum() == 6 and not torch.isnan(mask).any()
        return y

    assert pl.trace(Step(between), torch.ones(3, 6)).groups

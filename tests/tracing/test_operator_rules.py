"""Rules that need more than one small network: what is cut, what freezes and says what to do, what stays as it lies."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import prunelab as pl
from tests.cases import error, perturb, random_plan


def exact(model: nn.Module, inputs: Tensor | tuple, share: float = 0.5, backend: str = "module") -> nn.Module:
    """Cut a random share of every group, hold the result against the silenced network, and return it."""
    plan = random_plan(model, inputs, share, seed=1)
    cut, silent = pl.apply(model, plan, backend=backend), pl.masked(model, plan)
    with torch.no_grad():
        found, wanted = (net(*inputs) if isinstance(inputs, tuple) else net(inputs) for net in (cut, silent))
    assert error(found, wanted) < 1e-9
    return cut


def prepared(model: nn.Module) -> nn.Module:
    """Return the model in double precision, with norms and biases that matter."""
    return perturb(model).double().eval()


# ── gates, padding ────────────────────────────────────────────────────────────────────────────────────────────────


def test_glu_has_the_groups_of_the_same_gate_written_out():
    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left, right = x.chunk(2, 1)
            return left * right.sigmoid()

    torch.manual_seed(0)
    model = prepared(nn.Sequential(nn.Conv1d(3, 16, 3), nn.GLU(1), nn.Conv1d(8, 12, 3), nn.GLU(1), nn.Conv1d(6, 2, 1)))
    written = nn.Sequential(model[0], Written(), model[2], Written(), model[4])
    x = torch.randn(2, 3, 16).double()
    assert [(g.size, g.members) for g in pl.trace(model, x).groups] == [
        (g.size, g.members) for g in pl.trace(written, x).groups
    ]
    exact(model, x)


def test_a_gate_over_the_halves_of_heads_is_cut_in_both():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.last, self.heads = nn.Linear(3, 24), nn.Linear(12, 2), 4

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.glu(self.both(x).unflatten(-1, (self.heads, -1)), -1).flatten(-2))

    torch.manual_seed(0)
    model, x = prepared(Heads()), torch.randn(5, 3).double()
    assert [group.size for group in pl.trace(model, x).groups] == [4, 3]
    exact(model, x)


# ── channel shuffle, and integers that no shape gives away ────────────────────────────────────────────────────────


def test_a_channel_shuffle_is_cut_with_fewer_groups():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 1), nn.ReLU(), nn.ChannelShuffle(4), nn.Conv2d(32, 24, 3, groups=2), nn.ReLU()]
    model, x = prepared(nn.Sequential(*layers, nn.Conv2d(24, 5, 1))), torch.randn(2, 3, 8, 8).double()
    cut = exact(model, x)
    assert cut[2].groups == 2 and model[2].groups == 4


class Shuffled(nn.Module):
    """Shuffles channels with a number of groups that is written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.channel_shuffle(self.first(x), 4))


def test_a_number_of_groups_in_the_code_stays():
    torch.manual_seed(0)
    model, x = prepared(Shuffled()), torch.randn(2, 3, 4, 4).double()
    assert [group.size for group in pl.trace(model, x).groups] == [3]
    exact(model, x, 0.4)


class Middle(nn.Module):
    """Reads some of its features, by numbers in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)[:, 2:6].tanh())


def test_a_slice_that_would_start_elsewhere_is_refused():
    torch.manual_seed(0)
    model, x = prepared(Middle()), torch.randn(3, 4).double()
    graph = pl.trace(model, x)
    plan = pl.plan(
        pl.criteria.Random()(graph), ratio=0.3, overrides={g.name: 0.5 if g.size == 2 else 0 for g in graph.groups}
    )
    with pytest.raises(pl.PlanError, match=r"`slice` needs start=1 after the cut, and its code says 2"):
        pl.apply(model, plan, backend="module")
    with torch.no_grad():
        found, wanted = pl.apply(model, plan, backend="graph")(x), pl.masked(model, plan)(x)
    assert error(found, wanted) < 1e-9


class Normed(nn.Module):
    """A group norm whose number of groups is written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.group_norm(self.first(x), 4))


def test_a_group_norm_with_too_many_groups_is_refused():
    torch.manual_seed(0)
    model, x = prepared(Normed()), torch.randn(2, 3, 4, 4).double()
    graph = pl.trace(model, x)
    plan = pl.plan(
        pl.criteria.Random()(graph), ratio=0.5, overrides={g.name: 0.5 if g.size == 4 else 0 for g in graph.groups}
    )
    with pytest.raises(pl.PlanError, match="`native_group_norm` should give .*Its code holds a size"):
        pl.apply(model, plan, backend="module")
    exact(model, x, backend="graph")


# ── weights that are computed from other parameters ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("backend", ["module", "graph"])
def test_weight_norm_leaves_the_other_weights_as_they_were(backend: str):
    torch.manual_seed(0)
    norm = parametrizations.weight_norm
    layers = [norm(nn.Conv1d(3, 16, 3)), nn.Sigmoid(), norm(nn.ConvTranspose1d(16, 12, 3)), nn.ReLU()]
    model = prepared(nn.Sequential(*layers, norm(nn.Conv1d(12, 8, 1), dim=2), nn.ReLU(), norm(nn.Conv1d(8, 2, 1))))
    x = torch.randn(2, 3, 9).double()
    assert [group.size for group in pl.trace(model, x).groups] == [16, 12, 8]
    exact(model, x, backend=backend)
    plan = random_plan(model, x, 0.5, seed=1)
    cut = pl.apply(model, plan, backend="module")
    for number in (0, 2, 4, 6):  # the truth: every weight that is left is as it was
        kept = []
        for dim, size in enumerate(model[number].weight.shape):
            gone = {
                int(place)
                for group, units in plan.removed.items()
                for member in next(g for g in pl.trace(model, x).groups if g.name == group).members
                if member.name == f"{number}.parametrizations.weight.original1" and member.dim == dim
                for unit in units
                for place in member.positions(unit)
            }
            kept.append([place for place in range(size) if place not in gone])
        wanted = model[number].weight
        for dim, places in enumerate(kept):
            wanted = wanted.index_select(dim, torch.tensor(places))
        assert error(cut[number].weight, wanted) < 1e-12


def test_a_row_of_weight_norm_without_weights_is_refused():
    model = prepared(nn.Sequential(nn.Linear(3, 4), parametrizations.weight_norm(nn.Linear(4, 2))))
    plan = random_plan(model, torch.randn(2, 3).double(), 0.5, seed=1)
    (cut,) = plan.cuts
    kept = [unit for unit in range(4) if unit not in cut.removed]
    with torch.no_grad():
        model[1].parametrizations.weight.original1[0, kept] = 0
    for use in (pl.apply, pl.masked):
        with pytest.raises(pl.PlanError, match="original1.*remove_parametrizations"):
            use(model, plan)


def test_the_oracle_silences_columns_of_weight_norm_as_masked_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), parametrizations.weight_norm(nn.Linear(4, 2))).eval()
    x, y = torch.randn(16, 3), torch.randint(2, (16,))
    graph = pl.trace(model, x)
    scores = pl.criteria.get("oracle")(graph, [(x, y)])[graph.groups[0]]
    with torch.no_grad():
        base = F.cross_entropy(model(x), y)
        for unit in range(4):
            plan = pl.plan(pl.criteria.Random()(graph), ratio=0.25)
            (cut,) = plan.cuts
            plan = pl.Plan.from_json(plan.to_json().replace(f'"removed": [{cut.removed[0]}]', f'"removed": [{unit}]'))
            assert plan.cuts[0].removed == (unit,)
            wanted = F.cross_entropy(pl.masked(model, plan)(x), y) - base
            assert float(scores[unit]) == pytest.approx(float(wanted), abs=1e-6)


@pytest.mark.parametrize("kind", ["spectral", "matrix_exp", "cayley", "householder"])
def test_weights_that_need_the_whole_matrix_say_what_to_do(kind: str):
    torch.manual_seed(0)
    linear = nn.Linear(8, 6)
    if kind == "spectral":
        parametrizations.spectral_norm(linear)
    else:
        parametrizations.orthogonal(linear, orthogonal_map=kind)
    model = prepared(nn.Sequential(nn.Linear(3, 8), linear, nn.ReLU(), nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 2)))
    x = torch.randn(4, 3).double()
    graph = pl.trace(model, x)
    assert [(group.name, group.size) for group in graph.groups] == [("3", 10)]
    for name in ("0.weight", "1.bias"):
        assert "remove_parametrizations(model.get_submodule(\"1\"), 'weight')" in graph.frozen[name, 0]
    exact(model, x)
    plain = copy.deepcopy(model)
    parametrize.remove_parametrizations(plain[1], "weight")
    assert [group.size for group in pl.trace(plain, x).groups] == [8, 6, 10]


def test_a_model_prepared_for_quantisation_is_cut_with_its_observers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch is about to move these to another package
        quantization = pytest.importorskip("torch.ao.quantization")
        torch.manual_seed(0)
        body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten()]
        model = nn.Sequential(*body, nn.Linear(6 * 16, 5)).train()
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        model = quantization.prepare_qat(model)
        x = torch.randn(4, 3, 8, 8)
        model(x)
        model.eval().apply(quantization.disable_observer)
        assert [group.size for group in pl.trace(model, x).groups] == [8, 6]
        plan = random_plan(model, x, 0.5, seed=1)
        cut = pl.apply(model, plan, backend="module")
        assert cut[0].weight_fake_quant.scale.shape == cut[0].weight_fake_quant.zero_point.shape == (4,)
        with torch.no_grad():
            assert error(cut(x), pl.masked(model, plan)(x)) < 1e-5  # in single precision, as quantisation is


# ── states, and messages between nodes ────────────────────────────────────────────────────────────────────────────


class Cell(nn.Module):
    """A convolutional LSTM whose first state is zero."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.cell, self.out = nn.Conv2d(3, 6, 1), nn.Conv2d(6 + 8, 32, 3, padding=1), nn.Linear(8, 2)
        self.hidden, self.how = 8, how

    def forward(self, x: Tensor) -> Tensor:
        shape = (len(x), 8 if self.how == "literal" else self.hidden, *x.shape[3:])
        state = x.new_zeros(shape) if self.how == "new_zeros" else torch.zeros(shape, dtype=x.dtype)
        cell = torch.zeros_like(state)
        for step in x.unbind(1):
            i, f, o, g = self.cell(torch.cat([self.stem(step), state], 1)).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh()
        return self.out(state.sum((2, 3)))


@pytest.mark.parametrize("how", ["literal", "zeros", "new_zeros"])
def test_a_state_of_zeros_takes_any_width(how: str):
    torch.manual_seed(0)
    model, x = prepared(Cell(how)), torch.randn(2, 3, 3, 4, 4).double()
    assert sorted(group.size for group in pl.trace(model, x).groups) == [6, 8]
    cut = exact(model, x, backend="graph" if how == "literal" else "module")
    assert how == "literal" or cut.hidden == 4


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_a_loop_over_a_cell_loses_hidden_units(kind: str):
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.cell, self.last = nn.Linear(3, 6), getattr(nn, f"{kind}Cell")(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for step in x.unbind(1):
                state = self.cell(self.first(step), state)
            return self.last(state[0] if kind == "LSTM" else state)

    torch.manual_seed(0)
    model, x = prepared(Loop()), torch.randn(2, 3, 3).double()
    assert sorted(group.size for group in pl.trace(model, x).groups) == [6, 8]
    assert exact(model, x).cell.hidden_size == 4


def test_ones_beside_weights_are_no_units():
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.first(x), x.new_ones(len(x), 4)], 1))

    torch.manual_seed(0)
    model, x = prepared(Biased()), torch.randn(5, 3).double()
    graph = pl.trace(model, x)
    assert [group.size for group in graph.groups] == [8]
    exact(model, x)


class Messages(nn.Module):
    """Two layers of a graph network; edges are pairs of node numbers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.two, self.last, self.how = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2), how

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        for layer in (self.one, self.two):
            x = layer(x)
            empty = torch.zeros_like(x)
            if self.how == "index_add":
                x = empty.index_add_(0, target, x[source])
            elif self.how == "index_put":
                x = empty.index_put((target,), x[source], accumulate=True)
            else:
                sent = x.gather(0, source[:, None].expand(-1, x.shape[1]))
                wide = target[:, None].expand(-1, x.shape[1])
                x = empty.scatter_reduce(0, wide, sent, self.how, include_self=self.how == "sum")
            x = x.relu()
        return self.last(x)


@pytest.mark.parametrize("how", ["index_add", "sum", "index_put", "mean", "amax"])
def test_messages_move_rows_and_no_features(how: str):
    torch.manual_seed(0)
    model, inputs = prepared(Messages(how)), (torch.randn(7, 3).double(), torch.randint(7, (2, 15)))
    assert [group.size for group in pl.trace(model, inputs).groups] == [8, 6]
    exact(model, inputs)


# ── how tensors lie in memory ─────────────────────────────────────────────────────────────────────────────────────


def _video() -> nn.Module:
    layers = [nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 2))


@pytest.mark.parametrize("backend", ["module", "graph"])
@pytest.mark.parametrize(
    ("build", "form", "size"),
    [
        (lambda: torchvision.models.resnet18(num_classes=5), torch.channels_last, (32, 32)),
        (lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.25), torch.channels_last, (32, 32)),
        (_video, torch.channels_last_3d, (4, 8, 8)),
    ],
)
def test_channels_last_stays_last(build, form, size, backend):
    torch.manual_seed(0)
    model, x = prepared(build()).to(memory_format=form), torch.randn(2, 3, *size).double()
    plan = random_plan(model, x, 0.5, seed=1)
    cut = pl.apply(model, plan, backend=backend)
    assert backend == "graph" or type(cut) is type(model)
    kernels = [p for p in cut.parameters() if p.dim() == x.dim()]
    assert kernels and all(p.is_contiguous(memory_format=form) for p in kernels)
    like = torch.empty_like(kernels[0], memory_format=form)
    assert kernels[0].stride() == like.stride()
    with torch.no_grad():
        found, wanted = cut(x.to(memory_format=form)), pl.masked(model, plan)(x.to(memory_format=form))
    assert found.is_contiguous() and error(found, wanted) < 1e-9


def test_a_view_by_places_in_memory_freezes_what_it_moves():
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x.as_strided(x.shape, (1, len(x))))

    torch.manual_seed(0)
    graph = pl.trace(Strided(), torch.randn(6, 3))
    assert not graph.groups and "views it by places in memory" in graph.frozen["first.weight", 0]


# ── what stays frozen says why ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (nn.LocalResponseNorm(3), "slides over it"),
        (
            lambda x: torchvision.ops.ps_roi_align(x, [torch.zeros(1, 4)] * 2, 2).sum((2, 3), keepdim=True),
            "has no rule",
        ),
        (lambda x: torch.cdist(x.flatten(2).mT, x.flatten(2).mT).unsqueeze(1), "measures distances over it"),
        (lambda x: torch.fft.fft(x, dim=1).real, "transforms it"),
        (lambda x: x.cummax(1)[0], "depends on the order of its entries"),
        (lambda x: x.unfold(1, 8, 8).squeeze(-1), "slides over it"),
    ],
)
def test_channels_that_meet_each_other_stay(what, why):
    class Meets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return what(self.first(x))

    graph = pl.trace(Meets(), torch.randn(2, 3, 4, 4))
    assert not graph.groups and why in graph.frozen["first.weight", 0]

"""Batches as people have them: what is taken, what is refused, and in which words."""

from __future__ import annotations

import copy
from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab.batches.trees import tree_flatten, tree_leaves, tree_map, tree_unflatten
from prunelab.curvature.statistics.collect import collect
from tests.batches.test_losses import Output

FIRST_ORDER = ["taylor", "oracle"]
SECOND_ORDER = ["obd", "gate", "oba", "quadratic", "kron_obd"]
pytestmark = pytest.mark.filterwarnings("ignore:.*samples are too few")


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 3, 1, 4])


def scores(name: str, model: nn.Module, batches: Any, example: Any, **options: Any) -> Tensor:
    graph = pl.trace(model, example)
    found = pl.criteria.get(name, **options)(graph, batches)
    return torch.cat([found[group] for group in graph.groups])


Labelled = namedtuple("Labelled", ["image", "label"])
TARGETS = {
    "a dict": (lambda x, y: (x, {"y": y}), lambda t: t["y"]),
    "a tuple": (lambda x, y: (x, (y, y)), lambda t: t[0]),
    "a list of dicts": (
        lambda x, y: (x, [{"labels": one} for one in y]),
        lambda t: torch.stack([i["labels"] for i in t]),
    ),
    "a named tuple": (lambda x, y: Labelled(x, y), lambda t: t),
    "three parts": (lambda x, y: (x, y, y), lambda t: t[1]),
    "a mapping of other names": (lambda x, y: {"image": x, "label": y}, lambda t: t),
    "one mapping in another": (lambda x, y: (x, UserDict({"y": y})), lambda t: t["y"]),
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", FIRST_ORDER + SECOND_ORDER)
def test_targets_may_have_any_structure(kind, name, net, data):
    made, labels = TARGETS[kind]
    found = scores(name, net, [made(*data)], data[0], loss=lambda z, t: F.cross_entropy(z, labels(t)))
    torch.testing.assert_close(found, scores(name, net, [data], data[0]), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("batch", [lambda x: (x, None), lambda x: [x], lambda x: x], ids=["None", "one part", "alone"])
@pytest.mark.parametrize("name", FIRST_ORDER + ["obd", "gate"])
def test_inputs_alone_go_to_losses_that_need_no_targets(batch, name, net, data):
    found = scores(name, net, [batch(data[0])], data[0], loss=lambda z, t: z.square().mean())
    wanted = scores(name, net, [(data[0], torch.zeros(4, 5).double())], data[0], loss=F.mse_loss)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


def test_inputs_alone_are_refused_where_nobody_has_a_loss(net, data):
    for name in FIRST_ORDER + SECOND_ORDER:
        with pytest.raises(pl.BatchError, match=r"not a pair \(inputs, targets\), and Sequential returns no `.loss`"):
            scores(name, net, [data[0]], data[0])
    with pytest.raises(pl.BatchError, match="needs an iterable of batches, such as a data loader, got 3"):
        pl.criteria.get("taylor")(pl.trace(net, data[0]), 3)
    with pytest.raises(pl.BatchError, match=r"is not a pair .* but str.*pl.Task"):
        scores("taylor", net, ["x"], data[0])


class Masked(nn.Module):
    """Tokens ``[B, T]`` beside a mask that all samples share, ``[1, T]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)) * mask[..., None]
        return self.head(hidden.sum(1))


@pytest.mark.parametrize("name", FIRST_ORDER + SECOND_ORDER)
def test_what_all_samples_share_goes_to_each_of_them(name):
    torch.manual_seed(0)
    model, x, y = Masked().double(), torch.randn(4, 3, 6, dtype=torch.float64), torch.tensor([0, 3, 1, 4])
    mask = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    found = scores(name, model, [((x, mask), y)], (x, mask))
    wanted = scores(name, model, [((x, mask.expand(4, 3)), y)], (x, mask))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
    three_parts = scores(name, model, [(x, mask, y)], (x, mask))
    torch.testing.assert_close(three_parts, wanted, rtol=1e-5, atol=1e-8)


class TimeFirst(nn.Module):
    """``[T, B, F]`` to ``[B, classes]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)).mean(0))


class BatchFirst(TimeFirst):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1))


@pytest.mark.parametrize("name", FIRST_ORDER + SECOND_ORDER)
@pytest.mark.parametrize("times", [3, 4], ids=["other lengths", "as many as samples"])
def test_time_first_is_as_good_as_batch_first(name, times):
    torch.manual_seed(0)
    model, y = TimeFirst().double(), torch.tensor([0, 3, 1, 4])
    same = BatchFirst().double()
    same.load_state_dict(model.state_dict())
    x = torch.randn(times, 4, 6, dtype=torch.float64)
    batches: Any = [(x, y)] if times == 3 else pl.Task([(x, y)], samples=(1, 0))
    wanted = scores(name, same, [(x.transpose(0, 1), y)], x.transpose(0, 1))
    torch.testing.assert_close(scores(name, model, batches, x), wanted, rtol=1e-5, atol=1e-8)


class Graph(nn.Module):
    """A network on the nodes of one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        near = torch.zeros(len(x), len(x), dtype=x.dtype)
        near = near.index_put((edges[0], edges[1]), torch.ones((), dtype=x.dtype))
        return self.head(torch.tanh(self.first(near @ x)))


@pytest.mark.parametrize("number", [12, 10], ids=["as it is", "as many edges as nodes"])
def test_a_graph_is_one_batch_for_what_needs_no_samples_and_refused_by_what_does(number):
    torch.manual_seed(0)
    model, x, y = Graph().double(), torch.randn(10, 6, dtype=torch.float64), torch.randint(3, (10,))
    edges = torch.randint(10, (2, number))
    example = (x, edges)
    wanted = torch.autograd.grad(F.cross_entropy(model(x, edges), y), model.first.weight)[0]
    found = pl.criteria.Taylor().elementwise(model, [(example, y)])["first.weight"]
    torch.testing.assert_close(found, (model.first.weight * wanted).abs().detach())
    for measure in ("moments", "kronecker"):
        with pytest.raises(pl.BatchError, match=r"inputs of shape \[2, \d+\] but 10 targets.*pl.Task|but 10 targets"):
            collect(model, [(example, y)], {measure})
    assert scores("oracle", model, [(example, y)], example).isfinite().all()


def test_a_task_reads_what_no_default_can(net, data):
    loader = [{"meta": ["a", "b", "c", "d"], "pixels": data[0], "truth": {"class": data[1]}}]
    task = pl.Task(loader, inputs=lambda b: b["pixels"], targets=lambda b: b["truth"]["class"])
    for name in FIRST_ORDER + SECOND_ORDER:
        torch.testing.assert_close(scores(name, net, task, data[0]), scores(name, net, [data], data[0]))


def test_a_task_is_taken_wherever_batches_are(net, data):
    loader = [{"pixels": data[0], "truth": data[1]}]
    task = pl.Task(loader, inputs=lambda b: b["pixels"], targets=lambda b: b["truth"])
    graph = pl.trace(net, data[0])
    found, wanted = collect(graph, task, {"moments"}), collect(graph, [data], {"moments"})
    torch.testing.assert_close(found.moments, wanted.moments)
    torch.testing.assert_close(pl.criteria.OBD()(graph, found)["0"], pl.criteria.OBD()(graph, [data])["0"])
    plan = pl.plan(pl.criteria.Magnitude()(graph), ratio=0.5)
    torch.testing.assert_close(
        pl.apply(net, plan, compensate=task).state_dict(), pl.apply(net, plan, compensate=[data]).state_dict()
    )
    small, _ = pl.prune(net, data[0], "taylor", data=task, ratio=0.5, compensate=True, progress=False)
    same, _ = pl.prune(net, data[0], "taylor", data=[data], ratio=0.5, compensate=True, progress=False)
    torch.testing.assert_close(small.state_dict(), same.state_dict())


def test_a_task_s_mistakes_are_named(net, data):
    with pytest.raises(pl.BatchError, match="`loss` must be a function, got str"):
        pl.Task([data], loss="mse")
    with pytest.raises(pl.BatchError, match="one task says all"):
        pl.Task(pl.Task([data]))
    with pytest.raises(pl.BatchError, match="a function of the task cannot take this tuple: TypeError"):
        scores("taylor", net, pl.Task([data], inputs=lambda b: b["x"]), data[0])
    with pytest.raises(pl.BatchError, match="`outputs` of the task cannot take what the model returns"):
        scores("taylor", net, pl.Task([data], outputs=lambda z: z.logits), data[0])
    with pytest.raises(pl.BatchError, match="dimension 1 of a tensor of shape .4, 6. counts samples, but there are 4"):
        scores("obd", net, pl.Task([data], samples=(1, 0)), data[0])
    with pytest.raises(pl.BatchError, match="does not fit"):
        scores("obd", net, pl.Task([data], samples=({"x": 0}, 0)), data[0])


class Wrapped(nn.Module):
    """Returns what Hugging Face's models return, or segmentation's dicts."""

    def __init__(self, net: nn.Module, kind: str) -> None:
        super().__init__()
        self.net, self.kind = net, kind

    def forward(self, x: Tensor) -> Any:
        z = self.net(x)
        if self.kind == "dataclass":
            return Output(None, z)
        return {"out": z, "features": x * 2} if self.kind == "dict" else z[:, 0]


@pytest.mark.parametrize("options", [{}, {"curvature": "mc"}, {"curvature": "empirical"}, {"linear": True}], ids=str)
@pytest.mark.parametrize("kind", ["dataclass", "dict"])
def test_gates_take_outputs_of_any_structure(kind, options, net, data):
    def loss(z: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(z["out"] if kind == "dict" else z.logits, y)

    found = scores("gate", Wrapped(net, kind), [data], data[0], loss=loss, **options)
    torch.testing.assert_close(found, scores("gate", net, [data], data[0], **options), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["gate", "obd", "quadratic"])
def test_outputs_may_be_one_number_for_each_sample(name, net, data):
    option = {"gate": "curvature", "obd": "fisher", "quadratic": "curvature"}[name]
    x, y = data[0], torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    loss = F.binary_cross_entropy_with_logits
    found = scores(name, Wrapped(net, "number"), [(x, y)], x, loss=loss, **{option: "ggn"})
    column = nn.Sequential(net, First())
    wanted = scores(name, column, [(x, y[:, None])], x, loss=loss, **{option: "ggn"})
    torch.testing.assert_close(found, wanted[:8], rtol=1e-5, atol=1e-8)  # the others are those that `First` drops


class First(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z[:, :1]


def test_a_loss_without_second_derivative_is_named(net, data):
    def gates(**options: Any) -> Tensor:
        return scores("gate", net, [data], data[0], loss=nn.MultiMarginLoss(), **options)

    with pytest.raises(pl.BatchError, match='no second derivative .* curvature="ggn" needs: use curvature="empirical"'):
        gates()
    assert gates(curvature="empirical").isfinite().all()


def test_gates_with_thousands_of_outputs_warn_before_they_start():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 21, 1))
    graph, batch = (
        pl.trace(model, torch.randn(1, 1, 10, 10)),
        (torch.randn(1, 1, 10, 10), torch.zeros(1, 10, 10).long()),
    )
    with pytest.warns(UserWarning, match='2100 for each batch here.  curvature="mc" needs 1'):
        pl.criteria.Gate()(graph, [batch])
    pl.criteria.Gate(curvature="mc")(graph, [batch])


LOSSES = {
    "no mean": nn.CrossEntropyLoss(reduction="none"),
    "a float": lambda z, y: F.cross_entropy(z, y).item(),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("name", FIRST_ORDER + SECOND_ORDER)
def test_a_loss_must_be_one_number(kind, name, net, data):
    with pytest.raises(pl.BatchError, match="The loss is not a single number but"):
        scores(name, net, [data], data[0], loss=LOSSES[kind])


@pytest.mark.parametrize("name", ["taylor", "obd", "gate", "oba"])
def test_a_loss_must_have_a_gradient(name, net, data):
    with pytest.raises(pl.BatchError, match="gradient"):
        scores(name, net, [data], data[0], loss=lambda z, y: F.cross_entropy(z.detach(), y))


@pytest.mark.parametrize("name", FIRST_ORDER + SECOND_ORDER)
def test_empty_batches_are_named(name, net, data):
    with pytest.raises(pl.BatchError, match="Batch 1 is empty"):
        scores(name, net, [data, (data[0][:0], data[1][:0])], data[0])


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 6), nn.Linear(6, 8)
        self.filter = nn.Parameter(torch.randn(5, dtype=torch.cfloat))
        self.counts = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(self.head(torch.tanh(self.first(x)))) * self.filter)


def test_parameters_that_are_no_real_numbers_hinder_nothing():
    torch.manual_seed(0)
    model, x = Spectral(), torch.randn(4, 8)
    values = pl.criteria.Taylor().elementwise(model, pl.Task([(x, x)], loss=F.mse_loss))
    assert "counts" not in values and values["filter"].dtype == torch.float32
    with torch.no_grad():  # the loss as a function of the filter's scale
        moved = [F.mse_loss(_scaled(model, 1 + h)(x), x).double() for h in (1e-2, -1e-2)]
    total = float((moved[0] - moved[1]) / 2e-2)
    signed = pl.criteria.Taylor()._products(model, pl.Task([(x, x)], loss=F.mse_loss))["filter"].sum()
    assert abs(float(signed) - total) < 1e-2 * abs(total)  # a difference over finite steps, in float32
    assert scores("taylor", model, pl.Task([(x, x)], loss=F.mse_loss), x).isfinite().all()


def _scaled(model: nn.Module, factor: float) -> nn.Module:
    other = copy.deepcopy(model)
    other.filter.data *= factor
    return other


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


class Custom(nn.Module):
    def __init__(self, own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.scale, self.head = nn.Linear(6, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 5)
        self.times = Times.apply if own else torch.mul

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.times(self.first(x).tanh(), self.scale))


def test_functions_with_their_own_backward_go_sample_by_sample(data):
    x, y = data[0].float(), data[1]
    with pytest.warns(UserWarning, match="vmap cannot take Custom.*`?scale"):
        found = collect(Custom(True), [(x, y)], {"moments"}).moments
    torch.testing.assert_close(found, collect(Custom(False), [(x, y)], {"moments"}).moments)


class Checkpointed(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.net, x, use_reentrant=False)


@pytest.mark.parametrize("name", ["taylor", "obd", "kron_obd", "gate", "oba", "quadratic"])
def test_checkpointed_activations_change_nothing_or_are_named(name, net, data):
    if name in ("gate", "quadratic"):
        with pytest.raises(pl.BatchError, match=f"Checkpointed recomputes activations.*`{name}` cannot follow"):
            scores(name, Checkpointed(net), [data], data[0])
        return
    found = scores(name, Checkpointed(net), [data], data[0])
    torch.testing.assert_close(found, scores(name, net, [data], data[0]), rtol=1e-5, atol=1e-8)


@dataclass
class Unknown:
    loss: Tensor
    logits: Tensor | None


def test_trees_open_mappings_and_dataclasses_and_close_them_again():
    x = torch.ones(2)
    tree = (UserDict({"a": x, "b": [x, None]}), Unknown(x, None), {"c": 1})
    leaves, spec = tree_flatten(tree)
    assert len(leaves) == 6 and len(tree_leaves(tree)) == 6
    again = tree_unflatten(leaves, spec)
    assert isinstance(again[0], UserDict) and isinstance(again[1], Unknown) and again[0]["b"][1] is None
    doubled = tree_map(lambda leaf: leaf * 2 if isinstance(leaf, Tensor) else leaf, tree)
    assert torch.equal(doubled[0]["a"], 2 * x) and torch.equal(tree[0]["a"], x)
    assert torch.equal(doubled[1].loss, 2 * x) and torch.equal(tree[1].loss, x)

"""Isolation: whatever is measured, and whatever is raised, the model and the process are as they were, bit by bit."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import prunelab as pl
from prunelab.curvature import exact
from prunelab.curvature.second import hvp
from prunelab.runtime.isolation import eval_mode, evaluating, replaced
from tests.snapshot import Snapshot

WITHOUT_DATA = ("random", "magnitude", "bn_scale", "fpgm")
OPTIONS: dict[str, dict[str, Any]] = {"bn_scale": {"fallback": "keep"}, "oracle": {"progress": False}}


class Shared(nn.Module):
    """Modules with two names, tied and parametrized parameters, and a forward pass that leaves things behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.features = nn.Sequential(self.conv1, nn.ReLU(), self.conv2)
        self.norm, self.drop = nn.BatchNorm2d(6), nn.Dropout()
        self.layers = nn.ModuleList([nn.Linear(6, 6)] * 2)
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        self.right.weight = self.left.weight
        self.spectral = parametrizations.spectral_norm(nn.Linear(6, 6))
        self.split = parametrizations.weight_norm(nn.Linear(6, 6))
        self.memory = nn.LSTM(6, 6, batch_first=True)
        self.last = nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.shapes: list[Any] = []
        self.cache: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.shapes.append(x.shape)
        self.cache[str(x.shape)] = self.seen = x
        x = self.norm(self.features(x)).mean((2, 3))
        for layer in self.layers:
            x = x + F.relu(layer(x))
        x = self.right(F.relu(self.left(x)))
        x = self.split(F.relu(self.spectral(x)))
        return self.last(self.drop(self.memory(x[:, None])[0][:, 0]))


@pytest.fixture
def shared() -> nn.Module:
    """In training mode but for two modules, with gradients, a fixed parameter and hooks."""
    torch.manual_seed(0)
    model = Shared().train()
    model.norm.eval(), model.drop.eval()
    model.left.bias.requires_grad_(False)
    model(torch.randn(4, 3, 5, 5)).sum().backward()
    model.shapes.clear(), model.cache.clear()
    model.conv1.register_forward_hook(lambda module, inputs, output: None)
    model.last.register_full_backward_hook(lambda module, before, after: None)
    return model


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(size, 3, 5, 5), torch.arange(size) % 4) for size in (6, 3)]


@pytest.fixture(autouse=True)
def known_warnings():
    """Warnings that this model deserves: it writes to a buffer, which ``torch.func`` cannot follow."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.func.vmap cannot take")
        warnings.filterwarnings("ignore", "Cut without compensation: `(spectral|memory)")  # nor are an LSTM's a layer's
        warnings.filterwarnings("ignore", ".* knows linear layers and convolutions, and these groups")
        warnings.filterwarnings("ignore", "params=0.9: the layers end at")  # few ranks in so small a model
        yield


def criterion(name: str, **options: Any) -> pl.criteria.Criterion:
    return pl.criteria.get(name, **OPTIONS.get(name, {}), **options)


@pytest.mark.parametrize("name", pl.criteria.names())
def test_a_criterion_leaves_everything_as_it_was(shared, batches, name):
    graph = pl.trace(shared, batches[0][0])
    before = Snapshot(shared)
    criterion(name)(graph, batches)
    assert before.changes() == []


@pytest.mark.parametrize(
    "name", ["taylor", "obd", "kron_obs", "eigendamage", "gate", "obs", "oba", "quadratic", "oracle"]
)
def test_a_criterion_that_raises_leaves_everything_as_it_was(shared, batches, name):
    graph = pl.trace(shared, batches[0][0])
    before = Snapshot(shared)
    with pytest.raises(pl.PruneLabError, match="Shared cannot take inputs"):
        criterion(name)(graph, [*batches, (torch.zeros(2, 7), torch.tensor([0, 1]))])
    assert before.changes() == []


@pytest.mark.parametrize(
    "options", [{"curvature": "hessian", "interactions": True}, {"curvature": "mc", "linear": True}]
)
def test_gates_of_every_curvature_leave_everything_as_it_was(shared, batches, options):
    graph = pl.trace(shared, batches[0][0])
    before = Snapshot(shared)
    criterion("gate", **options)(graph, batches)
    assert before.changes() == []


def measurements(model: nn.Module, batches: list, folder: Any) -> dict[str, Callable[[], Any]]:
    graph = pl.trace(model, batches[0][0])
    plan = pl.plan(pl.criteria.get("magnitude")(graph), ratio=0.25)
    weights = {name: value.detach().abs() for name, value in model.named_parameters()}
    return {
        "trace": lambda: pl.trace(model, batches[0][0]),
        "collect": lambda: pl.collect(graph, batches, {"grad", "moments", "kronecker", "inputs"}),
        "product": lambda: hvp.self_product(model, batches),
        "pairs": lambda: pl.criteria.layer_pairs(model, batches),
        "exact": lambda: exact.hessian(model, batches, names=["last.weight"]),
        "plan": lambda: pl.plan(pl.criteria.get("magnitude")(graph), params=0.8),
        "latency plan": lambda: pl.plan(pl.criteria.get("magnitude")(graph), overrides={"conv1": 0.5}, ratio=0.25),
        "apply": lambda: pl.apply(model, plan, compensate=batches),
        "graph": lambda: pl.apply(model, plan, backend="graph"),
        "masked": lambda: pl.masked(model, plan),
        "latency": lambda: pl.latency(model, batches[0][0], seconds=0.01),
        "count": lambda: pl.count(model, batches[0][0]),
        "factorize": lambda: pl.factorize(model, pl.criteria.get("eigendamage")(graph, batches), params=0.9),
        "sparsify": lambda: pl.sparsify(model, weights, 0.5),
        "prune": lambda: pl.prune(model, batches[0][0], "taylor", batches, ratio=0.25, seed=0, progress=False),
        "save": lambda: pl.save(model, folder / "model.safetensors"),
    }


def test_all_else_leaves_everything_as_it_was(shared, batches, tmp_path):
    for name, measure in measurements(shared, batches, tmp_path).items():
        before = Snapshot(shared)
        measure()
        assert (name, before.changes()) == (name, [])


def test_a_snapshot_sees_what_a_forward_pass_leaves_behind(shared, batches):
    before = Snapshot(shared)
    shared(batches[0][0])
    assert {".seen", ".shapes", ".cache", "value of buffer calls"} <= set(before.changes())


def test_an_aliased_module_has_the_scores_of_one_that_is_not(batches):
    class Plain(nn.Module):
        def __init__(self, alias: bool) -> None:
            super().__init__()
            self.conv1, self.conv2, self.out = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5, 4)
            self.features = nn.Sequential(self.conv1, nn.ReLU(), self.conv2) if alias else None

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.conv2(F.relu(self.conv1(x))).relu().mean((2, 3)))

    torch.manual_seed(0)
    aliased, plain = Plain(True).double(), Plain(False).double()
    plain.load_state_dict(aliased.state_dict(), strict=False)
    batches = [(x.double(), y) for x, y in batches]
    for name in ("oba", "quadratic", "gate", "obd", "oracle"):
        scores = [criterion(name)(pl.trace(m, batches[0][0]), batches) for m in (aliased, plain)]
        for found, wanted in zip(*(s.by_name.values() for s in scores), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)  # the same operations in the same order


def test_a_tensor_takes_the_place_of_a_shared_parameter_everywhere(shared):
    with replaced(shared, {"left.weight": torch.zeros(6, 6), "calls": torch.ones(())}):
        assert shared.left.weight is shared.right.weight and not shared.right.weight.any()
        assert shared.calls == 1
    assert isinstance(shared.right.weight, nn.Parameter) and shared.left.weight is shared.right.weight


def test_what_was_replaced_is_put_back_after_an_error(shared):
    before = Snapshot(shared)
    with pytest.raises(ZeroDivisionError), replaced(shared, {"features.0.weight": torch.zeros(8, 3, 3, 3)}):
        assert not shared.conv1.weight.any()
        raise ZeroDivisionError
    assert before.changes() == []


def test_a_name_that_the_model_does_not_have_is_refused(shared):
    with (
        pytest.raises(pl.PruneLabError, match="no parameter or buffer `nowhere`"),
        replaced(shared, {"nowhere": torch.ones(1)}),
    ):
        pass


def test_a_parameter_that_no_gradient_can_have_is_named(batches):
    with torch.inference_mode():
        model = nn.Sequential(nn.Flatten(), nn.Linear(75, 6), nn.ReLU(), nn.Linear(6, 4))
    graph = pl.trace(model, batches[0][0])
    with pytest.raises(pl.PruneLabError, match=r"`1.weight` was made inside torch.inference_mode"):
        pl.criteria.get("taylor")(graph, batches)
    small = pl.apply(model, pl.plan(pl.criteria.get("magnitude")(graph), ratio=0.5))
    small(batches[0][0]).sum().backward()
    assert small[1].weight.grad is not None


def test_a_lazy_layer_is_named(batches):
    with (
        pytest.raises(pl.PruneLabError, match="`0.weight` has no shape yet"),
        evaluating(nn.Sequential(nn.LazyLinear(3))),
    ):
        pass


@pytest.mark.parametrize("name", [n for n in pl.criteria.names() if n != "random"])
def test_scores_in_inference_mode_are_those_outside(shared, batches, name):
    wanted = criterion(name)(pl.trace(shared, batches[0][0]), batches)
    with torch.inference_mode():
        given = [(x.clone(), y.clone()) for x, y in batches]
        found = criterion(name)(pl.trace(shared, given[0][0]), given)
    for group in wanted:
        torch.testing.assert_close(found[group.name], wanted[group], rtol=0, atol=0)
        assert not found[group.name].is_inference()


def test_models_made_in_inference_mode_can_be_trained(shared, batches, tmp_path):
    shared.eval()
    with torch.inference_mode():
        plan = pl.plan(pl.criteria.get("magnitude")(pl.trace(shared, batches[0][0])), ratio=0.25)
        made = [pl.apply(shared, plan), pl.apply(shared, plan, backend="graph"), pl.masked(shared, plan)]
        made.append(pl.prune(shared, batches[0][0], "taylor", batches, ratio=0.25, progress=False)[0])
        made.append(pl.sparsify(shared, {"last.weight": shared.last.weight}, 0.5))
        pl.save(shared, tmp_path / "model.safetensors")
        made.append(pl.load(shared, tmp_path / "model.safetensors"))
    for model in made:
        model(batches[0][0]).sum().backward()
        assert not any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])


def test_whether_gradients_are_on_stays_the_users_business(shared, batches):
    seen = []

    def finetune(model: nn.Module) -> None:
        seen.append(torch.is_grad_enabled())

    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            pl.prune(shared, batches[0][0], ratio=0.25, finetune=finetune, progress=False)
    assert seen == [False, True]


def test_a_model_without_anything_to_remove_is_named(batches):
    model = nn.Sequential(nn.Flatten(), nn.Linear(75, 4))
    scores = pl.criteria.get("magnitude")(pl.trace(model, batches[0][0]))
    with pytest.raises(pl.PlanError, match="Sequential has no units to remove.*the model's output"):
        pl.plan(scores, flops=0.5)
    with pytest.raises(pl.PlanError, match="Sequential has no units to remove"):
        pl.prune(model, batches[0][0], ratio=0.5, progress=False)
    with pytest.raises(pl.PlanError, match="it has no parameters"):
        pl.prune(nn.Identity(), batches[0][0], flops=0.5, progress=False)


def in_threads(number: int, work: Callable[[int], None]) -> None:
    """Run ``work`` in threads that begin together, and raise what one of them raises."""
    barrier, errors = threading.Barrier(number), []

    def run(place: int) -> None:
        try:
            barrier.wait(timeout=60)
            work(place)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def test_threads_that_score_one_model_find_what_one_alone_does(shared, batches):
    names = ["oba", "quadratic", "gate", "taylor", "oracle"]
    graph = pl.trace(shared, batches[0][0])
    wanted = {name: criterion(name)(graph, batches) for name in names}
    before = Snapshot(shared)

    def work(place: int) -> None:
        for name in names[place:] + names[:place]:
            own = pl.trace(shared, batches[0][0])
            found = criterion(name)(own, batches)
            for group in graph.groups:
                torch.testing.assert_close(found[group.name], wanted[name][group], rtol=0, atol=0)
            pl.apply(shared, pl.plan(found, ratio=0.25))
            pl.count(shared, batches[0][0])

    in_threads(3, work)
    assert before.changes() == []


def test_threads_that_measure_models_of_their_own_do_not_wait_for_one_another(batches):
    inside = threading.Barrier(2)

    def work(place: int) -> None:
        with eval_mode(nn.Linear(2, 2)):
            inside.wait(timeout=60)  # only passed if both are inside at once

    in_threads(2, work)


def test_one_thread_at_a_time_has_a_model(shared):
    inside: list[int] = []

    def work(place: int) -> None:
        for _ in range(50):
            with evaluating(shared), eval_mode(shared):
                inside.append(place)
                assert inside == [place]
                inside.remove(place)

    in_threads(3, work)

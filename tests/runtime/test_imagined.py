"""Apple GPUs have no float64: it is never asked of one, and the numbers are those of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab.pruning.seeds import seeded
from prunelab.runtime.devices import accelerator, exact, exact_on, forked_rng
from prunelab.sparsity.masks import density
from prunelab.tracing.fakes import FakeMode
from tests.imagined import MPS, ImaginedMPS, OnMPS, moved, plain

Made = tuple[nn.Module, Any, list[tuple[Tensor, Tensor]]]


def network() -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(54, 4)).eval()


@pytest.fixture
def both(monkeypatch) -> Any:
    """A network on the CPU and the same on the imagined device, with batches on the CPU.

    Tensors without data are on the CPU: PyTorch may end the process if one says that it is on a device it lacks.
    """
    make = FakeMode.make
    monkeypatch.setattr(FakeMode, "make", lambda self, like, _: make(self, like, torch.device("cpu")))
    monkeypatch.setattr(torch.mps, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", torch.set_rng_state)
    torch.manual_seed(1)
    batches = [(torch.randn(size, 3, 5, 5), torch.arange(size) % 4) for size in (40, 20)]
    with ImaginedMPS():
        models = network(), moved(network())
        yield [(model, pl.trace(model, example(model, batches)), batches) for model in models]


def example(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return inputs on the device of the model."""
    on_mps = any(isinstance(parameter, OnMPS) for parameter in model.parameters())
    return batches[0][0].as_subclass(OnMPS) if on_mps else batches[0][0]


def same(both: list[Made], found: Callable[[nn.Module, Any, list], Tensor]) -> None:
    """Compare numbers of the two, which do the same operations in the same order."""
    on_cpu, on_mps = (plain(found(*made).detach()) for made in both)
    torch.testing.assert_close(on_mps, on_cpu, rtol=0, atol=0)


def joined(scores: pl.criteria.Scores) -> Tensor:
    return torch.cat([scores[group] for group in scores])


def squared(found: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(found, F.one_hot(targets, 4).to(found.dtype))


OPTIONS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in pl.criteria.names() if name != "bn_scale"]
OPTIONS += [
    ("bn_scale", {"fallback": "keep"}),
    ("obd", {"fisher": "mc"}),
    ("obd", {"fisher": "ggn", "loss": squared}),
    ("obd", {"fisher": "hessian", "exact_below": 0}),
    ("gate", {"curvature": "hessian", "interactions": True}),
    ("oba", {"part": "gauss_newton", "first_order": True}),
    ("quadratic", {"curvature": "ggn", "chunk": 4}),
]


@pytest.mark.parametrize(
    ("name", "options"), OPTIONS, ids=[f"{number}-{name}" for number, (name, _) in enumerate(OPTIONS)]
)
def test_scores_are_those_of_the_cpu(both, name, options):
    same(both, lambda model, graph, batches: joined(pl.criteria.get(name, **options)(graph, batches)))


CUTS: dict[str, Callable[[nn.Module, Any, list, pl.Plan], nn.Module]] = {
    "apply": lambda model, graph, batches, plan: pl.apply(model, plan),
    "masked": lambda model, graph, batches, plan: pl.masked(model, plan),
    "consumers": lambda model, graph, batches, plan: pl.apply(model, plan, compensate=batches),
    "in order": lambda model, graph, batches, plan: pl.apply(
        model, plan, compensate=pl.Compensation(batches, sequential=True)
    ),
    "producers": lambda model, graph, batches, plan: pl.apply(
        model, plan, compensate=pl.Compensation(pl.collect(graph, batches, {"kronecker"}), side="producers")
    ),
    "factorize": lambda model, graph, batches, plan: pl.factorize(
        model, pl.criteria.get("eigendamage")(graph, batches), params=0.8
    ),
    "sparsify": lambda model, graph, batches, plan: pl.sparsify(model, dict(model.named_parameters()), 0.5),
    "prune": lambda model, graph, batches, plan: pl.prune(
        model, example(model, batches), "taylor", batches, ratio=0.5, seed=0, finetune=lambda _: None, progress=False
    )[0],
}


@pytest.mark.parametrize("cut", CUTS)
def test_cut_models_give_what_they_give_on_the_cpu(both, cut):
    plan = pl.plan(pl.criteria.get("magnitude")(both[0][1]), ratio=0.5)
    same(both, lambda model, graph, batches: CUTS[cut](model, graph, batches, plan)(example(model, batches)))


def test_single_weights_are_as_on_the_cpu(both):
    same(both, lambda model, graph, batches: pl.criteria.layer_pairs(model, batches)[1])
    same(both, lambda model, *_: torch.tensor(density(pl.sparsify(model, {"6.weight": model[6].weight.abs()}, 0.5))))
    same(both, lambda model, graph, batches: pl.criteria.get("obs").elementwise(model, batches)["6.weight"])


def test_the_imagined_device_refuses_what_a_real_one_does():
    with ImaginedMPS():
        tensor = torch.ones(3, device=MPS)
        assert isinstance(tensor, OnMPS) and tensor.device == MPS
        for double in (tensor.double, lambda: tensor.to(torch.float64), lambda: tensor.type(torch.float64)):
            with pytest.raises(TypeError, match="float64"):
                double()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(3, dtype=torch.float64, device=MPS)
        with pytest.raises(RuntimeError, match="same device"):
            tensor + torch.ones(3, dtype=torch.float64)


def test_exact_numbers_are_kept_where_they_can_be():
    with ImaginedMPS():
        found = exact(torch.ones(3, device=MPS))
    assert (found.dtype, found.device) == (torch.float64, torch.device("cpu"))
    assert exact_on(MPS) == torch.device("cpu") and exact_on(torch.device("cuda", 1)) == torch.device("cuda", 1)
    half = torch.ones(3, dtype=torch.float16)
    assert exact(half).dtype == torch.float64 and exact(exact(half)) is not None


def test_the_accelerator_is_that_of_pytorch(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_, **__: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: MPS)
    assert accelerator() == MPS
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_, **__: False)
    assert accelerator() == torch.device("cpu")


@pytest.mark.parametrize("kind", ["mps", "cuda", "xpu"])
def test_the_generator_of_any_device_goes_on_where_it_was(monkeypatch, kind):
    """MPS has one generator, and takes no device; the others have one for each."""
    states: dict[tuple, int] = {}
    place = () if kind == "mps" else (torch.device(kind, 1),)

    class Module:
        @staticmethod
        def get_rng_state(*at: Any) -> Any:
            return torch.tensor(states.setdefault(at, 7))

        @staticmethod
        def set_rng_state(state: Tensor, *at: Any) -> None:
            states[at] = int(state)

    monkeypatch.setattr(torch, "get_device_module", lambda *_: Module)
    before = torch.get_rng_state()
    with forked_rng(torch.device(kind) if kind == "mps" else torch.device(kind, 1)):
        torch.manual_seed(5)
        states[place] = 99
    assert states == {place: 7}
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


def test_generators_go_on_where_they_were_after_an_error():
    model = nn.Linear(2, 2)
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(model, 3, 1):
        torch.rand(4)
        raise ZeroDivisionError
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)

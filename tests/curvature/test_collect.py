"""Collect: one pass for several statistics, which add up, stop, resume and reduce; the model is left alone."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab.curvature import mean_gradient, statistics_for
from prunelab.curvature.statistics.accumulators import ACCUMULATORS
from prunelab.curvature.statistics.collect import Statistics, collect
from prunelab.errors import BatchError, BudgetError

ALL = frozenset(ACCUMULATORS)


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    model[1].running_mean.normal_()
    return model.eval()


def data(samples: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 2, 4, 4, generator=generator).double(), torch.arange(samples) % 3


def split(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    inputs, targets = data(sum(sizes))
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def agree(found: Statistics, wanted: Statistics, rtol: float = 1e-9) -> None:
    assert (found.samples, found.what, found.fisher) == (wanted.samples, wanted.what, wanted.fisher)
    for what, named in wanted.sums.items():
        assert found.sums[what].keys() == named.keys() and named
        for name, value in named.items():
            atol = 1e-11 * float(value.abs().max())
            torch.testing.assert_close(found.sums[what][name], value, rtol=rtol, atol=atol, msg=f"{what} {name}")


@pytest.mark.parametrize("fisher", ["empirical", "mc", "ggn"])
def test_one_pass_is_as_good_as_several(fisher):
    model, batches = net(), split(10, 14)
    together = collect(model, batches, ALL, fisher=fisher)
    for what in ALL:
        alone = collect(model, batches, {what}, fisher=fisher)
        agree(Statistics(24, fisher, {what: together.sums[what]}), Statistics(24, fisher, {what: alone.sums[what]}))
    gradient = mean_gradient(model, batches)
    assert together.gradient.keys() == gradient.keys()
    for name, value in gradient.items():
        torch.testing.assert_close(together.gradient[name], value)


@pytest.mark.parametrize("fisher", ["empirical", "mc", "ggn"])
def test_batch_size_does_not_matter(fisher):
    model = net()
    what = ALL - {"ekfac"}  # an eigenbasis turns with the last digits of its factors
    agree(collect(model, split(1, 16, 7), what, fisher=fisher), collect(model, split(24), what, fisher=fisher))


@pytest.mark.parametrize("fisher", ["empirical", "ggn"])
def test_the_order_of_samples_does_not_matter(fisher):
    model, (inputs, targets) = net(), data()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    what = ALL - {"ekfac"}
    shuffled = collect(model, [(inputs[order], targets[order])], what, fisher=fisher)
    agree(shuffled, collect(model, [(inputs, targets)], what, fisher=fisher))


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_collections_add_up_stop_and_resume(fisher):
    model, batches = net(), split(9, 15)
    what = ALL - {"ekfac"}
    part = collect(model, batches[:1], what, fisher=fisher, seed=4)
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    restored = Statistics.from_state_dict(torch.load(file, weights_only=True))
    rest = collect(model, batches[1:], what, fisher=fisher, seed=4, first=restored.samples)
    whole = collect(model, batches, what, fisher=fisher, seed=4)
    agree(restored + rest, whole)
    for name, factors in (restored + rest).kronecker.items():
        torch.testing.assert_close(factors.A, whole.kronecker[name].A)
        assert factors.rows == whole.kronecker[name].rows
    assert (restored + rest).inputs.keys() == whole.inputs.keys()


def test_ekfac_adds_up_in_one_eigenbasis_only():
    model, batches = net(), split(9, 16)
    whole = collect(model, batches, {"kronecker", "ekfac"})
    first = collect(model, batches, {"kronecker"})
    halves = [collect(model, [batch], {"ekfac"}, basis=first) for batch in batches]
    joined = first | (halves[0] + halves[1])
    agree(joined, whole)
    for name, factors in joined.kronecker.items():
        torch.testing.assert_close(factors.moments, whole.kronecker[name].moments)
        torch.testing.assert_close(factors.eigen().lambda_A, first.kronecker[name].eigen().lambda_A)
    other = collect(model, batches[1:], {"ekfac"}, basis=collect(model, batches[1:], {"kronecker"}))
    with pytest.raises(BatchError, match="different eigenbases"):
        halves[0] + other
    with pytest.raises(BatchError, match=r"25 samples .* and of 9"):
        first | halves[0]
    with pytest.raises(BatchError, match="reads the batches twice"):
        collect(model, iter(batches), {"ekfac"})


def test_what_does_not_belong_together_does_not_add_up():
    model, batches = net(), split(24)
    one = collect(model, batches, {"moments"})
    with pytest.raises(BatchError, match="empirical and mc do not add up"):
        one + collect(model, batches, {"moments"}, fisher="mc")
    with pytest.raises(BatchError, match="do not add up"):
        one + collect(model, batches, {"grad"})
    full = collect(model, batches, {"kronecker"}, factor="full")
    with pytest.raises(BatchError, match=r"`0.weight` do not add up"):
        full + collect(model, batches, {"kronecker"})
    with pytest.raises(BatchError, match="not a state of this version's statistics: 'fisher' is missing"):
        Statistics.from_state_dict({"samples": 3})
    older = copy.deepcopy(full.state_dict())
    del older["meta"]["kronecker"]["0.weight"]["view"]
    with pytest.raises(BatchError, match="'view' is missing. Collect them again"):
        Statistics.from_state_dict(older)


def state_of(model: nn.Module) -> dict:
    return {
        "modes": [module.training for module in model.modules()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "hooks": [len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules()],
        "fast": torch.backends.mha.get_fastpath_enabled(),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model, batches = net(), split(24)
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    before = state_of(model)
    if fails:
        batches.append((batches[0][0][:, :1], batches[0][1]))
        with pytest.raises(BatchError, match="cannot take inputs of shape"):
            collect(model, batches, ALL)
    else:
        frozen = collect(model, batches, ALL)
        assert frozen.moments["0.weight"].any() and frozen.gradient["0.weight"].any()
    after = state_of(model)
    for name in ("modes", "flags", "hooks", "fast"):
        assert after[name] == before[name]
    for old, new in zip(before["grads"], after["grads"], strict=True):
        assert (old is None and new is None) or torch.equal(old, new)
    assert all(torch.equal(before["values"][name], value) for name, value in after["values"].items())


def test_batch_norm_is_measured_in_eval_mode():
    model, batches = net(), split(24)
    wanted = collect(model, batches, {"moments"})
    agree(collect(model.train(), batches, {"moments"}), wanted)
    assert model.training and int(model[1].num_batches_tracked) == 0


def test_no_activation_outlives_its_batch():
    """Hooks that lead to calls that lead to hooks would keep a batch's memory until the next garbage collection."""
    model, kept = net(), []
    handle = model[5].register_forward_hook(lambda module, given, output: kept.append(weakref.ref(output)))
    gc.collect()
    gc.disable()
    try:
        collect(model, split(12, 12), ALL, fisher="ggn")
        assert len(kept) > 2 and not any(reference() is not None for reference in kept)
    finally:
        gc.enable()
        handle.remove()


def test_what_is_not_finite_is_named_with_layer_and_batch():
    model, batches = net(), split(4, 4)
    batches[1][0][2, 0, 1, 1] = float("nan")
    with pytest.raises(BatchError, match=r"The input of the layer of `0.weight` is not finite in batch 1"):
        collect(model, batches, {"moments"})
    with pytest.raises(BatchError, match=r"`0.weight` is not finite in batch 1"):
        collect(model, batches, {"kronecker"})
    with torch.no_grad():
        model[5].weight[0, 0] = float("inf")
    with pytest.raises(BatchError, match=r"The output of the layer of `5.weight` is not finite in batch 0"):
        collect(model, split(4), {"kronecker"})
    root = nn.Sequential(nn.Linear(2, 2, bias=False), Root(), nn.Linear(2, 2))
    with torch.no_grad():
        root[0].weight.zero_()
    for what in ("grad", "moments"):
        with pytest.raises(BatchError, match=r"The gradient at the output of the layer of `0.weight` is not finite"):
            collect(root, [(torch.ones(3, 2), torch.tensor([0, 1, 0]))], {what})
    large = nn.Linear(2, 2)
    with pytest.raises(BatchError, match=r"squares of its gradients are not finite in batch 0"):
        collect(large, [(torch.full((2, 2), 1e30), torch.tensor([0, 1]))], {"moments"}, loss=lambda z, y: z.mean())


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


class Skipping(nn.Module):
    """Calls another layer for large batches, or where the data say so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x) if x[0, 0] > 5 else self.first(x)


def test_bad_input_is_told():
    model, batches, targets = net(), split(4), torch.tensor([0, 1, 2, 0])
    with pytest.raises(BatchError, match="must be the plain mean over the samples"):
        collect(model, batches, {"moments"}, loss=lambda z, y: F.cross_entropy(z, y, reduction="sum"))
    with pytest.raises(BatchError, match="not a single number but a tensor of shape"):
        collect(model, batches, {"moments"}, loss=lambda z, y: F.cross_entropy(z, y, reduction="none"))
    with pytest.raises(BatchError, match="The loss cannot take outputs"):
        collect(model, batches, {"grad"}, loss=lambda z, y: (z @ z).mean())
    with pytest.raises(BatchError, match="empty loader"):
        collect(model, [], {"moments"})
    with pytest.raises(BatchError, match="Batch 1 is empty"):
        collect(model, [*batches, (batches[0][0][:0], targets[:0])], {"moments"})
    with pytest.raises(BatchError, match="needs batches"):
        collect(model, None, {"moments"})
    with pytest.raises(BudgetError, match=r"'hessian'.* is not one of grad, moments"):
        collect(model, batches, {"hessian"})
    with pytest.raises(BudgetError, match=r"fisher='exact' is not one of empirical, mc, ggn"):
        collect(model, batches, {"moments"}, fisher="exact")
    inputs = torch.ones(4, 3)
    with pytest.raises(BatchError, match=r"`second.weight` is called where a probe of 3 samples went elsewhere"):
        collect(Skipping(), [(inputs, targets), (9 * inputs, targets)], {"moments"})


def test_single_samples_and_any_structure_of_inputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, a: Tensor, b: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
            return {"a": self.left(a), "b": scale * self.right(b)}

    torch.manual_seed(0)
    model, a, b = Two().double(), torch.randn(5, 3).double(), torch.randn(5, 2).double()
    targets = torch.arange(5) % 4

    def loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs["a"] + outputs["b"].sin(), targets)

    tuples = collect(model, [((a, b), targets)], {"moments", "grad"}, loss=loss)
    dicts = [({"a": a[n : n + 1], "b": b[n : n + 1]}, targets[n : n + 1]) for n in range(5)]
    agree(collect(model, dicts, {"moments", "grad"}, loss=loss), tuples)
    with pytest.raises(BatchError, match='"ggn" needs a model with one tensor as output, not dict'):
        collect(model, dicts, {"moments"}, loss=loss, fisher="ggn")


def test_criteria_take_batches_or_statistics():
    model, batches = net(), split(24)
    graph = pl.trace(model, batches[0][0])
    found = pl.collect(graph, batches, {"moments", "kronecker"}, fisher="ggn")
    assert statistics_for(graph, found, {"moments"}, fisher="ggn") is found
    assert found.batches is batches and pl.collect(graph, iter(batches), {"grad"}).batches is None
    agree(statistics_for(graph, batches, {"moments", "kronecker"}, fisher="ggn"), found)
    with pytest.raises(
        BatchError, match=r"hold kronecker, moments; needed is grad.*what=\{'grad', 'kronecker', 'moments'\}"
    ):
        statistics_for(graph, found, {"grad"})
    with pytest.raises(BatchError, match='are of fisher="ggn", needed is "empirical": collect'):
        statistics_for(graph, found, {"moments"})
    with pytest.raises(BatchError, match=r"not 'inputs': collect\(…, what=\{'inputs', …\}\)"):
        found.inputs  # noqa: B018
    small = nn.Sequential(*copy.deepcopy(model)[:5], nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with pytest.raises(BatchError, match=r"of another model: `5.weight` has shape \[6, 16\] in them, \[5, 16\]"):
        statistics_for(small, found, {"moments"}, fisher="ggn")


def test_the_graph_decides_which_inputs_matter():
    model, batches = net(), split(24)
    graph = pl.trace(model, batches[0][0])
    assert collect(graph, batches, {"inputs"}).inputs.keys() == {"5.weight", "7.weight"}
    assert collect(model, batches, {"inputs"}).inputs.keys() == {"0.weight", "5.weight", "7.weight"}


def one_of_two(rank: int, folder: str) -> None:
    """Collect from every second batch, reduce, and keep what came out."""
    meeting = {"init_method": f"file://{folder}/meet", "timeout": timedelta(seconds=120)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **meeting)
    model, batches = net(), split(5, 7, 8, 4)[rank::2]
    found = collect(model, batches, ALL - {"ekfac"}).all_reduce()
    second = collect(model, batches, {"ekfac"}, basis=found).all_reduce()
    torch.save((found | second).state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def one_of_two_and_not_the_first(place: int, folder: str) -> None:
    one_of_two(place + 1, folder)


def test_two_processes_find_what_one_does(tmp_path):
    second = mp.spawn(one_of_two_and_not_the_first, (str(tmp_path),), nprocs=1, join=False)
    one_of_two(0, str(tmp_path))
    assert second.join(timeout=120)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    found = [Statistics.from_state_dict(state) for state in states]
    model, batches = net(), split(5, 7, 8, 4)
    wanted = collect(model, batches, ALL - {"ekfac"})
    agree(found[0], found[1], rtol=0)
    agree(found[0], wanted | collect(model, batches, {"ekfac"}, basis=found[0]))


def test_it_works_where_gradients_are_off():
    model, batches = net(), split(24)
    wanted = collect(model, batches, {"moments", "kronecker"})
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            agree(collect(model, batches, {"moments", "kronecker"}), wanted)


def test_inputs_and_attributes_that_require_gradients():
    model, (inputs, targets) = net(), data()
    wanted = collect(model, [(inputs, targets)], {"moments", "kronecker"})
    agree(collect(model, [(inputs.requires_grad_(), targets)], {"moments", "kronecker"}), wanted)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.odd, self.hidden = nn.Linear(3, 2), nn.Linear(3, 2), torch.zeros(3, requires_grad=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(x) + self.odd(x + self.hidden)

    odd = Odd()
    with pytest.raises(BatchError, match="No gradient arrived at the layer of `odd.weight`"):
        collect(odd, [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))], {"kronecker"})


def generated() -> Iterator[tuple[Tensor, Tensor]]:
    yield from split(10, 14)


def test_batches_are_read_once():
    agree(collect(net(), generated(), {"moments", "kronecker"}), collect(net(), split(24), {"moments", "kronecker"}))


def test_layers_behind_a_first_layer_without_factors_have_theirs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    batches = [(torch.randint(0, 11, (40, 5)), torch.randint(0, 4, (40,)))]
    alone, together = (collect(model, batches, what).kronecker for what in ({"kronecker"}, {"kronecker", "moments"}))
    assert alone.keys() == together.keys() == {"2.weight", "4.weight"}
    for name, factors in alone.items():
        torch.testing.assert_close(factors.S, together[name].S)

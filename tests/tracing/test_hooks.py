"""Hooks: a user's hook never sees a tensor without data, unless it is part of the function; then it is traced."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune, spectral_norm, weight_norm

import prunelab as pl
from prunelab.tracing.hooks import may_change
from tests.cases import error

KEPT: list[Any] = []
BY_NAME: dict[str, Any] = {}
COUNTER = 0


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)).double().eval()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 6, dtype=torch.float64)


class Features:
    """Keeps features in every way that people do."""

    def __init__(self) -> None:
        self.by_name: dict[str, Any] = {}
        self.last: Any = None
        self.calls = 0

    def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.by_name["features"] = output.detach().numpy()
        self.last = output
        self.calls = self.calls + 1

    def count(self, module: nn.Module, inputs: Any) -> None:
        self.calls = self.calls + 1

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.last = output.mean().item()


def keep_by_name(module: nn.Module, inputs: Any, output: Tensor) -> None:
    BY_NAME["here"] = output.cpu().numpy()


def count_calls(module: nn.Module, inputs: Any, output: Tensor) -> None:
    global COUNTER
    COUNTER = COUNTER + 1


@torch.no_grad()
def keep_without_gradients(module: nn.Module, inputs: Any, output: Tensor) -> None:
    KEPT.append(output.numpy())


def refuse_nan(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    if bool(output.isnan().any()):
        raise ValueError("not a number")
    return output


def keepers() -> dict[str, Callable[..., Any]]:
    kept: list[Any] = []
    features = Features()

    def seen_twice(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if kept and not bool(torch.equal(kept[-1], output)):
            kept.append(output)
            return
        logging.getLogger(__name__).info("mean %f", output.mean().item())

    return {
        "a list in a variable": lambda module, inputs, output: kept.append(output.detach().numpy()),
        "a list of the file": lambda module, inputs, output: KEPT.append(output),
        "a dictionary of the file": keep_by_name,
        "a number of the file": count_calls,
        "print": lambda module, inputs, output: print("mean", output.mean().item()),
        "a method": features.keep,
        "an object": features,
        "a part": partial(lambda name, module, inputs, output: KEPT.append((name, output.tolist())), "here"),
        "a wrapped function": keep_without_gradients,
        "several returns": seen_twice,
        "what it was given": refuse_nan,
    }


@pytest.mark.parametrize("name", keepers())
def test_a_hook_that_changes_nothing_does_not_run(model, x, name):
    without = pl.trace(model, x)
    hook = keepers()[name]
    assert not may_change(hook)
    called: list[Any] = []
    model[1].register_forward_hook(hook)
    KEPT.clear(), BY_NAME.clear()
    before = COUNTER
    graph = pl.trace(model, x)
    plan = pl.plan(pl.criteria.get("magnitude")(graph), ratio=0.5)
    pl.apply(model, plan), pl.apply(model, plan, backend="graph"), pl.masked(model, plan), pl.count(model, x)
    assert [(g.name, g.members) for g in graph.groups] == [(g.name, g.members) for g in without.groups]
    assert not KEPT and not BY_NAME and before == COUNTER and not called


def changers() -> dict[str, Callable[..., Any]]:
    def adds_in_place(module: nn.Module, inputs: Any, output: Any) -> None:
        output.add_(1)

    def adds_by_a_statement(module: nn.Module, inputs: Any, output: Any) -> None:
        output += 1

    def fills(module: nn.Module, inputs: Any, output: Any) -> None:
        output[:, 0] = 0

    def sets_a_weight(module: nn.Module, inputs: Any) -> None:
        module.weight = module.raw * 2

    def returns_another(module: nn.Module, inputs: Any, output: Any) -> Any:
        first, output = inputs[0], output * 2
        print(first)
        return output

    def returns_its_input(module: nn.Module, inputs: Any, output: Any) -> Any:
        return inputs

    def returns_a_default(module: nn.Module, inputs: Any, output: Any, kept: Any = KEPT) -> Any:
        return kept

    def returns_one_or_nothing(module: nn.Module, inputs: Any, output: Any) -> Any:
        return module.extra or None

    named = [adds_in_place, adds_by_a_statement, fills, sets_a_weight, returns_another, returns_its_input]
    named += [returns_a_default, returns_one_or_nothing]
    return {hook.__name__: hook for hook in named} | {
        "a product": lambda module, inputs, output: output * 2,
        "a sum, called add": lambda module, inputs, output: output.add(1),
        "a list, then a product": lambda module, inputs, output: KEPT.append(output) or output * 2,
        "one or nothing": lambda module, inputs, output: None if module.training else output * 2,
        "an attribute": lambda module, inputs: setattr(module, "weight", 1),
        "a function of one's own": lambda module, inputs, output: keep_by_name(module, inputs, output),
    }


@pytest.mark.parametrize("name", changers())
def test_a_hook_that_may_change_something_is_told_from_one_that_does_not(name):
    assert may_change(changers()[name])


def test_features_that_were_kept_stay_what_they_were(model, x):
    features = Features()
    model[1].register_forward_hook(features.keep)
    model[0].register_forward_pre_hook(features.count)
    model(x)
    kept, last, calls = dict(features.by_name), features.last, features.calls
    pl.trace(model, x)
    assert features.by_name == kept and features.last is last and features.calls == calls == 2


def test_a_cut_copy_keeps_its_hooks(model, x):
    kept: list[Tensor] = []
    model[1].register_forward_hook(lambda module, inputs, output: kept.append(output))
    small = pl.apply(model, pl.plan(pl.criteria.get("magnitude")(pl.trace(model, x)), ratio=0.5))
    assert kept == []
    small(x)
    assert [tuple(value.shape) for value in kept] == [(3, small[0].out_features)]


def skip_by_dictionary(model: nn.Module) -> dict[str, Any]:
    saved: dict[str, Any] = {}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        saved["skip"] = output

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output + saved["skip"]

    model[1].register_forward_hook(keep), model[3].register_forward_hook(add)
    return saved


def skip_by_variable(model: nn.Module) -> dict[str, Any]:
    skip: Any = None

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal skip
        skip = output

    model[1].register_forward_hook(keep)
    model[3].register_forward_hook(lambda module, inputs, output: output + skip)
    return {}


def skip_in_place(model: nn.Module) -> dict[str, Any]:
    saved: dict[str, Any] = {}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        saved["skip"] = output

    def add(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.add_(saved["skip"])

    model[1].register_forward_hook(keep), model[3].register_forward_hook(add)
    return saved


@pytest.mark.parametrize("skip", [skip_by_dictionary, skip_by_variable, skip_in_place])
def test_a_skip_connection_through_hooks_couples_what_it_adds(model, x, skip):
    saved = skip(model)
    (group,) = pl.trace(model, x).groups
    assert {member.name for member in group.members} >= {"0.weight", "2.weight", "4.weight"}
    assert not saved
    plan = pl.plan(pl.criteria.get("magnitude")(pl.trace(model, x)), ratio=0.5)
    assert not saved
    assert error(pl.apply(model, plan, backend="graph")(x), pl.masked(model, plan)(x)) < 1e-12  # float64


def test_a_hook_that_changes_an_output_is_traced_on_copies_of_what_it_keeps(model, x):
    kept: list[Any] = []

    def half(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        kept.append(output)
        return output[:, ::2]

    model[4] = nn.Linear(8, 5).double()
    model[3].register_forward_hook(half)
    graph = pl.trace(model, x)
    assert kept == []
    assert graph.group_of("0.weight") is not None


def test_a_hook_that_cannot_run_without_data_is_named(model, x):
    def clip(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output / max(output.abs().max().item(), 1.0)

    model[1].register_forward_hook(clip)
    with pytest.warns(UserWarning, match=r"Hook `.*clip` on `1` cannot run on tensors without data.*is not traced"):
        graph = pl.trace(model, x)
    assert len(graph.groups) == 2


def test_what_cannot_be_copied_is_left_to_the_user(model, x):
    waiting: queue.Queue = queue.Queue()

    def put(module: nn.Module, inputs: Any, output: Tensor) -> None:
        waiting.put(output)

    model[1].register_forward_hook(put)
    pl.trace(model, x)
    assert waiting.empty()


def test_hooks_of_backward_passes_and_state_dicts_do_not_run(model, x):
    called: list[str] = []
    model[1].register_full_backward_hook(lambda *_: called.append("backward"))
    model[1].register_full_backward_pre_hook(lambda *_: called.append("before backward"))
    model.register_state_dict_pre_hook(lambda *_: called.append("state"))
    model.register_load_state_dict_post_hook(lambda *_: called.append("loaded"))
    pl.trace(model, x)
    assert called == []


def test_hooks_for_all_modules_do_not_run_and_are_there_afterwards(model, x):
    kept: list[Any] = []
    handle = register_module_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        pl.trace(model, x), pl.count(model, x)
        assert kept == []
        model(x)
        assert len(kept) == 6  # five layers and the whole
    finally:
        handle.remove()


def test_a_hook_for_all_modules_that_changes_something_is_named(model, x):
    handle = register_module_forward_hook(lambda module, inputs, output: output * 2)
    try:
        with pytest.warns(UserWarning, match=r"`.*lambda.*` on all modules was not run on tensors without data"):
            pl.trace(model, x)
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weights_that_pytorch_computes_in_hooks_are_traced(x):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 5)
    )
    weight_norm(model[0]), spectral_norm(model[2]), prune.l1_unstructured(model[4], "weight", 0.3)
    model = model.double().eval()
    model(x)
    graph = pl.trace(model, x)
    used = {"0.weight_g", "0.weight_v", "2.weight_orig", "4.weight_orig", "4.weight_mask"}
    assert used <= graph.visited.keys()
    computed = {"0": model[0].weight, "2": model[2].weight, "4": model[4].weight}
    assert all(value is model[int(name)].weight for name, value in computed.items())


def test_a_weight_that_a_users_hook_computes_is_traced(model, x):
    def standardize(module: nn.Module, inputs: Any) -> None:
        module.weight = module.raw - 0.1 * module.raw

    layer = model[0]
    layer.raw = nn.Parameter(layer.weight.detach().clone())
    del layer._parameters["weight"]
    layer.weight = layer.raw.detach()
    layer.register_forward_pre_hook(standardize)
    before = layer.weight
    assert pl.trace(model, x).group_of("0.raw").size == 16
    assert layer.weight is before


def test_a_hook_that_is_a_module_of_the_users_own_is_part_of_the_function(model, x):
    class Scale(nn.Module):
        def forward(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return F.relu(output)

    model[1].register_forward_hook(Scale())
    assert len(pl.trace(model, x).groups) == 2

"""Switches: settings of the whole process are put back, whatever the order in which threads leave."""

from __future__ import annotations

import gc
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunelab as pl
from prunelab.runtime import switches
from prunelab.tracing import shortcut
from tests.cases import Case, images
from tests.runtime.test_isolation import in_threads

VALUES: dict[str, Callable[[], Any]] = {
    "layer_by_layer": torch.backends.mha.get_fastpath_enabled,
    "plain_attention": torch.backends.cuda.flash_sdp_enabled,
    "uncollected": gc.isenabled,
    "silent_fakes": lambda: not switches.logging.getLogger("torch._subclasses.fake_tensor").disabled,
}


@pytest.mark.parametrize("name", VALUES)
def test_the_last_thread_to_leave_puts_a_switch_back(name):
    switch, value = getattr(switches, name), VALUES[name]
    inside, first_left = threading.Event(), threading.Event()
    assert value() is True

    def short() -> None:
        with switch:
            inside.wait(60)
        first_left.set()

    def long() -> None:
        with switch:
            inside.set()
            first_left.wait(60)
            seen.append(value())

    seen: list[bool] = []
    threads = [threading.Thread(target=run) for run in (short, long)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == [False] and value() is True


@pytest.mark.parametrize("before", [True, False])
def test_a_switch_leaves_what_the_user_set(before):
    usual = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(before)
    try:
        with pytest.raises(ZeroDivisionError), switches.layer_by_layer, switches.layer_by_layer:
            raise ZeroDivisionError
        assert torch.backends.mha.get_fastpath_enabled() is before
    finally:
        torch.backends.mha.set_fastpath_enabled(usual)


def test_threads_that_trace_at_once_leave_the_process_as_it_was(monkeypatch):
    monkeypatch.setattr(shortcut, "LIMIT", 40)  # so that what is remembered is cleared again and again
    monkeypatch.setattr(shortcut, "_REMEMBERED", {})
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model, x = nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(8, 3)), torch.randn(2, 4, 5)
    wanted = pl.trace(model, x)
    filters = list(warnings.filters)

    def work(_: int) -> None:
        for _ in range(3):
            found = pl.trace(model, x)
            assert [(g.name, g.members) for g in found.groups] == [(g.name, g.members) for g in wanted.groups]
            assert pl.count(model, x) == pl.count(layer_of(model), x)

    in_threads(4, work)
    assert len(shortcut._REMEMBERED) <= 40
    assert all(value() is True for value in VALUES.values()) and warnings.filters == filters


def layer_of(model: nn.Module) -> nn.Module:
    return nn.Sequential(*model)


def test_threads_find_the_products_that_one_alone_does():
    models = [nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)) for _ in range(3)]
    batch = [(torch.randn(8, 5), torch.arange(8) % 3)]
    wanted = [pl.criteria.get("oba")(pl.trace(model, batch[0][0]), batch) for model in models]

    def work(place: int) -> None:
        for _ in range(5):
            found = pl.criteria.get("oba")(pl.trace(models[place], batch[0][0]), batch)
            torch.testing.assert_close(found["0"], wanted[place]["0"], rtol=0, atol=0)

    in_threads(3, work)


def test_only_one_module_sets_what_the_process_has_once():
    setters = (
        r"set_fastpath_enabled|gc\.disable|\.disabled = |sdpa_kernel\(|catch_warnings|dual_level\(|inference_mode\("
    )
    for path in Path(pl.__file__).parent.rglob("*.py"):
        if path.name != "switches.py":
            found = [line for line in path.read_text().splitlines() if re.search(setters, line) and "`" not in line]
            assert not found, path


class Token(nn.Module):
    """Makes tensors of its own, without a word on where."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.made = torch.arange(3).device
        return self.last(self.first(x).relu())


def line(model: nn.Module, batches: list) -> dict[str, Any]:
    """Go the whole way, and return plain data."""
    graph = pl.trace(model, batches[0][0])
    scores = {name: pl.criteria.get(name)(graph, batches) for name in ("random", "obd", "oba", "gate", "obs", "oracle")}
    plan = pl.plan(scores["obd"], flops=0.5)
    found: dict[str, Any] = {name: [value.tolist() for value in by.by_name.values()] for name, by in scores.items()}
    cut = {"cut": pl.apply(model, plan, compensate=batches), "graph": pl.apply(model, plan, backend="graph")}
    cut |= {"masked": pl.masked(model, plan), "sparse": pl.sparsify(model, {"first.weight": model.first.weight}, 0.5)}
    cut["small"] = pl.prune(model, batches[0][0], "taylor", batches, flops=0.5, seed=0, progress=False)[0]
    found |= {name: [value.tolist() for value in made.state_dict().values()] for name, made in cut.items()}
    return found | {"plan": plan.to_json(), "cost": pl.count(model, batches[0][0])}


@pytest.fixture
def token() -> tuple[Token, list]:
    torch.manual_seed(0)
    return Token().eval(), [(torch.randn(20, 6), torch.arange(20) % 4)]


def test_a_default_device_is_the_users_and_changes_nothing(token):
    wanted = line(*token)
    with torch.device("meta"):
        assert line(*token) == wanted
        token[0](token[1][0][0])
        assert token[0].made.type == "meta" and torch.empty(1).is_meta


def test_the_users_model_and_loss_keep_the_default_device(token):
    model, batches = token
    places: list[str] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        places.append(torch.zeros(1).device.type)
        return torch.nn.functional.cross_entropy(outputs, targets)

    with torch.device("meta"):
        pl.criteria.get("taylor", loss=loss)(pl.trace(model, batches[0][0]), batches)
        pl.criteria.get("obs", loss=loss)(pl.trace(model, batches[0][0]), batches)
    assert set(places) == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_default_type_changes_nothing(token, dtype):
    wanted = line(*token)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert line(*token) == wanted
    finally:
        torch.set_default_dtype(usual)


def test_deterministic_algorithms_change_nothing(token):
    wanted = line(*token)
    torch.use_deterministic_algorithms(True)
    try:
        assert line(*token) == wanted and torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_convolutional_network_is_traced_with_a_default_device():
    case = Case("resnet8", lambda: pl.zoo.ResNet(8, num_classes=3, width=4), images(16))
    model, x = case.make()
    wanted = pl.trace(model, x)
    with torch.device("meta"):
        found = pl.trace(model, x)
        members = [(group.name, group.members) for group in found.groups]
    assert members == [(group.name, group.members) for group in wanted.groups]
    for group in found.groups:
        assert group.members[0].positions(0).device.type == "cpu"

"""What cannot be traced says so in one sentence: whose fault it is, where, and what to do."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import prunelab as pl
from prunelab.errors import DataError, PlanError, TraceError
from prunelab.runtime.isolation import copied
from prunelab.runtime.outputs import result_tensors, tensors_of
from prunelab.surgery.rebuilt.tape import record
from prunelab.tracing import recorder as recorder_module
from prunelab.tracing import rules
from tests.cases import error, random_plan


class Inner(nn.Module):
    def __init__(self, code) -> None:
        super().__init__()
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        return self.code(x)


def early_exit(x: Tensor) -> Tensor:
    return x if x.max() > 3 else x * 2  # the line to be named


def by_mask(x: Tensor) -> Tensor:
    return x[x[:, 0] > 0]


def experts(x: Tensor) -> Tensor:
    return x[torch.where(x.argmax(1) == 0)[0]]


def to_numpy(x: Tensor) -> Tensor:
    return x * float(x.detach().numpy().mean())


def missing_key(x: Tensor) -> Tensor:
    return {"one": x}["two"]


def wrong_sizes(x: Tensor) -> Tensor:
    return x @ torch.ones(7, 7)


@pytest.mark.parametrize(
    ("code", "operator", "advice"),
    [
        (early_exit, "item", "behind a flag"),
        (by_mask, "index", "torch.where or multiply"),
        (experts, "nonzero", "torch.where or multiply"),
        (to_numpy, "", "behind a flag"),
        (missing_key, "KeyError", "Check that the model runs on the example inputs"),
        (wrong_sizes, "mm", "Check that the model runs on the example inputs"),
    ],
)
def test_an_error_names_module_operator_and_line_once_and_says_what_to_do(code, operator, advice):
    model = nn.Sequential(nn.Linear(4, 8), Inner(code), nn.Linear(8, 2))
    with pytest.raises(TraceError) as caught:
        pl.trace(model, torch.ones(3, 4))
    text = str(caught.value)
    line = code.__code__.co_firstlineno + 1
    assert f"test_blame.py, line {line}: `return " in text and "`1`" in text and advice in text
    assert text.count(operator) == 1 or not operator or operator in ("item", "mm")
    assert "aten" not in text and text.count("cannot be traced") == 1 and text.endswith(".")


def test_a_graph_of_such_code_is_refused_in_the_same_words():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    plan = random_plan(model, torch.ones(3, 4))
    model[1] = Inner(early_exit)
    with pytest.raises(PlanError, match=r"test_blame\.py, line \d+: `return x if x\.max\(\) > 3"):
        record(model, plan.inputs)


def test_a_rule_that_fails_is_our_fault_and_freezes_what_it_touches(monkeypatch):
    def fails(call):
        raise KeyError("pad")

    monkeypatch.setitem(rules._BY_NAME, "relu", fails)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    with pytest.warns(UserWarning, match=r"prunelab's rule for `relu` in `1` failed \(KeyError: 'pad'\).*report it"):
        graph = pl.trace(model, torch.ones(3, 4))
    assert [group.name for group in graph.groups] == ["2"]
    assert "prunelab's rule for `relu` in `1` failed" in graph.frozen["0.weight", 0]


def test_a_rule_of_the_wrong_number_of_dimensions_is_our_fault(monkeypatch):
    monkeypatch.setitem(rules._BY_NAME, "relu", lambda call: [call.dims(call.tensors[0])[:1]])
    with pytest.warns(UserWarning, match="it gives \\[1\\] dimensions"):
        assert not pl.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(3, 4)).groups


def test_an_error_inside_of_the_tracer_asks_for_a_report(monkeypatch):
    monkeypatch.setattr(recorder_module, "asks", None)
    with pytest.raises(TraceError, match=r"prunelab itself failed .*TypeError: .*. Please report it"):
        pl.trace(nn.Linear(4, 8), torch.ones(3, 4))


# ── modules that no trace can follow ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_scripted_modules_are_to_be_cut_before_they_are_scripted():
    layer = nn.Linear(6, 6)
    for model, name in (
        (torch.jit.script(layer), "RecursiveScriptModule"),
        (torch.jit.trace(layer, torch.ones(2, 6)), "TopLevelTracedModule"),
        (nn.Sequential(layer, torch.jit.script(layer)), "Module `1`"),
    ):
        with pytest.raises(TraceError, match=f"{name} is scripted.*before it is scripted, then script the cut one"):
            pl.trace(model, torch.ones(2, 6))


def test_masks_of_torch_prune_are_cut_with_their_weights():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 6)
    prune.l1_unstructured(model[0], "weight", 0.3)
    prune.random_unstructured(model[0], "weight", 0.3)
    plan = pl.plan(pl.criteria.Random()(pl.trace(model, x)), ratio=0.5)
    cut = pl.apply(model, plan)
    assert cut[0].weight_mask.shape == cut[0].weight_orig.shape == (4, 6)
    torch.testing.assert_close(cut(x), pl.masked(model, plan)(x))


# ── results that a model keeps ────────────────────────────────────────────────────────────────────────────────────


class Keeps(nn.Module):
    """Keeps results of its last call: in an attribute, a dict, an object and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 32), nn.Linear(32, 5)
        self.register_buffer("state", torch.zeros(3, 32), persistent=False)
        self.kept: dict = {}

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.a(x).relu()
        self.kept["twice"] = [self.last * 2]
        self.box = SimpleNamespace(inside=self.last * 3)
        self.state = self.last * 4
        return self.b(self.last)


@pytest.mark.parametrize("backend", ["module", "graph"])
def test_a_model_that_keeps_its_last_results_is_cut(backend):
    torch.manual_seed(0)
    model, x = Keeps().eval(), torch.randn(3, 6)
    model(x)
    kept = model.last
    assert not kept.is_leaf and not model.state.is_leaf
    plan = random_plan(model, x)
    with torch.no_grad():  # the same products in another order
        assert error(pl.apply(model, plan, backend=backend)(x), pl.masked(model, plan)(x)) < 1e-5
    assert model.last is kept and kept.requires_grad


def test_a_copy_has_the_results_that_the_model_kept_without_their_history():
    model = Keeps()
    model(torch.randn(3, 6))
    other = copied(model)
    assert torch.equal(other.last, model.last) and other.last is not model.last and other.last.is_leaf
    assert torch.equal(other.box.inside, model.box.inside) and torch.equal(other.kept["twice"][0], 2 * model.last)
    assert other.state.is_leaf and torch.equal(other.state, model.state)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_norms_of_weights_that_are_hooks_are_traced():
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 2))
    pl.trace(model, torch.ones(2, 6))
    pl.trace(nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(6, 8)), nn.Linear(8, 2)), torch.ones(2, 6))


# ── what a model returns ──────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass
class Out:
    logits: Tensor
    features: list[Tensor]


class Pair(NamedTuple):
    logits: Tensor
    name: str


class Object:
    def __init__(self, logits: Tensor) -> None:
        self.logits, self.itself = logits, self


class Slots:
    __slots__ = ("logits", "__hidden")

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.__hidden = logits, [logits * 2]


class DynamicCache(Object):
    """As Hugging Face's: keys and values for the next call."""


class Returns(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.a, self.c, self.b, self.kind = nn.Linear(6, 32), nn.Linear(32, 16), nn.Linear(16, 5), kind

    def forward(self, x: Tensor):
        features = self.a(x).relu()
        return self.kind(self.b(self.c(features).relu()), features)


KINDS = {
    "dataclass": (lambda y, f: Out(y, [f]), 1),
    "named tuple": (lambda y, f: Pair(y, "name"), 2),
    "object": (lambda y, f: Object(y), 2),
    "slots": (lambda y, f: Slots(y), 2),
    "namespace": (lambda y, f: SimpleNamespace(deep={"logits": [y]}), 2),
    "tuple with an object": (lambda y, f: (y, Object(f)), 1),
    "tuple with a cache": (lambda y, f: (y, DynamicCache(f)), 2),
}


@pytest.mark.parametrize("name", KINDS)
def test_tensors_are_found_in_whatever_a_model_returns(name):
    kind, number = KINDS[name]
    graph = pl.trace(Returns(kind), torch.ones(2, 6))
    assert len(graph.groups) == number
    assert graph.frozen["b.bias", 0] == "the model's output"


@pytest.mark.parametrize("name", ["dataclass", "object"])
def test_a_graph_does_not_return_objects(name):
    model = Returns(KINDS[name][0]).eval()
    plan = random_plan(model, torch.ones(2, 6))
    assert isinstance(pl.apply(model, plan), Returns)
    with pytest.raises(PlanError, match=r"returns a \w+, which cannot be rebuilt.*tuple, list or dict"):
        pl.apply(model, plan, backend="graph")


def test_what_a_model_returns_without_tensors_is_an_error():
    with pytest.raises(TraceError, match="returned no tensor but str"):
        pl.trace(Returns(lambda y, f: "nothing"), torch.ones(2, 6))


def test_a_tensor_is_found_once_however_often_it_is_there():
    one, two = torch.ones(1), torch.ones(2)
    assert [t.shape[0] for t in tensors_of([one, {"a": one, "b": (two, None, 3)}, Object(two)])] == [1, 2]
    assert not result_tensors(DynamicCache(one)) and not tensors_of([nn.Linear(1, 1), Tensor, "text"])


# ── weights without data, and weights that did not run ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [name for name in pl.criteria.names() if name != "random"])
def test_weights_without_data_have_no_score(name):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).to("meta")
    graph = pl.trace(model, torch.ones(2, 6))
    with pytest.raises(DataError, match=r"`0\.weight` has no data"):
        pl.criteria.get(name)(graph, [(torch.randn(4, 6), torch.randint(5, (4,)))])


class TwoEntries(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.out, self.proj = nn.Linear(6, 24), nn.Linear(24, 5), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x).relu())


def test_what_did_not_run_and_may_no_longer_fit_is_named():
    model = TwoEntries(24).eval()
    plan = random_plan(model, torch.ones(2, 6))
    with pytest.warns(UserWarning, match=r"`proj` did not run in the trace.* 24 "):
        pl.apply(model, plan, backend="module")


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.out, self.norm, self.more = nn.Linear(6, 24), nn.Linear(24, 5), nn.LayerNorm(24), nn.Linear(3, 24)
        self.scale = nn.Parameter(torch.ones(24))

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        y = self.a(x)
        return self.out(y if extra is None else self.norm(y) * self.scale + self.more(extra))


def test_what_an_optional_input_would_run_is_named():
    model = Optional().eval()
    plan = random_plan(model, torch.ones(2, 6))
    with pytest.warns(UserWarning, match="`norm` did not run in the trace"):
        pl.apply(model, plan, backend="module")
    both = (torch.ones(2, 6), torch.ones(2, 3))
    pl.apply(model, random_plan(model, both), backend="module")


def test_what_did_not_run_and_is_of_another_width_is_not_worth_a_word():
    model = TwoEntries(23).eval()
    pl.apply(model, random_plan(model, torch.ones(2, 6)), backend="module")


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 32), nn.Linear(32, 5)
        self.places = torch.randn(1, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) + self.places).relu())


def test_a_plain_tensor_freezes_what_it_meets_and_says_how_to_free_it():
    model = Table()
    graph = pl.trace(model, torch.ones(2, 6))
    assert not graph.groups
    assert graph.frozen["a.weight", 0].startswith("`places` is a plain tensor") and "register_buffer" in str(
        graph.frozen
    )
    places = model.places
    del model.places
    model.register_buffer("places", places)
    assert [group.size for group in pl.trace(model, torch.ones(2, 6)).groups] == [32]

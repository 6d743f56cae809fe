"""Losses that are means over something else than samples: ignored labels, class weights, smoothing, models' own."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab.curvature import exact
from prunelab.curvature.gradient import mean_gradient
from prunelab.curvature.second.hvp import ggn_product, hessian_product
from prunelab.curvature.statistics.collect import collect

WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)
LOSSES: dict[str, Any] = {
    "ignored": F.cross_entropy,
    "ignored, another label": nn.CrossEntropyLoss(ignore_index=2),
    "class weights": nn.CrossEntropyLoss(weight=WEIGHTS),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2),
    "all of them": nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1, ignore_index=1),
    "a function around it": lambda z, y: F.cross_entropy(z, y),
}
TIGHT = {"rtol": 1e-8, "atol": 1e-13}  # float64


class Dense(nn.Module):
    """Logits ``[B, 4]`` or ``[B, 4, 3]``, smooth in its weights."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.first, self.head, self.places = nn.Linear(5, 6), nn.Linear(6, 4 * max(places, 1)), places

    def forward(self, x: Tensor) -> Tensor:
        z = self.head(torch.tanh(self.first(x)))
        return z.view(len(x), 4, self.places) if self.places else z


def make(name: str, places: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model, batches = Dense(places).double(), []
    for size in (5, 3):
        targets = torch.randint(0, 4, (size, places) if places else (size,))
        if (name.startswith("ignored") and "another" not in name) or name == "a function around it":
            targets[0] = -100
            targets.view(-1)[-1] = -100
        batches.append((torch.randn(size, 5, dtype=torch.float64), targets))
    return model, batches


def shares(loss: Any, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, float]]:
    """Return single samples with what each counts: the number, or the weights, of its labels that are not ignored."""
    ignored = getattr(loss, "ignore_index", -100)
    weight = getattr(loss, "weight", None)
    out = []
    for inputs, targets in batches:
        for x, y in zip(inputs, targets, strict=True):
            used = y[y != ignored] if y.dim() else y[None][y[None] != ignored]
            share = float(used.numel() if weight is None else weight[used].sum())
            out.append((x[None], y[None], share))
    total = sum(share for *_, share in out)
    return [(x, y, share / total) for x, y, share in out if share]


def vector(model: nn.Module, value: Tensor, **options: Any) -> Tensor:
    found = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True, **options)
    return torch.cat([one.flatten() for one in found])


@pytest.fixture(params=[(name, places) for name in LOSSES for places in (0, 3)], ids=str)
def case(request) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], Any]:
    name, places = request.param
    return *make(name, places), LOSSES[name]


def joined(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in named.values()])


def test_the_gradient_is_the_weighted_mean_of_those_of_samples(case):
    model, batches, loss = case
    wanted = sum(share * vector(model, loss(model(x), y)) for x, y, share in shares(loss, batches))
    torch.testing.assert_close(joined(mean_gradient(model, batches, loss)), wanted, **TIGHT)
    found = collect(model, batches, {"grad", "moments"}, loss=loss)
    torch.testing.assert_close(
        joined({name: found.gradient[name] for name, _ in model.named_parameters()}), wanted, **TIGHT
    )


def test_moments_are_the_weighted_mean_of_squared_gradients_of_samples(case):
    model, batches, loss = case
    wanted = sum(share * vector(model, loss(model(x), y)) ** 2 for x, y, share in shares(loss, batches))
    torch.testing.assert_close(joined(collect(model, batches, {"moments"}, loss=loss).moments), wanted, **TIGHT)


def dense_ggn(model: nn.Module, x: Tensor, y: Tensor, loss: Any) -> Tensor:
    """Return ``JᵀΛJ`` of one sample, entry by entry from its definition."""
    z = model(x)
    leaf = z.detach().requires_grad_()
    bend = torch.autograd.functional.hessian(lambda z: loss(z.view_as(leaf), y), leaf.flatten())
    rows = torch.stack([vector(model, value, retain_graph=True) for value in z.flatten()])
    return rows.T @ bend @ rows


def test_the_gauss_newton_matrix_is_the_weighted_mean_of_those_of_samples(case):
    model, batches, loss = case
    wanted = sum(share * dense_ggn(model, x, y, loss) for x, y, share in shares(loss, batches))
    torch.testing.assert_close(exact.ggn(model, batches, loss), wanted, **TIGHT)
    moments = collect(model, batches, {"moments"}, loss=loss, fisher="ggn").moments
    torch.testing.assert_close(joined(moments), wanted.diagonal(), rtol=1e-5, atol=1e-9)
    direction = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    product = ggn_product(model, batches, direction, loss)
    torch.testing.assert_close(joined(product), wanted @ joined(direction), rtol=1e-5, atol=1e-9)


def test_hessian_products_do_not_depend_on_the_batches(case):
    model, batches, loss = case
    direction = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    singles = [(x[n : n + 1], y[n : n + 1]) for x, y in batches for n in range(len(x))]
    one_by_one = hessian_product(model, singles, direction, loss)
    torch.testing.assert_close(joined(hessian_product(model, batches, direction, loss)), joined(one_by_one), **TIGHT)


@pytest.mark.parametrize("name", ["obd", "gate", "quadratic", "oba", "oracle", "kron_obd", "taylor"])
@pytest.mark.filterwarnings("ignore:.*samples are too few")
def test_scores_do_not_depend_on_how_samples_are_batched(name, case):
    model, batches, loss = case
    graph = pl.trace(model, batches[0][0])
    criterion = pl.criteria.get(name, loss=loss)
    whole = criterion(graph, batches)[graph.groups[0]]
    singles = [(x[n : n + 1], y[n : n + 1]) for x, y in batches for n in range(len(x))]
    torch.testing.assert_close(criterion(graph, singles)[graph.groups[0]], whole, rtol=1e-4, atol=1e-6)


def test_sampled_labels_leave_ignored_ones_alone():
    model, batches = make("ignored", 3)
    draws = [collect(model, batches, {"moments"}, fisher="mc", seed=seed).moments for seed in range(400)]
    mean = torch.stack([joined(draw) for draw in draws]).mean(0)
    wanted = torch.zeros_like(mean)
    for x, y, share in shares(F.cross_entropy, batches):
        z, used = model(x), (y[0] != -100).nonzero().flatten()
        for place in used.tolist():  # positions are independent draws, whose slopes have mean zero
            p = z[0, :, place].softmax(0).detach()
            for label in range(4):
                g = vector(model, -z[0, :, place].log_softmax(0)[label], retain_graph=True) / len(used)
                wanted += share * p[label] * g**2
    torch.testing.assert_close(mean, wanted, rtol=0.25, atol=0.02 * float(wanted.max()))  # 400 draws


def test_sampled_labels_of_a_smoothed_loss_estimate_its_curvature():
    model, batches = make("smoothed", 0)
    loss = LOSSES["smoothed"]
    draws = [collect(model, batches, {"moments"}, fisher="mc", seed=seed, loss=loss).moments for seed in range(400)]
    mean = torch.stack([joined(draw) for draw in draws]).mean(0)
    wanted = exact.ggn(model, batches, loss).diagonal()
    torch.testing.assert_close(mean, wanted, rtol=0.25, atol=0.02 * float(wanted.max()))  # 400 draws


def test_sampled_labels_have_no_class_weights():
    model, batches = make("class weights", 0)
    with pytest.raises(pl.BatchError, match='fisher="mc".*class weights.*"ggn"'):
        collect(model, batches, {"moments"}, fisher="mc", loss=LOSSES["class weights"])
    with pytest.raises(pl.BatchError, match='curvature="mc".*class weights'):
        pl.criteria.Gate(curvature="mc", loss=LOSSES["class weights"])(pl.trace(model, batches[0][0]), batches)


UNKNOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "another ignored label": lambda z, y: F.cross_entropy(z, y, ignore_index=2),
    "class weights": lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS),
    "a sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "contrastive": lambda z, y: F.cross_entropy(z @ z.T, torch.arange(len(z))),
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("late", [False, True], ids=["in the first batch", "later"])
def test_what_an_unknown_loss_weighs_is_refused_on_whichever_batch(name, late):
    """In the first batch all samples are alike to it, if it weighs by labels."""
    torch.manual_seed(0)
    model = Dense(0).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    even, odd = torch.ones(6, dtype=torch.int64), torch.tensor([0, 1, 2, 2, 1, 3])
    labels = [even, odd] if late else [odd]
    batches, graph = [(x, y) for y in labels], pl.trace(model, x)
    for criterion in ("obd", "gate", "quadratic", "oba", "kron_obs"):
        with pytest.raises(pl.BatchError, match="must be the plain mean over the samples"):
            pl.criteria.get(criterion, loss=UNKNOWN[name])(graph, batches)


@pytest.mark.parametrize("name", ["taylor", "oracle", "obd", "gate", "oba"])
def test_a_shifted_loss_of_the_user_s_own_weighs_the_labels_that_it_looks_at(name):
    def loss(z: Output, y: Tensor) -> Tensor:
        return F.cross_entropy(z.logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())

    batches = [(batch["input_ids"], batch["labels"]) for batch in sentences()]
    model = words()
    graph = pl.trace(model, batches[0][0])
    singles = [(x[n : n + 1], y[n : n + 1]) for x, y in batches for n in range(len(x))]
    found, wanted = (pl.criteria.get(name, loss=loss)(graph, given)["up"] for given in (batches, singles))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    with pytest.raises(pl.BatchError, match="the next word: shift both with pl.Task"):
        pl.criteria.get("obd", loss=loss, fisher="mc")(graph, batches)


def ctc(z: Tensor, y: Tensor) -> Tensor:
    lengths = torch.full((len(z),), 7), torch.full((len(z),), 3)
    return F.ctc_loss(z.log_softmax(-1).transpose(0, 1), y, *lengths)


def test_a_loss_without_second_derivatives_serves_what_needs_none():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(3, 7, 5)
    graph, batches = pl.trace(model, x), [(x, torch.randint(1, 4, (3, 3)))]
    for name, options in (("taylor", {}), ("obd", {}), ("gate", {"curvature": "empirical"})):
        assert pl.criteria.get(name, loss=ctc, **options)(graph, batches)["0"].isfinite().all()
    second = [("gate", {"curvature": "hessian"}), ("quadratic", {}), ("oba", {}), ("obd", {"fisher": "hessian"})]
    for name, options in second:
        with pytest.raises(pl.BatchError, match="needs a derivative that an operator of Sequential or of its loss"):
            pl.criteria.get(name, loss=ctc, **options)(graph, batches)


def test_a_task_says_what_an_unknown_loss_weighs():
    model, batches = make("class weights", 0)
    known = collect(model, batches, {"moments"}, loss=LOSSES["class weights"]).moments
    task = pl.Task(batches, loss=UNKNOWN["class weights"], weights=lambda y: WEIGHTS[y])
    torch.testing.assert_close(joined(collect(model, task, {"moments"}).moments), joined(known), rtol=1e-6, atol=1e-12)
    wrong = pl.Task(batches, loss=UNKNOWN["class weights"], weights=lambda y: torch.ones(len(y)))
    with pytest.raises(pl.BatchError, match="plain mean"):
        collect(model, wrong, {"moments"})
    with pytest.raises(pl.BatchError, match="`weights` of the task must give 5 numbers"):
        collect(model, pl.Task(batches, weights=lambda y: y.sum()), {"moments"})


def test_batches_whose_labels_are_all_ignored_count_nothing():
    model, batches = make("ignored", 3)
    nothing = (batches[0][0], torch.full_like(batches[0][1], -100))
    for measure in (mean_gradient, lambda m, b: collect(m, b, {"moments"}).moments):
        torch.testing.assert_close(joined(measure(model, [batches[0], nothing])), joined(measure(model, batches[:1])))
    with pytest.raises(pl.BatchError, match="No label counts"):
        mean_gradient(model, [nothing])


# ── models that return their own loss, replicas of Hugging Face's ───────────────────────────────────────────────────


@dataclass
class Output:
    loss: Tensor | None = None
    logits: Tensor | None = None


torch.export.register_dataclass(Output)


class Words(nn.Module):
    """A causal language model: the label of a position is the next word."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(7, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.head, self.scale = nn.Linear(6, 7, bias=False), scale

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Output:
        x = self.embedding(input_ids).cumsum(1)
        logits = self.head(x + self.down(torch.tanh(self.up(x))))
        if labels is None:
            return Output(None, logits)
        value = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Output(self.scale * value, logits)


def sentences(kind: type = dict) -> list[Any]:
    torch.manual_seed(1)
    batches = []
    for size, padding in ((4, 2), (3, 0)):
        words = torch.randint(0, 7, (size, 5))
        mask = torch.ones(size, 5, dtype=torch.int64)
        mask[0, 5 - padding :] = 0
        labels = words.masked_fill(mask == 0, -100)
        batches.append(kind({"input_ids": words, "attention_mask": mask, "labels": labels}))
    return batches


def words() -> nn.Module:
    torch.manual_seed(0)
    return Words().double()


def pairs() -> pl.Task:
    """The same as pairs, with the loss written by hand."""
    return pl.Task(
        sentences(),
        inputs=lambda batch: batch["input_ids"],
        targets=lambda batch: batch["labels"][:, 1:],
        outputs=lambda found: found.logits[:, :-1].transpose(1, 2),
        loss=F.cross_entropy,
        weights=lambda y: (y != -100).sum(1),
    )


CRITERIA = [
    "taylor",
    "magnitude",
    "oracle",
    "obd",
    "gate",
    "oba",
    "quadratic",
    "kron_obd",
    "kron_obs",
    "c_obd",
    "c_obs",
]
CRITERIA += ["eigendamage", "obs"]


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.filterwarnings("ignore:.*samples are too few")
def test_mappings_with_labels_are_the_same_as_pairs(name, kind):
    model = words()
    graph = pl.trace(model, {"input_ids": sentences()[0]["input_ids"]})
    found = pl.criteria.get(name)(graph, sentences(kind))
    wanted = pl.criteria.get(name)(graph, pairs())
    for group in graph.groups:
        assert found[group].isfinite().all()
        torch.testing.assert_close(found[group], wanted[group], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("options", [{"curvature": "mc"}, {"curvature": "empirical"}, {"curvature": "hessian"}])
def test_gates_of_a_model_with_a_loss_of_its_own(options):
    model = words()
    graph = pl.trace(model, {"input_ids": sentences()[0]["input_ids"]})
    found, wanted = (pl.criteria.Gate(**options)(graph, batches) for batches in (sentences(), pairs()))
    torch.testing.assert_close(found["up"], wanted["up"], rtol=1e-4, atol=1e-7)


def test_moments_of_sentences_are_those_of_single_sentences():
    model = words()
    moments, total, count = {n: torch.zeros_like(p) for n, p in model.named_parameters()}, 0, 0
    for batch in sentences():
        for n in range(len(batch["labels"])):
            one = {name: value[n : n + 1] for name, value in batch.items()}
            count = int((one["labels"][:, 1:] != -100).sum())
            gradients = torch.autograd.grad(model(**one).loss, list(model.parameters()), materialize_grads=True)
            for name, gradient in zip(moments, gradients, strict=True):
                moments[name] += count * gradient**2
            total += count
    found = collect(model, sentences(), {"moments"}).moments
    for name, value in moments.items():
        torch.testing.assert_close(found[name], value / total, rtol=1e-5, atol=1e-10)


def test_an_unknown_loss_of_the_model_s_own_is_used_where_its_value_is_enough():
    torch.manual_seed(0)
    model = Words(scale=0.5).double()  # half of what its logits and labels say
    graph, batches = pl.trace(model, {"input_ids": sentences()[0]["input_ids"]}), sentences()[1:]
    scores = pl.criteria.get("taylor", normalizer="none")(graph, batches)
    plain = pl.criteria.get("taylor", normalizer="none")(
        pl.trace(words(), {"input_ids": batches[0]["input_ids"]}), batches
    )
    torch.testing.assert_close(scores["up"], plain["up"] / 2, rtol=1e-5, atol=1e-9)
    moments = [collect(m, batches, {"moments"}).moments["up.weight"] for m in (model, words())]
    torch.testing.assert_close(moments[0], moments[1] / 4, rtol=1e-5, atol=1e-12)
    for criterion in ("gate", "obd"):
        option = {"gate": "curvature", "obd": "fisher"}[criterion]
        with pytest.raises(pl.BatchError, match=r"pl.Task\(batches, loss="):
            pl.criteria.get(criterion, **{option: "ggn"})(graph, batches)


def test_an_unknown_loss_of_the_model_s_own_that_is_no_mean_is_refused():
    torch.manual_seed(0)
    model = Words(scale=0.5).double()
    with pytest.raises(pl.BatchError, match="the mean over its parts"):
        collect(model, sentences()[:1], {"moments"})


class Answers(nn.Module):
    """A model that returns nothing but its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Dense(0).double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.inner(x), y)


def test_a_model_may_return_its_loss_alone():
    torch.manual_seed(0)
    model, x, y = Answers(), torch.randn(4, 5, dtype=torch.float64), torch.arange(4)
    graph, plain = pl.trace(model, (x, y)), pl.trace(model.inner, x)
    for name, options in {"taylor": {}, "oracle": {}, "obd": {"fisher": "hessian"}, "oba": {}}.items():
        criterion = pl.criteria.get(name, **options)
        found, wanted = criterion(graph, [{"x": x, "y": y}]), criterion(plain, [(x, y)])
        torch.testing.assert_close(found[graph.groups[0]], wanted[plain.groups[0]], rtol=1e-4, atol=1e-7)
    with pytest.raises(pl.PruneLabError):
        pl.criteria.get("obd")(graph, [{"x": x, "y": y}])

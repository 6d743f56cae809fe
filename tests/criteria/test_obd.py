"""OBD: ½ w² h, with every h against the dense matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab import zoo
from prunelab.curvature import exact
from prunelab.curvature.statistics.collect import collect

DENSE = {
    "empirical": lambda model, batches: exact.fisher(model, batches, kind="empirical"),
    "mc": lambda model, batches: exact.fisher(model, batches, kind="mc", seed=3),
    "ggn": exact.ggn,
    "hessian": exact.hessian,
}


@pytest.fixture
def cnn() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()),
        *(nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)),
    )
    return model.double().eval()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 2, 3, 3, generator=generator).double(), torch.arange(n) % 3) for n in (5, 2)]


def diagonal(cnn: nn.Module, batches: list, fisher: str) -> dict[str, Tensor]:
    sizes = {name: value.numel() for name, value in cnn.named_parameters()}
    parts = DENSE[fisher](cnn, batches).diagonal().split(list(sizes.values()))
    return {name: part.view_as(cnn.get_parameter(name)) for name, part in zip(sizes, parts, strict=True)}


@pytest.mark.parametrize("fisher", DENSE)
def test_a_weight_is_scored_by_half_its_square_times_the_diagonal(cnn, batches, fisher):
    found = pl.criteria.OBD(fisher=fisher, seed=3).elementwise(cnn, batches)
    for name, h in diagonal(cnn, batches, fisher).items():
        torch.testing.assert_close(found[name], cnn.get_parameter(name).detach() ** 2 * h / 2)


@pytest.mark.parametrize("fisher", DENSE)
def test_a_unit_is_scored_by_the_sum_over_all_its_weights(cnn, batches, fisher):
    w, h = dict(cnn.named_parameters()), diagonal(cnn, batches, fisher)
    saliency = {name: (w[name] ** 2 * h[name] / 2).detach() for name in w}
    first = saliency["0.weight"].sum((1, 2, 3)) + saliency["0.bias"] + saliency["1.weight"] + saliency["1.bias"]
    second = saliency["3.weight"].sum((1, 2, 3)) + saliency["3.bias"] + saliency["6.weight"].view(3, 3, 4).sum((0, 2))
    scores = pl.criteria.OBD(fisher=fisher, seed=3)(pl.trace(cnn, batches[0][0]), batches)
    torch.testing.assert_close(scores["0"], (first + saliency["3.weight"].sum((0, 2, 3))).float())
    torch.testing.assert_close(scores["3"], second.float())


def test_for_a_quadratic_loss_with_a_diagonal_hessian_the_score_is_the_change_of_the_loss():
    """Least squares on inputs that are orthogonal: at the minimum OBD leaves nothing out."""
    model = nn.Linear(4, 1, bias=False).double()
    inputs = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])).double()
    batch = [(inputs, model(inputs).detach())]
    found = pl.criteria.OBD(fisher="hessian", loss=F.mse_loss).elementwise(model, batch)["weight"]
    for place in range(4):
        cut = model.weight.detach().clone()
        cut[0, place] = 0
        torch.testing.assert_close(found[0, place], F.mse_loss(inputs @ cut.T, batch[0][1]))


def test_probes_estimate_the_diagonal_and_more_of_them_do_it_better(cnn, batches):
    truth = torch.cat([h.flatten() for h in diagonal(cnn, batches, "hessian").values()])

    def gap(probes: int) -> float:
        found = pl.criteria.OBD(fisher="hessian", exact_below=0, probes=probes).diagonal(cnn, batches)
        return float((torch.cat([h.flatten() for h in found.values()]) - truth).norm() / truth.norm())

    assert gap(400) < 0.4 and gap(400) < gap(4) / 5  # the error falls with the root of the number


def test_probes_are_exact_where_the_hessian_is_diagonal():
    """z ⊙ Hz = diag(H) for random signs: whatever they are."""
    model = nn.Linear(3, 1, bias=False).double()
    batch = [(torch.diag(torch.tensor([1.0, 2.0, 3.0])).double(), torch.zeros(3, 1).double())]
    one, exact_ = (pl.criteria.OBD(fisher="hessian", exact_below=n, probes=1, loss=F.mse_loss) for n in (0, 9))
    torch.testing.assert_close(one.diagonal(model, batch), exact_.diagonal(model, batch))


def test_probes_are_seeded_and_do_not_depend_on_the_batches(cnn, batches):
    def found(given: list, seed: int = 0) -> Tensor:
        criterion = pl.criteria.OBD(fisher="hessian", exact_below=0, probes=3, seed=seed)
        return criterion.diagonal(cnn, given)["0.weight"]

    torch.testing.assert_close(found(batches), found(batches[::-1]))
    assert not torch.allclose(found(batches), found(batches, seed=1))


def test_statistics_serve_in_place_of_batches(cnn, batches):
    graph = pl.trace(cnn, batches[0][0])
    statistics = collect(graph, batches, {"moments"}, fisher="ggn")
    found, wanted = (pl.criteria.OBD(fisher="ggn")(graph, given) for given in (statistics, batches))
    torch.testing.assert_close(found["0"], wanted["0"])
    with pytest.raises(pl.BatchError, match='fisher="ggn", needed is "empirical"'):
        pl.criteria.OBD()(graph, statistics)
    hessian = pl.criteria.OBD(fisher="hessian")
    torch.testing.assert_close(hessian(graph, statistics)["0"], hessian(graph, batches)["0"])
    with pytest.raises(pl.BatchError, match="batches are gone"):
        hessian(graph, collect(graph, iter(batches), {"moments"}))


@pytest.mark.parametrize("fisher", ["empirical", "hessian"])
def test_it_runs_on_a_transformer(fisher):
    torch.manual_seed(0)
    model = zoo.VisionTransformer(image_size=16, width=16, depth=1, heads=2, mlp_width=12)
    batch = [(torch.randn(4, 3, 16, 16), torch.arange(4))]
    scores = pl.criteria.get("obd", fisher=fisher, probes=2)(pl.trace(model, batch[0][0]), batch)
    assert len(scores) > 4 and all(bool(scores[group].isfinite().all()) for group in scores)


def test_options_are_checked():
    for options, message in (
        ({"fisher": "kfac"}, "fisher='kfac'"),
        ({"probes": 0}, "probes=0"),
        ({"normalizer": "no"}, "normalizer='no'"),
    ):
        with pytest.raises(pl.BudgetError, match=message):
            pl.criteria.OBD(**options)
    with pytest.raises(pl.BatchError, match="needs batches"):
        pl.criteria.OBD(fisher="hessian").elementwise(nn.Linear(2, 2), None)

"""The one-page example: its groups, scores and cuts are the library's, and what it does not know it leaves whole."""

from __future__ import annotations

import ast
import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunelab as pl
from prunelab.networks import ResNet
from prunelab.plans import Cut
from tests.cases import error, perturb

PAGE = Path(__file__).resolve().parents[2] / "examples" / "mini.py"
SPEC = importlib.util.spec_from_file_location("mini", PAGE)
mini = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mini)


class Between(nn.Module):
    """Two convolutions with an operator between them, then a third of which every tracer knows all."""

    def __init__(self, operator: Callable[[Tensor], Tensor], middle: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second = middle or nn.Conv2d(6, 6, 3, padding=1)
        self.third, self.last = nn.Conv2d(6, 8, 3), nn.Linear(8, 4)
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.operator(self.norm(self.first(x))))
        return self.last(F.relu(self.third(x)).mean((2, 3)))


def plain() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Sigmoid()),  # which makes 1/2 of a silenced channel
        *(nn.Conv2d(6, 5, 3, stride=2), nn.BatchNorm2d(5, affine=False), nn.SiLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.ReLU()),
        nn.Linear(6, 4),
    )


NETWORKS = {"mini": lambda: mini.network(4), "plain": plain, "resnet20": lambda: ResNet(20, width=4)}


@pytest.fixture(params=NETWORKS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return perturb(NETWORKS[request.param]()).double().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(1)).double()


def by_members(graph: pl.DependencyGraph) -> dict[frozenset, pl.Group]:
    return {frozenset((member.name, member.dim) for member in group.members): group for group in graph.groups}


def random_masks(model: nn.Module, groups: list) -> list[Tensor]:
    """Return a mask for every group that keeps some units and not all."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sizes = [tensors[name].shape[dim] for (name, dim), *_ in groups]
    generator = torch.Generator().manual_seed(2)
    return [torch.randperm(size, generator=generator) >= size // 3 for size in sizes]


def as_plan(graph: pl.DependencyGraph, groups: list, masks: list[Tensor]) -> pl.Plan:
    found, cuts = by_members(graph), []
    for members, mask in zip(groups, masks, strict=True):
        removed = tuple((~mask).nonzero().flatten().tolist())
        cuts.append(Cut(found[frozenset(members)].name, len(mask), removed, tuple(members)))
    return pl.Plan(tuple(cuts), graph.inputs)


def test_the_groups_are_the_librarys(model, images):
    groups = mini.trace(model, images)
    assert groups
    assert len({place for group in groups for place in group}) == sum(map(len, groups)), "a place is in two groups"
    assert {frozenset(group) for group in groups} == by_members(pl.trace(model, images)).keys()


def test_the_scores_are_those_of_obd_with_the_empirical_fisher(model, images):
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    graph, groups = pl.trace(model, images), mini.trace(model, images)
    wanted = pl.criteria.get("obd", fisher="empirical")(graph, [(images[:4], labels[:4]), (images[4:], labels[4:])])
    for group, found in zip(groups, mini.score(model, groups, images, labels), strict=True):
        assert found.dtype == torch.double
        # the library's scores are sums of at most some dozen numbers in single precision
        torch.testing.assert_close(
            found, wanted[by_members(graph)[frozenset(group)]].double(), rtol=1e-6, atol=0, check_dtype=False
        )


def test_a_cut_network_computes_what_the_silenced_one_does(model, images):
    groups = mini.trace(model, images)
    masks, graph = random_masks(model, groups), pl.trace(model, images)
    with torch.no_grad():
        found = mini.cut(model, groups, masks)(images)
        assert error(found, pl.masked(model, as_plan(graph, groups, masks))(images)) < 1e-12
        assert error(found, mini.cut(model, groups, masks, silence=True)(images)) < 1e-12
        assert error(found, model(images)) > 1e-3


def test_a_cut_network_has_the_librarys_shapes_and_sizes(model, images):
    groups = mini.trace(model, images)
    masks = random_masks(model, groups)
    before = copy.deepcopy(model.state_dict())
    small = mini.cut(model, groups, masks)
    wanted = pl.apply(model, as_plan(pl.trace(model, images), groups, masks))
    assert str(small) == str(wanted) != str(model), "in_channels, out_channels, num_features, …"
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], value, rtol=0, atol=0)
    for name, value in before.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)


UNKNOWN = {
    "sort": lambda x: x.sort(1).values,
    "flip": lambda x: x.flip(1),
    "cumsum": lambda x: x.cumsum(1),
    "softmax": lambda x: x.softmax(1),
    "slice and cat": lambda x: torch.cat([x[:, 3:], x[:, :3]], 1),
    "shuffle": lambda x: x.view(len(x), 2, 3, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "mean over channels": lambda x: x - x.mean(1, keepdim=True),
    "variance over channels": lambda x: x / x.std((1, 2, 3), keepdim=True),
    "space becomes channels": lambda x: x.transpose(1, 2)[:, :6],
    "behind a constant": lambda x: torch.cat([torch.zeros(x.shape, dtype=x.dtype), x], 1)[:, 6:],
    "a number": lambda x: x * float(x.abs().amax()),
    "a decision": lambda x: x if torch.equal(x, x.abs()) else -x,
    "a constant": lambda x: x * torch.arange(1, 7, dtype=x.dtype).view(1, 6, 1, 1).expand(x.shape),
    "written into": lambda x: torch.zeros_like(x).copy_(x),
}
LAYERS = {
    "groups": nn.Conv2d(6, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "transposed": nn.ConvTranspose2d(6, 6, 3, padding=1),
}


@pytest.mark.parametrize("network", [*UNKNOWN, *LAYERS])
def test_what_meets_an_unknown_operator_stays(network, images):
    model = Between(UNKNOWN.get(network, nn.Identity()), LAYERS.get(network)).double().eval()
    groups = mini.trace(model, images)
    held = {name.partition(".")[0] for group in groups for name, _ in group}
    assert "first" not in held and "norm" not in held
    assert [("third.weight", 0), ("third.bias", 0), ("last.weight", 1)] in groups, "elsewhere nothing changes"
    assert len(groups) == (1 if network in LAYERS else 2)


KNOWN = {
    "relu": F.relu_,
    "square": lambda x: x * x + 1,
    "a sum with itself": lambda x: x.add_(x.exp()),
    "a constant for all": lambda x: x - 3 * torch.ones(()).item(),
}


@pytest.mark.parametrize("operator", KNOWN)
def test_what_meets_a_known_operator_goes(operator, images):
    model = Between(KNOWN[operator]).double().eval()
    groups = mini.trace(model, images)
    masks = random_masks(model, groups)
    assert len(groups) == 3
    with torch.no_grad():
        wanted = pl.masked(model, as_plan(pl.trace(model, images), groups, masks))(images)
        assert error(mini.cut(model, groups, masks)(images), wanted) < 1e-12


class Repeated(nn.Module):
    """A linear layer whose bias is one number for all outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(1))
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.addmm(self.bias, x.mean((2, 3)), self.weight.t()))


class Sideways(nn.Module):
    """A mean that leaves the width of the image, of which there is as much as of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 10, 3), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x).mean((1, 2)))


FLAT = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 3))  # a unit is a row and a hundred columns


@pytest.mark.parametrize("model", [Repeated(), Sideways(), FLAT], ids=lambda model: type(model).__name__)
def test_what_one_axis_cannot_describe_stays(model, images):
    assert mini.trace(model.double(), images) == []


class Aside(nn.Module):
    """A network, and layers that it does not use in eval mode."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.aside = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3))
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.aside(x) if self.training else x)


def test_a_layer_that_is_not_used_stays(images):
    network = mini.network(4).double().eval()
    groups = [[(f"network.{name}", dim) for name, dim in group] for group in mini.trace(network, images)]
    assert mini.trace(Aside(network).double().eval(), images) == groups


def test_tracing_leaves_the_model_alone(images):
    model = mini.network(4).double()
    before = copy.deepcopy(model.state_dict())
    mini.trace(model, images)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(hasattr(value, "axes") for value in (*model.parameters(), *model.buffers(), images))


def test_the_cheapest_units_go_but_never_a_whole_group():
    scores = [torch.tensor([0.5, 0.1, 0.4]), torch.tensor([0.0, 0.2]), torch.tensor([7.0, 0.3, 8.0, 9.0, 6.0])]
    kept = {share: [mask.nonzero().flatten().tolist() for mask in mini.plan(scores, share)] for share in (0, 0.3, 0.6)}
    assert kept[0] == [[0, 1, 2], [0, 1], [0, 1, 2, 3, 4]]
    assert kept[0.3] == [[0, 2], [1], [0, 1, 2, 3, 4]]  # 0.0, 0.1, and 0.2, which is the last of its group
    assert kept[0.6] == [[0], [1], [0, 2, 3, 4]]
    assert [int(mask.sum()) for mask in mini.plan([torch.zeros(4), torch.zeros(3)], 0.9)] == [1, 1], "equal scores"


def test_it_is_one_page_of_plain_torch():
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    tree = ast.parse(text)
    imported = {name for node in ast.walk(tree) for name in module_names(node)}
    assert imported <= {"copy", "json", "pathlib", "torch", "PIL"}
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {"trace", "score", "plan", "cut"} <= lengths.keys()
    assert max(lengths.values()) <= 30


def module_names(node: ast.AST) -> set[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module] if isinstance(node, ast.ImportFrom) else []
    return {name.partition(".")[0] for name in names}


def test_it_runs(capsys, monkeypatch):
    monkeypatch.setattr(mini, "network", partial(mini.network, 4))
    mini.main(epochs=1)
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["removed", "by", "parameters", "accuracy"]
    sizes = [int(size) for _, name, size, _ in rows if name == "OBD"]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]
    assert rows[0][2:] == rows[1][2:], "nothing was removed yet"

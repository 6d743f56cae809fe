"""``round_to``: what is left of a layer has a width that is a multiple, whatever factors that width has."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import prunelab as pl


class Attention(nn.Module):
    """Grouped-query attention as language models have it: every two of the queries' heads share one of the keys'."""

    def __init__(self, width: int = 24, heads: int = 6, size: int = 8) -> None:
        super().__init__()
        self.size = size
        self.first = nn.Linear(5, width)
        self.q, self.k, self.v = (nn.Linear(width, n * size) for n in (heads, heads // 2, heads // 2))
        self.out, self.last = nn.Linear(heads * size, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        q = self.q(x).view(*x.shape[:2], -1, 2, self.size).permute(0, 2, 3, 1, 4)
        k, v = (layer(x).view(*x.shape[:2], -1, 1, self.size).permute(0, 2, 3, 1, 4) for layer in (self.k, self.v))
        mixed = (q @ k.mT).softmax(-1) @ v
        return self.last(x + self.out(mixed.permute(0, 3, 1, 2, 4).flatten(2)))


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=4), nn.ReLU(), nn.Conv2d(32, 5, 1))


def grouped_up() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.ConvTranspose2d(24, 48, 2, groups=3), nn.ReLU(), nn.Conv2d(48, 5, 1)
    )


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 5, 1)
    )


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32), nn.ReLU(), nn.Conv2d(32, 48, 3, groups=2), nn.Conv2d(48, 5, 1)
    )


def upscaling() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 128, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(32, 5, 3))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(5, 32), layer, nn.Linear(32, 3))


IMAGE, TOKENS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4, 5)
CASES = {
    make.__name__: (make, IMAGE if image else TOKENS)
    for make, image in (
        (grouped, 1), (grouped_up, 1), (depthwise, 1), (norms, 1), (upscaling, 1), (encoder, 0), (Attention, 0)
    )
}  # fmt: skip


def widths(model: nn.Module) -> dict[str, int]:
    """Return what goes into and comes out of every layer, as its own attributes say."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd):
            found |= {f"{name} in": module.in_channels, f"{name} out": module.out_channels}
        elif isinstance(module, nn.Linear):
            found |= {f"{name} in": module.in_features, f"{name} out": module.out_features}
        elif getattr(module, "in_proj_weight", None) is not None:
            found[f"{name} heads"] = module.in_proj_weight.shape[0] // 3
    return found


@pytest.mark.parametrize("round_to", [2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("case", CASES)
def test_every_width_that_changes_becomes_a_multiple(case, round_to):
    torch.manual_seed(0)
    make, inputs = CASES[case]
    model = make().eval()
    scores, before = pl.criteria.Random(seed=1)(pl.trace(model, inputs)), widths(model)
    cuts = 0
    for options in ({"flops": 0.75}, {"flops": 0.5}, {"params": 0.6, "scope": "layer"}, {"ratio": 0.4}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of blocks that are too large to come within 1 % of the budget
            try:
                plan = pl.plan(scores, round_to=round_to, **options)
                small = pl.apply(model, plan)
            except pl.BudgetError as error:
                # Six is more than heads and groups can be multiples of; what cannot be met is said by name.
                assert "cannot be met" in str(error) and f"round_to={round_to} keeps `" in str(error)
                continue
        cuts += len(plan.cuts)
        kind, share = next(iter(options.items()))
        assert kind == "ratio" or plan.budget["kept"][kind] <= share
        for name, width in widths(small).items():
            assert width == before[name] or width % round_to == 0, (name, before[name], width)
        difference = (small(inputs) - pl.masked(model, plan)(inputs)).abs().max()
        assert difference < 1e-5  # float32, layers of at most 64 inputs
    assert cuts


def test_a_grouped_convolution_is_cut_although_its_groups_are_few():
    torch.manual_seed(0)
    model = grouped()
    scores = pl.criteria.Magnitude()(pl.trace(model, IMAGE))
    assert sorted(group.size for group in scores.graph.groups) == [4, 8, 8]
    small = pl.apply(model, pl.plan(scores, flops=0.5, round_to=8))
    assert small[0].out_channels == small[2].out_channels == 16


def test_plain_layers_are_rounded_as_before():
    torch.manual_seed(0)
    scores = pl.criteria.Random()(
        pl.trace(nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 2)), torch.ones(1, 3))
    )
    found = {share: pl.plan(scores, ratio=share, round_to=8).table()["left"].tolist() for share in (0.1, 0.3, 0.6)}
    assert found == {0.1: [16], 0.3: [8], 0.6: [8]}


def test_what_is_overridden_counts_as_it_is():
    torch.manual_seed(0)
    scores = pl.criteria.Random()(pl.trace(grouped(), IMAGE))
    heads = next(group.name for group in scores.graph.groups if group.size == 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = pl.plan(scores, flops=0.3, round_to=8, overrides={heads: 0.5})
    left = {cut.group: cut.size - len(cut.removed) for cut in plan.cuts}
    assert left.pop(heads) == 2 and left and all(2 * number % 8 == 0 for number in left.values())


@pytest.mark.filterwarnings("default")
def test_a_miss_names_the_groups_that_rounding_keeps_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 2))
    scores = pl.criteria.Random()(pl.trace(model, torch.ones(1, 3)))
    with pytest.warns(UserWarning, match=r"below the budget; .* round_to=16 keeps `0` whole"):
        pl.plan(scores, flops=0.6, round_to=16)
    with pytest.raises(pl.BudgetError, match=r"cannot be met.* round_to=100 keeps `0`, `2` whole"):
        pl.plan(scores, flops=0.6, round_to=100)

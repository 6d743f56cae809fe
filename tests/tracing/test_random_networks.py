"""Networks put together at random: whatever they are built of, permutation and silencing hold exactly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prunelab as pl
from tests.cases import error, permuted, perturb, random_plan


class Residual(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(c, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Dense(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.grow, self.mix = nn.Conv2d(c, 4, 3, padding=1), nn.Conv2d(c + 4, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([x, self.grow(x).relu()], 1))


class Split(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c // 2, c // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return torch.cat([self.conv(left).tanh(), right], 1)


class Gated(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.both, self.out = nn.Conv2d(c, 12, 1), nn.Conv2d(6, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.glu(self.both(x), dim=1))


class Grouped(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(c, 2 * c, 3, padding=1, groups=2), nn.GroupNorm(4, 2 * c)
        self.out = nn.Conv2d(2 * c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x)).relu())


class Depthwise(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1, groups=c)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.conv(x))


class Excite(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(c, 5), nn.Linear(5, c)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]


class Larger(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, 4 * c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pixel_shuffle(self.conv(x), 2), 2)


class Transposed(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(c, c, 2, stride=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.conv(x), 2)


class Attention(nn.Module):
    """Grouped queries: two heads of queries for one of keys and values; layer norm, position embedding."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm, self.position = nn.LayerNorm(c), nn.Parameter(torch.randn(16, c))
        self.query, self.keys, self.out = nn.Linear(c, 24), nn.Linear(c, 24), nn.Linear(24, c)
        self.heads, self.shared = 4, 2

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x.flatten(2).transpose(1, 2) + self.position)
        query = self.query(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.keys(tokens).unflatten(-1, (2, self.shared, -1)).permute(2, 0, 3, 1, 4)
        key, value = (part.repeat_interleave(self.heads // self.shared, dim=1) for part in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, scale=0.4)
        return x + self.out(out.transpose(1, 2).flatten(2)).transpose(1, 2).view_as(x)


BLOCKS = [Residual, Dense, Split, Gated, Grouped, Depthwise, Excite, Larger, Transposed, Attention]


class Network(nn.Module):
    def __init__(self, blocks: list[type[nn.Module]], width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 1), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(block(width) for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean((2, 3)))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5), st.sampled_from([8, 12]), st.integers(0, 99))
def test_any_network_is_permuted_and_cut_exactly(blocks, width, seed):
    torch.manual_seed(seed)
    model, x = perturb(Network(blocks, width)).double().eval(), torch.randn(2, 3, 4, 4).double()
    graph = pl.trace(model, x)
    moved = model
    for group in graph.groups:
        moved = permuted(moved, group, torch.randperm(group.size))
    plan = random_plan(model, x, 0.4, seed)
    with torch.no_grad():
        wanted = model(x)
        assert error(moved(x), wanted) < 1e-9
        assert error(pl.apply(model, plan)(x), pl.masked(model, plan)(x)) < 1e-9

"""Costs, against numbers worked out by hand and against time itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunelab as pl


def test_counts_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 16, 5))
    cost = pl.count(model, torch.ones(2, 3, 4, 4))
    assert cost.flops == 2 * 2 * (8 * 3 * 9 * 16 + 8 * 16 * 5)
    assert cost.params == 8 * 3 * 9 + 8 * 16 * 5 + 5 and cost.bytes == 4 * cost.params
    assert cost.to_dict()["params"] == cost.params


def test_attention_is_counted():
    from prunelab.zoo import Attention

    tokens, width = 7, 12
    cost = pl.count(Attention(width, heads=3), torch.ones(1, tokens, width))
    assert cost.flops == 2 * tokens * width * 4 * width + 2 * 2 * tokens * tokens * width


def test_the_published_size_of_resnet20():
    """He et al. 2016, table 6: 0.27 M parameters; option B adds the two projections."""
    cost = pl.count(pl.zoo.resnet20(), torch.ones(1, 3, 32, 32))
    assert cost.params == 272_474 and round(cost.flops / 2e6) == 41


def test_counting_needs_no_memory_and_says_what_does_not_fit():
    with torch.device("meta"):
        model = pl.zoo.vgg19()
    assert pl.count(model, torch.empty(1, 3, 32, 32, device="meta")).params > 2e7
    with pytest.raises(pl.BatchError, match="VGG cannot run"):
        pl.count(model, torch.empty(1, 4, 32, 32))


def test_latency_grows_with_work():
    small, large = nn.Linear(8, 8), nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
    quick = pl.latency(small, torch.ones(64, 8), seconds=0.05)
    slow = pl.latency(large, torch.ones(64, 512), seconds=0.05)
    assert 0 < quick.median < slow.median and quick.spread >= 0
    with pytest.raises(pl.BatchError, match="shape 3, 5|shape \\[3, 5\\]"):
        pl.latency(small, torch.ones(3, 5))


def test_attention_on_pytorchs_fast_path_is_counted_too():
    layer, tokens = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(1, 5, 8)
    projections, attention = 4 * 5 * 8 * 8 + 2 * 5 * 8 * 16, 2 * 2 * 5 * 5 * 4
    assert pl.count(layer, tokens).flops == 2 * (projections + attention)

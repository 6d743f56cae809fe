"""Stand-ins compute what the layers they replace do, and go on doing it when heads or widths are cut."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

import prunelab as pl
from prunelab.surgery.layers import free, stand_in_for
from tests.cases import error, perturb, random_plan


def freed(layer: nn.Module) -> nn.Module:
    stand_in = free(copy.deepcopy(layer), {name for name, _ in layer.named_parameters()})
    found = stand_in_for(type(layer))
    assert found is not None and type(stand_in) is found[0] and isinstance(stand_in, type(layer))
    return stand_in


CALLS = {
    "self": lambda x, y: ((x, x, x), {}),
    "without weights": lambda x, y: ((x, x, x), {"need_weights": False}),
    "weights per head": lambda x, y: ((x, y, y), {"average_attn_weights": False}),
    "forbidden tokens": lambda x, y: ((x, y, y), {"attn_mask": torch.ones(5, 7).tril(2) == 0}),
    "added mask": lambda x, y: ((x, y, y), {"attn_mask": torch.randn(2 * 3, 5, 7).double()}),
    "padding": lambda x, y: ((x, y, y), {"key_padding_mask": torch.arange(14).view(2, 7) % 7 > 4}),
    "causal": lambda x, y: ((x, x, x), {"attn_mask": torch.ones(5, 5).triu(1) == 1, "need_weights": False}),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", [{}, {"kdim": 12, "vdim": 12, "bias": False}], ids=["packed", "apart"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_stands_in_exactly(call, options, batch_first):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, 3, batch_first=batch_first, **options).double()
    perturb(layer)
    x, y = torch.randn(2, 5, 12).double(), torch.randn(2, 7, 12).double()
    if not batch_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    args, kwargs = CALLS[call](x, y)
    (wanted, weights), (found, others) = layer(*args, **kwargs), freed(layer)(*args, **kwargs)
    assert error(found, wanted) < 1e-12
    assert (weights is None and others is None) or error(others, weights) < 1e-12


def test_one_sequence_without_a_batch():
    layer, x = nn.MultiheadAttention(12, 3).double(), torch.randn(5, 12).double()
    assert error(freed(layer)(x, x, x)[0], layer(x, x, x)[0]) < 1e-12


WINDOWS = {
    "whole": ShiftedWindowAttention(12, [4, 4], [0, 0], 3),
    "shifted": ShiftedWindowAttention(12, [4, 4], [2, 2], 3),
    "one way": ShiftedWindowAttention(12, [4, 3], [2, 0], 3),
    "second version": ShiftedWindowAttentionV2(12, [4, 4], [2, 1], 3),
}


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("size", [(8, 12), (7, 9), (4, 4)], ids=str)
def test_window_attention_stands_in_exactly(kind, size):
    torch.manual_seed(0)
    layer, x = perturb(WINDOWS[kind]).double().eval(), torch.randn(2, *size, 12).double()
    with torch.no_grad():
        assert error(freed(layer)(x), layer(x)) < 1e-12


def test_relative_attention_stands_in_exactly():
    torch.manual_seed(0)
    layer, x = RelativePositionalMultiHeadAttention(12, 4, 9).double(), torch.randn(2, 3, 9, 12).double()
    assert error(freed(layer)(x), layer(x)) < 1e-12


class Around(nn.Module):
    """A residual stream around an attention layer, so that every width of it can be cut."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.into, self.norm, self.attention, self.out = nn.Linear(3, 12), nn.LayerNorm(12), attention, nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.into(x))
        out = self.attention(x, x, x) if isinstance(self.attention, nn.MultiheadAttention) else self.attention(x)
        return self.out(x + (out[0] if isinstance(out, tuple) else out))


@pytest.mark.parametrize(
    ("attention", "shape"),
    [
        (lambda: nn.MultiheadAttention(12, 3, batch_first=True), (2, 5, 3)),
        (lambda: ShiftedWindowAttention(12, [4, 4], [2, 2], 3), (2, 8, 8, 3)),
        (lambda: ShiftedWindowAttentionV2(12, [4, 4], [2, 2], 3), (2, 8, 8, 3)),
        (lambda: RelativePositionalMultiHeadAttention(12, 4, 9), (2, 3, 9, 3)),
    ],
    ids=["multihead", "window", "window v2", "relative"],
)
def test_cut_attention_equals_silenced_attention(attention, shape):
    torch.manual_seed(0)
    model, x = perturb(Around(attention())).double().eval(), torch.randn(shape).double()
    graph = pl.trace(model, x)
    assert {group.size for group in graph.groups} >= {12, 3, 4}, "width of the stream, heads and head width"
    plan = random_plan(model, x, 0.4)
    cut = pl.apply(model, plan)
    assert len(plan.cuts) == len(graph.groups) and type(cut) is Around
    with torch.no_grad():
        assert error(cut(x), pl.masked(model, plan)(x)) < 1e-9
    twice = random_plan(cut, x, 0.3)
    with torch.no_grad():
        assert error(pl.apply(cut, twice)(x), pl.masked(cut, twice)(x)) < 1e-9

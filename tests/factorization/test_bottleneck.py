"""Bottlenecks: at full rank the layer itself, borders included; with directions left out, the layer without them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from prunelab.factorization.bottleneck import Bottleneck, fill, parts_of, refusal, shell

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (3, 6)),
    "zeros": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 6)),
    "no bias": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), (2, 4, 7, 6)),
    "stride and dilation": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2), (2, 4, 9, 8)),
    "same": (lambda: nn.Conv2d(4, 6, (1, 5), padding="same", dilation=(1, 2)), (2, 4, 7, 9)),
    "reflect": (lambda: nn.Conv2d(4, 6, 5, padding=2, padding_mode="reflect"), (2, 4, 7, 6)),
    "replicate": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="replicate"), (2, 4, 7, 6)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 0), padding_mode="circular"), (2, 4, 7, 6)),
    "groups": (lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3), (2, 6, 5, 5)),
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "3d": (lambda: nn.Conv3d(4, 3, (1, 3, 2), padding=(0, 1, 1), padding_mode="replicate"), (2, 4, 3, 5, 4)),
    "one image": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 7, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 4)),
    "transposed in groups": (lambda: nn.ConvTranspose1d(6, 4, 4, stride=3, dilation=2, groups=2), (2, 6, 5)),
}


def orthogonal(groups: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(groups, size, size, generator=generator, dtype=torch.float64)).Q


def narrowed(layer: nn.Module, inward: int | None, outward: int | None, seed: int = 0) -> tuple[Bottleneck, Tensor]:
    """Return a bottleneck on random orthogonal directions, and the weight that is left of the layer's own."""
    parts = parts_of(layer)
    groups, out, into = parts.core.shape[:3]
    left = None if outward is None else orthogonal(groups, out, seed)[..., :outward]
    right = None if inward is None else orthogonal(groups, into, seed + 1)[..., :inward]
    weight = parts.core
    if left is not None:
        weight = torch.einsum("gop,gpi...->goi...", left @ left.mT, weight)
    if right is not None:
        weight = torch.einsum("goi...,gij->goj...", weight, right @ right.mT)
    weight = (weight.transpose(1, 2) if parts.view.out_dim else weight).flatten(0, 1)
    return fill(shell(layer, inward, outward), parts.rotated(left, right)), weight


def case(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    return build().double(), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", LAYERS)
def test_at_full_rank_it_is_the_layer_borders_included(name, sides):
    layer, inputs = case(name)
    out, into = parts_of(layer).core.shape[1:3]
    made, _ = narrowed(layer, into if sides[0] else None, out if sides[1] else None)
    assert [part for part, _ in made.named_children()] == ["inward"] * sides[0] + ["core"] + ["outward"] * sides[1]
    torch.testing.assert_close(made(inputs), layer(inputs), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_with_directions_left_out_it_is_the_layer_without_them(name):
    layer, inputs = case(name)
    made, weight = narrowed(layer, 1, 2)
    torch.testing.assert_close(made.weight, weight)
    whole = layer(inputs)
    layer.weight.data = weight
    torch.testing.assert_close(made(inputs), layer(inputs), rtol=0, atol=1e-10)
    assert (made(inputs) - whole).abs().max() > 0.01  # something was left out


@pytest.mark.parametrize("name", LAYERS)
def test_narrowing_again_merges_the_rotations(name):
    layer, inputs = case(name)
    once, _ = narrowed(layer, *[size - 1 or 1 for size in parts_of(layer).core.shape[2:0:-1]])
    core = parts_of(once).core
    twice, _ = narrowed(once, core.shape[2], core.shape[1], seed=5)
    assert [part for part, _ in twice.named_children()] == ["inward", "core", "outward"]
    torch.testing.assert_close(twice(inputs), once(inputs), rtol=0, atol=1e-10)
    third, _ = narrowed(twice, 1, None, seed=7)
    assert third.inward.weight.shape[0] == core.shape[0] and third.outward.weight.shape == twice.outward.weight.shape


def test_a_side_can_be_added_later_and_the_bias_moves_with_the_end():
    layer, inputs = case("groups")
    once, _ = narrowed(layer, 2, None)
    assert once.core.bias is not None and not hasattr(once, "outward")
    twice, _ = narrowed(once, None, 3, seed=3)
    assert twice.core.bias is None and torch.equal(twice.outward.bias, layer.bias)
    torch.testing.assert_close(twice(inputs), once(inputs), rtol=0, atol=1e-10)


def test_it_answers_what_code_asks_of_the_layer():
    layer, _ = case("groups")
    made, _ = narrowed(layer, 1, 2)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(made, name) == getattr(layer, name), name
    assert torch.equal(made.bias, layer.bias) and made.weight.shape == layer.weight.shape
    linear, inputs = case("linear")
    made, _ = narrowed(linear, 3, 2)
    assert (made.in_features, made.out_features) == (6, 4)
    torch.testing.assert_close(F.linear(inputs, made.weight, made.bias), made(inputs))
    assert not hasattr(made, "kernel_sizes")
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(again(inputs), made(inputs))


def test_it_takes_over_mode_type_and_what_is_trained():
    layer = nn.Conv2d(4, 6, 3).half().eval()
    layer.weight.requires_grad_(False)
    made = shell(layer, 2, 3, trainable=False)
    assert not made.training and not made.core.training and {p.dtype for p in made.parameters()} == {torch.half}
    flags = {name: parameter.requires_grad for name, parameter in made.named_parameters()}
    assert flags == {"inward.weight": False, "core.weight": False, "outward.weight": False, "outward.bias": True}
    assert all(parameter.requires_grad for parameter in shell(nn.Linear(3, 3), 2, None).parameters())


def test_making_one_draws_no_random_numbers():
    layer = nn.Conv2d(4, 6, 3)
    before = torch.get_rng_state()
    shell(layer, 2, 3)
    assert torch.equal(torch.get_rng_state(), before)


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean())


def test_layers_that_compute_something_else_are_refused():
    assert refusal(nn.Linear(2, 2)) is None and refusal(nn.Conv1d(2, 2, 1)) is None
    assert "forward of its own" in refusal(Own(2, 2))
    assert "parametrized" in refusal(parametrizations.weight_norm(nn.Linear(2, 2)))
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    assert "hooks" in refusal(hooked)
    assert "BatchNorm1d" in refusal(nn.BatchNorm1d(2))

"""Weight views: every weight is taken apart into the matrices by which its layer multiplies, and put together again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.curvature.watching.layer_calls import LayerCalls
from prunelab.curvature.watching.weight_view import WeightView

TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

# function, its view, in and out channels, its options
CASES: dict[str, tuple[Callable[..., Tensor], WeightView, int, int, dict[str, Any]]] = {
    "linear": (F.linear, WeightView(), 5, 3, {}),
    "product": (lambda x, w: torch.addmm(torch.zeros(3).double(), x, w), WeightView(out_dim=1), 5, 3, {}),
    "conv1d": (F.conv1d, WeightView(kernel=(3,)), 4, 6, {"stride": 2, "padding": 1}),
    "conv1d, groups": (F.conv1d, WeightView(groups=2, kernel=(3,)), 4, 6, {"dilation": 2}),
    "conv1d, depthwise": (F.conv1d, WeightView(groups=4, kernel=(2,)), 4, 8, {}),
    "conv2d": (F.conv2d, WeightView(kernel=(3, 2)), 5, 3, {"padding": 1}),
    "conv2d, groups": (F.conv2d, WeightView(groups=3, kernel=(3, 2)), 6, 9, {"stride": 2}),
    "conv2d, depthwise": (F.conv2d, WeightView(groups=3, kernel=(2, 3)), 3, 3, {}),
    "conv3d": (F.conv3d, WeightView(kernel=(1, 2, 3)), 2, 5, {"padding": 1}),
    "conv3d, groups": (F.conv3d, WeightView(groups=2, kernel=(1, 2, 3)), 2, 6, {}),
    "transposed 1d": (F.conv_transpose1d, WeightView(1, kernel=(3,)), 5, 3, {"stride": 2, "padding": 1}),
    "transposed 2d": (F.conv_transpose2d, WeightView(1, kernel=(3, 2)), 5, 3, {"stride": 2, "output_padding": 1}),
    "transposed 2d, groups": (F.conv_transpose2d, WeightView(1, 2, (3, 2)), 4, 6, {"dilation": 2}),
    "transposed 2d, depthwise": (F.conv_transpose2d, WeightView(1, 3, (3, 2)), 3, 6, {"padding": 1}),
    "transposed 3d, groups": (F.conv_transpose3d, WeightView(1, 2, (1, 2, 3)), 6, 4, {"stride": 2}),
}


def setting(name: str) -> tuple[Callable[..., Tensor], WeightView, dict[str, Any], Tensor, Tensor]:
    """Return function, view, options, a weight and an input; what the shape of the weight is, PyTorch says."""
    function, view, into, out, options = CASES[name]
    first, second = (into, out) if function in TRANSPOSED or name == "product" else (out, into)
    generator = torch.Generator().manual_seed(0)
    shape = (first, second // view.groups, *view.kernel)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    space = (5, 6, 7)[: len(view.kernel)]
    return function, view, options, weight, torch.randn(2, into, *space, generator=generator, dtype=torch.float64)


def by_hand(matrix: Tensor, x: Tensor, view: WeightView, scatter: bool, options: dict[str, Any]) -> Tensor:
    """Return what the layer gives: one product per kernel position, of windows of the input or scattered."""
    stride, dilation, padding = options.get("stride", 1), options.get("dilation", 1), options.get("padding", 0)
    x = x.unflatten(1, (view.groups, -1))
    reach = [dilation * (size - 1) for size in view.kernel]
    if scatter:
        more = 1 + options.get("output_padding", 0)
        sizes = [(n - 1) * stride + far + more for n, far in zip(x.shape[3:], reach, strict=True)]
    else:
        x = F.pad(x, [padding] * 2 * len(view.kernel))
        sizes = [(n - far - 1) // stride + 1 for n, far in zip(x.shape[3:], reach, strict=True)]
    counts = x.shape[3:] if scatter else sizes
    found = x.new_zeros(len(x), view.groups, matrix.shape[1], *sizes)
    for position in itertools.product(*(range(size) for size in view.kernel)):
        starts = [place * dilation for place in position]
        window = (..., *(slice(at, at + (n - 1) * stride + 1, stride) for at, n in zip(starts, counts, strict=True)))
        weight = matrix[(slice(None), slice(None), slice(None), *position)]
        product = torch.einsum("goi,ngi...->ngo...", weight, x if scatter else x[window])
        found[window if scatter else ...] += product
    if scatter and padding:
        found = found[(..., *(slice(padding, size - padding) for size in sizes))]
    return found.flatten(1, 2)


@pytest.mark.parametrize("name", CASES)
def test_a_layer_multiplies_by_the_matrices_of_its_weight(name):
    function, view, options, weight, x = setting(name)
    grouped = {"groups": view.groups} if view.kernel else {}
    found = by_hand(view.as_matrix(weight), x, view, function in TRANSPOSED, options)
    torch.testing.assert_close(found, function(x, weight, **options, **grouped), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_taps_say_how_the_weight_of_a_call_is_laid_out(name):
    function, view, options, weight, x = setting(name)
    model = nn.ParameterDict({"weight": weight})
    with LayerCalls(model) as taps:
        function(x, model["weight"], **options, **({"groups": view.groups} if view.kernel else {}))
    assert [call.view for call in taps.calls] == [view]


@pytest.mark.parametrize("name", CASES)
def test_the_matrices_make_the_weight_again(name):
    _, view, _, weight, _ = setting(name)
    matrix = view.as_matrix(weight)
    assert torch.equal(view.from_matrix(matrix), weight)
    assert torch.equal(view.from_matrix(matrix.flatten(2)), weight)


@pytest.mark.parametrize("name", CASES)
def test_channels_by_group_belong_to_the_matrices_rows_and_columns(name):
    """A weight that is zero but for some channels of one side has matrices that are zero but for the same."""
    _, view, _, weight, _ = setting(name)
    for dim, axis in ((view.out_dim, 1), (view.in_dim, 2)):
        mask = torch.arange(weight.shape[dim]) % 2 == 0
        cut = weight * mask.view(-1, *(1,) * (weight.dim() - 1 - dim))
        rows = view.rows_of(mask, dim, slice(0, len(weight)))
        used = view.as_matrix(cut).movedim(axis, 1).flatten(2).any(2)
        assert torch.equal(used, rows)


def test_rows_are_those_of_dimension_0_whatever_it_counts():
    mask = torch.tensor([True, False, True, True])
    assert WeightView().rows_of(mask, 0, slice(1, 3)).tolist() == [[False, True]]
    assert WeightView(out_dim=1).rows_of(mask, 0, slice(1, 3)).tolist() == [[False, True]]
    assert WeightView(groups=2).rows_of(mask, 1, slice(1, 3)).tolist() == [mask.tolist()] * 2


def test_what_belongs_to_a_side_stands_where_the_weight_has_it():
    assert WeightView().ordered("out", "in") == ("out", "in")
    assert WeightView(out_dim=1).ordered("out", "in") == ("in", "out")

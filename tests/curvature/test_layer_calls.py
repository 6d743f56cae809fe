"""LayerCalls: they see every use of a weight, change nothing, and tell enough to compute the call again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunelab.curvature.watching.layer_calls import LayerCall, LayerCalls
from tests.cases import CASES, error


def again(model: nn.Module, call: LayerCall) -> torch.Tensor:
    """Compute a call from what was recorded of it."""
    parameters = dict(model.named_parameters())
    weight = parameters[call.weight][call.rows]
    bias = None if call.bias is None else parameters[call.bias][call.bias_rows]
    if call.kind == "linear":
        return F.linear(call.input, weight, bias)
    space, common = weight.dim() - 2, (call.stride, call.padding)
    if call.kind == "conv":
        conv = (F.conv1d, F.conv2d, F.conv3d)[space - 1]
        return conv(call.input, weight, bias, *common, call.dilation, call.view.groups)
    transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[space - 1]
    return transposed(call.input, weight, bias, *common, call.output_padding, call.view.groups, call.dilation)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in ("vgg19", "resnet32")], ids=lambda case: case.name
)
def test_a_recorded_call_can_be_computed_again(case):
    model, inputs = case.make()
    with LayerCalls(model) as taps, torch.no_grad():
        found = model(inputs)
    with torch.no_grad():
        assert torch.equal(found, model(inputs))
        assert taps.calls
        for call in taps.calls:
            assert torch.equal(again(model, call), call.output)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))]
    assert len(taps.calls) == len(layers)


class Layers(nn.Module):
    """Convolutions of one and three dimensions, options given in every way that PyTorch takes."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(2, 4, 4, padding="same", dilation=1)
        self.even = nn.Conv1d(4, 4, 3, padding="same", dilation=2, groups=2)
        self.valid = nn.Conv1d(4, 6, 2, padding="valid", stride=2)
        self.mirror = nn.Conv1d(6, 6, 3, padding=1, padding_mode="reflect")
        self.back = nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1, groups=2, bias=False)
        self.volume = nn.Conv3d(1, 2, (1, 2, 3), padding=(0, 1, 1))
        self.kernel = nn.Parameter(torch.randn(3, 2, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.back(self.mirror(self.valid(self.even(self.line(x)))))
        x = self.volume(x[:, None, None])
        return F.conv3d(input=x, weight=self.kernel, stride=2)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_options_come_in_numbers():
    torch.manual_seed(0)
    model, inputs = Layers().double(), torch.randn(2, 2, 9).double()
    with LayerCalls(model) as taps:
        found = model(inputs)
    assert torch.equal(found, model(inputs))
    names = ["line.weight", "even.weight", "valid.weight", "mirror.weight", "back.weight", "volume.weight", "kernel"]
    assert [call.weight for call in taps.calls] == names
    for call in taps.calls:
        assert torch.equal(again(model, call), call.output)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["self", "memory", "cross", "widths"])
def test_the_slices_of_fused_attention_are_seen(kind, train):
    torch.manual_seed(0)
    widths = {"kdim": 5, "vdim": 3} if kind == "widths" else {}
    model = nn.MultiheadAttention(8, 2, batch_first=True, **widths).double().train(train)
    query, other, third = (torch.randn(2, 4, width).double() for width in (8, 8, 8))
    if kind == "widths":
        other, third = torch.randn(2, 4, 5).double(), torch.randn(2, 4, 3).double()
    given = {
        "self": (query, query, query),
        "memory": (query, other, other),
        "cross": (query, other, third),
        "widths": (query, other, third),
    }[kind]
    with torch.no_grad(), LayerCalls(model) as taps:
        found = model(*given)[0]
    torch.testing.assert_close(found, model(*given)[0])
    for call in taps.calls:
        torch.testing.assert_close(again(model, call), call.output)
    rows = [(call.weight, call.rows.start, call.rows.stop) for call in taps.calls]
    fused = {
        "self": [("in_proj_weight", 0, 24)],
        "memory": [("in_proj_weight", 0, 8), ("in_proj_weight", 8, 24)],
        "cross": [("in_proj_weight", start, start + 8) for start in (0, 8, 16)],
        "widths": [(f"{name}_proj_weight", 0, 8) for name in "qkv"],
    }[kind]
    assert rows == [*fused, ("out_proj.weight", 0, 8)]
    assert {call.bias for call in taps.calls} == {"in_proj_bias", "out_proj.bias"}


def test_a_transformer_layer_in_eval_mode_is_seen_too():
    """In eval mode PyTorch would take a fused kernel in which no layer can be seen."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad(), LayerCalls(layer) as taps:
        layer(torch.randn(2, 3, 8))
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert [call.weight for call in taps.calls] == names


def test_tied_and_repeated_weights_are_named_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    with LayerCalls(model) as taps:
        model(model(torch.ones(1, 3)))
    assert [call.weight for call in taps.calls] == ["0.weight"] * 4
    assert [call.bias for call in taps.calls] == ["0.bias", "2.bias"] * 2


def test_what_is_no_parameter_is_not_recorded():
    model = nn.Linear(3, 4)
    with LayerCalls(model) as taps:
        F.linear(torch.ones(2, 3), torch.ones(4, 3))
        F.linear(torch.ones(2, 4), model.weight.t())
        F.linear(torch.ones(2, 3), 2 * model.weight)
        F.linear(torch.ones(2, 3), model.weight[::2])
        F.linear(torch.ones(2, 3), model.weight[1:3], model.bias[1:3])
    assert [(call.rows, call.bias_rows) for call in taps.calls] == [(slice(1, 3), slice(1, 3))]


def test_before_and_after_replace_what_goes_in_and_out():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    seen = []

    def before(call: LayerCall) -> torch.Tensor | None:
        assert call.output is None
        return 2 * call.input if call.weight == "0.weight" else None

    def after(call: LayerCall) -> torch.Tensor | None:
        seen.append(call.weight)
        return call.output + 1 if call.weight == "1.weight" else None

    with LayerCalls(model, before, after, keep=False) as taps:
        found = model(inputs)
    torch.testing.assert_close(found, model(2 * inputs) + 1)
    assert seen == ["0.weight", "1.weight"] and not taps.calls


def test_the_edge_gives_the_gradient_of_the_output_before_it_was_changed_in_place():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), torch.randn(5, 3)
    with LayerCalls(model) as taps:
        loss = model(inputs).square().sum()
    (found,) = torch.autograd.grad(loss, [taps.calls[0].edge])
    before = F.linear(inputs, model[0].weight, model[0].bias).detach().requires_grad_()
    (wanted,) = torch.autograd.grad(model[2](before.relu()).square().sum(), before)
    assert error(found, wanted) == 0


def test_another_set_of_parameters_can_be_watched():
    model = nn.Linear(3, 2)
    other = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    with LayerCalls(model, parameters=other) as taps:
        torch.func.functional_call(model, other, torch.ones(1, 3))
        model(torch.ones(1, 3))
    assert [call.weight for call in taps.calls] == ["weight"]

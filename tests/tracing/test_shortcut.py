"""Tracing takes two shortcuts, results that are remembered and a quicker copy; neither may change what is found."""

from __future__ import annotations

import gc
from collections import OrderedDict

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn

import prunelab as pl
from prunelab.errors import TraceError
from prunelab.tracing import shortcut
from prunelab.tracing.fakes import fake_inputs, fake_mode, fake_model, select
from prunelab.tracing.shortcut import Shortcut


def found(graph: pl.DependencyGraph) -> tuple:
    """Everything that a trace says, as plain data."""
    tape = [
        (op.name, op.module, [(out.shape, out.stride(), out.dtype, out.device) for out in op.outputs])
        for op in graph.tape
    ]
    groups = [(group.name, group.size, [(m.name, m.dim, m.role) for m in group.members]) for group in graph.groups]
    return tape, groups, dict(graph.frozen)


class Nothing(Shortcut):
    def describe(self, func, args, kwargs):
        return None


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "densenet121", "mobilenet_v3_small"])
def test_what_is_remembered_is_what_pytorch_says(name, monkeypatch):
    model, inputs = tv.get_model(name, weights=None), torch.ones(2, 3, 224, 224)
    monkeypatch.setattr(shortcut, "_REMEMBERED", {})
    remembering, remembered = found(pl.trace(model, inputs)), found(pl.trace(model, inputs))
    assert shortcut._REMEMBERED
    monkeypatch.setattr("prunelab.tracing.trace.Shortcut", Nothing)
    assert remembering == remembered == found(pl.trace(model, inputs))


def call(answer: Shortcut, func, *args, **kwargs):
    """Do as the recorder does: recall, or ask PyTorch and remember."""
    with torch.no_grad():
        key = answer.describe(func, args, kwargs)
        out = None if key is None else answer.recall(key, args)
        if out is not None:
            return out, True
        with answer.mode:
            out = func(*args, **kwargs)
        if key is not None:
            answer.remember(key, func, args, kwargs, out)
        return out, False


@pytest.fixture
def answer(monkeypatch) -> Shortcut:
    monkeypatch.setattr(shortcut, "_REMEMBERED", {})
    return Shortcut(fake_mode())


def fake(answer: Shortcut, *tensors: Tensor) -> list[Tensor]:
    return list(fake_inputs(tensors, answer.mode, nn.Identity())[0])


aten = torch.ops.aten


def test_a_second_call_is_answered_from_memory_with_the_same_layout(answer):
    (image,) = fake(answer, torch.ones(2, 3, 8, 8).to(memory_format=torch.channels_last))
    first, known = call(answer, aten.slice.Tensor, image, 2, 3, 7)
    second, known_now = call(answer, aten.slice.Tensor, image, 2, 3, 7)
    assert (known, known_now) == (False, True)
    assert first is not second
    for tensor in (first, second):
        assert (tensor.shape, tensor.stride(), tensor.storage_offset()) == ((2, 3, 4, 8), (192, 1, 24, 3), 72)
        assert (type(tensor), tensor.device, tensor.fake_mode) == (type(image), image.device, answer.mode)


def test_an_operator_that_writes_in_place_returns_its_argument(answer):
    one, two = fake(answer, torch.ones(3), torch.ones(3))
    call(answer, aten.relu_.default, one)
    out, known = call(answer, aten.relu_.default, two)
    assert known and out is two


@pytest.mark.parametrize(
    ("func", "first", "second"),
    [
        (aten.add.Tensor, (1,), (1.0,)),  # equal numbers of another type give another type
        (aten.mul.Tensor, (True,), (1,)),
        (aten.sum.dim_IntList, ([0],), ([1],)),
    ],
)
def test_calls_that_differ_are_not_confused(answer, func, first, second):
    (numbers,) = fake(answer, torch.ones(2, 3, dtype=torch.bool))
    call(answer, func, numbers, *first)
    out, known = call(answer, func, numbers, *second)
    assert not known
    real = func(torch.ones(2, 3, dtype=torch.bool), *second)
    assert (out.shape, out.dtype) == (real.shape, real.dtype)


def test_what_depends_on_more_than_shapes_is_left_to_pytorch(answer):
    (complex_,) = fake(answer, torch.ones(2, dtype=torch.complex64))
    with torch.no_grad():
        assert answer.describe(aten.conj.default, (complex_,), {}) is None  # a lazy bit says whether it is conjugated
        assert answer.describe(aten.relu.default, (torch.ones(2),), {}) is None  # a real tensor
        assert answer.describe(aten.bernoulli.default, (torch.ones(2),), {"generator": torch.Generator()}) is None
        (other,) = fake(Shortcut(fake_mode()), torch.ones(2))
        assert answer.describe(aten.relu.default, (other,), {}) is None  # of another trace
        (matrix,) = fake(answer, torch.ones(2, 3))
        call(answer, aten.t_.default, matrix)  # changes its own shape
        assert not shortcut._REMEMBERED
    assert answer.describe(aten.relu.default, (matrix,), {}) is None  # gradients are on


def test_a_selection_from_a_fake_tensor_has_the_shape_of_that_from_a_real_one(answer):
    index = torch.tensor([2, 0])
    for real in (torch.ones(3, 4, dtype=torch.float64), torch.ones(5, 3, 2).permute(1, 0, 2)):
        (stand_in,) = fake(answer, real)
        for dim in range(2):
            found, wanted = select(stand_in, dim, index), select(real, dim, index)
            assert (found.shape, found.stride(), found.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
            assert type(found) is type(stand_in) and type(wanted) is Tensor


def test_memory_is_bounded(answer, monkeypatch):
    monkeypatch.setattr(shortcut, "LIMIT", 3)
    for size in range(1, 9):
        call(answer, aten.relu.default, *fake(answer, torch.ones(size)))
    assert 0 < len(shortcut._REMEMBERED) <= 3


def test_the_garbage_collector_is_left_as_it_was():
    model, inputs = nn.Linear(2, 2), torch.ones(1, 2)
    assert gc.isenabled()
    pl.trace(model, inputs)
    assert gc.isenabled()
    with pytest.raises(TraceError):
        pl.trace(model, torch.ones(1, 3))
    assert gc.isenabled()
    gc.disable()
    try:
        pl.trace(model, inputs)
        assert not gc.isenabled()
    finally:
        gc.enable()


# ── the copy ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Odd(nn.Module):
    """Attributes of all kinds, some shared."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.again = self.inner[0]
        self.weight = self.inner[0].weight
        self.register_buffer("table", torch.ones(4), persistent=False)
        self.raw = torch.ones(2)
        self.numbers, self.names = [1, 2], ("a", 2.0)
        self.shared = OrderedDict(numbers=self.numbers)
        self.found = {"module": self.inner, "weights": [self.weight], 3: {4}}
        self.inner.numbers = self.numbers

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images) * self.table[:, None, None]


def test_a_copy_shares_nothing_with_the_model_and_everything_within_itself():
    model = Odd().train()
    model.inner.eval()
    model.inner.register_forward_hook(lambda *_: None)
    copy = fake_model(model, fake_mode())
    assert type(copy) is Odd
    assert copy.again is copy.inner[0] is copy.found["module"][0] is not model.again
    assert copy.weight is copy.inner[0].weight is copy.found["weights"][0] is not model.weight
    assert copy.numbers is copy.shared["numbers"] is copy.inner.numbers is not model.numbers
    assert (copy.numbers, copy.names, copy.found[3]) == ([1, 2], ("a", 2.0), {4})
    assert copy.raw is not model.raw
    assert (copy.training, copy.inner.training, copy.inner[2].training) == (True, False, False)
    assert len(copy.inner._forward_hooks) == 1 and copy.inner._forward_hooks is not model.inner._forward_hooks
    assert list(copy.state_dict()) == list(model.state_dict())
    copy.inner[0].new, copy.numbers[0] = 1, 7
    assert not hasattr(model.inner[0], "new") and model.numbers == [1, 2]


def test_a_module_that_copies_itself_is_asked_to():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.copies = nn.Linear(2, 3), 0

        def __deepcopy__(self, memo):
            from copy import deepcopy

            new = Own()
            new.layer, new.copies = deepcopy(self.layer, memo), self.copies + 1
            return memo.setdefault(id(self), new)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    copy = fake_model(nn.Sequential(Own(), nn.Linear(3, 2)), fake_mode())
    assert copy[0].copies == 1
    assert pl.trace(nn.Sequential(Own(), nn.Linear(3, 2)), torch.ones(1, 2)).group_of("0.layer.weight").size == 3


def test_a_module_that_cannot_be_copied_says_so():
    model = nn.Linear(2, 2)
    model.file = (line for line in ())
    with pytest.raises(TraceError, match="cannot be copied"):
        pl.trace(model, torch.ones(1, 2))

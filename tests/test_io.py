"""Saving and loading: the same function in another process, and nothing but data in the file."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import prunelab as pl
from tests.cases import Embedded, random_plan
from tests.files import forge, header_of


@pytest.mark.parametrize("name", ["resnet20", "vit_small"])
def test_a_pruned_model_is_the_same_in_another_process(name, tmp_path):
    torch.manual_seed(0)
    model, inputs = pl.zoo.build(name).eval(), torch.randn(2, 3, 32, 32)
    small = pl.apply(model, random_plan(model, inputs))
    pl.save(small, tmp_path / "small.safetensors")
    save_file({"inputs": inputs}, tmp_path / "inputs")
    code = f"""
import torch, prunelab as pl
from safetensors.torch import load_file, save_file
model = pl.load(pl.zoo.build({name!r}), {str(tmp_path / "small.safetensors")!r}).eval()
with torch.no_grad():
    save_file({{"out": model(load_file({str(tmp_path / "inputs")!r})["inputs"])}}, {str(tmp_path / "out")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with torch.no_grad():
        assert torch.equal(load_file(tmp_path / "out")["out"], small(inputs))


def test_a_model_pruned_twice_is_saved_with_both_plans(small, tmp_path):
    model, inputs = small
    once = pl.apply(model, random_plan(model, inputs, 0.25))
    twice = pl.apply(once, random_plan(once, inputs, 0.5))
    pl.save(twice, tmp_path / "twice.safetensors")
    again = pl.load(model, tmp_path / "twice.safetensors")
    assert again[0].out_channels == 3 and torch.equal(again.eval()(inputs), twice(inputs))
    pl.save(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "twice.safetensors").read_bytes()


def test_tied_weights_are_saved_once(tmp_path):
    torch.manual_seed(0)
    model, tokens = Embedded().eval(), torch.randint(0, 11, (2, 5))
    model.table = model.embedding.weight
    small = pl.apply(model, random_plan(model, tokens))
    pl.save(small, tmp_path / "tied.safetensors")
    fresh = Embedded()
    fresh.table = fresh.embedding.weight
    again = pl.load(fresh, tmp_path / "tied.safetensors").eval()
    assert again.table is again.embedding.weight and torch.equal(again(tokens), small(tokens))


def test_what_cannot_be_loaded_is_an_error_and_the_model_stays(small, tmp_path):
    model, inputs = small
    path, wrong = tmp_path / "small.safetensors", tmp_path / "wrong.safetensors"
    pl.save(pl.apply(model, random_plan(model, inputs)), path)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    with pytest.raises(pl.DataError, match="missing"):
        pl.load(model, tmp_path / "nothing")
    with pytest.raises(pl.DataError, match="does not fit.*Sequential.*ResNet"):
        pl.load(pl.zoo.resnet20(), path)
    forge(wrong, path, header_of(path) | {"format": 99})
    with pytest.raises(pl.DataError, match="format 99.*update prunelab"):
        pl.load(model, wrong)
    forge(wrong, path, header_of(path) | {"format": 1})
    with pytest.raises(pl.DataError, match="format 1.*save the model again"):
        pl.load(model, wrong)
    with pytest.raises(pl.DataError, match=r"pruned already: load .* into a fresh"):
        pl.load(pl.load(model, path), path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_failed_save_leaves_the_old_file(small, tmp_path):
    path = tmp_path / "small.safetensors"
    pl.save(small[0], path)
    old = path.read_bytes()
    with pytest.raises(pl.DataError, match="cannot be written"):
        pl.save(small[0], tmp_path / "no" / "folder")
    pl.save(nn.Linear(2, 2), path)
    assert path.read_bytes() != old and [file.name for file in tmp_path.iterdir()] == ["small.safetensors"]


# ── factorised models ─────────────────────────────────────────────────────────────────────────────────────────────


def factorized(model: nn.Module, inputs: torch.Tensor, **budget) -> nn.Module:
    graph = pl.trace(model, inputs)
    batches = [(torch.randn(80, *inputs.shape[1:], dtype=inputs.dtype), torch.arange(80) % 4)]
    return pl.factorize(model, pl.criteria.EigenDamage()(graph, batches), **budget)


class Encoder(nn.Module):
    """PyTorch's own attention, whose projections are fused."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x).mean(1))


@pytest.mark.parametrize("name", ["resnet20", "encoder"])
def test_a_factorised_model_is_loaded_into_a_fresh_one_of_the_users_class(name, tmp_path):
    torch.manual_seed(0)
    build, inputs = {
        "resnet20": (pl.zoo.resnet20, torch.randn(2, 3, 16, 16)),
        "encoder": (Encoder, torch.randn(2, 5, 12)),
    }[name]
    model = build().eval()
    small = factorized(model, inputs, params=0.6, train_rotations=False)
    path, fresh = tmp_path / "small.safetensors", build()
    pl.save(small, path)
    state, rng = {key: value.clone() for key, value in fresh.state_dict().items()}, torch.get_rng_state()
    again = pl.load(fresh, path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(inputs), small(inputs), rtol=0, atol=0)
    assert type(again) is type(model) and torch.equal(torch.get_rng_state(), rng)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in small.parameters()]
    assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())
    pl.save(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_pruning_and_factorising_are_redone_in_their_order(tmp_path):
    torch.manual_seed(0)
    model, inputs = pl.zoo.resnet20().eval(), torch.randn(2, 3, 16, 16)
    small = pl.apply(model, random_plan(model, inputs, 0.25))
    small = factorized(small, inputs, flops=0.8)
    small = pl.apply(small, random_plan(small, inputs, 0.2, seed=1))
    small = factorized(small, inputs, params=0.9)
    pl.save(small, tmp_path / "small.safetensors")
    again = pl.load(pl.zoo.resnet20(), tmp_path / "small.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(again(inputs), small(inputs))


def test_a_factorised_file_that_does_not_fit_is_refused_and_the_model_stays(small, tmp_path):
    model, inputs = small
    path, wrong = tmp_path / "small.safetensors", tmp_path / "wrong.safetensors"
    pl.save(factorized(model, inputs, flops=0.815), path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(pl.DataError, match="does not fit.*saved from a Sequential, this is a ResNet"):
        pl.load(pl.zoo.resnet20(), path)
    wider = nn.Sequential(nn.Conv2d(3, 10, 3), *list(model)[1:])
    with pytest.raises(pl.DataError, match=r"does not fit.*`0.weight`: it has the shape \[1, 10, 3, 3, 3\]"):
        pl.load(wider, path)
    header = header_of(path)
    step = header["plans"][0]
    layer = next(layer for layer in step["layers"] if layer["weight"] == "0.weight")
    for changes in (
        {"layers": [layer | {"weight": "2.weight"}]},
        {"layers": [layer | {"weight": "__class__.weight"}]},
        {"layers": [layer | {"inward": 10**9}]},
        {"layers": [layer | {"inward": 1, "outward": None}]},
        {"layers": [layer, layer]},
        {"layers": []},
    ):
        forge(wrong, path, header | {"plans": [step | changes]})
        with pytest.raises(pl.DataError, match="does not fit"):
            pl.load(model, wrong)
    for changes in ({"layers": [{"weight": "0.weight"}]}, {"train_rotations": "yes"}, {"action": "run"}):
        forge(wrong, path, header | {"plans": [step | changes]})
        with pytest.raises(pl.DataError, match="damaged"):
            pl.load(model, wrong)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

"""Saving and loading: the same model again, and nothing but data in the file; in new processes: test_roundtrips."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import prunelab as pl
from tests.cases import Embedded, random_plan
from tests.files import forge, header_of


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


# ── files that were cut off, edited, or made by somebody else ─────────────────────────────────────────────────────


@pytest.fixture
def saved(small, tmp_path) -> tuple[nn.Module, torch.Tensor, nn.Module, Path]:
    model, inputs = small
    cut = pl.apply(model, random_plan(model, inputs))
    pl.save(cut, tmp_path / "small.safetensors")
    return model, inputs, cut, tmp_path / "small.safetensors"


def test_a_file_that_was_cut_off_anywhere_is_refused(saved, tmp_path):
    model, _, _, path = saved
    whole, wrong = path.read_bytes(), tmp_path / "wrong"
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        wrong.write_bytes(whole[:length])
        with pytest.raises(pl.DataError, match="damaged"):
            pl.load(model, wrong)
    wrong.write_bytes(whole + b"\0")
    with pytest.raises(pl.DataError, match="damaged"):
        pl.load(model, wrong)


def test_a_file_in_which_any_byte_was_changed_is_refused(saved, tmp_path):
    """The checksum covers header and tensors; only the padding of safetensors' own header means nothing."""
    model, inputs, cut, path = saved
    whole, wrong = bytearray(path.read_bytes()), tmp_path / "wrong"
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(len(whole), generator=generator)[:150].tolist() + list(range(len(whole) - 20, len(whole)))
    refused = 0
    for place in places:
        edited = bytearray(whole)
        edited[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        wrong.write_bytes(edited)
        try:
            again = pl.load(model, wrong)
        except pl.DataError:
            refused += 1
        else:
            with torch.no_grad():
                assert torch.equal(again.eval()(inputs), cut(inputs))
    assert refused >= len(places) - 3


def test_edited_json_and_edited_tensors_are_refused_by_the_checksum(saved, tmp_path):
    model, _, _, path = saved
    header, tensors, wrong = header_of(path), load_file(path), tmp_path / "wrong"
    other = copy.deepcopy(header)
    other["plans"][0]["cuts"][0]["removed"][0] ^= 1
    forge(wrong, path, other, honest=False)
    with pytest.raises(pl.DataError, match="do not have the checksum"):
        pl.load(model, wrong)
    forge(wrong, path, header, tensors | {"0.bias": tensors["0.bias"] + 1e-7}, honest=False)
    with pytest.raises(pl.DataError, match="do not have the checksum"):
        pl.load(model, wrong)
    forge(wrong, path, {key: value for key, value in header.items() if key != "sha256"}, honest=False)
    with pytest.raises(pl.DataError, match="do not have the checksum"):
        pl.load(model, wrong)


def test_names_shapes_and_types_must_be_the_models(saved, tmp_path):
    model, _, cut, path = saved
    header, tensors, wrong = header_of(path), load_file(path), tmp_path / "wrong"
    width = cut[0].out_channels
    for changed, message in [
        ({key: value for key, value in tensors.items() if key != "0.bias"}, "the file lacks `0.bias`"),
        (tensors | {"9.bias": torch.ones(2)}, "the file has `9.bias`, the model does not"),
        (
            tensors | {"0.bias": torch.ones(9)},
            rf"`0.bias` has the shape \[9\] in the file and \[{width}\] in the model",
        ),
        (tensors | {"0.bias": tensors["0.bias"].half()}, "`0.bias` is float16 in the file and float32 in the model"),
        ({"0.bias": tensors["0.bias"]}, "the file lacks .* and [0-9]+ more"),
    ]:
        forge(wrong, path, header, changed)
        with pytest.raises(pl.DataError, match=f"does not fit.*{message}"):
            pl.load(model, wrong)
    with pytest.raises(pl.DataError, match="is float32 in the file and float64 in the model"):
        pl.load(copy.deepcopy(model).double(), path)


class Payload:
    """What a pickle may do when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_refused_and_never_opened(saved, tmp_path):
    model, _, _, path = saved
    mark, wrong = tmp_path / "opened", tmp_path / "wrong"
    pickled = pickle.dumps(Payload(mark))
    torch.save({"0.weight": Payload(mark)}, wrong)
    archive = wrong.read_bytes()
    header = header_of(path)
    for content in (pickled, archive, path.read_bytes() + pickled, path.read_bytes() + archive):
        wrong.write_bytes(content)
        with pytest.raises(pl.DataError, match="damaged"):
            pl.load(model, wrong)
    text = pickled.hex()
    inside = torch.frombuffer(bytearray(pickled), dtype=torch.uint8)
    for changed, tensors in [
        (header | {"class": text}, None),
        (header, load_file(path) | {"0.bias": inside}),
        (header | {"plans": [{"action": text}]}, None),
    ]:
        forge(wrong, path, changed, tensors)
        if changed["class"] == text:
            pl.load(model, wrong)  # a name that nobody reads
        else:
            with pytest.raises(pl.DataError):
                pl.load(model, wrong)
    assert not mark.exists()
    pickle.loads(pickled)
    assert mark.exists()  # it would have


HUGE, DEEP = 10**30, "[" * 100_000 + "]" * 100_000


def hostile_headers(header: dict[str, Any]) -> Iterator[Any]:
    """Yield headers that are wrong in type, size or nesting, one place at a time."""
    odd = [None, True, -1, 1.5, HUGE, float("inf"), float("nan"), "", "x" * 1000, [], [[]], {}, {"shape": 3}]
    plan = header["plans"][0]
    cut = plan["cuts"][0]
    for value in odd:
        for key in ("format", "class", "plans", "tied"):
            if not (key == "class" and isinstance(value, str)) and not (key == "tied" and value == {}):
                yield header | {key: value}
        yield header | {"plans": [value]}
        yield header | {"tied": {"a": value}}
        for key in ("format", "cuts", "inputs"):
            if value is not True:  # which is 1, the format of plans
                yield header | {"plans": [plan | {key: value}]}
        for key in ("group", "size", "removed", "members"):
            yield header | {"plans": [plan | {"cuts": [cut | {key: value}]}]}
        yield header | {"plans": [plan | {"cuts": [cut | {"removed": [value]}]}]}
        yield header | {"plans": [plan | {"cuts": [cut | {"members": [value]}]}]}
        yield header | {"plans": [plan | {"budget": {"backend": value}}]}
        for inputs in (
            {"shape": value, "dtype": "float32"},
            {"shape": [value], "dtype": "float32"},
            {"shape": [2, 3, HUGE, 8], "dtype": value},
            {"shape": [2, 3, 8, 8], "dtype": value},
            {"named": value},
            {"value": value},
            [value],
        ):
            yield header | {"plans": [plan | {"inputs": inputs}]}
        for action in ({"action": "sparsify", "names": value}, {"action": "sparsify", "names": [value]}):
            if value != []:
                yield header | {"plans": [action]}
        layer = {"weight": "0.weight", "shape": [1, 8, 3, 3, 3], "inward": 1, "outward": None}
        for key in layer:
            action = {"action": "factorize", "train_rotations": True, "budget": {}, "layers": [layer | {key: value}]}
            yield header | {"plans": [action]}
    for name in ("load", "float32.__class__", "nn", "Tensor"):
        yield header | {"plans": [plan | {"inputs": {"shape": [2, 3, 8, 8], "dtype": name}}]}
    yield header | {"plans": [plan] * 1001}
    yield header | {"plans": [plan | {"inputs": [{"shape": [2**20, 3, 2**20, 2**20], "dtype": "float32"}]}]}
    yield header | {"plans": [plan | {"inputs": {"shape": [1] * 1000, "dtype": "float32"}}]}
    yield header | {"plans": [plan | {"cuts": [cut | {"group": "__class__"}]}]}
    nested: Any = {"shape": [2, 3, 8, 8], "dtype": "float32"}
    for _ in range(50):
        nested = [nested]
    yield header | {"plans": [plan | {"inputs": nested}]}
    text = json.dumps(header)
    yield from (DEEP, '{"a":' * 50_000, text[:-1], text.replace('"plans": [', f'"plans": [{DEEP}, ', 1), "9" * 5000)
    yield text.replace('"format": 2', '"format": ' + "9" * 5000)


def test_a_hostile_header_gives_an_error_of_ours_and_nothing_else(saved, tmp_path):
    model, _, _, path = saved
    wrong, tensors, number = tmp_path / "wrong", load_file(path), 0
    for number, header in enumerate(hostile_headers(header_of(path))):  # noqa: B007
        forge(wrong, path, header, tensors)
        with pytest.raises(pl.PruneLabError):
            pl.load(model, wrong)
    assert number > 300


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_a_hostile_container_gives_an_error_of_ours_and_nothing_else(saved, tmp_path):
    model, _, _, path = saved
    wrong, text = tmp_path / "wrong", json.dumps(header_of(path))
    about = {"__metadata__": {"prunelab": text}}
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    contents = [b"", b"\xff" * 8, (2**63).to_bytes(8, "little"), (2**40).to_bytes(8, "little") + b"{}"]
    contents += [raw(DEEP.encode()), raw(b"{}"), raw(b"not json"), raw(about), raw({"__metadata__": {"prunelab": ""}})]
    for change in (
        {"shape": [2**62, 2**62]},
        {"shape": [-2]},
        {"shape": "2"},
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [8, 0]},
        {"dtype": "F7"},
        {"dtype": "object"},
        {},
    ):
        contents.append(raw(about | {"0.weight": one | change}, b"\0" * 8))
    contents.append(raw(about | {"../../etc": one, "__class__": one | {"data_offsets": [8, 16]}}, b"\0" * 16))
    for content in contents:
        wrong.write_bytes(content)
        with pytest.raises(pl.DataError):
            pl.load(model, wrong)
    with pytest.raises(pl.DataError, match="missing"):
        pl.load(model, tmp_path)  # a folder


def test_ties_that_are_not_those_of_the_model_are_refused(tmp_path):
    torch.manual_seed(0)
    model = Embedded()
    model.table = model.embedding.weight
    path, wrong = tmp_path / "tied.safetensors", tmp_path / "wrong"
    pl.save(model, path)
    header, tensors = header_of(path), load_file(path)
    assert header["tied"] == {"table": "embedding.weight"} and "table" not in tensors
    forge(wrong, path, header | {"tied": {}}, tensors | {"table": tensors["embedding.weight"] + 1})
    with pytest.raises(pl.DataError, match="`table` and `embedding.weight` are one tensor in the model and two"):
        pl.load(model, wrong)
    for ties in ({"table": "nothing"}, {"norm.bias": "embedding.weight"}, {"table": "norm.bias"}):
        forge(wrong, path, header | {"tied": ties})
        with pytest.raises(pl.DataError, match="does not fit"):
            pl.load(model, wrong)


# ── what cannot be saved, and saves that do not come to an end ────────────────────────────────────────────────────


def test_what_such_a_file_cannot_hold_is_an_error_before_anything_is_written(small, tmp_path):
    model, inputs = small

    class Stateful(nn.Linear):
        def get_extra_state(self):
            return {"anything": print}

    path = tmp_path / "small.safetensors"
    for wrong, message in [
        (Stateful(2, 2), "`_extra_state` in the state_dict of Stateful is a dict, not a dense tensor"),
        (nn.Linear(2, 2, device="meta"), "has no data: the model is on the meta device"),
    ]:
        with pytest.raises(pl.DataError, match=f"cannot be written: .*{message}"):
            pl.save(wrong, path)
    cut = pl.apply(model, random_plan(model, inputs))
    cut.prunelab_plans[0] = dataclasses.replace(cut.prunelab_plans[0], inputs={"value": object()})
    with pytest.raises(pl.DataError, match="made with a object among the example inputs, which is not plain data"):
        pl.save(cut, path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
def test_a_save_that_is_killed_halfway_leaves_the_old_file(saved):
    """SIGKILL while the new file is half written; then at the last moment before it takes the old one's place."""
    model, inputs, cut, path = saved
    code = f"""
import os, signal
import torch, prunelab as pl, prunelab.io.keep, prunelab.files.atomic, safetensors.torch

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def half(tensors, target, metadata):
    content = safetensors.torch.save(tensors, metadata)
    with open(target, "wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        killed()

for module, name, instead in [
    (prunelab.io.keep, "save_file", half), (prunelab.files.atomic.os, "replace", lambda *paths: killed())
]:
    child = os.fork()
    if not child:
        setattr(module, name, instead)
        pl.save(torch.nn.Linear(2, 2), {str(path)!r})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""
    old = path.read_bytes()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert path.read_bytes() == old and len(list(path.parent.glob(".*.tmp"))) == 2
    assert torch.equal(pl.load(model, path).eval()(inputs), cut(inputs))


def test_a_save_that_fails_leaves_nothing_behind(saved, monkeypatch):
    path = saved[3]
    old = path.read_bytes()

    def full(tensors, target, metadata):
        Path(target).write_bytes(b"a part")
        raise OSError("No space left on device")

    monkeypatch.setattr("prunelab.io.keep.save_file", full)
    with pytest.raises(pl.DataError, match="cannot be written: No space left"):
        pl.save(nn.Linear(2, 2), path)
    assert path.read_bytes() == old and [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="links and modes are those of POSIX")
def test_a_link_stays_a_link_and_a_file_keeps_its_mode(saved, tmp_path):
    path, link = saved[3], tmp_path / "link"
    link.symlink_to(path)
    path.chmod(0o640)
    pl.save(nn.Linear(2, 2), link)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    pl.load(nn.Linear(2, 2), path)

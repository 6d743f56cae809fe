"""Every network of the zoo, after every action, twice in a row and mixed: saved, and the same in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import prunelab as pl
from tests.cases import perturb, random_plan

NAMES = tuple(pl.zoo.MODELS)
SIZES = dict.fromkeys(NAMES, 16) | {"vit_small": 32}  # its position embedding knows the size


def cut(model: nn.Module, inputs: Tensor) -> nn.Module:
    return pl.apply(model, random_plan(model, inputs, 0.3, seed=len(pl_steps(model))))


def rebuilt(model: nn.Module, inputs: Tensor) -> nn.Module:
    return pl.apply(model, random_plan(model, inputs, 0.3, seed=len(pl_steps(model))), backend="graph")


def factorised(model: nn.Module, inputs: Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*are too few for.*Kronecker factors")
        warnings.filterwarnings("ignore", message=".*the layers end at")
        scores = pl.criteria.EigenDamage()(pl.trace(model, inputs[:1]), [(inputs, torch.arange(len(inputs)) % 10)])
        return pl.factorize(model, scores, params=0.8)


def masked(model: nn.Module, inputs: Tensor) -> nn.Module:
    share = 0.5 if not pl_steps(model) or type(pl_steps(model)[-1]).__name__ != "Sparsified" else 0.25
    return pl.sparsify(model, pl.criteria.Magnitude(p=1).elementwise(model), share)


def baked(model: nn.Module, inputs: Tensor) -> nn.Module:
    return pl.bake(model)


def pl_steps(model: nn.Module) -> list:
    return getattr(model, "prunelab_plans", [])


Action = Callable[[nn.Module, Tensor], nn.Module]
WAYS: dict[str, tuple[Action, ...]] = {
    "cut": (cut, cut),
    "factorised": (factorised, factorised),
    "masked": (masked, masked),
    "baked": (masked, masked, baked),
    "cut, factorised, masked": (cut, factorised, cut, factorised, masked, masked),
    "baked, then cut": (cut, masked, baked, cut, masked, baked, cut),
    "rebuilt": (rebuilt, rebuilt, masked, masked),
}

CHILD = """
import json, sys
import torch, prunelab as pl
from safetensors.torch import load_file
folder = sys.argv[1]
found = {}
for name in json.loads(sys.argv[2]):
    fresh, inputs = pl.zoo.build(name), load_file(f"{folder}/{name}.inputs")["inputs"]
    for way in json.loads(sys.argv[3]):
        file = f"{folder}/{name}, {way}"
        model = pl.load(fresh, file).eval()
        with torch.no_grad():
            same = torch.equal(model(inputs), load_file(f"{file}.outputs")["outputs"])
        pl.save(model, f"{file}, again")
        found[f"{name}, {way}"] = [same, open(file, "rb").read() == open(f"{file}, again", "rb").read()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[bool]]]:
    """Save every network after every way here; load all of them in one new process."""
    folder = tmp_path_factory.mktemp("round")
    for name in NAMES:
        torch.manual_seed(0)
        model, inputs = perturb(pl.zoo.build(name)).eval(), torch.randn(4, 3, SIZES[name], SIZES[name])
        save_file({"inputs": inputs}, folder / f"{name}.inputs")
        for way, actions in WAYS.items():
            small = model
            for action in actions:
                small = action(small, inputs)
            pl.save(small, folder / f"{name}, {way}")
            with torch.no_grad():
                save_file({"outputs": small(inputs)}, folder / f"{name}, {way}.outputs")
    command = [sys.executable, "-W", "error", "-c", CHILD, str(folder), json.dumps(NAMES), json.dumps(list(WAYS))]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        yield json.loads(done.stdout)
    finally:
        for file in Path(folder).iterdir():
            file.unlink()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_a_new_process_loads_the_same_function_and_writes_the_same_file(found, name, way):
    outputs, file = found[f"{name}, {way}"]
    assert outputs and file

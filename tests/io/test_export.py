"""torch.export and ONNX of what pruning makes: the same outputs, from plain operators."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import prunelab as pl
from tests.cases import perturb, random_plan

NAMES = ("resnet20", "vit_small")


def cut(model: nn.Module, inputs: Tensor) -> nn.Module:
    return pl.apply(model, random_plan(model, inputs))


def rebuilt(model: nn.Module, inputs: Tensor) -> nn.Module:
    return pl.apply(model, random_plan(model, inputs), backend="graph")


def factorised(model: nn.Module, inputs: Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*are too few for.*Kronecker factors")
        warnings.filterwarnings("ignore", message=".*the layers end at")
        scores = pl.criteria.EigenDamage()(pl.trace(model, inputs), [(inputs, torch.arange(len(inputs)) % 10)])
        return pl.factorize(model, scores, params=0.6)


def masked(model: nn.Module, inputs: Tensor) -> nn.Module:
    return pl.sparsify(model, pl.criteria.Magnitude(p=1).elementwise(model), 0.3)


def baked(model: nn.Module, inputs: Tensor) -> nn.Module:
    return pl.bake(masked(model, inputs))


ACTIONS = {"cut": cut, "rebuilt": rebuilt, "factorised": factorised, "masked": masked, "baked": baked}


def made(name: str, action: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, inputs = perturb(pl.zoo.build(name)).eval(), torch.randn(4, 3, 32, 32)
    return ACTIONS[action](model, inputs).eval(), inputs


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_an_exported_program_computes_the_same(name, action):
    model, inputs = made(name, action)
    program = torch.export.export(model, (inputs,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(inputs), model(inputs), rtol=0, atol=1e-6)


def to_onnx(model: nn.Module, inputs: Tensor, file: Path) -> None:
    torch.onnx.export(model, (inputs,), file, dynamo=True, verbose=False, external_data=False)


@pytest.fixture(scope="module")
def onnx_works(tmp_path_factory) -> None:
    """Skip where the packages are missing, or an older PyTorch cannot export the whole network with them either."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra `onnx`")
    try:
        to_onnx(
            pl.zoo.build("resnet20").eval(), torch.randn(2, 3, 32, 32), tmp_path_factory.mktemp("onnx") / "whole.onnx"
        )
    except Exception:
        if torch.__version__ >= torch.torch_version.TorchVersion("2.15"):
            raise
        pytest.skip("this PyTorch cannot write a whole network as ONNX with these versions of its packages")


@pytest.mark.usefixtures("onnx_works")
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_onnx_computes_the_same(name, action, tmp_path: Path):
    import onnxruntime

    model, inputs = made(name, action)
    file = tmp_path / "model.onnx"
    to_onnx(model, inputs, file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    with torch.no_grad():
        wanted = model(inputs)
    # other kernels add up in another order
    torch.testing.assert_close(torch.from_numpy(outputs), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))

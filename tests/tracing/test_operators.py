"""Every operator that has a rule is met by a small network: its width is free, on every device, and the cut exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import prunelab as pl
from prunelab.criteria.gates import Gates
from prunelab.tracing.rules import RULES
from tests.cases import error, perturb, random_plan
from tests.operators import OPERATORS, Operator

UNIMAGINABLE = ("not linked with support", "no NVIDIA driver", "unexpected device type", "CUDA error")
"""What PyTorch says where even a tensor without data needs a driver."""

NEEDS_A_GPU = {"cudnn_grid_sampler", "_cudnn_rnn"}
NEEDS_A_GPU |= {"_lstm_mps", "linear", "max_pool2d", "_scaled_dot_product_attention_math_for_mps"}
"""Operators that PyTorch cannot run without data, or only has where it was built for that GPU."""

each = pytest.mark.parametrize("case", OPERATORS, ids=lambda case: f"{OPERATORS.index(case)}-{case.words.split()[0]}")


def traced(case: Operator, device: str) -> pl.DependencyGraph | None:
    """Trace a case on a device that need not be there; ``None`` where PyTorch asks for it."""
    model, mode = case.build(), FakeTensorMode()

    def moved(tensor: Tensor) -> Tensor:
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(mode, like, torch.device(device))

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(moved(parameter), parameter.requires_grad)
        module._buffers.update({name: moved(b) for name, b in module._buffers.items() if b is not None})
    try:
        return pl.trace(model, moved(model.inputs()))
    except pl.TraceError as problem:
        if any(text in str(problem) for text in UNIMAGINABLE):
            return None
        raise


@pytest.mark.filterwarnings(
    "ignore:.*was rebuilt for inputs of exactly the sizes", "ignore:index_reduce", "ignore:Accessing the data pointer"
)
@each
def test_a_cut_around_an_operator_is_exact(case: Operator):
    if "cpu" not in case.devices:
        pytest.skip("its operators do not exist on the CPU")
    torch.manual_seed(0)
    model = perturb(case.build()).to(case.dtype).eval()
    inputs = model.inputs()
    inputs = inputs.to(case.dtype) if inputs.is_floating_point() else inputs
    assert len(pl.trace(model, inputs).groups) == case.groups
    if not case.groups:
        return
    plan = random_plan(model, inputs, 0.5, seed=1)
    if not case.own:
        with pytest.raises(pl.PlanError, match="nothing was cut"):
            pl.apply(model, plan, backend="module")
    for backend in ["module"] * case.own + ["graph"] * case.rebuilt:
        with torch.no_grad():
            found, wanted = pl.apply(model, plan, backend=backend)(inputs), pl.masked(model, plan)(inputs)
        assert error(found, wanted) < (1e-10 if case.dtype == torch.float64 else 1e-6), backend


WRITES_WHILE_IT_RUNS = ("_fused_moving_avg_obs_fq_helper", "_batch_norm_with_update")
"""Operators that change a buffer in every run, in eval mode too."""


@pytest.mark.filterwarnings("ignore:index_reduce", "ignore:Accessing the data pointer")
@each
def test_gates_of_zero_around_an_operator_are_the_silenced_network(case: Operator):
    if "cpu" not in case.devices or not case.groups or any(word in case.words for word in WRITES_WHILE_IT_RUNS):
        pytest.skip("there is nothing to compare")
    torch.manual_seed(0)
    model = perturb(case.build()).to(case.dtype).eval()
    inputs = model.inputs()
    inputs = inputs.to(case.dtype) if inputs.is_floating_point() else inputs
    graph = pl.trace(model, inputs)
    plan = random_plan(model, inputs, 0.5, seed=1)
    z = [torch.ones(group.size, dtype=case.dtype) for group in graph.groups]
    for group, own in zip(graph.groups, z, strict=True):
        own[list(plan.removed.get(group.name, ()))] = 0
    try:
        gates = Gates(graph, inputs)
    except pl.BatchError as problem:
        if "cannot take inputs" not in str(problem):
            raise
        pytest.skip("its code writes down how many samples there are")
    with torch.no_grad():
        found, wanted = gates.run(inputs, torch.cat(z)), pl.masked(model, plan)(inputs)
    assert error(found, wanted) < (1e-9 if case.dtype == torch.float64 else 1e-5)


@pytest.mark.filterwarnings("ignore:index_reduce", "ignore:Accessing the data pointer")
@each
def test_an_operator_leaves_the_same_groups_on_every_device(case: Operator):
    graphs = {device: traced(case, device) for device in case.devices}
    groups = {d: [(g.name, g.size, g.members) for g in graph.groups] for d, graph in graphs.items() if graph}
    assert groups
    for found in groups.values():
        assert found == groups[case.devices[0]]


@pytest.mark.filterwarnings("ignore:index_reduce", "ignore:Accessing the data pointer")
def test_every_word_of_the_table_is_dispatched():
    words = {word for names in RULES.values() for word in names.split()}
    words = {word for word in words if "::" in word or hasattr(torch.ops.aten, word)}
    graphs = [traced(case, device) for case in OPERATORS for device in case.devices if device != "mps"]
    assert words - NEEDS_A_GPU <= {op.name.removesuffix("_") for graph in graphs if graph for op in graph.tape}

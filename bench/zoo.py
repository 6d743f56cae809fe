"""Trace and cut every model of torchvision and of timm's usual families, without a hint, and measure how exact that is.

    python -m bench.zoo [--models resnet18 timm/levit_128 …] [--out bench/zoo.md]

One row per model: time to trace, groups, share of the parameters that some group runs through, error of permuting
all groups, and error of the cut network against the silenced one at a random cut of half of every group, in float32 and
relative to the largest output: on inputs like those that were traced, and on three of another size, if the model takes
one.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import prunelab as pl
from prunelab.tracing.fakes import forget

HEAD = ("model", "trace, s", "groups", "parameters in groups", "permutation error", "cut error")
HEAD = (*HEAD, "at another size", "back end", "outcome")
FAMILIES = (
    "vit_tiny_patch16_224 deit3_small_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224 cait_xxs24_224 "
    "mixer_s32_224 resmlp_12_224 gmlp_ti16_224 pit_ti_224 poolformer_s12 caformer_s18 efficientformer_l1 levit_128 "
    "mobilevit_s mobilevitv2_050 edgenext_xx_small twins_pcpvt_small coat_tiny crossvit_tiny_240 xcit_nano_12_p16_224 "
    "pvt_v2_b0 swin_s3_tiny_224 convnextv2_atto inception_next_tiny mambaout_femto nfnet_f0 resnetv2_50 dpn68 "
    "hrnet_w18_small ghostnet_100 rexnet_100 res2net50_26w_4s resnest14d skresnet18 cspdarknet53 dla34 "
    "ese_vovnet19b_dw mobileone_s0 repvit_m0_9 fastvit_t8 mobilenetv4_conv_small tiny_vit_5m_224 "
    "maxxvit_rmlp_nano_rw_256 xception41"
)
"""A model of each of timm's usual families; they are only run where timm is installed."""


def build(name: str) -> nn.Module:
    """Return an untrained model of torchvision or timm by its name."""
    if name.startswith("timm/"):
        import timm

        return timm.create_model(name.removeprefix("timm/"), pretrained=False)
    segmentation = name in tv.list_models(module=tv.segmentation)
    return tv.get_model(name, weights=None, **({"weights_backbone": None} if segmentation else {}))


def inputs_for(name: str, model: nn.Module) -> Tensor:
    """Return random images or one clip of the size that a model was made for."""
    if name.startswith("timm/"):
        return torch.randn(2, *model.default_cfg["input_size"])  # type: ignore[arg-type, misc]
    if name in tv.list_models(module=tv.video):
        frames, size = (16, 224) if name.startswith(("mvit", "swin", "s3d")) else (8, 112)
        return torch.randn(1, 3, frames, size, size)
    size = 299 if name == "inception_v3" else 256 if name.startswith("swin_v2") else 224
    return torch.randn(2, 3, size, size)


def disturb(model: nn.Module) -> nn.Module:
    """Give norms, biases and zero-initialised weights values that matter."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.dim() == 1:
            positive = name.endswith(("weight", "running_var"))
            tensor.data = torch.rand_like(tensor) + 0.5 if positive else 0.2 * torch.randn_like(tensor)
        elif tensor.is_floating_point() and not tensor.any():
            tensor.data = 0.2 * torch.randn_like(tensor)
    return model


def error(found: object, wanted: object) -> float:
    """Return the largest difference over all outputs, relative to each one's largest entry."""
    pairs = zip(tree_leaves(found), tree_leaves(wanted), strict=True)
    return max(float((one - two).abs().max() / two.abs().max()) for one, two in pairs)


def permuted(model: nn.Module, graph: pl.DependencyGraph) -> nn.Module:
    """Return a copy in which every group has its units in another order, in every member."""
    model = forget(copy.deepcopy(model))
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for group in graph.groups:
        order = torch.randperm(group.size)
        for member in group.members:
            place = member.unit.clone()
            owned = (place >= 0).nonzero().flatten()
            # Positions of a unit, in order: sorting by unit puts those of equal rank side by side.
            by_unit = owned[place[owned].argsort(stable=True)].view(group.size, -1)
            index = torch.arange(len(place))
            index[by_unit] = by_unit[order]
            tensors[member.name].data = tensors[member.name].data.index_select(member.dim, index)
    return model


def others(inputs: Tensor) -> Iterator[Tensor]:
    """Yield three inputs of another size, then of the same."""
    for more in (32, 0):
        yield torch.randn(3, *inputs.shape[1:-2], *(size + more for size in inputs.shape[-2:]))


def error_elsewhere(model: nn.Module, cut: nn.Module, silent: nn.Module, inputs: Tensor) -> tuple[float, str]:
    """Return the error on inputs that were not traced, and their size; a network that was rebuilt may take one only."""
    for other in others(inputs):
        try:
            model(other)
            found = cut(other)
        except Exception:
            continue
        return error(found, silent(other)), "×".join(map(str, other.shape[2:]))
    return float("nan"), "none"


def measure(name: str) -> dict[str, object]:
    """Return one row of the table."""
    torch.manual_seed(0)
    model = disturb(build(name)).eval()
    inputs = inputs_for(name, model)
    pl.trace(model, inputs)
    start = time.perf_counter()
    graph = pl.trace(model, inputs)
    row: dict[str, object] = {
        "model": name,
        "trace, s": f"{time.perf_counter() - start:.2f}",
        "groups": len(graph.groups),
    }
    names = {member.name for group in graph.groups for member in group.members}
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    row["parameters in groups"] = f"{sum(sizes.get(key, 0) for key in names) / sum(sizes.values()):.1%}"
    with torch.no_grad():
        wanted = model(inputs)
        row["permutation error"] = f"{error(permuted(model, graph)(inputs), wanted):.0e}"
        overrides = {group.name: min(0.5, 1 - 1 / group.size) for group in graph.groups}
        plan = pl.plan(pl.criteria.Random()(graph), ratio=0.5, overrides=overrides)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the table says that the graph back end was needed
            cut = pl.apply(model, plan, check=False)  # which is what is measured here
        row["back end"] = "graph" if isinstance(cut, torch.fx.GraphModule) else "module"
        silent = pl.masked(model, plan)
        row["cut error"] = f"{error(cut(inputs), silent(inputs)):.0e}"
        elsewhere, size = error_elsewhere(model, cut, silent, inputs)
        row["at another size"] = f"{elsewhere:.0e} ({size})"
    good = max(float(str(row["permutation error"])), float(str(row["cut error"])), elsewhere) < 1e-4
    row["outcome"] = "exact" if good else "WRONG"
    return row


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [name for part in (tv, tv.segmentation, tv.video) for name in tv.list_models(module=part)]
    if importlib.util.find_spec("timm"):
        everything += [f"timm/{name}" for name in FAMILIES.split()]
    parser.add_argument("--models", nargs="+", default=everything)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchvision")
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    print("\n".join(lines))
    rows = []
    for name in tqdm(args.models, unit="model"):
        try:
            row = measure(name)
        except pl.PruneLabError as problem:
            row = {"model": name, "outcome": str(problem).splitlines()[0][:160].replace("|", "/")}
        rows.append(row)
        lines.append("| " + " | ".join(str(row.get(key, "–")) for key in HEAD) + " |")
        tqdm.write(lines[-1])
        if args.out:
            args.out.write_text("\n".join([*lines, "", summary(rows)]) + "\n")
    print(summary(rows))


def summary(rows: list[dict[str, object]]) -> str:
    """Return how many models are cut exactly, and by which back end."""
    exact = [row for row in rows if row["outcome"] == "exact"]
    ends = {end: sum(row["back end"] == end for row in exact) for end in ("module", "graph")}
    return f"{len(exact)} of {len(rows)} models are exact: {ends['module']} cut in place, {ends['graph']} rebuilt."


if __name__ == "__main__":
    main()

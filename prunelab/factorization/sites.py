"""Sites: the layers of a model that a bottleneck may stand for, and how often each is used.

Flows in: a model.  Flows out: ``Site``s by the name of their weight, and for all other layers the reason in words.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from prunelab.curvature.watching.layer_calls import LayerCall, LayerCalls
from prunelab.errors import BatchError
from prunelab.factorization.bottleneck import Bottleneck, BottleneckAttention, parts_of, refusal
from prunelab.runtime.switches import without_data
from prunelab.surgery.layers import FreeMultiheadAttention
from prunelab.tracing import fakes
from prunelab.tracing.answering import Answering

Positions = tuple[int, int, int]
"""How many vectors the inward, core and outward layer of a bottleneck multiply in one forward pass."""


@dataclass(frozen=True, eq=False)
class Site:
    """A layer that a bottleneck may stand for.

    Attributes:
        weight: qualified name of the weight that is split; of the core, for a bottleneck.
        path: of the module.
        layer: the layer; for the fused projection of an attention layer a linear layer with its parameters.
        fused: whether it is that.
    """

    weight: str
    path: str
    layer: nn.Module
    fused: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """``[groups, out, in, *kernel]`` of the weight that is split."""
        return tuple(parts_of(self.layer).core.shape)

    @property
    def around(self) -> tuple[int | None, int | None]:
        """Sizes per group at the far ends of the rotations that there are already."""
        parts = parts_of(self.layer)
        inward = None if parts.inward is None else parts.inward.shape[2]
        return inward, None if parts.outward is None else parts.outward.shape[1]


def find(model: nn.Module) -> tuple[dict[str, Site], dict[str, str]]:
    """Return all sites by the name of their weight, and why other linear and convolution layers are none.

    Attention layers whose projection is to be found must be ``FreeMultiheadAttention``
    (``prunelab.surgery.layers.free``).
    """
    sites: dict[str, Site] = {}
    dense: dict[str, str] = {}
    owners: dict[int, int] = defaultdict(int)
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] += 1
    inside: set[str] = set()
    weight: Tensor | None
    for path, module in model.named_modules():
        if path.rpartition(".")[0] in inside:
            inside.add(path)
            continue
        prefix = f"{path}." if path else ""
        if isinstance(module, Bottleneck):
            inside.add(path)
            site = Site(f"{prefix}core.weight", path, module)
            weight, reason = module.core.weight, refusal(module.core)
            reason = "it has hooks" if module._forward_hooks or module._forward_pre_hooks else reason
        elif isinstance(module, (nn.Linear, _ConvNd)):
            site, weight, reason = (
                Site(f"{prefix}weight", path, module),
                module._parameters.get("weight"),
                refusal(module),
            )
        elif isinstance(module, FreeMultiheadAttention) and module.in_proj_weight is not None:
            site = Site(f"{prefix}in_proj_weight", path, _as_linear(module), fused=True)
            weight, reason = module.in_proj_weight, None
        else:
            continue
        if not path and not site.fused:
            reason = "it is the whole model; put it into an nn.Sequential"
        elif reason is None and owners[id(weight)] > 1:
            reason = "another layer shares its weight"
        elif reason is None and site.shape[1:3] == (1, 1):
            reason = "it has one channel per group"
        if reason is None:
            sites[site.weight] = site
        else:
            dense[site.weight] = reason
    return sites, dense


def _as_linear(attention: nn.MultiheadAttention) -> nn.Linear:
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer.train(attention.training)


def uses(
    model: nn.Module, sites: Mapping[str, Site], mode: Any, inputs: Any
) -> tuple[dict[str, Positions], dict[str, str]]:
    """Return how many positions the inward, core and outward layer of each site would see in one forward pass.

    Args:
        model: a fake copy of a model, which is changed: it gets hooks.
        sites: of that copy.
        mode: the fake mode that it lives in.
        inputs: example inputs.

    Returns:
        Weight name -> positions; and why a bottleneck would not do for the other sites: other code uses the weight.

    Raises:
        BatchError: the model cannot run on the inputs.
    """
    watch = _Watch(sites)
    for name, site in sites.items():
        layer = model.get_submodule(site.path)
        layer.register_forward_pre_hook(partial(watch.enter, name))
        layer.register_forward_hook(partial(watch.leave, name), with_kwargs=True)
    args, kwargs = fakes.fake_inputs(inputs, mode, model)
    try:
        with without_data(), mode, Answering(mode), LayerCalls(model.eval(), before=watch.before, keep=False):
            model(*args, **kwargs)
    except Exception as error:
        raise BatchError(f"{type(model).__name__} cannot run on the example inputs: {error}") from error
    foreign = dict(watch.foreign)
    for name in sites:
        if name not in watch.seen:
            foreign.setdefault(name, "the example inputs do not reach it")
    return {name: positions for name, positions in watch.seen.items() if name not in foreign}, foreign


class _Watch:
    """Counts positions, and notices when a weight is used while its own layer is not running."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.sites = sites
        self.seen: dict[str, Positions] = {}
        self.foreign: dict[str, str] = {}
        self.running: dict[str, int] = defaultdict(int)

    def enter(self, name: str, layer: nn.Module, args: Any) -> None:
        self.running[name] += 1

    def leave(self, name: str, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.running[name] -= 1
        site = self.sites[name]
        if site.fused:
            return
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        groups, out, into = site.shape[:3]
        inner = given.numel() // (groups * (site.around[0] or into))
        outer = output.numel() // (groups * (site.around[1] or out))
        core, _ = parts_of(site.layer).view.ordered(outer, inner)  # its kernel slides over the other of the two
        self.add(name, inner, core, outer)

    def before(self, found: LayerCall) -> None:
        site = self.sites.get(found.weight)
        if site is None:
            return
        if not self.running[found.weight]:
            self.foreign[found.weight] = "code other than its own uses its weight"
        elif site.fused and found.rows != slice(0, math.prod(site.shape[:2])):
            self.foreign[found.weight] = "queries, keys and values are not projected from one tensor"
        elif site.fused:
            rows = found.input.numel() // found.input.shape[-1]
            self.add(found.weight, rows, rows, rows)

    def add(self, name: str, *positions: int) -> None:
        before = self.seen.get(name, (0, 0, 0))
        self.seen[name] = before[0] + positions[0], before[1] + positions[1], before[2] + positions[2]


def put(model: nn.Module, site: Site, made: Bottleneck) -> None:
    """Put a bottleneck in the place of a site's layer, wherever the model holds it."""
    layer = model.get_submodule(site.path)
    if site.fused:
        layer.__class__ = BottleneckAttention
        layer.in_proj = made
        layer.in_proj_weight = layer.in_proj_bias = None  # type: ignore[assignment]
    else:
        for module in list(model.modules()):
            for name, child in list(module._modules.items()):
                if child is layer:
                    module._modules[name] = made
    for path, module in model.named_modules():
        inside = f"{site.path}.".startswith(f"{path}." if path else "")
        if inside and isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # keeps it off a fused path, which would multiply the layers out
        if inside and isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # these are for that path

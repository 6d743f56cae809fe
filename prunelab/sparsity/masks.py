"""Masks: weights that are zero and stay zero, as torch parametrizations.

Flows in: a model and which weights stay.  Flows out: the same model with masks (``put_masks``), or with the zeros
written into its weights and the masks taken off (``bake``).  Notebook 05_obs uses them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunelab.distributed import refuse_wrapped
from prunelab.errors import PlanError
from prunelab.plans import PLANS
from prunelab.runtime.devices import exact
from prunelab.runtime.isolation import copied, modes_kept
from prunelab.runtime.switches import undisturbed
from prunelab.surgery.layers import layer_type

LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.MultiheadAttention,
    nn.RNNBase,
)
"""Layers whose weights are pruned unless ``names`` says otherwise: no norms, no biases, no free parameters."""

ORDER = "prunelab_order"
"""Attribute of a module with masks: the order of its parameters before, which ``bake`` restores."""


class Mask(nn.Module):
    """The parametrization: ``w`` where the mask (bool, like the weight) is True, zero elsewhere."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        # Not a product: 0 · nan would be nan, and 0 · −1 is −0.
        return weight.masked_fill(~self.mask, 0)


@dataclass(frozen=True)
class Sparsified:
    """What ``save`` has to know of a sparse model: which weights have masks.

    Attributes:
        names: qualified names of the weights.
    """

    names: tuple[str, ...]

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps({"action": "sparsify", "names": list(self.names)})

    @classmethod
    def from_json(cls, text: str) -> Sparsified:
        """Read it back.

        Raises:
            PlanError: the text is something else.
        """
        try:
            return cls(tuple(str(name) for name in json.loads(text)["names"]))
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"This does not say which weights have masks: {error!r}.") from error

    def redo(self, model: nn.Module) -> nn.Module:
        """Put masks that let everything pass on ``model`` itself, as a place for those of a file.

        Raises:
            PlanError: the model lacks one of the weights.
        """
        parameters = parameters_of(model)
        for name in self.names:
            if name not in parameters:
                raise PlanError(f"A mask belongs to `{name}`, but {type(model).__name__} has no such parameter.")
        return put_masks(model, {name: torch.ones_like(value_of(model, name), dtype=torch.bool) for name in self.names})


@undisturbed()
def bake(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Return ``model`` with its zeros written into the weights and the masks taken off: plain layers again.

    From here on training fills the zeros.  A model without masks comes back as it is (as a copy).

    Args:
        model: a model that ``sparsify`` made.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The model without masks, of the same class, in the same mode, on the same device.

    Raises:
        PlanError: a weight with a mask has another parametrization too, whose result a plain weight cannot keep.

    >>> import prunelab as pl
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> sparse = pl.sparsify(model, {"0.weight": torch.arange(8.0).view(2, 4)}, 0.25)
    >>> list(sparse.state_dict()), list(pl.bake(sparse).state_dict())
    (['0.bias', '0.parametrizations.weight.original', '0.parametrizations.weight.0.mask'], ['0.weight', '0.bias'])
    >>> int((pl.bake(sparse)[0].weight != 0).sum())
    2
    """
    refuse_wrapped(model)
    for module, parts, attribute in _masked(model):
        if len(parts) > 1:
            raise PlanError(
                f"`{attribute}` of a {type(module).__name__} has a mask and another parametrization: first remove "
                "that, with torch.nn.utils.parametrize.remove_parametrizations."
            )
    out = model if inplace else copied(model)
    for module, _, attribute in list(_masked(out)):
        _own_class(module)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
        if not parametrize.is_parametrized(module):
            order = vars(module).pop(ORDER, [])
            for name in [name for name in order if name in module._parameters]:
                module._parameters[name] = module._parameters.pop(name)
    if hasattr(out, PLANS):
        setattr(out, PLANS, [made for made in getattr(out, PLANS) if not isinstance(made, Sparsified)])
    return out


def densities(model: nn.Module) -> dict[str, float]:
    """Return the share of weights that are not zero, by parameter name, for all weights that ``sparsify`` may prune.

    Tied weights count once.
    """
    seen: set[int] = set()
    out = {}
    for name, parameter in parameters_of(model).items():
        if (prunable(model, name) or mask_of(model, name) is not None) and id(parameter) not in seen:
            seen.add(id(parameter))
            out[name] = float(exact(value_of(model, name) != 0).mean())
    return out


def density(model: nn.Module) -> float:
    """Return the share of weights that are not zero, over all weights that ``sparsify`` may prune together."""
    shares = densities(model)
    sizes = {name: value_of(model, name).numel() for name in shares}
    return sum(share * sizes[name] for name, share in shares.items()) / max(sum(sizes.values()), 1) if sizes else 1.0


def put_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Put masks (parameter name -> bool like it) on ``model`` itself, and what ``save`` needs to know of them."""
    parameters = parameters_of(model)
    fresh = []
    for name, mask in masks.items():
        mask = mask.to(parameters[name].device).clone(memory_format=torch.contiguous_format)  # no view of all masks
        old = mask_of(model, name)
        if old is not None:
            old.mask = mask
            continue
        fresh.append(name)
        parametrization = Mask(mask)
        for owner, attribute in places_of(model, parameters[name]):
            _own_class(owner)
            vars(owner).setdefault(ORDER, list(owner._parameters))
            parametrize.register_parametrization(owner, attribute, parametrization)
    if fresh:
        setattr(model, PLANS, [*getattr(model, PLANS, []), Sparsified(tuple(fresh))])
    return model


def places_of(model: nn.Module, parameter: Tensor) -> list[tuple[nn.Module, str]]:
    """Return every module and attribute that holds a parameter; several if it is tied."""
    paths = [path.rpartition(".") for path, found in parameters_of(model).items() if found is parameter]
    places = [(model.get_submodule(module), attribute) for module, _, attribute in paths]
    return list({(id(owner), attribute): (owner, attribute) for owner, attribute in places}.values())


def mask_of(model: nn.Module, name: str) -> Mask | None:
    """Return the mask on a weight, ``None`` where there is none."""
    module, _, attribute = name.rpartition(".")
    owner = model.get_submodule(module)
    if not parametrize.is_parametrized(owner, attribute):
        return None
    parts: Any = owner.parametrizations[attribute]  # type: ignore[index]
    return next((part for part in parts if isinstance(part, Mask)), None)


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    PyTorch keeps the properties of a parametrized module in a class that it makes; copies of the module share it, and
    changing the parametrizations of one would break the others.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        members = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, members)


def _masked(model: nn.Module) -> Iterator[tuple[nn.Module, nn.ModuleList, str]]:
    for module in model.modules():
        known: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
        for attribute, parts in known.items():
            if any(isinstance(part, Mask) for part in parts):
                yield module, parts, attribute


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters under the names that the user knows, parametrized or not, tied ones under every name."""
    found: dict[str, Tensor] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(plain_name(path), parameter)
    return found


def plain_name(name: str) -> str:
    """Return the name that a parameter had before it was parametrized."""
    module, between, rest = name.rpartition("parametrizations.")
    return module + rest.rpartition(".")[0] if between else name


def value_of(model: nn.Module, name: str) -> Tensor:
    """Return a weight as its layer uses it, masks and all."""
    module, _, attribute = name.rpartition(".")
    owner = model.get_submodule(module)
    with modes_kept(owner):  # in training mode a look at a spectral norm changes it
        if parametrize.is_parametrized(owner):
            owner.eval()
        return getattr(owner, attribute).detach()


def prunable(model: nn.Module, name: str) -> bool:
    """Return whether a parameter is the weight of one of the ``LAYERS``, under this name or one that it is tied to."""
    value = value_of(model, name)
    return value.dim() >= 2 and any(
        issubclass(layer_type(owner), LAYERS) and "bias" not in attribute
        for owner, attribute in places_of(model, parameters_of(model)[name])
    )


def input_dim(model: nn.Module, name: str) -> int:
    """Return the dimension of a weight that runs over its layer's inputs."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return 0 if issubclass(layer_type(owner), nn.modules.conv._ConvTransposeNd) else 1

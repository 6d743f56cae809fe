"""What factorising did to a model, as plain data, and how to do it again.

Flows in: the ranks of some layers, by name, and their eigenbases (or none: then the weights are to be loaded).  Flows
out: the model with bottlenecks.  ``save`` writes the note into the file, ``load`` rebuilds the model from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.criteria.eigendamage import LayerScores
from prunelab.errors import PlanError
from prunelab.factorization.bottleneck import fill, parts_of, shell
from prunelab.factorization.sites import Site, find, put
from prunelab.plans import PLANS
from prunelab.surgery.layers import free
from prunelab.tracing import fakes


@dataclass(frozen=True)
class Narrowed:
    """One layer that became a bottleneck.

    Attributes:
        weight: qualified name of the weight that was split; the core's, where there was a bottleneck before.
        shape: of that weight's matrices before, ``[groups, out, in, *kernel]``.
        inward: r_in per group, ``None`` if that side was left alone.
        outward: r_out per group, or ``None``.
    """

    weight: str
    shape: tuple[int, ...]
    inward: int | None
    outward: int | None


@dataclass(frozen=True)
class Factorized:
    """What ``factorize`` did to a model.

    Attributes:
        layers: the layers that became bottlenecks.
        train_rotations: whether the rotations require gradients.
        budget: what was asked for, the shares of FLOPs and parameters that are kept, and the damage that the quadratic
            model predicts.
        dense: weight name -> why that layer cannot be a bottleneck (not saved).
    """

    layers: tuple[Narrowed, ...]
    train_rotations: bool = True
    budget: dict[str, Any] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict, compare=False)

    def to_json(self) -> str:
        """Return it as JSON."""
        data = asdict(self)
        del data["dense"]
        return json.dumps({"action": "factorize"} | data)

    @classmethod
    def from_json(cls, text: str) -> Factorized:
        """Read it back.

        Raises:
            PlanError: the text is something else.
        """
        try:
            data = json.loads(text)
            if data["action"] != "factorize" or type(data["train_rotations"]) is not bool:
                raise PlanError("This is not a factorisation of prunelab.")
            layers = tuple(
                Narrowed(
                    str(layer["weight"]),
                    tuple(int(size) for size in layer["shape"]),
                    *(None if layer[side] is None else int(layer[side]) for side in ("inward", "outward")),
                )
                for layer in data["layers"]
            )
            return cls(layers, data["train_rotations"], dict(data["budget"]))
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"This is not a factorisation of prunelab: {error!r}.") from error

    def redo(self, model: nn.Module) -> nn.Module:
        """Return ``model``, changed in place, with bottlenecks of these shapes, whose weights are not set yet.

        Raises:
            PlanError: a layer is missing, of another shape, or cannot be split; nothing was changed then.
        """
        return build(model, self)


@torch.no_grad()
def build(model: nn.Module, note: Factorized, bases: Mapping[str, LayerScores] | None = None) -> nn.Module:
    """Put the bottlenecks of a note into ``model`` itself.

    Args:
        model: which has the layers that the note names.
        note: the layers and ranks.
        bases: weight name -> eigenbasis; without it the weights of the bottlenecks are left unset, to be loaded.

    Raises:
        PlanError: a layer is missing, of another shape, or cannot be split; ``model`` is unchanged.
    """
    names = {layer.weight for layer in note.layers}
    _sites_of(free(fakes.fake_model(model, fakes.fake_mode()), names), note)
    sites = _sites_of(free(model, names), note)
    for layer in note.layers:
        site = sites[layer.weight]
        made = shell(site.layer, layer.inward, layer.outward, note.train_rotations)
        if bases is not None:
            left, right = _rotations(bases[layer.weight], layer)
            fill(made, parts_of(site.layer).rotated(left, right))
        put(model, site, made)
    setattr(model, PLANS, [*getattr(model, PLANS, []), note])
    return model


def _rotations(basis: LayerScores, layer: Narrowed) -> tuple[Tensor | None, Tensor | None]:
    """Return the directions that are kept of both sides, the most important first, ``[groups, size, rank]``."""

    def kept(vectors: Tensor, importance: Tensor, rank: int | None) -> Tensor | None:
        if rank is None:
            return None
        groups = layer.shape[0]
        order = importance.reshape(groups, -1).argsort(dim=1, descending=True, stable=True)[:, :rank]
        vectors = vectors.reshape(groups, *vectors.shape[-2:])
        return vectors.gather(2, order[:, None, :].expand(-1, vectors.shape[1], -1))

    return kept(basis.Q_S, basis.rows, layer.outward), kept(basis.Q_A, basis.columns, layer.inward)


def _sites_of(model: nn.Module, note: Factorized) -> dict[str, Site]:
    """Return the sites of the layers that a note names.

    Raises:
        PlanError: one is missing or does not fit.
    """
    sites, dense = find(model)
    seen = set()
    for layer in note.layers:
        site = sites.get(layer.weight)
        if site is None:
            why = dense.get(layer.weight, f"{type(model).__name__} has no such linear or convolution layer")
            raise PlanError(f"Cannot factorise `{layer.weight}`: {why}.")
        if site.shape != tuple(layer.shape):
            raise PlanError(
                f"Cannot factorise `{layer.weight}`: it has the shape {list(site.shape)} (groups, out, in, kernel), "
                f"and {list(layer.shape)} is expected."
            )
        ranks = ((layer.inward, site.shape[2]), (layer.outward, site.shape[1]))
        if layer.weight in seen or any(rank is not None and not 0 < rank <= size for rank, size in ranks):
            raise PlanError(f"Cannot factorise `{layer.weight}` at ranks {layer.inward} and {layer.outward}.")
        seen.add(layer.weight)
    return sites

"""Sparse training: penalties that make whole units small while a network learns, so that they can go without harm.

For those who start before the pruning does.  Every class is built from a graph; its ``loss()`` is added to the loss
that is trained on:

    penalty = pl.regularizers.GroupLasso(pl.trace(model, images), 1e-4)
    (loss_function(model(inputs), targets) + penalty.loss()).backward()

The parameters are those of the traced model, looked up at every call: the penalty follows them to another device, and
holds for the module inside ``DistributedDataParallel`` too.  A unit is the same as everywhere else, all slices that can
only go together; ``pl.trace(…, ignore=)`` leaves modules out.

Flows in: a graph.  Flows out: a number to add to the loss.  Notebook 02_magnitude shows the scores that fit them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from prunelab.criteria.bn_scale import NORMS
from prunelab.errors import BudgetError, PlanError
from prunelab.tracing.groups import Group, Member
from prunelab.tracing.trace import DependencyGraph

__all__ = ["DepGraphNorm", "GroupLasso", "NetworkSlimming", "Regularizer"]


@dataclass(frozen=True, eq=False)
class _Slices:
    """Where the units of a group lie in one dimension of one parameter.

    Attributes:
        name: of the parameter.
        dim: the dimension.
        shape: of the parameter when it was traced.
        places: int64, the positions that belong to some unit.
        owners: int64 like ``places``, the unit.
    """

    name: str
    dim: int
    shape: tuple[int, ...]
    places: Tensor
    owners: Tensor

    @property
    def weights(self) -> int:
        """How many numbers of the parameter lie at one position."""
        return math.prod(self.shape) // self.shape[self.dim]


class Regularizer(ABC):
    """A penalty on the units of a graph's groups.

    Args:
        graph: of the model that is trained.
        strength: λ, at least 0.  It may be changed between steps (``penalty.strength = …``), as schedules do.

    Raises:
        BudgetError: ``strength`` is not a number of at least 0.
        PlanError: the graph has nothing that the penalty is about.
    """

    def __init__(self, graph: DependencyGraph, strength: float) -> None:
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength < math.inf:
            raise BudgetError(f"`strength` must be a number of at least 0, got {strength!r}.")
        self.model, self.strength = graph.model, strength
        self.sizes = {group.name: group.size for group in graph.groups}
        parameters = {name for name, _ in graph.model.named_parameters()}
        self._slices: dict[str, list[_Slices]] = {}
        for group in graph.groups:
            found = [_slices(graph, member) for member in self._counted(group) if member.name in parameters]
            if found:
                self._slices[group.name] = found
        if not self._slices:
            raise PlanError(
                f"{type(graph.model).__name__} has no group that {type(self).__name__} could act on: {self._missing}."
            )
        self._placed: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    _missing = "nothing in it can be pruned"

    @abstractmethod
    def _counted(self, group: Group) -> list[Member]:
        """Return the members whose slices count."""

    @abstractmethod
    def loss(self) -> Tensor:
        """Return the penalty, a scalar on the model's device, to add to the loss before ``backward``.

        Raises:
            PlanError: the model has other parameters or shapes than when it was traced.
        """

    def squares(self) -> dict[str, Tensor]:
        """Return ``‖θ_u‖²`` of every unit, by group name, float ``[size]``: the sum over all members that count.

        Raises:
            PlanError: as for ``loss``.
        """
        out = {}
        for name, parts in self._slices.items():
            sums = [self._by_unit(part, self.sizes[name]) for part in parts]
            out[name] = torch.stack([one.to(sums[0]) for one in sums]).sum(0)
        return out

    def _by_unit(self, part: _Slices, size: int) -> Tensor:
        """Return the sum of squares of every unit in one parameter."""
        value = self._value(part)
        value = value if value.dtype in (torch.float32, torch.float64) else value.float()
        sums = value.square().movedim(part.dim, 0).flatten(1).sum(1) if value.dim() > 1 else value.square()
        places, owners = self._at(part, sums)
        return sums.new_zeros(size).index_add(0, owners, sums.index_select(0, places))

    def _value(self, part: _Slices) -> Tensor:
        """Return a parameter as it is now, as its layer uses it."""
        module, _, attribute = part.name.rpartition(".")
        try:
            value = getattr(self.model.get_submodule(module), attribute)
        except AttributeError:
            value = None
        if not isinstance(value, Tensor) or tuple(value.shape) != part.shape:
            found = f"has the shape {list(value.shape)}" if isinstance(value, Tensor) else "is gone"
            raise PlanError(
                f"`{part.name}` had the shape {list(part.shape)} when {type(self.model).__name__} was traced, and now "
                f"{found}: trace the model again and make a new {type(self).__name__}."
            )
        return value

    def _at(self, part: _Slices, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions and owners where the parameter is."""
        key = (id(part), like.device)
        if key in self._placed:
            return self._placed[key]
        found = part.places.to(like.device), part.owners.to(like.device)
        if not isinstance(like, FakeTensor) and not isinstance(found[0], FakeTensor):
            self._placed[key] = found
        return found

    def __repr__(self) -> str:
        return f"{type(self).__name__}(strength={self.strength}, {len(self._slices)} of {len(self.sizes)} groups)"


class NetworkSlimming(Regularizer):
    """``λ Σ |γ|`` over the scales of norms: channels that do little are switched off at their batch norm.

    Only scales that a unit owns count, each once.  The gradient is ``λ sign(γ)``, 0 where γ is 0.  Afterwards prune by
    ``pl.criteria.BNScale()``.

    Args:
        graph: of the model that is trained.
        strength: λ; the paper takes 1e-4 or 1e-5.
        every_norm: whether group, layer, instance and RMS norms count too, and not batch norms alone.

    Raises:
        BudgetError: ``strength`` is not a number of at least 0.
        PlanError: no unit is scaled by such a norm.

    Source: Liu et al. 2017, *Learning Efficient Convolutional Networks through Network Slimming*, equation 1.

    >>> from prunelab import trace
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    >>> penalty = NetworkSlimming(trace(model, torch.ones(1, 3, 8, 8)), strength=0.5)
    >>> penalty.loss().detach().item()  # four scales, all 1
    2.0
    >>> penalty.loss().backward()
    >>> model[1].weight.grad.tolist()
    [0.5, 0.5, 0.5, 0.5]
    """

    _missing = "no batch norm with a scale runs through its groups"

    def __init__(self, graph: DependencyGraph, strength: float = 1e-4, *, every_norm: bool = False) -> None:
        kinds = NORMS if every_norm else (nn.modules.batchnorm._BatchNorm,)
        self._scales = {
            f"{name}.weight" if name else "weight" for name, m in graph.model.named_modules() if isinstance(m, kinds)
        }
        super().__init__(graph, strength)

    def _counted(self, group: Group) -> list[Member]:
        return [member for member in group.members if member.name in self._scales]

    def loss(self) -> Tensor:
        terms: list[Tensor] = []
        for part in {part.name: part for parts in self._slices.values() for part in parts}.values():
            value = self._value(part)
            places, _ = self._at(part, value)
            terms.append(value.abs().movedim(part.dim, 0).index_select(0, places).sum())
        return self.strength * _total(terms)


class _OnGroups(Regularizer):
    """What both penalties on whole groups share: which members count."""

    def __init__(self, graph: DependencyGraph, strength: float, *, bias: bool = True) -> None:
        self.bias = bias
        super().__init__(graph, strength)

    def _counted(self, group: Group) -> list[Member]:
        return [member for member in group.members if self.bias or not member.name.endswith("bias")]


class GroupLasso(_OnGroups):
    """``λ Σ_g Σ_u √n_u ‖θ_u‖₂``: whole units go to zero, in all layers that they run through, at the same time.

    θ_u are all weights of unit u: its rows in every layer that produces it, its columns in every layer that consumes
    it, its scales and biases; n_u is their number.  The gradient is ``λ √n_u θ / ‖θ_u‖``, which does not get weaker as
    the unit gets smaller, and 0 where the unit is zero.  A weight between two groups is in a unit of each.  Afterwards
    prune by ``pl.criteria.Magnitude(group_reduction="sum", normalizer="none")``.

    Args:
        graph: of the model that is trained.
        strength: λ.
        by_size: the factor √n_u, which asks as much of large units as of small ones, weight by weight.
        bias: whether biases count.

    Raises:
        BudgetError: ``strength`` is not a number of at least 0.
        PlanError: the graph has no groups.

    Source: Yuan & Lin 2006, *Model selection and estimation in regression with grouped variables*, equation 2.1; over
    the coupled slices of several layers in Fang et al. 2023, *DepGraph*, section 3.3.

    >>> from prunelab import trace
    >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0], [0.0]]))
    >>> _ = model[2].weight.data.copy_(torch.tensor([[4.0, 2.0]]))
    >>> penalty = GroupLasso(trace(model, torch.ones(1, 1)), 1.0, by_size=False)
    >>> penalty.loss().detach().item()  # a unit of the weights 3 and 4, and one of 0 and 2
    7.0
    >>> penalty.loss().backward()
    >>> model[0].weight.grad.flatten().tolist(), model[2].weight.grad.flatten().tolist()
    ([0.6, 0.0], [0.8, 1.0])
    """

    def __init__(
        self, graph: DependencyGraph, strength: float = 1e-4, *, by_size: bool = True, bias: bool = True
    ) -> None:
        super().__init__(graph, strength, bias=bias)
        self.numbers: dict[str, Tensor] = {}
        for name, parts in self._slices.items():
            numbers = torch.zeros(self.sizes[name])
            for part in parts:
                numbers.index_add_(0, part.owners, torch.full((len(part.owners),), float(part.weights)))
            self.numbers[name] = numbers.sqrt() if by_size else torch.ones_like(numbers)

    def loss(self) -> Tensor:
        terms = []
        for name, squares in self.squares().items():
            # The root has no slope at zero; held above zero it passes none on, and a unit that is gone stays gone.
            norms = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
            terms.append((self.numbers[name].to(norms) * norms).sum())
        return self.strength * _total(terms)


class DepGraphNorm(_OnGroups):
    """``λ Σ_g Σ_u γ_u ‖θ_u‖²``, with up to 2^α times more pressure on the units that are smallest already.

        γ_u = 2^(α (max_v I_v − I_u) / (max_v I_v − min_v I_v)),        I_u = ‖θ_u‖²

    θ_u as in ``GroupLasso``.  γ is a constant in the gradient, which is ``2 λ γ_u θ``.  In a group whose units are all
    equal γ is 1.

    Args:
        graph: of the model that is trained.
        strength: λ; Torch-Pruning takes 1e-4, for half of this penalty.
        alpha: α, how far the pressure on units differs: 1 for the largest, 2^α for the smallest.
        bias: whether biases count.

    Raises:
        BudgetError: ``strength`` or ``alpha`` is not a number of at least 0.
        PlanError: the graph has no groups.

    Source: Fang et al. 2023, *DepGraph: Towards Any Structural Pruning*, section 3.3, with α = 4.

    >>> from prunelab import trace
    >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [2.0]])), model[2].weight.data.fill_(0.0)
    >>> penalty = DepGraphNorm(trace(model, torch.ones(1, 1)), 1.0)
    >>> penalty.loss().detach().item()  # 16 · 1² + 1 · 2²
    20.0
    """

    def __init__(
        self, graph: DependencyGraph, strength: float = 1e-4, *, alpha: float = 4.0, bias: bool = True
    ) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < math.inf:
            raise BudgetError(f"`alpha` must be a number of at least 0, got {alpha!r}.")
        super().__init__(graph, strength, bias=bias)
        self.alpha = alpha

    def loss(self) -> Tensor:
        terms = []
        for squares in self.squares().values():
            sizes = squares.detach()
            range_ = (sizes.amax() - sizes.amin()).clamp_min(torch.finfo(sizes.dtype).tiny)
            terms.append((2 ** (self.alpha * (sizes.amax() - sizes) / range_) * squares).sum())
        return self.strength * _total(terms)


def _total(terms: list[Tensor]) -> Tensor:
    """Return the sum of scalars, on the device of the first; a model may be spread over several."""
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _slices(graph: DependencyGraph, member: Member) -> _Slices:
    places = (member.unit >= 0).nonzero().flatten()
    return _Slices(member.name, member.dim, graph.shapes[member.name], places, member.unit[places])

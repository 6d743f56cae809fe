"""What all criteria share: the scores they return, and how numbers per weight become numbers per unit.

Removing unit u sets its slices to zero, δ = −θ on S_u, and changes the loss by ΔL(u) ≈ gᵀδ + ½ δᵀHδ.  Every criterion
is a choice of which of these terms to keep, which curvature to put for H, and in which basis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import wraps
from itertools import accumulate
from os import PathLike
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from prunelab.batches import Batches
from prunelab.criteria.stored import Stored, read, write
from prunelab.errors import DataError, OptionError, PlanError
from prunelab.options import flag, function, one_of, shown, whole
from prunelab.runtime.switches import undisturbed
from prunelab.tracing.groups import Group, Member
from prunelab.tracing.recorder import named_tensors
from prunelab.tracing.trace import DependencyGraph

Reduction = Literal["mean", "sum", "max", "prod", "first", "gate"]
Normalizer = Literal["none", "mean", "sum", "max", "standardization", "gaussian", "lamp"]


class NoScores(PlanError, KeyError):
    """Scores were asked for a group that they do not have."""

    __str__ = Exception.__str__  # a KeyError would put its message in quotation marks


@dataclass(frozen=True, eq=False)
class Scores(Mapping[Group, Tensor]):
    """One number per prunable unit; higher means costlier to remove.

    Attributes:
        graph: the dependency graph whose units are scored.
        by_name: group name -> float32 ``[group.size]`` on the CPU.
        criterion: what computed them.
        matrix: float32 ``[U, U]`` over all U units, group after group: entry ``uv`` is what removing both units costs
            beyond the sum of their scores (symmetric; the diagonal is not used).  ``None`` where a criterion knows
            each unit by itself only.
    """

    graph: DependencyGraph
    by_name: Mapping[str, Tensor]
    criterion: str
    matrix: Tensor | None = None

    def __post_init__(self) -> None:
        for group in self.graph.groups:
            score = self.by_name.get(group.name)
            if score is None or tuple(score.shape) != (group.size,):
                found = "none" if score is None else list(score.shape)
                raise PlanError(f"Scores of group `{group.name}` have shape {found}; its units are {group.size}.")
            if score.isnan().any():
                raise PlanError(f"`{self.criterion}` gave no number for some units of group `{group.name}`.")
        units = sum(group.size for group in self.graph.groups)
        if self.matrix is not None and tuple(self.matrix.shape) != (units, units):
            raise PlanError(f"The matrix of `{self.criterion}` is {list(self.matrix.shape)}; there are {units} units.")
        if self.matrix is not None and self.matrix.isnan().any():
            raise PlanError(f"The matrix of `{self.criterion}` has no number for some pairs of units.")

    @property
    def offsets(self) -> dict[str, int]:
        """Group name -> where its units begin among all units, as in ``matrix``."""
        ends = list(accumulate(group.size for group in self.graph.groups))
        return {group.name: end - group.size for group, end in zip(self.graph.groups, ends, strict=True)}

    def together(self, removed: Mapping[str, Iterable[int]]) -> float:
        """Return what a set of units costs: ``Σ_u score_u + Σ_{u<v} M_uv`` (the sum alone without a matrix).

        Args:
            removed: group name -> units, as in ``plan.removed``.

        Raises:
            PlanError: there is no such group or unit.
        """
        if not isinstance(removed, Mapping):
            raise PlanError(f"`removed` must map names of groups to units, as plan.removed does, got {shown(removed)}.")
        removed = {name: list(group) for name, group in removed.items()}
        for name, group in removed.items():
            if name not in self.by_name or not all(0 <= unit < len(self.by_name[name]) for unit in group):
                raise PlanError(f"There are no units {shown(group)} in a group {shown(name)}.")
        units = torch.tensor([self.offsets[name] + unit for name, group in removed.items() for unit in group]).long()
        total = torch.cat([self[group] for group in self])[units].double().sum()
        if self.matrix is not None:
            total = total + self.matrix[units][:, units].double().triu(1).sum()
        return float(total)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the scores to a file, matrix included, so that they can be planned from in another process.

        The file is in the safetensors format, with a JSON header: no pickle, nothing that is ever run.  It appears
        whole or not at all.

        Raises:
            DataError: the file cannot be written.
        """
        kind = type(self).__name__
        if KINDS.get(kind) is not type(self):
            raise DataError(f"{path} cannot be written: only {' and '.join(KINDS)} can be kept, not a {kind}.")
        write(Stored(kind, self.criterion, self.graph, self._tensors(), tuple(self._layers())), path)

    @staticmethod
    def load(path: str | PathLike[str], graph: DependencyGraph | nn.Module) -> Scores:
        """Return the scores in a file that ``save`` wrote.

        Args:
            path: of the file.
            graph: of the model that was scored; or the model itself, which is then traced as it was.  Names, groups and
                shapes must be the same; the values of the weights are not compared.

        Raises:
            DataError: the file is missing, damaged, edited, or not one of scores.
            PlanError: the scores are of another model; the message says what differs.
        """
        stored = read(path, graph, KINDS)
        try:
            return KINDS[stored.kind]._made(stored)
        except (KeyError, TypeError, PlanError) as error:
            raise DataError(f"{path} is not a file of scores, or is damaged or edited: {error!r}.") from error

    def _layers(self) -> Iterable[str]:
        """Return the names of the layers that are scored beside the groups."""
        return ()

    def _tensors(self) -> dict[str, Tensor]:
        """Return all numbers, by the name that they have in a file."""
        found = {f"scores/{group.name}": self[group] for group in self.graph.groups}
        return found if self.matrix is None else found | {"matrix": self.matrix}

    @classmethod
    def _made(cls, stored: Stored) -> Scores:
        """Return the scores that are stored."""
        by_name = {group.name: stored.tensors[f"scores/{group.name}"] for group in stored.graph.groups}
        return cls(stored.graph, by_name, stored.criterion, stored.tensors.get("matrix"))

    def __getitem__(self, group: Group | str) -> Tensor:
        name = group if isinstance(group, str) else getattr(group, "name", group)
        if not isinstance(name, str) or name not in self.by_name:
            raise NoScores(f"There are no scores for {shown(group)}; there are for {', '.join(self.by_name)}.")
        return self.by_name[name]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.graph.groups)

    def __len__(self) -> int:
        return len(self.graph.groups)


KINDS: dict[str, type[Scores]] = {"Scores": Scores}
"""Classes of scores that can be stored, by name."""


CRITERIA: dict[str, type[Criterion]] = {}
"""All criteria, by the name that ``get`` takes."""


class Criterion(ABC):
    """A way to score units: ``criterion(graph, batches) -> Scores``."""

    name: ClassVar[str]
    """What ``criteria.get`` knows it by: ``class Mine(Criterion, name="mine")``.  ``str(criterion)`` returns it."""

    def __post_init__(self) -> None:
        """Check the options that mean the same in every criterion: flags, seeds and losses.

        Raises:
            OptionError: one is of another type.
        """
        options: tuple[Field[Any], ...] = fields(self) if is_dataclass(self) else ()
        for field in options:
            value, kind = getattr(self, field.name), field.type
            if kind in ("bool", bool):
                setattr(self, field.name, flag(field.name, value))
            elif field.name == "seed":
                setattr(self, field.name, whole(field.name, value, least=-(2**63), most=2**63 - 1))
            elif field.name == "loss" and not (value is None and field.default is None):
                function(field.name, value, "loss(outputs, targets)")

    @abstractmethod
    def __call__(self, graph: DependencyGraph, batches: Batches | None = None) -> Scores:
        """Return the score of every unit of every group of ``graph``."""

    def __init_subclass__(cls, *, name: str | None = None, **options: Any) -> None:
        """Let every criterion run outside of inference mode, refuse what is not a graph, and say what has no data.

        Args:
            name: what ``criteria.get`` knows it by; a class without one is not a criterion by itself.
            options: as for any class.

        Raises:
            OptionError: another criterion has that name.
        """
        super().__init_subclass__(**options)
        if name is not None:
            other = CRITERIA.setdefault(name, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise OptionError(f"There is a criterion {name!r} already, {other.__module__}.{other.__qualname__}.")
            CRITERIA[name], cls.name = cls, name
        for name in ("__call__", "elementwise"):
            if name in vars(cls):
                setattr(cls, name, undisturbed()(_with_data(vars(cls)[name])))
        if "__call__" in vars(cls):
            cls.__call__ = _checking_graph(cls.__call__)  # type: ignore[method-assign]

    def __str__(self) -> str:
        return vars(type(self)).get("name", type(self).__name__.lower())


def _checking_graph(score: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(score)
    def checked(self: Criterion, graph: DependencyGraph, *args: Any, **given: Any) -> Any:
        if not isinstance(graph, DependencyGraph):
            advice = "trace the model first, with pl.trace(model, example_inputs)"
            raise OptionError(f"`graph` must be a pl.DependencyGraph, got a {type(graph).__name__}: {advice}.")
        return score(self, graph, *args, **given)

    return checked


def _with_data(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a criterion that fails on weights without data say that they have none."""

    @wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            given = [*args, *kwargs.values()]
            models = [value.model for value in given if isinstance(value, DependencyGraph)]
            models += [value for value in given if isinstance(value, nn.Module)]
            for model in models:
                for name, tensor in named_tensors(model):
                    if tensor.is_meta:
                        raise DataError(
                            f"`{args[0]}` cannot score {type(model).__name__}: `{name}` has no data, it is on the meta "
                            "device. Load the weights first, or score with `random`."
                        ) from error
            raise

    return checked


def sum_by_unit(values: Tensor, member: Member, size: int) -> Tensor:
    """Sum a tensor like the member's parameter over everything that belongs to the same unit, to ``[size]``."""
    rows = values.movedim(member.dim, 0).reshape(values.shape[member.dim], -1).sum(1)
    owned = member.unit.to(rows.device) >= 0
    return rows.new_zeros(size).index_add_(0, member.unit.to(rows.device)[owned], rows[owned])


@dataclass
class GroupwiseCriterion(Criterion):
    """Scores every member on its own, then reduces over the members and normalises over the units of the group.

    Args:
        group_reduction: over the members that share a unit: ``"mean"``, ``"sum"``, ``"max"``, ``"prod"``, ``"first"``
            (the first producer) or ``"gate"`` (the last norm or scale, else the last member).
        normalizer: over the units of a group: ``"none"``, ``"mean"``, ``"sum"``, ``"max"``, ``"standardization"`` (to
            [0, 1]), ``"gaussian"`` (zero mean, unit deviation) or ``"lamp"`` (share of all that is not smaller).
        target_types: only parameters of modules of these types count; all by default.
        bias: whether biases count.

    Source: names and meaning of the options as in Torch-Pruning (Fang et al. 2023, *DepGraph*); LAMP from Lee et al.
    2021, equation 1.
    """

    group_reduction: Reduction = "mean"
    normalizer: Normalizer = "mean"
    target_types: Sequence[type[nn.Module]] | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if str(self.normalizer) == "standarization":  # the spelling that Torch-Pruning's users know
            self.normalizer = "standardization"
        one_of("group_reduction", self.group_reduction, REDUCTIONS)
        one_of("normalizer", self.normalizer, NORMALIZERS)
        if self.target_types is not None:
            given: Any = self.target_types
            self.target_types = tuple(given) if _iterable(given) else (given,)
            if not self.target_types or not all(isinstance(kind, type) for kind in self.target_types):
                raise OptionError(f"`target_types` must be classes of modules, got {shown(given)}.")

    def member_scores(self, values: Mapping[str, Tensor], member: Member, size: int) -> Tensor:
        """Return ``[size]``: the score of every unit on one member, from values per weight."""
        return sum_by_unit(values[member.name], member, size)

    def reduce(self, graph: DependencyGraph, values: Mapping[str, Tensor]) -> Scores:
        """Turn values per weight (parameter name -> tensor like it) into scores per unit."""
        scores: dict[str, Tensor] = {}
        for group in graph.groups:  # a parameter without a value (of integers, say) does not count
            members = self._counted(graph.model, [member for member in group.members if member.name in values])
            if not members:
                scores[group.name] = torch.zeros(group.size)
                continue
            rows = [self.member_scores(values, member, group.size).float().cpu() for member in members]
            reduced = REDUCTIONS[self.group_reduction](torch.stack(rows), [member.role for member in members])
            scores[group.name] = NORMALIZERS[self.normalizer](reduced)
        return Scores(graph, scores, str(self))

    def _counted(self, model: nn.Module, members: list[Member]) -> list[Member]:
        chosen = [
            member
            for member in members
            if (self.bias or not member.name.endswith("bias")) and self._is_target(model, member.name)
        ]
        return chosen or members

    def _is_target(self, model: nn.Module, name: str) -> bool:
        if self.target_types is None:
            return True
        return isinstance(model.get_submodule(name.rpartition(".")[0]), tuple(self.target_types))


def _iterable(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, type))


def _first(rows: Tensor, roles: list[str]) -> Tensor:
    return rows[roles.index("produces") if "produces" in roles else 0]


def _gate(rows: Tensor, roles: list[str]) -> Tensor:
    return rows[len(roles) - 1 - roles[::-1].index("carries") if "carries" in roles else -1]


REDUCTIONS: dict[Reduction, Callable[[Tensor, list[str]], Tensor]] = {
    "mean": lambda rows, _: rows.mean(0),
    "sum": lambda rows, _: rows.sum(0),
    "max": lambda rows, _: rows.amax(0),
    "prod": lambda rows, _: rows.prod(0),
    "first": _first,
    "gate": _gate,
}


def _lamp(score: Tensor) -> Tensor:
    order = score.argsort(descending=True, stable=True)
    return torch.empty_like(score).index_copy_(0, order, score[order] / score[order].cumsum(0).clamp_min(1e-30))


NORMALIZERS: dict[Normalizer, Callable[[Tensor], Tensor]] = {
    "none": lambda score: score,
    "mean": lambda score: score / score.mean().clamp_min(1e-30),
    "sum": lambda score: score / score.sum().clamp_min(1e-30),
    "max": lambda score: score / score.max().clamp_min(1e-30),
    "standardization": lambda score: (score - score.min()) / (score.max() - score.min()).clamp_min(1e-30),
    "gaussian": lambda score: (score - score.mean()) / score.std(correction=0).clamp_min(1e-30),
    "lamp": _lamp,
}

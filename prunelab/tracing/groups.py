"""Groups: what is left free when all equations are stated, and runs through a parameter.

Flows in: a recorder after the run.  Flows out: groups with their members, and which groups must keep equal numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from prunelab.errors import PlanError
from prunelab.options import plain_number, shown
from prunelab.tracing.axes import Axis, find, fold, freeze, leaves
from prunelab.tracing.recorder import Recorder


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter or buffer that a group runs through.

    Attributes:
        name: qualified name of the parameter or buffer.
        dim: the dimension.
        role: ``"produces"`` (rows of a weight), ``"consumes"`` (its columns) or ``"carries"`` (norms, biases, scales).
        axis: what the dimension is made of.
        leaf: the part of it that is the group's.
    """

    name: str
    dim: int
    role: str
    axis: Axis = field(repr=False, compare=False)
    leaf: Axis = field(repr=False, compare=False)

    @cached_property
    def unit(self) -> Tensor:
        """int64 ``[size of the dimension]``: the unit that owns each position, -1 where none does."""
        return unit_map(self.axis, self.leaf)

    def positions(self, unit: int) -> Tensor:
        """Return int64 positions of one unit of the group in this dimension.

        Raises:
            PlanError: the group has no such unit.
        """
        number = plain_number(unit)
        if not isinstance(number, int) or not 0 <= number <= int(self.unit.max()):
            raise PlanError(f"`{self.name}` has no unit {shown(unit)}; it has {int(self.unit.max()) + 1} units.")
        return (self.unit == unit).nonzero().flatten()


@dataclass(frozen=True, eq=False)
class Group:
    """Slices that can only be removed together.

    Attributes:
        name: of the module that produces the units, with what they are after a colon if it has several kinds.
        size: number of prunable units.
        members: every dimension that the group runs through.
        axis: the leaf of the axis algebra.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    axis: Axis = field(repr=False)


def make_bundles(groups: tuple[Group, ...], ties: list[set[int]]) -> tuple[tuple[Group, ...], ...]:
    """Put groups that are tied into one bundle; every group is in exactly one."""
    bundle_of = {id(group.axis): [group] for group in groups}
    for tie in ties:
        bundles = list({id(bundle_of[part]): bundle_of[part] for part in tie if part in bundle_of}.values())
        joined = [group for bundle in bundles for group in bundle]
        for group in joined:
            bundle_of[id(group.axis)] = joined
    order = {group.name: place for place, group in enumerate(groups)}
    unique = {id(bundle): sorted(bundle, key=lambda group: order[group.name]) for bundle in bundle_of.values()}
    return tuple(tuple(bundle) for bundle in unique.values())


def make_groups(recorder: Recorder) -> tuple[Group, ...]:
    """Collect the free leaves of all parameters, in the order in which the model first used them."""
    found: dict[int, tuple[Axis, list[tuple[str, int]]]] = {}
    for name in sorted(recorder.visited, key=recorder.visited.__getitem__):
        for place, dim in enumerate(recorder.parameters[name]):
            for part in leaves(dim.axis):
                if part.frozen is None:
                    found.setdefault(id(part), (part, []))[1].append((name, place))
    roles = _roles(recorder)
    drafts = []
    for axis, places in found.values():
        members = tuple(
            Member(name, place, _role(roles, (name, place), axis), recorder.parameters[name][place].axis, axis)
            for name, place in dict.fromkeys(places)
        )
        if all(member.role == "carries" for member in members):
            freeze(axis, "no layer makes or reads it")
        else:
            drafts.append((axis, members))
    names = _names(recorder, drafts)
    return tuple(Group(name, axis.size, members, axis) for name, (axis, members) in zip(names, drafts, strict=True))


def _roles(recorder: Recorder) -> dict[tuple[str, int], list[tuple[str, Axis | None]]]:
    roles: dict[tuple[str, int], list[tuple[str, Axis | None]]] = {}
    for origin, role, within in recorder.marks:
        roles.setdefault(origin, []).append((role, within))
    return roles


def _role(
    roles: Mapping[tuple[str, int], Sequence[tuple[str, Axis | None]]], origin: tuple[str, int], axis: Axis
) -> str:
    known = roles.get(origin, [])
    if any(within is not None and any(part is axis for part in leaves(within)) for _, within in known):
        return "carries"
    plain = {role for role, within in known if within is None}
    return "produces" if "produces" in plain else "consumes" if "consumes" in plain else "carries"


def _names(recorder: Recorder, drafts: Iterable[tuple[Axis, tuple[Member, ...]]]) -> list[str]:
    """Name each group after the module of its first producer, and after what or where it is in there."""
    names: list[str] = []
    for axis, members in drafts:
        first = next((member for member in members if member.role == "produces"), members[0])
        free = [part for part in leaves(recorder.parameters[first.name][first.dim].axis) if part.frozen is None]
        alone = all(part is axis for part in free)
        place = next(place for place, part in enumerate(free) if part is axis)
        name = module_of(first.name) + (f":{axis.label}" if axis.label else "" if alone else f":{place}")
        names.append(name if name not in names else f"{name}.{place}")
    return names


def module_of(name: str) -> str:
    """Return the module that a parameter belongs to, or the parameter itself where it has a name of its own."""
    module, _, parameter = name.rpartition(".")
    return module if module and parameter in ("weight", "bias", "running_mean", "running_var") else name


def unit_map(axis: Axis, target: Axis) -> Tensor:
    """Return int64 ``[axis.size]``: which entry of the leaf ``target`` each entry of ``axis`` belongs to, or -1."""

    def at_leaf(part: Axis) -> Tensor:
        return torch.arange(part.size) if part is find(target) else torch.full((part.size,), -1)

    def at_product(parts: list[Tensor]) -> Tensor:
        out = parts[0]
        for part in parts[1:]:
            out = torch.maximum(out[:, None], part[None, :]).flatten()
        return out

    return fold(axis, at_leaf, at_product, torch.cat)

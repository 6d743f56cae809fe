"""A plan: which units go, as plain data that names parameters and units, nothing more.

Plans can be read (``print``, ``table``), kept (``to_json``), put together (``merge``) and applied again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from prunelab.errors import PlanError
from prunelab.runtime.extras import extra

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1

PLANS = "prunelab_plans"
"""Name of the attribute in which a pruned model carries the plans that made it."""


@dataclass(frozen=True)
class Cut:
    """The units that go from one group.

    Attributes:
        group: the group's name.
        size: how many units it has.
        removed: which of them go, sorted.
        members: ``[parameter, dimension]`` of everything that is cut along.
    """

    group: str
    size: int
    removed: tuple[int, ...]
    members: tuple[tuple[str, int], ...]

    @property
    def kept(self) -> list[int]:
        """The units that stay."""
        gone = set(self.removed)
        return [unit for unit in range(self.size) if unit not in gone]


@dataclass(frozen=True)
class Plan:
    """What goes, as plain data.

    Attributes:
        cuts: one per group that loses units.
        inputs: shapes and types of the example inputs, to trace the model again.
        budget: what was ``"asked"`` for and what is ``"kept"`` (shares of FLOPs, parameters and bytes, and of latency
            where that was ``"measured"``); ``"missed"`` and ``"why"`` where the plan ends more than 1 % of the budget
            away from it: ``"missed"`` is the difference as a share of the budget, negative below it.
    """

    cuts: tuple[Cut, ...]
    inputs: Any
    budget: dict[str, Any] = field(default_factory=dict)

    @property
    def removed(self) -> dict[str, tuple[int, ...]]:
        """Group name -> removed units."""
        return {cut.group: cut.removed for cut in self.cuts}

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps({"format": FORMAT} | asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan back.

        Raises:
            PlanError: the text is not a plan, or of a later format.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise PlanError(f"The plan has format {data['format']}, this version reads {FORMAT}: update prunelab.")
            cuts = tuple(
                Cut(
                    str(cut["group"]),
                    int(cut["size"]),
                    tuple(sorted(int(unit) for unit in cut["removed"])),
                    tuple((str(name), int(dim)) for name, dim in cut["members"]),
                )
                for cut in data["cuts"]
            )
            return cls(cuts, data["inputs"], dict(data["budget"]))
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"This is not a plan of prunelab: {error!r}.") from error

    def merge(self, other: Plan, *, after: bool | None = None) -> Plan:
        """Return one plan, for the model of this one, that removes what both remove; ``one + two`` is the same.

        Args:
            other: a plan of the same model, or of the model that this plan has cut, whose units then have new numbers.
            after: whether it is the latter; by default the sizes of the groups that both cut tell.

        Raises:
            PlanError: the plans are of models that have nothing to do with each other, or leave nothing of a group.

        >>> from prunelab.plans import Cut, Plan
        >>> weight = (("0.weight", 0),)
        >>> first, later = Plan((Cut("0", 6, (1, 4), weight),), None), Plan((Cut("0", 4, (1,), weight),), None)
        >>> (first + later).removed
        {'0': (1, 2, 4)}
        """
        check_plan(other)
        mine = {cut.group: cut for cut in self.cuts}
        if after is None:
            after = _is_later(mine, other)
        joined = dict(mine)
        for cut in other.cuts:
            first = mine.get(cut.group)
            joined[cut.group] = cut if first is None else _join(first, cut, bool(after))
        budget: dict[str, Any] = {"merged": [*_parts(self), *_parts(other)]}
        mine_kept, other_kept = (_numbers(plan.budget.get("kept")) for plan in (self, other))
        if after and self.inputs == other.inputs:
            # What a later plan keeps is a share of what this one left.
            budget["kept"] = {key: mine_kept[key] * other_kept[key] for key in mine_kept if key in other_kept}
        if "graph" in (self.budget.get("backend"), other.budget.get("backend")):
            budget["backend"] = "graph"
        return Plan(tuple(joined.values()), self.inputs, budget)

    __add__ = merge

    def table(self) -> pd.DataFrame:
        """Return one row per group that loses units: ``group``, ``units``, ``removed``, ``left`` and ``share``."""
        pandas = extra("pandas", "tables", "Plan.table()")
        columns = ["group", "units", "removed", "left", "share"]
        rows = [
            (cut.group, cut.size, len(cut.removed), cut.size - len(cut.removed), len(cut.removed) / cut.size)
            for cut in self.cuts
        ]
        return pandas.DataFrame(rows, columns=columns)

    def __repr__(self) -> str:
        units = sum(len(cut.removed) for cut in self.cuts)
        kept = ", ".join(f"{share:.1%} of the {key}" for key, share in _numbers(self.budget.get("kept")).items())
        return f"Plan(removes {units} units from {len(self.cuts)} groups{kept and '; keeps ' + kept})"

    def __str__(self) -> str:
        lines = [repr(self)]
        asked = _numbers(self.budget.get("asked"))
        if asked:
            what = " and ".join(f"{name}={share:g}" for name, share in asked.items())
            how = [f"{name} {self.budget[name]}" for name in ("criterion", "scope", "per") if name in self.budget]
            lines.append(f"Asked for {what}" + (f" ({', '.join(how)})." if how else "."))
        measured = self.budget.get("measured")
        seconds = _numbers(measured.get("seconds")) if isinstance(measured, Mapping) else {}
        if seconds.keys() >= {"whole", "cut"}:
            facts = _numbers(measured)
            lines.append(
                f"Measured {seconds['whole']:.3g} s before and {seconds['cut']:.3g} s after the cut, "
                f"on {facts.get('measurements', 0):g} networks at places {facts.get('resolution', 0):.3g} of the order "
                "apart."
            )
        if "why" in self.budget:
            lines.append(str(self.budget["why"]))
        width = max((len(cut.group) for cut in self.cuts), default=0)
        for cut in self.cuts:
            lines.append(f"  {cut.group.ljust(width)}  {cut.size} units, {len(cut.removed)} go")
        return "\n".join(lines)


def check_plan(plan: object) -> None:
    """Refuse what is not a plan.

    Raises:
        PlanError: it is something else; the message says how a plan is made.
    """
    if not isinstance(plan, Plan):
        made = ": make one of these scores, with pl.plan(scores, flops=0.5)" if hasattr(plan, "by_name") else ""
        raise PlanError(f"A pl.Plan was expected, got a {type(plan).__name__}{made}.")


def _numbers(given: Any) -> dict[str, float]:
    """Return the numbers in what a plan says of its budget; a plan may come from anywhere."""
    entries = given.items() if isinstance(given, Mapping) else ()
    return {str(key): value for key, value in entries if type(value) in (int, float)}


def _parts(plan: Plan) -> list[Any]:
    merged = plan.budget.get("merged")
    return list(merged) if isinstance(merged, list) else [plan.budget]


def _is_later(mine: Mapping[str, Cut], other: Plan) -> bool | None:
    """Return whether ``other`` is of the model after the cuts, ``None`` where nothing tells."""
    tells: dict[bool, str] = {}
    for cut in other.cuts:
        first = mine.get(cut.group)
        if first is not None and first.removed and cut.size in (first.size, len(first.kept)):
            tells[cut.size != first.size] = cut.group
    if len(tells) == 2:
        raise PlanError(
            f"The plans cannot be merged: by group `{tells[True]}` the second is of the model that the first has cut, "
            f"by group `{tells[False]}` it is of the same model."
        )
    return next(iter(tells), None)


def _join(first: Cut, second: Cut, after: bool) -> Cut:
    """Return the cut that removes what both do, in the numbers of the first."""
    if set(first.members) != set(second.members):
        raise PlanError(f"The plans cannot be merged: they couple different parameters in group `{first.group}`.")
    names = first.kept if after else range(first.size)
    if second.size != len(names):
        raise PlanError(
            f"The plans cannot be merged: group `{first.group}` has {first.size} units, of which the first leaves "
            f"{len(first.kept)}; the second is of a model in which it has {second.size}."
        )
    wrong = next((unit for unit in second.removed if not 0 <= unit < second.size), None)
    if wrong is not None:
        raise PlanError(f"The second plan removes unit {wrong} of group `{first.group}`, which has {second.size}.")
    removed = {*first.removed, *(names[unit] for unit in second.removed)}
    if len(removed) >= first.size:
        raise PlanError(f"The plans cannot be merged: together they leave none of the units of group `{first.group}`.")
    return replace(first, removed=tuple(sorted(removed)))

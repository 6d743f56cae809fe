"""A plan: which units go, as plain data that names parameters and units, nothing more."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from prunelab.errors import PlanError

FORMAT = 1


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


@dataclass(frozen=True)
class Plan:
    """What goes, as plain data.

    Attributes:
        cuts: one per group that loses units.
        inputs: shapes and types of the example inputs, to trace the model again.
        budget: what was asked for, and the shares of FLOPs and parameters that are kept.
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
            PlanError: the text is no plan, or of a later format.
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

    def __repr__(self) -> str:
        units = sum(len(cut.removed) for cut in self.cuts)
        kept = ", ".join(f"{self.budget['kept'][key]:.1%} of the {key}" for key in self.budget.get("kept", {}))
        return f"Plan(removes {units} units from {len(self.cuts)} groups{kept and '; keeps ' + kept})"

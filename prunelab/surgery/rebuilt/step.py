"""One row of a tape on its way into the graph: its arguments by name, its sizes before and after the cut.

Flows in: a row and the builder of the graph.  Flows out: what rules (``replay_ops``) need to call the operator again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prunelab.surgery.rebuilt.tape import Ref, Row

if TYPE_CHECKING:
    from prunelab.surgery.rebuilt.graph import Builder


class Inexpressible(Exception):
    """A size follows the inputs in a way that the graph cannot say."""


class Step:
    """One row on its way into the graph: its arguments by name, and where its results go."""

    def __init__(self, builder: Builder, number: int, row: Row) -> None:
        self.builder, self.number, self.row, self.where = builder, number, row, builder.where(number)
        self.name = row.func._schema.name.removeprefix("aten::")
        self.values: dict[str, Any] = {}
        for place, argument in enumerate(row.func._schema.arguments):
            given = row.args[place] if place < len(row.args) else row.kwargs.get(argument.name, argument.default_value)
            self.values[argument.name] = given

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def out(self, place: int = -1) -> Ref:
        """Return where a result of this row is known."""
        return Ref("op", self.number, place)

    def was(self, ref: Ref) -> tuple[int, ...]:
        """Return the shape of a tensor on the tape."""
        return self.builder.was(ref)

    def stays(self, ref: Ref) -> tuple[int, ...]:
        """Return what is kept of it."""
        return self.builder.stays(ref)

    def number_of(self, value: Any, was: int, stays: int) -> Any:
        """Return the integer to call with for one that was ``was`` on the tape."""
        return self.builder.number(value, was, stays)

    def size(self, ref: Ref, rest: bool = False) -> list[Any]:
        """Return the sizes that a result must have; with ``rest`` one that follows the inputs somehow may be -1.

        Raises:
            Inexpressible: there is more than one such size, or one may not be -1.
        """
        found: list[Any] = []
        for value, was, stays in zip(self.builder.sizes_of(ref), self.was(ref), self.stays(ref), strict=True):
            try:
                found.append(self.number_of(value, was, stays))
            except Inexpressible:
                if not rest or -1 in found:
                    raise
                found.append(-1)
        return found

    def give(self, func: Any, *args: Any, place: int = -1, **kwargs: Any) -> None:
        """Call ``func``; what it returns is this row's result."""
        self.builder.give(self.out(place), self.builder.call(func, *args, **kwargs))

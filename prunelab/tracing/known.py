"""What a trace knows by value: tensors that the code makes from constants alone are computed for real when asked for.

Flows in: every operator that a model calls on tensors without data.  Flows out: answers where the code looks at the
values of a mask, a stride or an index that depends on no input and no weight; ``None`` where they do.

Known are tensors made from nothing (``arange``, ``zeros``), plain tensors that the code holds, integer and Boolean
buffers, single numbers, and what is computed from these alone.  Nothing is computed until the code asks: then the
operators so far run once, in order, on the CPU.  A write of something unknown makes a tensor and all its views unknown.

Guards against broken data are decided as well: ``isnan`` and ``isinf`` of what the model computes are taken to be false
everywhere, ``isfinite`` to be true.  Such a check never changes which slices belong together.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from prunelab.tracing.fakes import FakeMode, data_of
from prunelab.tracing.finite import TESTS, Guard, Step, guard_in, writes_infinities

LIMIT = 1 << 24
"""A tensor with more entries than this is never computed: 64 MiB in single precision."""

_ASKS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_EMPTY = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}


@cache
def asks(func: Any) -> bool:
    """Tell whether PyTorch may have to see values to say what an operator returns."""
    return any(tag in func.tags for tag in _ASKS)


class _Kind(NamedTuple):
    """What an operator does: views share memory, and what is random is never known."""

    view: bool
    writes: tuple[tuple[int, str], ...]
    random: bool
    tests: bool


@cache
def _kind(func: Any) -> _Kind:
    returns, name = func._schema.returns, func._schema.name.removeprefix("aten::")
    view = any(result.alias_info is not None and not result.alias_info.is_write for result in returns)
    random = torch.Tag.nondeterministic_seeded in func.tags
    arguments = func._schema.arguments
    written = [(n, a.name) for n, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    return _Kind(view, tuple(written), random, name in TESTS or name in ("eq", "ne"))


class Known:
    """Follows what a model computes from constants, in one fake mode.

    Args:
        mode: the mode in which the tensors live; it knows the data of integer buffers.
    """

    def __init__(self, mode: FakeMode) -> None:
        self.mode = mode
        self._tensors: dict[int, Tensor] = {}  # all that was ever known, so that an id stays one tensor's
        self._roots: dict[int, int] = {}
        self._parents: dict[int, list[Tensor]] = {}
        self._unknown: set[int] = set()  # roots that something unknown was written to
        self._values: dict[int, Tensor] = {}
        self._borrowed: set[int] = set()  # whose values are the model's own
        self._pending: list[Step] = []
        self._guards: dict[int, Guard] = {}
        self._unmet: dict[int, Tensor] = {}
        self._made_by: dict[int, list[Step]] = {}

    def knows(self, tensor: Tensor) -> bool:
        """Tell whether a tensor was made from constants alone."""
        key = id(tensor)
        root = self._roots.get(key)
        if root is None:
            return key not in self._made_by and key not in self._unmet and self._meet(tensor)
        return root not in self._unknown

    def _meet(self, tensor: Tensor) -> bool:
        """Take in a tensor that no operator made: one with data, or the fake of a buffer whose data are at hand."""
        data = self.mode.data_of(tensor) if isinstance(tensor, FakeTensor) else data_of(tensor)
        if data is None or data.numel() > LIMIT:
            self._unmet[id(tensor)] = tensor
            return False
        self._remember(tensor, id(tensor), [])
        self._values[id(tensor)] = data
        self._borrowed.add(id(tensor))
        return True

    def _remember(self, tensor: Tensor, root: int, parents: list[Tensor]) -> None:
        self._tensors[id(tensor)] = tensor
        self._roots[id(tensor)] = root
        self._parents[id(tensor)] = parents

    def note(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor], made: list[Tensor]
    ) -> None:
        """Follow one call: what went in and what came out are the tensors ``given`` and ``made``."""
        kind = _kind(func)
        step = Step(func, args, kwargs, made, given)
        known = not kind.random and all(map(self.knows, given))
        if known and (kind.view or kind.writes or all(tensor.numel() <= LIMIT for tensor in made)):
            for tensor in made:
                if id(tensor) not in self._roots:
                    root = self._roots[id(given[0])] if kind.view and given else id(tensor)
                    self._remember(tensor, root, given)
            self._pending.append(step)
            return
        if kind.writes:
            self._forget(step)
        for tensor in made:
            self._made_by.setdefault(id(tensor), []).append(step)
        if kind.tests:
            self._note_guard(step)

    def _forget(self, step: Step) -> None:
        """Make unknown what an operator writes to."""
        for place, name in _kind(step.func).writes:
            for tensor in tree_leaves(step.args[place] if place < len(step.args) else step.kwargs.get(name)):
                if isinstance(tensor, Tensor) and self.knows(tensor):
                    self._unknown.add(self._roots[id(tensor)])

    def _note_guard(self, step: Step) -> None:
        """Take a test for broken data to say that there are none."""
        guard = guard_in(step)
        if guard is not None:
            made = step.made[0]
            self._remember(made, id(made), [])
            with torch._C._DisableTorchDispatch():
                self._values[id(made)] = torch.tensor(guard.value).expand(made.shape)
            self._guards[id(made)] = guard
            if made.numel() <= LIMIT:  # code may write to it
                self._borrowed.add(id(made))

    # ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────

    def answer(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]
    ) -> tuple[tuple[Any, ...], Any] | None:
        """Return the arguments and the result of an operator that looks at values, if it looks at known ones alone.

        Masks among the indices of a tensor are replaced by the numbers of the entries that they pick.
        """
        name = func._schema.name
        if name == "aten::index":
            return self._index(func, *args)
        if not given or not self._sound(given):
            return None
        if name == "aten::masked_select" and not self.knows(args[0]):
            return self._masked_select(args)
        if not all(self.knows(tensor) for tensor in given):
            return None
        self._catch_up()
        try:
            real = self._run(func, args, kwargs)
        except Exception:  # not implemented for this type on the CPU
            return None
        device, parents = given[0].device, list(given)

        def fake(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            made = self._fake(value, device)
            self._remember(made, id(made), parents)
            self._values[id(made)] = value
            return made

        return args, tree_map(fake, real)

    def _index(self, func: Any, tensor: Tensor, indices: list[Tensor | None]) -> tuple[tuple[Any, ...], Any] | None:
        masks = [index for index in indices if index is not None and index.dtype in (torch.bool, torch.uint8)]
        if not masks or not self._sound(masks):
            return None
        numbers: list[Tensor | None] = []
        for index in indices:
            if not any(index is mask for mask in masks):
                numbers.append(index)
                continue
            mask = self.value(index)  # type: ignore[arg-type]
            if mask is None:
                return None
            with torch._C._DisableTorchDispatch():
                places = [place.contiguous() for place in mask.nonzero().unbind(1)]
            numbers += [self._fake(place, tensor.device) for place in places]
        return (tensor, numbers), func(tensor, numbers)

    def _masked_select(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any] | None:
        tensor, mask = args
        data = self.value(mask)
        if data is None:
            return None
        shape = torch.broadcast_shapes(tensor.shape, mask.shape)
        with torch._C._DisableTorchDispatch():
            like = torch.empty(int(data.expand(shape).sum()), dtype=tensor.dtype, device="meta")
        return args, self.mode.make(like, tensor.device)

    def _fake(self, value: Tensor, device: torch.device) -> Tensor:
        with torch._C._DisableTorchDispatch():
            like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return self.mode.make(like, device)

    def value(self, tensor: Tensor) -> Tensor | None:
        """Return the data of a known tensor, on the CPU; ``None`` where an operator cannot compute them there."""
        self._catch_up()
        return self._data(tensor) if self.knows(tensor) else None

    def _catch_up(self) -> None:
        """Run the operators on known tensors that have not run yet, in order."""
        pending, self._pending = self._pending, []
        for step in pending:
            try:
                out = self._run(step.func, step.args, step.kwargs)
            except Exception:  # not implemented for this type on the CPU, or made from what is unknown by now
                self._unknown.update(self._roots[id(tensor)] for tensor in step.made)
                if step.func._schema.is_mutable:
                    self._forget(step)
                continue
            found = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
            for tensor, value in zip(step.made, found, strict=True):
                self._values.setdefault(id(tensor), value)

    def _data(self, tensor: Tensor) -> Tensor:
        key = id(tensor)
        if key in self._borrowed:  # code may write to its copy of it
            self._borrowed.remove(key)
            with torch._C._DisableTorchDispatch():
                self._values[key] = self._values[key].detach().to("cpu", copy=True)
        return self._values[key]

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operator on the data of its arguments."""

        def real(value: Any) -> Any:
            if isinstance(value, torch.device):
                return torch.device("cpu")
            return self._data(value) if isinstance(value, Tensor) else value

        args, kwargs = tree_map(real, args), tree_map(real, kwargs)
        with torch.no_grad(), torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            out = func(*args, **kwargs)
            return out.zero_() if func._schema.name in _EMPTY else out

    # ── where known values come from ──────────────────────────────────────────────────────────────────────────────

    def sources(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return all known tensors that the given ones were made from, and these themselves."""
        found: dict[int, Tensor] = {}
        waiting = list(tensors)
        while waiting:
            tensor = waiting.pop()
            if id(tensor) not in found:
                found[id(tensor)] = tensor
                waiting += self._parents.get(id(tensor), [])
        return list(found.values())

    def guards(self, tensors: Iterable[Tensor]) -> list[Guard]:
        """Return the tests for broken data that the given tensors were made from."""
        return [self._guards[id(tensor)] for tensor in self.sources(tensors) if id(tensor) in self._guards]

    def _sound(self, tensors: Iterable[Tensor]) -> bool:
        """Tell whether what was tested for infinities is free of those that the code writes itself."""
        tested = [guard.tested for guard in self.guards(tensors) if guard.infinity]
        return not any(writes_infinities(tensor, self._made_by, self.value) for tensor in tested)

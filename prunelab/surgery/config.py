"""Configurations that follow a cut, as Hugging Face's ``save_pretrained`` writes them and ``from_pretrained`` reads.

A configuration says in a few numbers what the class builds. After a cut those numbers are looked for with which the
class builds what is left: the same parameters, buffers and attributes, module by module. Where there are none, since
layers of one kind have several widths, or since heads became narrower and would be scaled or rotated by other numbers,
the configuration does not change, and ``pl.save`` is the way to keep the model.

Flows in: the model before and after a cut.  Flows out: numbers, set in the configuration of the cut one.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from prunelab.errors import TraceError
from prunelab.runtime.devices import forked_rng, raise_out_of_memory
from prunelab.runtime.switches import ignoring
from prunelab.tracing.trace import DependencyGraph, trace

BUILDS = 40
"""How often a model is built, without data, before the search ends."""

Shape = tuple[int, ...] | None
Field = tuple[tuple[str, ...], str]
"""A number of a configuration: the names of the configurations within it, and its own."""


def is_configured(model: nn.Module) -> bool:
    """Tell whether a model is built from a configuration that is saved beside its weights."""
    return hasattr(getattr(model, "config", None), "to_dict") and hasattr(model, "save_pretrained")


def follow(model: nn.Module, before: Any, cut: DependencyGraph, inputs: Any) -> bool:
    """Set the numbers of a cut model's configuration so that its class builds just this model.

    Args:
        model: cut; only its configuration changes.
        before: the configuration of the model before the cut.
        cut: a trace of the cut model.
        inputs: what it was traced with.

    Returns:
        Whether there are such numbers.
    """
    found = _Search(model, before).run()
    if found is None:
        return False
    _adopt(found.built, model)
    try:
        built = trace(found.built, inputs)
    except TraceError:
        return False
    if _calls(built) != _calls(cut):
        return False
    for (path, name), value in found.changes.items():
        setattr(_holder(model.config, path), name, value)
    return True


class _Found(NamedTuple):
    changes: dict[Field, int]
    built: nn.Module


def _calls(graph: DependencyGraph) -> list[tuple[Any, ...]]:
    """Return every call of a trace: which operator, in which module, with what numbers, and what shapes it gives."""
    return [
        (
            op.func,
            op.module,
            [None if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves((op.args, op.kwargs))],
            [tensor.shape for tensor in op.outputs],
        )
        for op in graph.tape
    ]


def _adopt(built: nn.Module, model: nn.Module) -> None:
    """Give a model the tensors of another one whose modules have the same names: their types and devices too."""
    for name, module in built.named_modules():
        if module._parameters or module._buffers:
            own = model.get_submodule(name)
            module._parameters.update(own._parameters)
            module._buffers.update(own._buffers)


class _Search:
    def __init__(self, model: nn.Module, before: Any) -> None:
        self.kind, self.before, self.builds = type(model), before, 0
        self.counts: dict[frozenset[tuple[Field, int]], tuple[int, int] | None] = {}
        self.wanted, self.numbers = _held(model)
        self.unsaved = _unsaved(model)

    def run(self) -> _Found | None:
        """Return the numbers that change, as few as possible, and what they build; ``None`` if there are none."""
        whole = self.built({})
        if whole is None or _shapes(whole).keys() != self.wanted.keys():
            return None
        if not self.is_uniform(_shapes(whole)):
            return None
        likely, possible = self.candidates(whole)
        changes = {field: values[0] for field, values in likely.items()}
        wrong = self.wrong(changes)
        moves = list(self.unnamed(changes).items())
        moves += [(field, value) for field in possible for value in possible[field]]
        moves += [(field, value) for field in likely for value in (*likely[field][1:], self.value(field))]
        for field, value in moves:
            if wrong is None or wrong > (0, 0):
                count = self.wrong(tried := {**changes, field: value})
                if count is not None and (wrong is None or count < wrong):
                    changes, wrong = tried, count
        if wrong is None or wrong[0]:
            return None
        for field in list(changes):
            fewer = {other: value for other, value in changes.items() if other != field}
            if self.wrong(fewer) == wrong:
                changes = fewer
        built = self.built(changes, buffers=True)
        return _Found(changes, built) if built is not None and self.has_same_buffers(built) else None

    def is_uniform(self, whole: dict[str, Shape]) -> bool:
        """Tell whether layers that differ in their number alone, and had one shape, still have one."""
        kinds: dict[tuple[str, Shape], set[Shape]] = {}
        for name, shape in whole.items():
            kinds.setdefault((re.sub(r"\d+", "*", name), shape), set()).add(self.wanted[name])
        return all(len(shapes) == 1 for shapes in kinds.values())

    def has_same_buffers(self, built: nn.Module) -> bool:
        """Tell whether the buffers that are computed, and not saved, come out as the cut model has them."""
        own = _unsaved(built)
        pairs = [(tensor, own.get(name)) for name, tensor in self.unsaved.items()]
        return all(
            other is not None and "meta" not in (one.device.type, other.device.type) and torch.equal(one, other.to(one))
            for one, other in pairs
        )

    def candidates(self, whole: nn.Module) -> tuple[dict[Field, list[int]], dict[Field, list[int]]]:
        """Return what numbers of the configuration may have become, likeliest first.

        Returns:
            What sizes that were equal to them are now, and the like for sizes that they are a factor of.
        """
        before, after = (shapes | numbers for shapes, numbers in (_held(whole), (self.wanted, self.numbers)))
        became: Counter[tuple[int, int]] = Counter()
        for key, sizes in before.items():
            for one, other in zip(sizes or (), after.get(key) or (), strict=False):
                if one != other and type(one) is type(other) is int:
                    became[one, other] += 1
        likely: dict[Field, list[int]] = {}
        possible: dict[Field, list[int]] = {}
        for field in _fields(self.before):
            value = self.value(field)
            for (old, new), _ in became.most_common():
                if old == value:
                    likely.setdefault(field, []).append(new)
                elif 1 < value < old and old % value == 0 and new % (old // value) == 0:
                    possible.setdefault(field, []).append(new // (old // value))
        return likely, possible

    def unnamed(self, changes: dict[Field, int]) -> dict[Field, int]:
        """Return the numbers that modules hold and the configuration leaves to a rule, such as ``head_dim``."""
        built = self.built(changes)
        numbers = {} if built is None else _numbers_of(built)
        wrong = {name.rpartition(".")[2]: own for name, own in self.numbers.items() if numbers.get(name, own) != own}
        return {
            ((), name): own[0]
            for name, own in wrong.items()
            if len(own) == 1 and type(own[0]) is int and getattr(self.before, name, None) is None
        }

    def value(self, field: Field) -> int:
        path, name = field
        return int(getattr(_holder(self.before, path), name))

    def wrong(self, changes: dict[Field, int]) -> tuple[int, int] | None:
        """Return how many shapes and how many attributes are wrong; ``None`` if nothing is built."""
        key = frozenset(changes.items())
        if key not in self.counts:
            self.counts[key] = self._count(self.built(changes))
        return self.counts[key]

    def _count(self, built: nn.Module | None) -> tuple[int, int] | None:
        if built is None:
            return None
        shapes, numbers = _held(built)
        if shapes.keys() != self.wanted.keys():
            return None
        return (
            sum(shapes[name] != self.wanted[name] for name in shapes),
            sum(numbers.get(name) != value for name, value in self.numbers.items()),
        )

    def built(self, changes: dict[Field, int], *, buffers: bool = False) -> nn.Module | None:
        """Return what the class builds from the configuration with some numbers changed, without data.

        Args:
            changes: which numbers.
            buffers: compute buffers too; parameters stay without data.
        """
        self.builds += 1
        if self.builds > BUILDS:
            return None
        config = copy.deepcopy(self.before)
        try:
            for (path, name), value in changes.items():
                setattr(_holder(config, path), name, value)
            where = _WithoutWeights() if buffers else torch.device("meta")
            with ignoring(), forked_rng(torch.device("cpu")), where, torch.no_grad():
                return self.kind(config).eval()
        except Exception as error:  # the class refuses these numbers, each in its own way
            raise_out_of_memory(error)
            return None


class _WithoutWeights(TorchFunctionMode):
    """Makes what layers reserve for their weights without data, and computes everything else."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _shapes(model: nn.Module) -> dict[str, Shape]:
    """Return the shapes of parameters and buffers, also of those that share their weights."""
    return {
        f"{name}.{key}": None if tensor is None else tuple(tensor.shape)
        for name, module in model.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
    }


def _unsaved(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that the state dict leaves out."""
    return {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        for key in module._non_persistent_buffers_set
        if (tensor := module._buffers.get(key)) is not None
    }


def _numbers_of(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Return the numbers that modules hold as attributes."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            parts = tuple(value) if isinstance(value, (tuple, list)) else (value,)
            if not key.startswith("_") and parts and all(type(part) in (int, float) for part in parts):
                found[f"{name}.{key}"] = parts
    return found


def _held(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return _shapes(model), _numbers_of(model)


def _fields(config: Any, path: tuple[str, ...] = ()) -> Iterator[Field]:
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if type(value) is int:
            yield path, name
        elif hasattr(value, "to_dict") and len(path) < 3:
            yield from _fields(value, (*path, name))


def _holder(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config

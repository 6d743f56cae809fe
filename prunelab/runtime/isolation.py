"""Isolation: a model is measured as the user gave it, and given back the same.

Measuring needs the model in eval mode, with gradients for its parameters, sometimes with other tensors in their place;
and a forward pass may leave things behind (caches, counters, running statistics).  Everything of the kind is done here,
so that all of it is undone, whatever is raised.  A model is borrowed by one thread at a time; others wait.

Flows in: a model.  Flows out: contexts in which it may be used, and changed.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.errors import PruneLabError, TraceError
from prunelab.runtime.outputs import tensors_of
from prunelab.runtime.switches import layer_by_layer, undisturbed

_HOLDS: list[tuple[int, set[int]]] = []
"""The thread of every hold, and the ``id`` of all modules and parameters that it holds."""

_FREED = threading.Condition()

_OTHERS = ("torch.distributed", "torch.nn.parallel", "torch._dynamo", "torch.jit")
"""Where modules come from whose attributes are the state of something else, and not theirs alone to put back."""


@contextmanager
def held(model: nn.Module) -> Iterator[bool]:
    """Hold a model, with all modules and parameters that it may share with others; another thread waits.

    Returns:
        Whether this thread did not hold all of it before.
    """
    modules = list(model.modules())
    kept = [*modules, *(p for m in modules for p in m._parameters.values() if p is not None)]  # so that ids stay theirs
    parts = {id(part) for part in kept}
    hold = threading.get_ident(), parts
    with _FREED:
        _FREED.wait_for(lambda: all(thread == hold[0] or held.isdisjoint(parts) for thread, held in _HOLDS))
        first = not parts <= set().union(*(held for thread, held in _HOLDS if thread == hold[0]))
        _HOLDS.append(hold)
    try:
        yield first
    finally:
        with _FREED:
            _HOLDS[:] = [other for other in _HOLDS if other is not hold]
            _FREED.notify_all()


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module back its own mode, training or eval, in the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            if module.training is not training:
                module.training = training


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Borrow a model in eval mode; then restore it exactly.

    Modes, attributes, buffers (values too) and hooks are put back; parameters are not written to by a forward pass.
    """
    with held(model) as first:
        before = Snapshot(model, list(model.buffers())) if first else None
        try:
            with modes_kept(model):
                model.eval()
                yield
        finally:
            if before is not None:
                before.restore()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Borrow a model in eval mode, with gradients for all parameters; then restore it exactly.

    Raises:
        PruneLabError: a parameter cannot have a gradient, or has no shape yet.
    """
    with undisturbed(), eval_mode(model), layer_by_layer:
        for name, parameter in model.named_parameters():
            if isinstance(parameter, nn.UninitializedParameter):
                raise PruneLabError(f"Parameter `{name}` has no shape yet: run the model once on a batch first.")
            if parameter.is_inference():
                raise PruneLabError(
                    f"Parameter `{name}` was made inside torch.inference_mode(), so it cannot have a gradient: build "
                    "the model outside of it, or take copy.deepcopy(model), made outside of it."
                )
        flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        try:
            for parameter in flags:
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
            yield
        finally:
            for parameter, flag in flags.items():
                if parameter.requires_grad is not flag:
                    parameter.requires_grad_(flag)


def copied(model: nn.Module) -> nn.Module:
    """Return ``copy.deepcopy(model)``, made while nobody else has the model, and with gradients possible in it.

    Results that the model keeps are copied without their history.

    Raises:
        TraceError: the model cannot be copied.
    """
    with held(model), undisturbed():
        with torch.no_grad():
            computed = [tensor for tensor in kept_tensors(model.modules()) if not tensor.is_leaf]
            memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in computed}
        try:
            return copy.deepcopy(model, memo)
        except Exception as error:
            raise uncopied(model, error) from error


def kept_tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Return the tensors that modules keep beside their parameters: buffers, and whatever their attributes hold."""
    found: list[Tensor] = []
    for module in modules:
        own = [value for key, value in vars(module).items() if key not in _EVERY_MODULE and type(value) not in _PLAIN]
        own = [value for value in own if type(value) not in _STORES or not _PLAIN.issuperset(map(type, value))]
        own += [buffer for buffer in module._buffers.values() if buffer is not None]
        found += tensors_of(own) if own else []
    return found


_PLAIN = {int, float, bool, str, bytes, type(None), type, torch.dtype, torch.device, torch.layout, torch.memory_format}
_STORES = {list, tuple, set}
_EVERY_MODULE = frozenset(vars(nn.Module()))


def uncopied(model: nn.Module, error: Exception) -> TraceError:
    """Return the error for a model that cannot be copied."""
    reason = str(error).strip().rstrip(".") or type(error).__name__
    return TraceError(
        f"{type(model).__name__} cannot be copied, which tracing and surgery need: {reason}. "
        "Keep locks, loaders and open files outside the model, and detach tensors that it keeps."
    )


@contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in place of parameters and buffers, then put those back.

    A tensor goes wherever the model holds the one that its name stands for: in a module that has two names, and in all
    modules that share a parameter.

    Args:
        model: the network.
        tensors: name of a parameter or buffer -> what takes its place.

    Raises:
        PruneLabError: the model has no such parameter or buffer.
    """
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    own |= dict(model.named_buffers(remove_duplicate=False))
    unknown = next((name for name in tensors if name not in own), None)
    if unknown is not None:
        raise PruneLabError(f"{type(model).__name__} has no parameter or buffer `{unknown}`.")
    instead = {id(own[name]): tensor for name, tensor in tensors.items()}
    stores: list[dict[str, Any]] = [s for m in model.modules() for s in (m._parameters, m._buffers)]
    with held(model):
        places = [(store, key, old) for store in stores for key, old in store.items() if id(old) in instead]
        try:
            for store, key, old in places:
                store[key] = instead[id(old)]
            yield
        finally:
            for store, key, old in places:
                store[key] = old


def ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor, or a copy of one that was made in inference mode, which autograd cannot keep."""
    return tensor.clone() if tensor.is_inference() else tensor


class Snapshot:
    """What the modules of a model hold, to be put back: all attributes, and what containers among them hold.

    Args:
        model: the model.
        buffers: tensors whose values are kept too.
    """

    def __init__(self, model: nn.Module, buffers: Iterable[Tensor] = ()) -> None:
        modules = [module for module in model.modules() if not type(module).__module__.startswith(_OTHERS)]
        self.attributes = [(vars(module), dict(vars(module))) for module in modules]
        self.containers: list[tuple[Any, Any]] = [
            (value, _copy_of(value) if value else ())
            for _, before in self.attributes
            for value in before.values()
            if type(value) in _CONTAINERS
        ]
        self.buffers = [(buffer, _version(buffer), buffer.detach().clone()) for buffer in buffers]

    def restore(self) -> None:
        """Put back what has changed."""
        for now, before in self.attributes:
            _put_back(now, before)
        for value, content in self.containers:
            if not content:  # as most are, such as those for hooks
                if value:
                    value.clear()
            elif isinstance(value, list):
                if len(value) != len(content) or any(a is not b for a, b in zip(value, content, strict=True)):
                    value[:] = content
            elif isinstance(value, set):
                value &= content
                value |= content
            else:
                _put_back(value, content)
        with torch.no_grad():
            for buffer, version, original in self.buffers:
                if _version(buffer) != version or version is None:
                    buffer.copy_(original)


_CONTAINERS = {dict, OrderedDict, defaultdict, list, set}


def _copy_of(value: Any) -> Any:
    return dict(value) if type(value) is defaultdict else type(value)(value)


def _put_back(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Make a dictionary hold the same objects as before, in the same order."""
    if len(now) == len(before) and all(map(is_, now, before)) and all(map(is_, now.values(), before.values())):
        return
    for key in now.keys() - before.keys():
        del now[key]
    for key, value in before.items():
        if key not in now or now[key] is not value:
            now[key] = value
    if list(now) != list(before):
        now.clear()
        now.update(before)


def _version(tensor: Tensor) -> int | None:
    """Return how often a tensor was written to; tensors made in inference mode do not count."""
    return None if tensor.is_inference() else tensor._version

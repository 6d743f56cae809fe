"""Agreement: the cut network against the silenced one, by value, on the path that users run.

Shapes can be right where values are not: an integer that permutes channels, a fast path that a cut has made wrong.  So
``apply`` runs both networks once, in eval mode, on an input of the traced shape.

Flows in: a model, a plan and the cut network.  Flows out: nothing, or an error that names the first call that differs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from prunelab.batches import call, device_of
from prunelab.errors import BatchError, PlanError
from prunelab.kept import Kept
from prunelab.plans import Plan
from prunelab.runtime.devices import forked_rng
from prunelab.runtime.isolation import copied, eval_mode
from prunelab.runtime.stack import user_level
from prunelab.runtime.switches import undisturbed
from prunelab.surgery.silence import silenced
from prunelab.tracing import fakes, hooks
from prunelab.tracing.calls import Calls, innermost, tensors_of
from prunelab.tracing.recorder import named_tensors
from prunelab.tracing.trace import DependencyGraph

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""How far apart the outputs may be, relative to the largest; rounding takes a hundredth of that, a wrong cut more.

Networks in float64 may compute parts in float32."""


class Example:
    """An input of the traced shape, and what the silenced network makes of it.

    Args:
        silence: returns the silenced network; called with a function, one that tells what every call gives.
        described: the inputs that the model was traced with, as plain data.
    """

    def __init__(self, silence: Callable[..., nn.Module], described: Any) -> None:
        self.silence, self.silent = silence, silence()
        silent = self.silent
        self.inputs = fakes.example(described, device_of(silent))
        self.wanted = self._run(silent)

    def _run(self, model: nn.Module, seed: int = 0, mode: Calls | None = None) -> list[Tensor]:
        """Return what a model gives, as users run it; with the same seed random numbers in it are the same."""
        inputs = tree_map_only(Tensor, Tensor.clone, self.inputs)
        with ExitStack() as stack:
            forked = forked_rng(device_of(model))
            for context in (forked, undisturbed(), eval_mode(model), torch.no_grad(), hooks.only_needed(model)):
                stack.enter_context(context)
            torch.manual_seed(seed)
            if mode is not None:
                stack.enter_context(mode)
            return tensors_of(call(model, inputs))

    def check(self, cut: nn.Module) -> None:
        """Compare a cut network with the silenced one.

        Raises:
            PlanError: they differ; the message names the first call that does, if it can be found.
        """
        name = type(self.silent).__name__
        cut = copied(cut)  # a run may leave traces in buffers and attributes
        try:
            found = self._run(cut)
        except BatchError as error:
            raise PlanError(f"The cut {name} does not run in eval mode, so nothing was cut: {error}") from error
        difference = _difference(found, self.wanted)
        if difference is None:
            return
        if _difference(self._run(self.silent, seed=1), self.wanted) is not None:
            warnings.warn(
                f"The cut {name} was not compared with pl.masked: its outputs are random in eval mode.", stacklevel=2
            )
            return
        raise PlanError(
            f"The cut {name} would not compute what the plan says{self._place(cut)}, so nothing was cut: its output "
            f"differs from that of pl.masked by {difference:.2g} of the largest entry. Ignore that module. This is a "
            "mistake of prunelab: please report it."
        )

    def _place(self, cut: nn.Module) -> str:
        """Return in words the first call that gives something else, and the module it is in."""
        wanted: list[tuple[str, list[Tensor]]] = []
        found = _Kept(cut)
        with suppress(Exception):  # an explanation that fails must not hide what it explains
            self._run(self.silence(lambda *call: wanted.append(call)))
            self._run(cut, mode=found)
        for (name, made), one in zip(wanted, found.calls, strict=False):
            if name != one.name or [part.dim() for part in made] != [part.dim() for part in one.made]:
                break
            if _difference(one.made, made) is not None:
                return f" (first in `{name}` in {one.module})"
        return ""


class _Made(NamedTuple):
    """What a call of a function returned, and the module it was made in."""

    name: str
    module: str
    made: list[Tensor]


class _Kept(Calls):
    """Keeps what every function returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(module): name for name, module in model.named_modules()}
        self.calls: list[_Made] = []

    def on_call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function and keep what it returns."""
        out = func(*args, **kwargs)
        made = [part.detach().clone() for part in tensors_of(out)]
        if made:
            self.calls.append(_Made(getattr(func, "__name__", "").partition(".")[0], self._module(), made))
        return out

    def _module(self) -> str:
        """Return the innermost module whose code runs, in words."""
        name = innermost(self.names)
        return f"`{name}`" if name else "the model's own forward"


def has_data(model: nn.Module) -> bool:
    """Tell whether a model can be run: not on the meta device, nor on fake tensors."""
    return not any(tensor.is_meta or isinstance(tensor, FakeTensor) for _, tensor in named_tensors(model))


def _difference(found: list[Tensor], wanted: list[Tensor]) -> float | None:
    """Return how far apart outputs are, relative to the largest entry; ``None`` if rounding may explain it."""
    if [part.shape for part in found] != [part.shape for part in wanted]:
        return float("inf")
    for one, two in zip(found, wanted, strict=True):
        if not two.is_floating_point():  # a place or a label follows from what is compared
            continue
        allowed = TOLERANCE.get(two.dtype, 1e-1)
        one, two = (part.to("cpu", torch.float64) for part in (one, two))
        finite = two.isfinite()
        if not torch.equal(one.isfinite(), finite):
            return float("inf")
        if not finite.any():
            continue
        apart = float((one - two)[finite].abs().max() / two[finite].abs().max().clamp_min(1e-30))
        if apart > allowed:
            return apart
    return None


def example_for(model: nn.Module, plan: Plan, graph: DependencyGraph, kept: Kept) -> Example | None:
    """Return what a cut network is compared by; ``None``, with a warning, if the model has no data."""
    if not kept.masks:
        return None
    if not has_data(model):
        warnings.warn(
            f"The cut {type(model).__name__} was not compared with pl.masked: its weights have no data. Compare them "
            "once it has, or pass check=False.",
            stacklevel=user_level(),
        )
        return None
    return Example(partial(silenced, model, graph, kept), plan.inputs)

"""Hooks: which of a user's hooks run when a model runs on tensors without data.

A hook may keep features, print numbers or count calls; on tensors without data that is useless, and would leave such
tensors in the user's lists.  A hook may also be part of the function: PyTorch's old ``weight_norm``, ``spectral_norm``
and ``prune`` compute weights in one, and a hook that returns something changes what its module takes or gives.  So, on
the fake copy of a model:

- hooks of PyTorch itself (and of prunelab) run;
- if no other hook can change a result, none of the others runs.  Their code tells: it returns nothing, what it was
  given, or what ``print`` or a list's ``append`` returns, and does not write to a tensor or to the module;
- if one can, all of them run, since one may keep what another adds, but on copies of whatever they refer to.  A hook
  that cannot run without data is left out, with a warning that names it.

Hooks of backward passes and of state dicts never run here, nor do those that are registered for all modules.

Flows in: the modules of a model.  Flows out: the hooks of its fake copy.
"""

from __future__ import annotations

import dis
import inspect
import types
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from prunelab.tracing.sheltered import Sheltered

FORWARD = ("_forward_pre_hooks", "_forward_hooks")
"""Where a module keeps the hooks of its forward pass."""

BACKWARD = ("_backward_pre_hooks", "_backward_hooks")
"""Where it keeps those of a backward pass."""

OTHERS = (
    *BACKWARD,
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Where it keeps those that have no part in one."""

_ALL = (*FORWARD, *OTHERS)
_OWN = ("torch.", "prunelab.")
_FILLED_BY = ("append", "extend", "insert", "add", "update", "clear", "appendleft")
_FILLER = {"RESUME", "COPY_FREE_VARS", "PUSH_NULL", "PRECALL", "CACHE", "NOP", "EXTENDED_ARG", "MAKE_CELL", "NOT_TAKEN"}

Found = list[tuple[dict[Any, Any], str, dict[Any, Any]]]
"""Hooks of the copy, the name of the module, hooks of the user's module."""


def dropped(*_: Any, **__: Any) -> None:
    """Take the place of a hook that does not run."""


class Traced:
    """A hook on a fake copy: a sheltered copy of the user's, left out once it has failed.

    Args:
        hook: what runs.
        name: of the hook and its module, for a warning.
    """

    def __init__(self, hook: Callable[..., Any], name: str) -> None:
        self.hook, self.name, self.able = hook, name, True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.able:
            return None
        try:
            return self.hook(*args, **kwargs)
        except Exception as error:
            self.able = False
            warnings.warn(
                f"{self.name} cannot run on tensors without data, so it was left out, and what it changes is not "
                f"traced ({type(error).__name__}: {error}). Remove it before tracing, or do what it does in forward.",
                stacklevel=2,
            )
            return None


def emptied(modules: Iterable[tuple[str, nn.Module]], memo: dict[int, Any]) -> Found:
    """Make ``copy.deepcopy`` find no hooks; ``fill`` then gives the copies theirs.

    Args:
        modules: names and modules of the user's model.
        memo: of the copy: ``id`` of what is copied -> its copy.
    """
    found: Found = []
    for path, module in modules:
        store = vars(module)
        for attribute in _ALL:
            hooks = store.get(attribute)
            if hooks and id(hooks) not in memo:
                memo[id(hooks)] = OrderedDict()
                if attribute in FORWARD:
                    found.append((memo[id(hooks)], path or type(module).__name__, hooks))
    return found


def fill(found: Found, memo: dict[int, Any]) -> None:
    """Give the copies of modules the hooks that run, and stand-ins for those that do not.

    Args:
        found: by ``emptied``.
        memo: as for that, with the copies of all modules.
    """
    of_user = [hook for _, _, hooks in found for hook in hooks.values() if not is_own(hook)]
    run = any(may_change(hook) for hook in of_user)
    sheltered = Sheltered(memo, is_own)
    for copies, path, hooks in found:
        for key, hook in hooks.items():
            if is_own(hook):
                copies[key] = hook
            elif isinstance(hook, Traced):
                copies[key] = Traced(sheltered(hook.hook), hook.name)
            else:
                name = f"Hook `{_name(hook)}` on `{path}`"
                copies[key] = Traced(sheltered(hook), name) if run else dropped


@contextmanager
def only_needed(model: nn.Module) -> Iterator[None]:
    """Leave out, for a while, the user's hooks of a model that can have no part in what it computes.

    Those are all hooks of backward passes, and those of forward passes if none of them can change anything.
    """
    modules = list(model.modules())
    forward = [vars(module)[attribute] for module in modules for attribute in FORWARD]
    of_user = [(hooks, key) for hooks in forward for key, hook in hooks.items() if not is_own(hook)]
    keep = any(may_change(hooks[key]) for hooks, key in of_user)
    before = [(hooks, dict(hooks)) for hooks, _ in of_user]
    backward = [(module, name, vars(module)[name]) for module in modules for name in BACKWARD if vars(module)[name]]
    try:
        for hooks, key in () if keep else of_user:
            hooks[key] = dropped
        for module, name, hooks in backward:
            vars(module)[name] = type(hooks)()
        yield
    finally:
        for hooks, content in before:
            hooks.update(content)
        for module, name, hooks in backward:
            vars(module)[name] = hooks


def warn_of_global_hooks() -> None:
    """Warn of hooks for all modules that may change what a model computes: they are not traced."""
    for hooks in (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks):
        for wrapped in hooks.values():
            hook = getattr(wrapped, "hook", wrapped)
            if not is_own(hook) and may_change(hook):
                warnings.warn(
                    f"Hook `{_name(hook)}` on all modules was not run on tensors without data: what it changes is not "
                    "traced. Register it on the modules that it is for.",
                    stacklevel=4,
                )


def is_own(hook: Callable[..., Any]) -> bool:
    """Return whether a hook is PyTorch's or ours: those compute weights, or numbers that the model uses."""
    if isinstance(hook, (Traced, nn.Module)):
        return False
    function = _function(hook)
    return function is not None and f"{function.__module__}.".startswith(_OWN)


def may_change(hook: Callable[..., Any]) -> bool:
    """Return whether a hook may change what the model computes, as far as its code tells; when in doubt, yes."""
    if hook is print:
        return False
    function = None if isinstance(hook, Traced) else _function(hook)
    function = inspect.unwrap(function) if function is not None else None
    if not isinstance(function, types.FunctionType):
        return True
    steps = [step for step in dis.get_instructions(function) if step.opname not in _FILLER]
    if _writes(function, steps):
        return True
    required = function.__code__.co_argcount - len(function.__defaults__ or ())
    arguments = function.__code__.co_varnames[:required]
    stored = {name for step in steps if step.opname.startswith("STORE_FAST") for name in _names(step)}
    unchanged = tuple(set(arguments[-1:]) - stored)  # a hook's last argument is what it may change
    for place, step in enumerate(steps):
        if step.opname == "RETURN_CONST" and step.argval is not None:
            return True
        if step.opname == "RETURN_VALUE":
            before = steps[place - 1]
            nothing = before.opname == "LOAD_CONST" and before.argval is None
            nothing = nothing or _loads(before, unchanged)
            if step.is_jump_target or not (nothing or _returns_nothing(function, steps)):
                return True
    return False


def _writes(function: types.FunctionType, steps: list[dis.Instruction]) -> bool:
    """Return whether code has operations that may write to a tensor or to a module."""
    names = function.__code__.co_names
    if "setattr" in names or any(name.endswith("_") and not name.endswith("__") for name in names):
        return True  # methods that write to a tensor end so
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    of_self = arguments[:1] == ("self",)
    for place, step in enumerate(steps):
        if step.opname.startswith("INPLACE_") or (step.opname == "BINARY_OP" and step.argrepr.endswith("=")):
            return True
        if step.opname == "STORE_ATTR" and not (of_self and _loads(steps[place - 1], arguments[:1])):
            return True
        if step.opname == "STORE_SLICE":
            return True
        if step.opname == "STORE_SUBSCR":
            key, holder = steps[place - 1], steps[place - 2]
            if not (key.opname.startswith("LOAD_") and holder.opname in ("LOAD_DEREF", "LOAD_GLOBAL", "LOAD_ATTR")):
                return True
    return False


def _loads(step: dis.Instruction, names: tuple[str, ...]) -> bool:
    """Return whether what a step loads, last if it loads two, is one of some variables."""
    return step.opname.startswith("LOAD_FAST") and _names(step)[-1] in names


def _names(step: dis.Instruction) -> tuple[str, ...]:
    """Return the variables of a step; since Python 3.13 there may be two."""
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)


def _returns_nothing(function: types.FunctionType, steps: list[dis.Instruction]) -> bool:
    """Return whether all that code does is to call ``print``, or something that fills a list and the like.

    What is called is loaded before its arguments: a name, then an attribute.
    """
    last = steps[-1].opname == "RETURN_VALUE" and steps[-2].opname.startswith("CALL")
    if not last or any(step.is_jump_target or "RETURN" in step.opname for step in steps[:-1]):
        return False
    found = _value(function, steps[0])
    if found is print:
        return True
    filled = isinstance(found, (list, dict, set, deque)) and type(found).__module__ in ("builtins", "collections")
    return filled and steps[1].opname in ("LOAD_ATTR", "LOAD_METHOD") and steps[1].argval in _FILLED_BY


def _value(function: types.FunctionType, step: dis.Instruction) -> Any:
    """Return what a step loads from outside of a function, ``None`` if it does not."""
    if step.opname in ("LOAD_DEREF", "LOAD_GLOBAL"):
        outside = inspect.getclosurevars(function)
        return {**outside.builtins, **outside.globals, **outside.nonlocals}.get(step.argval)
    return None


def _function(hook: Any) -> types.FunctionType | None:
    """Return the Python function that a hook runs, ``None`` where it is something else."""
    while isinstance(hook, (partial, types.MethodType)):
        hook = hook.func if isinstance(hook, partial) else hook.__func__
    if not isinstance(hook, types.FunctionType):
        hook = type(hook).__call__ if callable(hook) else None
    return hook if isinstance(hook, types.FunctionType) else None


def _name(hook: Any) -> str:
    return getattr(_function(hook), "__qualname__", type(hook).__name__).replace("<locals>.", "")

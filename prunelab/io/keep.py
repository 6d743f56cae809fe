"""Save and load: a pruned, factorised or sparse model as data, and the same model again.

Flows in: a model that ``apply`` cut, ``factorize`` split or ``sparsify`` masked, in any order.  Flows out: a file, and
from it and a fresh unpruned model, the same model again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from prunelab import options
from prunelab.distributed import refuse_wrapped
from prunelab.errors import DataError, PruneLabError
from prunelab.files import header
from prunelab.files.atomic import replacing
from prunelab.files.header import Header
from prunelab.io import steps
from prunelab.plans import PLANS
from prunelab.runtime.isolation import copied, held
from prunelab.runtime.switches import undisturbed


def save(model: nn.Module, path: str | Path) -> None:
    """Write the weights of ``model`` and the steps that made it; the file appears whole or not at all.

    The file is in the safetensors format, with a JSON header: no pickle, nothing that is ever run.  What is in it is
    what ``state_dict`` returns.  An interrupted save does not touch the old file.  Among several processes
    (``torch.distributed``) let one save, rank 0 as a rule.

    Args:
        model: one that ``apply``, ``factorize`` or ``sparsify`` made, in any order, or any other; it is not changed.
        path: of the file to write; one that is there already is replaced.

    Raises:
        OptionError: ``path`` is not a path.
        DataError: the file cannot be written, or the model holds something that such a file cannot.

    >>> import tempfile, prunelab as pl
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pl.save(model, f"{folder}/model.safetensors")
    ...     [file.name for file in Path(folder).iterdir()]
    ['model.safetensors']
    """
    path = options.path("path", path)
    refuse_wrapped(model)
    try:
        with held(model):
            tensors, ties = _tensors(model)
        about = Header(type_before_parametrizations(model).__name__, steps.plain(model), ties)
        with replacing(path) as fresh:
            save_file(tensors, str(fresh), metadata=header.metadata(about, tensors))
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, DataError) as error:
        raise DataError(f"{path} cannot be written: {error}") from error


@undisturbed()
def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Return a copy of ``model`` with every step in the file done again, and with the file's weights.

    Nothing in the file is run: it names parameters, units and ranks, and holds numbers.  They must be exactly those of
    the model that comes of it, by name, shape and type, and have the checksum that was written with them.

    Args:
        model: a fresh, unpruned model of the class that was pruned, of the same precision; it is not changed.
        path: a file written by ``save``.

    Returns:
        The model, in the mode and on the device of ``model``.

    Raises:
        OptionError: ``path`` is not a path.
        DataError: the file is missing, damaged, edited, or not of this class of model; the message says which.

    >>> import tempfile, prunelab as pl
    >>> x, fresh = torch.ones(1, 4), lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> small, _ = pl.prune(fresh(), x, ratio=0.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pl.save(small, f"{folder}/small.safetensors")
    ...     again = pl.load(fresh(), f"{folder}/small.safetensors")
    >>> again[0], torch.equal(again(x), small(x))
    (Linear(in_features=4, out_features=4, bias=True), True)
    """
    path = options.path("path", path)
    refuse_wrapped(model)
    about, tensors = header.read(path)
    try:
        known = [steps.opened(data) for data in about.steps]
    except DataError as error:
        raise DataError(f"{path} is not a model saved by prunelab, or is damaged or edited: {error}.") from error
    if getattr(model, PLANS, []):
        raise DataError(f"This {type(model).__name__} is pruned already: load {path} into a fresh, unpruned one.")
    made = f"it was saved from a {about.name[:100]}, this is a {type(model).__name__}"
    out = copied(model)
    try:
        _raise(_other_types(_state(model), tensors))  # now, since steps would fail for reasons that are harder to read
        for step in known:
            out = steps.redo(out, step)
        out.load_state_dict(_fitting(out, tensors, about.ties))
    except PruneLabError as error:
        raise DataError(f"{path} does not fit the model ({made}): {error}") from error
    except Exception as error:  # a file may say anything; what the model's own code then raises is no way to tell it
        raise DataError(f"{path} does not fit the model ({made}): {error!r}") from error
    return out


# ── the state_dict, and the file's tensors for it ─────────────────────────────────────────────────────────────────


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors that are written, contiguous and on the CPU, and other names -> the name that stands for them.

    Raises:
        DataError: the ``state_dict`` holds something that a file of tensors cannot.
    """
    state = _state(model)
    owners = _owners(state)
    tensors = {name: state[name].cpu().clone(memory_format=torch.contiguous_format) for name in set(owners.values())}
    return tensors, {name: kept for name, kept in owners.items() if name != kept}


def _state(model: nn.Module) -> dict[str, Tensor]:
    refuse_wrapped(model)
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            kind = value.layout if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise DataError(f"`{name}` in the state_dict of {type(model).__name__} is {kind}, not a dense tensor")
        if value.is_meta:
            raise DataError(f"`{name}` of {type(model).__name__} has no data: the model is on the meta device")
    return state


def _owners(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for every name the first name, in the order of the alphabet, that has the same memory."""
    first: dict[Any, str] = {}
    owners = {}
    for name, value in sorted(state.items()):
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else name
        owners[name] = first.setdefault(place, name)
    return owners


def _fitting(model: nn.Module, tensors: Mapping[str, Tensor], ties: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the file's tensors under all names of the ``state_dict``.

    Raises:
        DataError: they are not of the names, shapes and types that it has.
    """
    state = _state(model)
    given = dict(tensors)
    for name, kept in ties.items():
        if kept not in tensors or name in tensors:
            raise DataError(f"`{name[:100]}` must be the same as `{kept[:100]}`, which the file does not have")
        given[name] = tensors[kept]
    wrong = [f"the file lacks `{name}`" for name in sorted(state.keys() - given.keys())]
    wrong += [f"the file has `{name[:100]}`, the model does not" for name in sorted(given.keys() - state.keys())]
    for name in sorted(given.keys() & state.keys()):
        found, value = given[name], state[name]
        if found.shape != value.shape:
            wrong.append(f"`{name}` has the shape {list(found.shape)} in the file and {list(value.shape)} in the model")
    wrong += _other_types(state, given)
    if not wrong:
        for name, owner in _owners(state).items():
            if name != owner and not torch.equal(given[name], given[owner]):
                wrong.append(f"`{name}` and `{owner}` are one tensor in the model and two in the file")
    _raise(wrong)
    return given


def _other_types(state: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Return in words which tensors are of another type in the file than in the model."""
    types = {name: (given[name].dtype, state[name].dtype) for name in sorted(given.keys() & state.keys())}
    return [
        f"`{name}` is {str(found)[6:]} in the file and {str(wanted)[6:]} in the model"
        for name, (found, wanted) in types.items()
        if found != wanted
    ]


def _raise(wrong: list[str]) -> None:
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataError("; ".join(wrong[:3]) + more + ".")

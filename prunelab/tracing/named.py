"""What a user means by a module or a name: the parameters and buffers that stay whole with it.

``ignore=`` of ``trace``, ``plan``, ``prune`` and ``factorize`` all mean this.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from prunelab.errors import PlanError, PruneLabError
from prunelab.options import parts
from prunelab.tracing.recorder import named_tensors

Items = Iterable[str | nn.Module]
"""Names of modules, parameters or buffers, or modules themselves; one of these alone will do."""


def covered(
    model: nn.Module,
    ignore: Items,
    *,
    groups: Collection[str] = (),
    error: type[PruneLabError] = PlanError,
) -> dict[str, str]:
    """Return every parameter and buffer that is, or is part of, what ``ignore`` names, and which item names it.

    Args:
        model: what the names are looked up in; a tensor with several names is covered by any of them.
        ignore: modules and names.
        groups: other names that may be given there; they cover nothing here.
        error: what is raised.

    Raises:
        error: ``ignore`` names something that the model does not have.
        OptionError: it holds something that is neither a name nor a module.

    >>> covered(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), ["1"])
    {'1.weight': '1', '1.bias': '1'}
    """
    items = parts("ignore", ignore)
    if not items:
        return {}
    modules = {id(module): name for name, module in model.named_modules()}
    places = dict(model.named_modules(remove_duplicate=False))
    first = {id(tensor): name for name, tensor in named_tensors(model)}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    found: dict[str, str] = {}
    for item in items:
        name = modules.get(id(item)) if isinstance(item, nn.Module) else item
        if name is None:
            raise error(f"ignore holds a {type(item).__name__} that is not part of the model {type(model).__name__}.")
        inside = [first[id(tensor)] for key, tensor in tensors if name == "" or f"{key}.".startswith(f"{name}.")]
        if not inside and name not in places and name not in groups:
            raise error(f"ignore holds `{name}`, which is not a module, parameter or group of {type(model).__name__}.")
        found |= dict.fromkeys(inside, name)
    return found

"""Parameters that the trace never met: other code may run them on what a cut makes narrower."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import nn

from prunelab.tracing.axes import Axis
from prunelab.tracing.trace import DependencyGraph


def warn_of_unused(model: nn.Module, graph: DependencyGraph, kept_size: Callable[[Axis], int]) -> None:
    """Warn of layers that did not run in the trace and read something as wide as what is cut.

    A second entry point (``model.embed``) or an optional input may run them; they keep their size.

    Args:
        model: what is cut.
        graph: of the whole model.
        kept_size: how many entries of an axis stay.
    """
    learned = {name for name, _ in model.named_parameters()}
    cut = {dim.size for dims in graph.dims.values() for dim in dims if kept_size(dim.axis) != dim.size}
    found: dict[str, int] = {}
    for name in graph.dims:
        if name in learned and name not in graph.visited:
            owner = name.rpartition(".")[0]
            width = _reads(model.get_submodule(owner), [dim.size for dim in graph.dims[name]], cut)
            if width is not None:
                found.setdefault(owner or name, width)
    if found:
        names = ", ".join(f"`{name}`" for name in list(found)[:3]) + (" and others" if len(found) > 3 else "")
        widths = ", ".join(str(width) for width in sorted(set(found.values())))
        warnings.warn(
            f"{names} did not run in the trace, so the size stays, but a width of {widths} is cut elsewhere in "
            f"{type(model).__name__}: if other code or another input runs them, they may no longer fit. Trace with "
            "an input or a forward that runs them, or ignore the layers that feed them.",
            stacklevel=4,
        )


def _reads(module: nn.Module, sizes: list[int], cut: set[int]) -> int | None:
    """Return a width among ``cut`` that a module with a parameter of these sizes reads, by all appearances."""
    if len(sizes) == 1:
        read = sizes if isinstance(module, _NORMS) else []
    else:
        read = sizes[:1] if isinstance(module, nn.modules.conv._ConvTransposeNd) else sizes[1:]
    return next((size for size in read if size in cut and size > 1), None)


_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

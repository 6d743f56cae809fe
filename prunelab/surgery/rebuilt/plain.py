"""How an operator without a rule of its own is called again after a cut: as it was, with the sizes that are left.

Flows in: a row of a tape on its way into the graph.  Flows out: a node, or an error where an integer might describe
what is cut.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from prunelab.errors import PlanError
from prunelab.surgery.rebuilt.sizes import Varying
from prunelab.surgery.rebuilt.step import Step
from prunelab.surgery.rebuilt.tape import Ref

HARMLESS = {"dim", "dims", "dim0", "dim1", "kernel_size", "stride", "padding", "dilation", "output_padding", "pad"}
HARMLESS |= {"output_size", "index", "shifts", "k", "diagonal", "upscale_factor", "downscale_factor", "padding_idx"}
HARMLESS |= {"correction", "memory_format", "divisor_override", "axis", "ch_axis", "quant_min", "quant_max", "mode"}
HARMLESS |= {"interpolation_mode", "padding_mode", "pooled_height", "pooled_width", "sampling_ratio", "normalization"}
HARMLESS |= {"last_dim_size", "offset", "dim1", "dim2", "expand1", "expand2", "expand3", "sumdim", "unroll_dim"}
HARMLESS |= {"compute_mode", "low", "high", "zero_point"}
"""Integers that do not change when channels are cut: places, and sizes in space."""

UNKNOWN = {"new_empty_strided", "empty_strided"}
"""Operators whose integers follow the layout in memory."""


def plain(step: Step, harmless: Collection[str] = HARMLESS) -> None:
    """Call the operator as it was recorded; sizes of the result follow the cut."""
    row, schema = step.row, step.row.func._schema
    results = [step.out(place) for place in row.shapes]
    tensors = [value for value in tree_leaves((row.args, row.kwargs)) if isinstance(value, Ref)]
    cut = any(step.was(ref) != step.stays(ref) for ref in (*tensors, *results))
    if cut and step.name in UNKNOWN:
        raise PlanError(f"{step.where} has no rule in the graph back end, so nothing was cut: ignore that module.")
    given: list[Any] = []
    named: dict[str, Any] = {}
    for place, argument in enumerate(schema.arguments):
        if place >= len(row.args) and argument.name not in row.kwargs:
            continue
        value = step[argument.name]
        if argument.name == "size" and isinstance(value, (list, tuple)):
            value = step.size(results[0])
        else:
            numbers = any(_is_number(part) for part in tree_leaves(value))
            integers = numbers and "int" in str(argument.type).lower()  # a Scalar is a "number"
            if cut and integers and argument.name not in harmless and torch.Tag.pointwise not in row.func.tags:
                raise PlanError(
                    f"{step.where} takes an integer `{argument.name}` that the graph back end cannot follow through "
                    "a cut, so nothing was cut: ignore that module."
                )
            value = step.builder.argument(value)
        if place < len(row.args):
            given.append(value)
        else:
            named[argument.name] = value
    if -1 in row.shapes:
        step.give(row.func, *given, **named)
        return
    several = step.builder.call(row.func, *given, **named)
    for place in row.shapes:
        step.give(operator.getitem, several, place, place=place)


def _is_number(value: Any) -> bool:
    return type(value.values[0] if isinstance(value, Varying) else value) is int

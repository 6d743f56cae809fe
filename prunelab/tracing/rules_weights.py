"""Rules for operators that compute one weight from others: weight norm, fake quantisation.

Flows in: a call.  Flows out: the dimensions of its outputs, with the parameters that they are made from.
"""

from __future__ import annotations

from prunelab.tracing.axes import find
from prunelab.tracing.recorder import NUMBERS, Call, Dim, Dims
from prunelab.tracing.rules_entries import is_tensor, made_like, merge


def weight_norm(call: Call) -> list[Dims]:
    """``g · v / ‖v‖``, a norm for every row: a cut of columns must scale ``g`` (``surgery.weight_norm``)."""
    direction, length = call.dims("v"), call.dims("g")
    place = call["dim"] % len(direction)
    rows = merge(call, [direction[place], length[place]])
    weight = [rows if number == place else dim for number, dim in enumerate(direction)]
    names = [{name for dim in dims for name, _ in dim.origins} for dims in (direction, length)]
    if all(len(found) == 1 for found in names):
        call.recorder.weight_norms.append((names[0].pop(), names[1].pop(), place))
    else:
        call.freeze([dim for dim in direction if dim is not direction[place]], "takes a norm over it")
    norms = [Dim(rows.axis) if number == place else dim for number, dim in enumerate(length)]
    return [weight, *(norms for _ in call.outputs[1:])]


def fake_quantize(call: Call) -> list[Dims]:
    """Rounding entry by entry, with one scale for all or one per channel."""
    dims = call.dims("self")
    place = call.get("ch_axis", call.get("axis"))
    for name in ("scale", "zero_point", "running_min", "running_max"):
        one = call.get(name)
        if place is None or not is_tensor(one) or one.dim() != 1 or one.numel() != dims[place].size or one.numel() == 1:
            continue
        (each,) = call.dims(name)
        axis = find(each.axis)
        if axis.frozen == NUMBERS:  # a zero point per channel goes with its channel
            axis.frozen = None
        call.unify(dims[place], each)
    return [dims if out.shape == call.tensors[0].shape else made_like(call, out) for out in call.outputs]

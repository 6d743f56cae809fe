"""How each operator on a tape is called again after a cut: one rule per operator, as in ``rules``.

Flows in: a row of a tape, and what is kept of every axis.  Flows out: nodes of an ``fx.Graph``.  Sizes are taken from
the kept axes, kernels that belong to one device are called by their common name, and an operator whose integers are not
understood here is an error once a tensor that it meets is cut.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import fx

from prunelab.errors import PlanError
from prunelab.surgery.rebuilt.calls import batch_norm_in_mode
from prunelab.surgery.rebuilt.plain import plain
from prunelab.surgery.rebuilt.sizes import Varying
from prunelab.surgery.rebuilt.step import Step
from prunelab.surgery.rebuilt.tape import Ref, Row
from prunelab.tracing.axes import regroup

if TYPE_CHECKING:
    from prunelab.surgery.rebuilt.graph import Builder

aten = torch.ops.aten

# ── rules ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def view(step: Step) -> None:
    """A view; where nothing writes through it, one that also takes tensors that lie differently in memory."""
    if step.row.func is aten.view.dtype:
        plain(step)
        return
    ref = step.out()
    func = aten.view.default if step.builder.written_later(ref) else aten.reshape.default
    step.give(func, step.builder.node(step["self"]), step.size(ref, rest=True))


def stride(step: Step) -> None:
    """Pooling to one pixel gives its result other strides, which move no entry: the result is as it was."""
    source = step["self"]
    before = zip(step.was(source), step.row.strides, step["stride"], strict=False)
    if step.was(source) == step.was(step.out()) and all(size == 1 or old == new for size, old, new in before):
        step.give(aten.alias.default, step.builder.node(source))
    else:
        plain(step, ("stride",) if step.was(source) == step.stays(source) else ())


def repeat(step: Step) -> None:
    """The number of copies is itself an axis, and may be cut."""
    source, ref = step["self"], step.out()
    missing = len(step.was(ref)) - len(step.was(source))
    before = [1] * missing + list(step.was(source)), [1] * missing + list(step.stays(source))
    times = [
        step.number_of(value, was // one, stays // kept)
        for value, was, stays, one, kept in zip(step["repeats"], step.was(ref), step.stays(ref), *before, strict=True)
    ]
    step.give(aten.repeat.default, step.builder.node(source), times)


def slice_(step: Step) -> None:
    """Bounds are places: after a cut, the number of kept entries before them."""
    source = step["self"]
    dim = step["dim"] % len(step.was(source))
    if step.was(source)[dim] == step.stays(source)[dim]:
        plain(step, ("dim", "start", "end", "step"))
        return
    start, end = step["start"] or 0, step["end"]
    if step["step"] != 1 or isinstance(start, Varying) or isinstance(end, Varying):
        raise PlanError(f"{step.where} cannot follow a cut, so nothing was cut: ignore that module.")
    kept = step.builder.mask(source, dim)
    bounds = [int(kept[:place].sum()) for place in slice(start, end).indices(len(kept))[:2]]
    part = [step.builder.node(step["src"])] if "src" in step.values else []
    step.give(step.row.func, step.builder.node(source), *part, dim, *bounds)


def split(step: Step) -> None:
    """Parts of equal size may keep different numbers: each part gets its own."""
    source = step["self"]
    dim = step["dim"] % len(step.was(source))
    if step.was(source)[dim] == step.stays(source)[dim]:
        plain(step, ("dim", "split_size", "split_sizes"))
        return
    sizes = [step.stays(step.out(place))[dim] for place in step.row.shapes]
    several = step.builder.call(aten.split_with_sizes.default, step.builder.node(source), sizes, dim)
    for place in step.row.shapes:
        step.give(operator.getitem, several, place, place=place)


def convolution(step: Step) -> None:
    """By its common name, with as many groups as are left."""
    x, weight, groups = step["input"], step["weight"], step["groups"]
    dims, transposed = len(step.was(weight)) - 2, step["transposed"]
    if groups != 1:
        whole = step.out() if transposed else x
        groups = step.stays(whole)[1] // step.stays(weight)[1]
    func = getattr(F, f"conv_transpose{dims}d" if transposed else f"conv{dims}d")
    x, weight, bias = (step.builder.node(value) for value in (x, weight, step["bias"]))
    given = [step["stride"], step["padding"]]
    if transposed:
        step.give(func, x, weight, bias, *given, step["output_padding"], groups, step["dilation"])
    else:
        step.give(func, x, weight, bias, *given, step["dilation"], groups)


def matmul(step: Step) -> None:
    """``x Wᵀ`` with a transposed weight is a linear layer again."""
    matrix, biased = step["mat2"], step.name == "addmm"
    made = step.builder.rows[matrix.key] if matrix.kind == "op" else None
    simple = not biased or (step["beta"] == 1 == step["alpha"] and len(step.was(step["self"])) == 1)
    if made is None or not simple or made.func is not aten.t.default:
        plain(step)
        return
    parts = (step["mat1"], made.args[0], step["self"]) if biased else (step["self"], made.args[0], None)
    step.give(F.linear, *(step.builder.node(part) for part in parts))


def linear(step: Step) -> None:
    """A linear layer, by its common name."""
    step.give(F.linear, *(step.builder.node(step[name]) for name in ("input", "weight", "bias")))


def attention(step: Step) -> None:
    """The same kernel for every device; the scale is that of the whole head width."""
    query, key = step["query"], step["key"]
    mask = step.values.get("attn_mask", step.values.get("attn_bias"))
    scale = step["scale"]
    step.give(
        F.scaled_dot_product_attention,
        *(step.builder.node(value) for value in (query, key, step["value"], mask)),
        dropout_p=step["dropout_p"],
        is_causal=step["is_causal"],
        scale=step.was(query)[-1] ** -0.5 if scale is None else scale,
        enable_gqa=step.was(query)[1] != step.was(key)[1],
        place=0,
    )


def norm_over(step: Step) -> None:
    """Layer norm and root-mean-square norm, over what is kept."""
    x, shape = step["input"], step["normalized_shape"]
    sizes = [
        step.number_of(value, was, stays)
        for value, was, stays in zip(shape, step.was(x)[-len(shape) :], step.stays(x)[-len(shape) :], strict=True)
    ]
    if step.name == "native_layer_norm":
        x, weight, bias = (step.builder.node(step[name]) for name in ("input", "weight", "bias"))
        step.give(F.layer_norm, x, sizes, weight, bias, step["eps"], place=0)
    else:
        x, weight = (step.builder.node(step[name]) for name in ("input", "weight"))
        step.give(F.rms_norm, x, sizes, weight, step["eps"], place=0)


def group_norm(step: Step) -> None:
    """With as many groups as are left."""
    groups = step.stays(step.out(1))[1]
    x, weight, bias = (step.builder.node(step[name]) for name in ("input", "weight", "bias"))
    step.give(F.group_norm, x, groups, weight, bias, step["eps"], place=0)


def batch_norm(step: Step) -> None:
    """With the statistics of the batch in training mode, unless the model asks for them in any mode."""
    x, mean, variance, weight, bias = (
        step.values.get(name) for name in ("input", "running_mean", "running_var", "weight", "bias")
    )
    momentum: Any = step.values.get("momentum", step.values.get("exponential_average_factor"))
    eps = step.values.get("eps", step.values.get("epsilon"))
    builder, updates = step.builder, step.name == "_batch_norm_with_update"
    always = step.values.get("training", updates or mean is None)
    node = [builder.node(value) for value in (x, mean, variance, weight, bias)]
    if always or not isinstance(mean, Ref) or mean.kind != "tensor":
        step.give(F.batch_norm, *node, always, momentum, eps, place=0)
        return
    training, count, momentum = builder.statistics(mean.key, momentum)
    step.give(batch_norm_in_mode, *node, count, training, momentum, eps, place=0)


def shuffle(step: Step) -> None:
    """Channel shuffle, with as many groups as are left."""
    source = step["self"]
    channels, groups = (step.builder.axes(source) or ())[1], step["groups"]
    outer, _ = regroup([channels], [groups, channels.size // groups], step.where)
    step.give(aten.channel_shuffle.default, step.builder.node(source), step.builder.kept.size(outer))


def padding(step: Step) -> None:
    """Padding with a constant may also drop entries: of a cut dimension, as many as are left of them."""
    source = step["self"]
    amounts = list(step["pad"])
    for back in range(len(amounts) // 2):
        dim = len(step.was(source)) - 1 - back
        if step.was(source)[dim] != step.stays(source)[dim] and any(type(n) is int and n < 0 for n in amounts):
            kept = step.builder.mask(source, dim)
            first, last = amounts[2 * back : 2 * back + 2]
            amounts[2 * back] = -int(kept[:-first].sum()) if first < 0 else first
            amounts[2 * back + 1] = -int(kept[last:].sum()) if last < 0 else last
    step.give(step.row.func, step.builder.node(source), step.builder.argument(amounts), step["value"])


def windows(step: Step) -> None:
    """Pieces of a dimension that is not cut."""
    plain(step, {"dimension", "size", "step"})


def recurrent(step: Step) -> None:
    """A recurrent layer, whose state is not cut."""
    plain(step, {"mode", "hidden_size", "num_layers", "proj_size", "batch_sizes", "weight_stride0"})


def sampling_grid(step: Step) -> None:
    """The size is that of an image, of which only height and width matter."""
    size = [step.number_of(value, 0, 0) for value in step["size"]]
    step.give(step.row.func, step.builder.node(step["theta"]), size, step["align_corners"])


def deformable(step: Step) -> None:
    """With as many groups as are left; the rest is about space."""
    x, weight = step["input"], step["weight"]
    groups = step.stays(x)[1] // step.stays(weight)[1]
    values = [groups if name == "groups" else step.builder.argument(value) for name, value in step.values.items()]
    step.give(step.row.func, *values)


def fresh(step: Step) -> None:
    """A constant written in the code, made again in every call, since code may write to it."""
    step.give(aten.clone.default, step.builder.node(step["self"]))


Rule = Callable[[Step], None]

RULES: dict[Rule, str] = {
    view: "view _unsafe_view _reshape_alias",
    stride: "as_strided",
    repeat: "repeat",
    slice_: "slice slice_scatter",
    split: "split split_with_sizes unsafe_split unsafe_split_with_sizes",
    convolution: "convolution _convolution",
    matmul: "mm addmm",
    linear: "linear",
    attention: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps",
    norm_over: "native_layer_norm _fused_rms_norm",
    group_norm: "native_group_norm",
    batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm _batch_norm_with_update",
    shuffle: "channel_shuffle native_channel_shuffle",
    padding: "constant_pad_nd",
    windows: "unfold",
    recurrent: "mkldnn_rnn_layer _cudnn_rnn _lstm_mps",
    sampling_grid: "affine_grid_generator",
    deformable: "torchvision::deform_conv2d",
    fresh: "lift_fresh lift_fresh_copy",
}
"""The table; operators that are not in it are called as they were (``plain``)."""

_BY_NAME: dict[str, Rule] = {name: rule for rule, names in RULES.items() for name in names.split()}


def replay_row(builder: Builder, number: int, row: Row) -> None:
    """Add the nodes of one row to the graph."""
    if row.marks:
        x, p = row.args
        node = builder.call(row.func, builder.node(x), p, builder.attribute("training"))
        builder.give(Ref("op", number), node)
        return
    step = Step(builder, number, row)
    _BY_NAME.get(step.name.removesuffix("_"), plain)(step)


def is_pure(node: fx.Node) -> bool:
    """Tell whether a node may go once nobody needs its result."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or node.target is batch_norm_in_mode:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    return node.target in (operator.getitem, operator.mul, getattr) or getattr(
        node.target, "__module__", ""
    ).startswith("torch.")

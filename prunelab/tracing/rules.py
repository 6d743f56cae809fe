"""One equation per ATen operator: how the axes of its outputs follow from those of its inputs.

Flows in: an operator that was just called, with the axes of its tensors.  Flows out: the axes of its results; on the
way axes are unified, split or frozen.  An operator without a rule freezes whatever it touches, so an unknown operator
costs prunable units, never a wrong cut.  Notebook 01_tracing walks through the table at the end of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunelab.tracing.axes import concatenation, freeze, is_frozen, leaf, leaves, product, regroup, split
from prunelab.tracing.recorder import Call, Dim, Dims


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _merge(call: Call, dims: Sequence[Dim]) -> Dim:
    for other in dims[1:]:
        call.unify(dims[0], other)
    return Dim(dims[0].axis, frozenset().union(*(dim.origins for dim in dims)))


def _broadcast(call: Call, operands: Sequence[Dims], sizes: Sequence[int]) -> Dims:
    """Unify operands that are broadcast to one shape, from the right."""
    out = []
    for place, size in enumerate(sizes):
        back = len(sizes) - place
        met = [dims[-back] for dims in operands if back <= len(dims) and dims[-back].size == size]
        out.append(_merge(call, met) if met else call.fresh(size, "broadcasts to it"))
    return out


# ── element by element ────────────────────────────────────────────────────────────────────────────────────────────


def pointwise(call: Call) -> list[Dims]:
    """Every entry depends on the entries at the same place: all operands share their axes."""
    operands = [call.dims(tensor) for tensor in call.tensors]
    return [_broadcast(call, operands, out.shape) for out in call.outputs]


def same(call: Call) -> list[Dims]:
    """The result has the axes of the first argument."""
    dims = call.dims(call.tensors[0])
    if any(list(out.shape) != [dim.size for dim in dims] for out in call.outputs):
        return unknown(call)
    return [dims for _ in call.outputs]


def made(call: Call) -> list[Dims]:
    """A tensor out of nothing: its sizes stand in the model's code."""
    return [made_like(call, out) for out in call.outputs]


def made_like(call: Call, tensor: Tensor) -> Dims:
    """Frozen dimensions of an output of which nothing else is known."""
    return [call.fresh(size) for size in tensor.shape]


def unknown(call: Call) -> list[Dims]:
    """No rule: nothing that goes in or comes out may be cut."""
    for tensor in call.tensors:
        call.freeze(call.dims(tensor), "has no rule")
    return made(call)


# ── shapes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def view(call: Call) -> list[Dims]:
    """The same entries in other dimensions: factors are split and merged in row-major order."""
    dims, shape = call.dims("self"), call.out.shape
    axes = regroup([dim.axis for dim in dims], shape, call.where)
    return [[Dim(axis, origins) for axis, origins in zip(axes, _origins_of_view(dims, shape), strict=True)]]


def _origins_of_view(dims: Dims, shape: Sequence[int]) -> list[frozenset]:
    """Give every new dimension the origins of the old ones whose entries it shares."""

    def spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
        inner = [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
        return [(stride, stride * size) for stride, size in zip(inner, sizes, strict=True)]

    if not any(dim.origins for dim in dims):
        return [frozenset()] * len(shape)
    old = list(zip(dims, spans([dim.size for dim in dims]), strict=True))
    return [
        frozenset().union(*(dim.origins for dim, (low, high) in old if low < above and below < high))
        for below, above in spans(shape)
    ]


def permute(call: Call) -> list[Dims]:
    dims = call.dims("self")
    return [[dims[place] for place in call["dims"]]]


def transpose(call: Call) -> list[Dims]:
    dims = list(call.dims("self"))
    first, second = (call["dim0"], call["dim1"]) if "dim0" in call.values else (0, len(dims) - 1)
    if dims:
        dims[first], dims[second] = dims[second], dims[first]
    return [dims]


def squeeze(call: Call) -> list[Dims]:
    dims = call.dims("self")
    chosen = call.get("dim")
    places = range(len(dims)) if chosen is None else [chosen] if isinstance(chosen, int) else chosen
    gone = {place % len(dims) for place in places if dims[place].size == 1}
    return [[dim for place, dim in enumerate(dims) if place not in gone]]


def unsqueeze(call: Call) -> list[Dims]:
    dims = list(call.dims("self"))
    dims.insert(call["dim"] % (len(dims) + 1), Dim(leaf(1)))
    return [dims]


def expand(call: Call) -> list[Dims]:
    """A dimension of one entry is repeated: the copies are a new axis that nothing is known of yet."""
    dims, shape = call.dims("self"), call.out.shape
    dims = [Dim(leaf(1))] * (len(shape) - len(dims)) + dims
    return [[dim if dim.size == size else Dim(leaf(size)) for dim, size in zip(dims, shape, strict=True)]]


def repeat(call: Call) -> list[Dims]:
    dims, shape = call.dims("self"), call.out.shape
    dims = [Dim(leaf(1))] * (len(shape) - len(dims)) + dims
    times = [size // dim.size for dim, size in zip(dims, shape, strict=True)]
    return [[Dim(product([leaf(n), dim.axis])) if n > 1 else dim for n, dim in zip(times, dims, strict=True)]]


def select(call: Call) -> list[Dims]:
    """Code picks entries by their number, so that none of them may go."""
    dims = list(call.dims("self"))
    call.freeze([dims.pop(call["dim"])], "picks entries by number")
    return [dims for _ in call.outputs]


def slice_(call: Call) -> list[Dims]:
    dims, shape = list(call.dims("self")), call.out.shape
    place = call["dim"] % len(dims)
    size, length = dims[place].size, shape[place]
    if length == size:
        return [dims]
    start = min(max((call["start"] or 0) + (size if (call["start"] or 0) < 0 else 0), 0), size)
    if call["step"] != 1 or not length:
        call.freeze([dims[place]], "takes some entries of it")
        dims[place] = call.fresh(length)
    else:
        cuts = [start, length, size - start - length]
        pieces = split(dims[place].axis, [cut for cut in cuts if cut], call.where)
        dims[place] = Dim(pieces[1 if start else 0], dims[place].origins)
    return [dims]


def chunks(call: Call) -> list[Dims]:
    dims = call.dims("self")
    place = call["dim"] % len(dims)
    sizes = [out.shape[place] for out in call.outputs]
    pieces = split(dims[place].axis, sizes, call.where)
    if len(set(sizes)) == 1 and call.name != "split_with_sizes":
        call.recorder.ties.append(pieces)  # code that asks for equal parts will ask again
    return [[*dims[:place], Dim(piece, dims[place].origins), *dims[place + 1 :]] for piece in pieces]


def cat(call: Call) -> list[Dims]:
    parts = [call.dims(tensor) for tensor in call["tensors"] if tensor.numel() or tensor.dim() > 1]
    out = call.out.shape
    place = call["dim"] % len(out)
    dims = [_merge(call, [part[other] for part in parts]) if other != place else None for other in range(len(out))]
    segments = [part[place] for part in parts]
    origins = frozenset().union(*(dim.origins for dim in segments))
    if all(is_frozen(dim.axis) for dim in segments):
        return [[dim or Dim(call.fresh(out[place], "joins").axis, origins) for dim in dims]]
    return [[dim or Dim(concatenation([part.axis for part in segments]), origins) for dim in dims]]


def stack(call: Call) -> list[Dims]:
    parts = [call.dims(tensor) for tensor in call["tensors"]]
    dims = [_merge(call, met) for met in zip(*parts, strict=True)]
    dims.insert(call["dim"] % (len(dims) + 1), call.fresh(len(parts), "stacks"))
    return [dims]


def pad(call: Call) -> list[Dims]:
    """Padding a channel dimension joins constant channels to it; other padded dimensions are frozen."""
    dims = list(call.dims("self"))
    amounts = call["pad"]
    for back in range(len(amounts) // 2):
        before, after = amounts[2 * back], amounts[2 * back + 1]
        place = len(dims) - 1 - back
        if not before and not after:
            continue
        if is_frozen(dims[place].axis) or before < 0 or after < 0 or call.name != "constant_pad_nd":
            call.freeze([dims[place]])
            dims[place] = call.fresh(call.out.shape[place], "pads")
        else:
            ends = [call.fresh(amount, "pads").axis for amount in (before, after)]
            dims[place] = Dim(concatenation([ends[0], dims[place].axis, ends[1]]))
    return [dims]


def reorder(call: Call) -> list[Dims]:
    """Entries move along some dimensions (roll, flip, sort, cumsum): those may not be cut."""
    dims = call.dims("self")
    places = call.get("dims", call.get("dim"))
    places = [places] if isinstance(places, int) else places or range(len(dims))
    call.freeze([dims[place] for place in places if dims], "depends on the order of its entries")
    return [dims for _ in call.outputs]


def pixel_shuffle(call: Call) -> list[Dims]:
    *batch, channels, high, wide = call.dims("self")
    factor = call["upscale_factor"]
    outer, inner = regroup([channels.axis], [channels.size // factor**2, factor**2], call.where)
    freeze(inner, f"{call.where} lays it out in space")
    return [[*batch, Dim(outer), call.fresh(high.size * factor), call.fresh(wide.size * factor)]]


def channel_shuffle(call: Call) -> list[Dims]:
    batch, channels, *rest = call.dims("self")
    groups = call["groups"]
    outer, inner = regroup([channels.axis], [groups, channels.size // groups], call.where)
    return [[batch, Dim(product([inner, outer])), *rest]]


# ── contractions ──────────────────────────────────────────────────────────────────────────────────────────────────


def matmul(call: Call) -> list[Dims]:
    """``[…, n, k] @ […, k, m]``: the inner axes are one and the same, and disappear."""
    names = {"mm": ("self", "mat2"), "bmm": ("self", "mat2")}.get(call.name)
    names = names or (("batch1", "batch2") if "batch1" in call.values else ("mat1", "mat2"))
    left, right = call.dims(names[0]), call.dims(names[1])
    batch = [_merge(call, [one, two]) for one, two in zip(left[:-2], right[:-2], strict=True)]
    call.unify(left[-1], right[-2])
    call.contract(left[-1])
    for operand, inner, outer in ((left, left[-1], left[-2]), (right, right[-2], right[-1])):
        if any(dim.origins for dim in operand):
            call.mark(inner, "consumes")
            call.mark(outer, "produces")
    if not any(dim.origins for dim in (*left, *right)):
        _label(left[-1], "head_width")
        for dim in batch:
            _label(dim, "heads")
    call.count(2, *batch, left[-2], left[-1], right[-1])
    out = [*batch, left[-2], right[-1]]
    if call.name in ("addmm", "baddbmm"):
        _broadcast(call, [out, call.dims("self")], call.out.shape)
    return [out]


def matvec(call: Call) -> list[Dims]:
    """Matrix times vector, or two vectors."""
    left, right = call.dims("self"), call.dims("vec" if "vec" in call.values else "tensor")
    call.unify(left[-1], right[0])
    call.contract(left[-1])
    call.mark(left[-1], "consumes")
    call.mark(right[0], "consumes")
    call.count(2, *left)
    return [left[:-1]]


def convolution(call: Call) -> list[Dims]:
    """Channels are contracted with the kernel's; groups make both sides a product of groups and channels in a group."""
    batch, channels, *space = call.dims("input")
    weight = call.dims("weight")
    transposed, groups = call.get("transposed", False), call.get("groups", 1)
    into, out = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
    result = out
    if groups == 1:
        call.unify(channels, into)
        call.mark(into, "consumes")
        call.mark(out, "produces")
    else:
        group = Dim(leaf(groups))
        inner, outer = leaf(weight[0].size // groups), weight[1].axis
        call.unify(weight[0], Dim(product([group.axis, inner])))
        if transposed:
            call.unify(channels, weight[0])
            result = Dim(product([group.axis, outer]))
        else:
            call.unify(channels, Dim(product([group.axis, outer])))
        call.mark(weight[0], "consumes" if transposed else "produces")
        call.mark(weight[1], "produces" if transposed else "consumes")
        call.mark(weight[0], "carries", within=group.axis)
        call.recorder.sizes.append((call.recorder.module, "groups", group.axis))
    call.contract(into)
    call.freeze(weight[2:], "slides it over the image")
    call.freeze(space, "slides over it")
    if _is_tensor(call.get("bias")):
        call.unify(result, call.dims("bias")[0])
    places = math.prod(dim.size for dim in space) if transposed else math.prod(call.out.shape[2:])
    call.count(2 * places * math.prod(dim.size for dim in weight[2:]), batch, weight[0], weight[1])
    return [[batch, result, *(call.fresh(size, "makes this spatial dimension") for size in call.out.shape[2:])]]


def attention(call: Call) -> list[Dims]:
    """``softmax(q kᵀ · scale) v`` for ``q [B, H, N, E]``, ``k [B, H, S, E]``, ``v [B, H, S, V]``."""
    query, key, value = call.dims("query"), call.dims("key"), call.dims("value")
    batch = _merge(call, [query[0], key[0], value[0]])
    call.unify(key[1], value[1])
    if query[1].size == key[1].size:
        call.unify(query[1], key[1])
    else:
        call.unify(query[1], Dim(product([key[1].axis, leaf(query[1].size // key[1].size)])))
    call.unify(query[3], key[3])
    call.contract(query[3])
    call.freeze([query[2], key[2], value[2]], "attends over it")
    bias = call.get("attn_bias", call.get("attn_mask"))
    if _is_tensor(bias):
        _broadcast(call, [[batch, query[1], query[2], key[2]], call.dims(bias)], [d.size for d in (*query[:3], key[2])])
    _label(query[1], "heads")
    _label(query[3], "head_width")
    _label(value[3], "head_width")
    call.count(2, batch, query[1], query[2], key[2], query[3])
    call.count(2, batch, query[1], query[2], key[2], value[3])
    out, sums = [batch, query[1], query[2], value[3]], [batch, query[1], query[2]]
    others = [
        sums if other.shape == call.outputs[0].shape[:3] else made_like(call, other) for other in call.outputs[1:]
    ]
    return [out, *others]


def _label(dim: Dim, label: str) -> None:
    """Name what is free in an axis after what attention does with it."""
    for part in leaves(dim.axis):
        if part.frozen is None:
            part.label = part.label or label


def embedding(call: Call) -> list[Dims]:
    table, width = call.dims("weight")
    call.freeze([table], "looks entries up by number")
    call.mark(width, "produces")
    return [[*call.dims("indices"), width]]


# ── normalisation, reduction, space ───────────────────────────────────────────────────────────────────────────────


def batch_norm(call: Call) -> list[Dims]:
    """One mean, variance, scale and shift per channel."""
    dims = call.dims("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if _is_tensor(call.get(name)):
            call.unify(dims[1], call.dims(name)[0])
    return [
        dims,
        *([dims[1]] if other.dim() == 1 and len(other) else made_like(call, other) for other in call.outputs[1:]),
    ]


def layer_norm(call: Call) -> list[Dims]:
    """Mean and variance over the last dimensions; a cut network takes them over the entries that are kept."""
    dims = call.dims("input")
    for name in ("weight", "bias"):
        if _is_tensor(call.get(name)):
            for one, two in zip(reversed(dims), reversed(call.dims(name)), strict=False):
                call.unify(one, two)
    shape = call.get("normalized_shape")
    statistics = dims[: len(dims) - len(shape)] + [Dim(leaf(1)) for _ in shape]
    return [dims, *(statistics if other.dim() == len(dims) else made_like(call, other) for other in call.outputs[1:])]


def group_norm(call: Call) -> list[Dims]:
    """Mean and variance over groups of channels: channels are groups × channels in a group."""
    dims = call.dims("input")
    group = leaf(call["group"])
    call.unify(dims[1], Dim(product([group, leaf(dims[1].size // group.size)])))
    for name in ("weight", "bias"):
        if _is_tensor(call.get(name)):
            call.unify(dims[1], call.dims(name)[0])
    call.recorder.sizes.append((call.recorder.module, "num_groups", group))
    return [dims, *([dims[0], Dim(group)] for _ in call.outputs[1:])]


def reduction(call: Call) -> list[Dims]:
    """Dimensions disappear into one number each: sums, norms, means and variances are over the units that stay."""
    dims = call.dims(call.tensors[0])
    places = call.get("dim")
    places = [places] if isinstance(places, int) else list(places or range(len(dims)))
    gone = {place % len(dims) for place in places} if dims else set()
    call.contract(*(dims[place] for place in sorted(gone)))
    if call.name not in ("sum", "norm", "linalg_vector_norm", "any", "mean", "var", "var_mean", "std", "std_mean"):
        call.freeze_if_used([dims[place] for place in gone], "reduces it")
    if call.outputs[0].dim() == len(dims):
        kept = [Dim(leaf(1)) if place in gone else dim for place, dim in enumerate(dims)]
    else:
        kept = [dim for place, dim in enumerate(dims) if place not in gone]
    return [kept for _ in call.outputs]


def softmax(call: Call) -> list[Dims]:
    dims = call.dims("self")
    if dims:
        call.freeze([dims[call["dim"]]], "normalises over it")
    return [dims]


def spatial(call: Call) -> list[Dims]:
    """Pooling and resizing: batch and channels stay, the rest is space."""
    dims = call.dims(call.tensors[0])
    keep = 2 if len(dims) > 2 else 1
    call.freeze(dims[keep:], "slides over it")
    return [
        [*dims[:keep], *(call.fresh(size, "makes this spatial dimension") for size in out.shape[keep:])]
        if out.dim() == len(dims)
        else made_like(call, out)
        for out in call.outputs
    ]


def _spread(index: Tensor | None) -> list[Tensor | None]:
    """Return an index for every dimension that it picks from: a mask picks from as many as it has."""
    masks = index is not None and index.dtype in (torch.bool, torch.uint8)
    return [index] * index.dim() if masks and index is not None else [index]


def indexing(call: Call) -> list[Dims]:
    """``x[i, :, j]``: indexed dimensions are frozen, the others pass."""
    dims = call.dims("self")
    indices = [part for index in call["indices"] for part in _spread(index)]
    indexed = [place for place, index in enumerate(indices) if index is not None]
    if not indexed:  # by a single truth value
        return unknown(call)
    call.freeze([dims[place] for place in indexed], "picks entries by number")
    together = indexed == list(range(indexed[0], indexed[-1] + 1))
    rest = [dim for place, dim in enumerate(dims) if place not in indexed]
    new = call.out.dim() - len(rest)
    first = indexed[0] if together else 0
    picked = [call.fresh(size, "picks them") for size in call.out.shape[first : first + new]]
    return [[*rest[:first], *picked, *rest[first:]]]


def picking(call: Call) -> list[Dims]:
    """``index_select``, ``gather``, ``topk``: entries along one dimension are picked by number."""
    dims, out = list(call.dims("self")), call.outputs[0].shape
    if not dims:
        return made(call)
    place = call["dim"] % len(dims)
    call.freeze([dims[place]], "picks entries by number")
    dims[place] = call.fresh(out[place])
    return [[dim if dim.size == size else call.fresh(size) for dim, size in zip(dims, out, strict=True)]] * len(
        call.outputs
    )


Rule = Callable[[Call], list[Dims]]

RULES: dict[Rule, str] = {
    pointwise: "copy masked_fill native_dropout dropout where clamp lerp addcmul addcdiv prelu _prelu_kernel rrelu "
    "rrelu_with_noise gelu silu mish softplus hardtanh hardswish hardsigmoid hardshrink softshrink log_sigmoid_forward "
    "threshold leaky_relu elu celu selu fill zero masked_scatter",
    made: "new_zeros new_ones new_full new_empty new_empty_strided",
    same: "clone detach alias lift lift_fresh _to_copy contiguous to zeros_like ones_like empty_like rand_like "
    "randn_like full_like bernoulli uniform normal view_copy alias_copy as_strided",
    view: "view _unsafe_view reshape _reshape_alias flatten unflatten",
    permute: "permute",
    transpose: "transpose t numpy_T swapaxes",
    squeeze: "squeeze",
    unsqueeze: "unsqueeze",
    expand: "expand",
    repeat: "repeat",
    select: "select unbind",
    slice_: "slice",
    chunks: "split split_with_sizes chunk unsafe_split unsafe_split_with_sizes unsafe_chunk",
    cat: "cat",
    stack: "stack",
    pad: "constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d",
    reorder: "roll flip cumsum cumprod sort triu tril",
    pixel_shuffle: "pixel_shuffle",
    channel_shuffle: "channel_shuffle native_channel_shuffle",
    matmul: "mm bmm addmm baddbmm",
    matvec: "mv dot",
    convolution: "convolution _convolution",
    attention: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math",
    embedding: "embedding",
    batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm batch_norm _batch_norm_with_update",
    layer_norm: "native_layer_norm _fused_rms_norm",
    group_norm: "native_group_norm",
    reduction: "sum mean amax amin prod var var_mean std std_mean norm linalg_vector_norm any all logsumexp max min "
    "argmax argmin",
    softmax: "_softmax _log_softmax _safe_softmax",
    spatial: "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d upsample_bilinear2d "
    "upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    indexing: "index",
    picking: "index_select gather topk kthvalue",
}
"""The whole table, rule by operators; in-place forms (``relu_``) follow their plain ones."""

_BY_NAME: dict[str, Rule] = {name: rule for rule, names in RULES.items() for name in names.split()}


def apply_rule(call: Call) -> list[Dims]:
    """Return the dimensions of every output of a call."""
    name = call.name
    rule = _BY_NAME.get(name) or _BY_NAME.get(name.rstrip("_"))
    if rule is None:
        if torch.Tag.pointwise in call.func.tags:
            rule = pointwise
        else:
            rule = unknown if call.tensors else made
    return rule(call)

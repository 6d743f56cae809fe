"""Rules for operators with weights of their own: convolutions, attention, embeddings, bilinear layers.

Flows in: a call.  Flows out: the dimensions of its outputs, and what every dimension of a weight is used for.
"""

from __future__ import annotations

import math

from prunelab.tracing.axes import concatenation, leaf, leaves, product, split
from prunelab.tracing.recorder import Call, Dim, Dims
from prunelab.tracing.rules_entries import broadcast, is_tensor, made_like, merge


def outer_product(call: Call) -> list[Dims]:
    """All products of the entries of two vectors, added to a matrix."""
    out = [call.dims("vec1")[0], call.dims("vec2")[0]]
    return [broadcast(call, [out, call.dims("self")], call.out.shape)]


def linear(call: Call) -> list[Dims]:
    """A linear layer in one operator, as on Apple's GPUs; elsewhere it is a product with a transposed matrix."""
    *places, width = call.dims("input")
    rows, columns = call.dims("weight")
    call.unify(width, columns)
    call.contract(width)
    call.mark(columns, "consumes")
    call.mark(rows, "produces")
    if is_tensor(call.get("bias")):
        call.unify(rows, call.dims("bias")[0])
    call.count(2, *places, width, rows)
    return [[*places, rows]]


def fused_cell(call: Call) -> list[Dims]:
    """One step of an LSTM or GRU cell in one kernel: the gates are equal parts, one entry of each per hidden unit."""
    batch, hidden = call.dims("cx" if "cx" in call.values else "hx")
    gates = [call.dims("input_gates"), call.dims("hidden_gates")]
    biases = [call.dims(name) for name in ("input_bias", "hidden_bias") if is_tensor(call.get(name))]
    for dims in [*gates, *biases]:
        for part in split(dims[-1].axis, [hidden.size] * (dims[-1].size // hidden.size), call.where):
            call.unify(hidden, Dim(part))
    for dims in gates:
        call.unify(batch, dims[0])
    return [
        [batch, hidden] if out.shape[-1] == hidden.size else _workspace(call, batch, hidden, out.shape[-1])
        for out in call.outputs
    ]


def _workspace(call: Call, batch: Dim, hidden: Dim, size: int) -> Dims:
    return [batch, Dim(concatenation([hidden.axis] * (size // hidden.size)))]


def batch_sum(call: Call) -> list[Dims]:
    """``Σ_b left_b @ right_b``, added to a matrix."""
    left, right = call.dims("batch1"), call.dims("batch2")
    call.unify(left[2], right[1])
    call.contract(left[2])
    call.freeze([left[0], right[0]], "sums over it")
    call.count(2, *left, right[2])
    return [broadcast(call, [[left[1], right[2]], call.dims("self")], call.out.shape)]


def cross(call: Call) -> list[Dims]:
    """The vector product, along a dimension of three."""
    operands = [call.dims("self"), call.dims("other")]
    for dims in operands:
        call.freeze([dims[call["dim"]]], "multiplies vectors of it")
    return [broadcast(call, operands, call.out.shape)]


def recurrent(call: Call) -> list[Dims]:
    """A recurrent layer in one kernel: what it reads may be cut, its state may not."""
    *places, width = call.dims("input")
    weights = call.get("weight") or call.get("params") or [call[f"weight{number}"] for number in range(4)]
    step = call.get("weight_stride0", 4 if call.get("has_biases", True) else 2)
    reading = weights[::step][: 2 if call.get("bidirectional") and len(weights) > 4 else 1]
    for tensor in call.tensors:
        dims = call.dims(tensor)
        if any(tensor is weight for weight in reading):
            call.unify(width, dims[1])
            call.contract(width)
            call.mark(dims[1], "consumes")
            dims = dims[:1]
        if tensor is not call["input"]:
            call.freeze(dims, "computes with all of its state at once")
    size = (call.recorder.module, "input_size")
    if all(size != (module, attribute) for module, attribute, _ in call.recorder.sizes):  # the first layer reads it
        call.recorder.sizes.append((*size, width.axis))
    first, *others = call.outputs
    return [[*places, call.fresh(first.shape[-1])], *(made_like(call, other) for other in others)]


def three_way(call: Call) -> list[Dims]:
    """``Σ a · b · c`` over some dimensions, once all have the same ones: a bilinear layer."""
    operands = []
    for number in (1, 2, 3):
        dims = list(call.dims(f"i{number}"))
        for place in sorted(call[f"expand{number}"]):
            dims.insert(place, Dim(leaf(1)))
        operands.append(dims)
    sizes = [max(dim.size for dim in met) for met in zip(*operands, strict=True)]
    joined = broadcast(call, operands, sizes)
    for place in range(len(sizes)):
        for dims in operands:
            call.mark(dims[place], "consumes" if place in call["sumdim"] else "produces")
    call.contract(*(joined[place] for place in call["sumdim"]))
    call.count(2, *joined)
    return [[dim for place, dim in enumerate(joined) if place not in call["sumdim"]]]


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
    if is_tensor(call.get("bias")):
        call.unify(result, call.dims("bias")[0])
    places = math.prod(dim.size for dim in space) if transposed else math.prod(call.out.shape[2:])
    call.count(2 * places * math.prod(dim.size for dim in weight[2:]), batch, weight[0], weight[1])
    return [[batch, result, *(call.fresh(size, "makes this spatial dimension") for size in call.out.shape[2:])]]


def deformable(call: Call) -> list[Dims]:
    """A convolution that reads the image at places of its own; channels are offset in groups."""
    parts, channels = call["offset_groups"], call.dims("input")[1]
    if parts > 1:
        call.unify(channels, Dim(product([call.fresh(parts, "offsets it").axis, leaf(channels.size // parts)])))
    for name in ("offset", "mask"):
        call.freeze(call.dims(name)[1:], "computes places from it")
    return convolution(call)


def attention(call: Call) -> list[Dims]:
    """``softmax(q kᵀ · scale) v`` for ``q [B, H, N, E]``, ``k [B, H, S, E]``, ``v [B, H, S, V]``."""
    query, key, value = call.dims("query"), call.dims("key"), call.dims("value")
    batch = merge(call, [query[0], key[0], value[0]])
    call.unify(key[1], value[1])
    if query[1].size == key[1].size:
        call.unify(query[1], key[1])
    else:
        call.unify(query[1], Dim(product([key[1].axis, leaf(query[1].size // key[1].size)])))
    call.unify(query[3], key[3])
    call.contract(query[3])
    call.freeze([query[2], key[2], value[2]], "attends over it")
    bias = call.get("attn_bias", call.get("attn_mask"))
    if is_tensor(bias):
        broadcast(call, [[batch, query[1], query[2], key[2]], call.dims(bias)], [d.size for d in (*query[:3], key[2])])
    label(query[1], "heads")
    label(query[3], "head_width")
    label(value[3], "head_width")
    call.count(2, batch, query[1], query[2], key[2], query[3])
    call.count(2, batch, query[1], query[2], key[2], value[3])
    out, sums = [batch, query[1], query[2], value[3]], [batch, query[1], query[2]]
    others = [
        sums if other.shape == call.outputs[0].shape[:3] else made_like(call, other) for other in call.outputs[1:]
    ]
    return [out, *others]


def label(dim: Dim, label: str) -> None:
    """Name what is free in an axis after what attention does with it."""
    for part in leaves(dim.axis):
        if part.frozen is None:
            part.label = part.label or label


def embedding(call: Call) -> list[Dims]:
    """Rows of a table are looked up by number; its width passes."""
    table, width = call.dims("weight")
    call.freeze([table], "looks entries up by number")
    call.mark(width, "produces")
    return [[*call.dims("indices"), width]]

"""One equation per ATen operator: how the axes of its outputs follow from those of its inputs.

Flows in: an operator that was just called, with the axes of its tensors.  Flows out: the axes of its results; on the
way axes are unified, split or frozen.  An operator without a rule freezes whatever it touches, so an unknown operator
costs prunable units, never a wrong cut.  Notebook 01_tracing walks through the table at the end of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from prunelab.tracing import rules_layers as layers
from prunelab.tracing import rules_rows as rows
from prunelab.tracing import rules_shapes as shapes
from prunelab.tracing import rules_space as space
from prunelab.tracing import rules_weights as weights
from prunelab.tracing.axes import leaf, product
from prunelab.tracing.recorder import Call, Dim, Dims
from prunelab.tracing.rules_entries import (
    broadcast,
    freeze_whole,
    is_tensor,
    looked_up,
    made,
    made_like,
    matrices,
    merge,
    pointwise,
    reduced,
    restrided,
    same,
    uniform,
    unknown,
    whole,
)

# ── contractions ──────────────────────────────────────────────────────────────────────────────────────────────────


def _mark_operands(call: Call, left: Dims, right: Dims) -> None:
    """Say which dimension of a weight a product adds up, and which is that of its result."""
    for operand, inner, outer in ((left, left[-1], left[-2]), (right, right[-2], right[-1])):
        if any(dim.origins for dim in operand):
            call.mark(inner, "consumes")
            call.mark(outer, "produces")


def matmul(call: Call) -> list[Dims]:
    """``[…, n, k] @ […, k, m]``: the inner axes are the same, and disappear."""
    names = {"mm": ("self", "mat2"), "bmm": ("self", "mat2")}.get(call.name)
    names = names or (("batch1", "batch2") if "batch1" in call.values else ("mat1", "mat2"))
    left, right = call.dims(names[0]), call.dims(names[1])
    batch = [merge(call, [one, two]) for one, two in zip(left[:-2], right[:-2], strict=True)]
    call.unify(left[-1], right[-2])
    call.contract(left[-1])
    _mark_operands(call, left, right)
    if not any(dim.origins for dim in (*left, *right)):
        layers.label(left[-1], "head_width")
        for dim in batch:
            layers.label(dim, "heads")
        if any(op.name == "_safe_softmax" for op in call.recorder.tape[-8:]):  # PyTorch's own attention, step by step
            layers.label(right[-1], "head_width")
    call.count(2, *batch, left[-2], left[-1], right[-1])
    out = [*batch, left[-2], right[-1]]
    if call.name in ("addmm", "baddbmm"):
        broadcast(call, [out, call.dims("self")], call.out.shape)
    return [out]


def grouped_matmul(call: Call) -> list[Dims]:
    """``[n, k] @ [e, k, m]``, each row with one of ``e`` matrices, as experts are computed; all of these stay."""
    left, right = call.dims("self"), call.dims("mat2")
    if len(left) != 2 or len(right) != 3 or call.get("bias") is not None:
        return whole(call)
    call.freeze([right[0]], "picks a matrix by number")
    call.unify(left[1], right[1])
    call.contract(left[1])
    _mark_operands(call, left, right)
    call.count(2, left[0], left[1], right[2])
    return [[left[0], right[2]]]


def matvec(call: Call) -> list[Dims]:
    """Matrix times vector, or two vectors; what weights alone are multiplied to is not known to be free."""
    left = call.dims("mat" if call.name == "addmv" else "self")
    right = call.dims(next(name for name in ("vec", "tensor", "other") if name in call.values))
    if all(any(dim.origins for dim in dims) for dims in (left, right)):
        return freeze_whole(call, "multiplies weights with each other, as spectral norm does")
    call.unify(left[-1], right[0])
    call.contract(left[-1])
    call.mark(left[-1], "consumes")
    call.mark(right[0], "consumes")
    call.count(2, *left)
    return [left[:-1]]


# ── normalisation, reduction, space ───────────────────────────────────────────────────────────────────────────────


def batch_norm(call: Call) -> list[Dims]:
    """One mean, variance, scale and shift per channel."""
    dims = call.dims("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if is_tensor(call.get(name)):
            call.unify(dims[1], call.dims(name)[0])
    return [
        dims,
        *([dims[1]] if other.dim() == 1 and len(other) else made_like(call, other) for other in call.outputs[1:]),
    ]


def layer_norm(call: Call) -> list[Dims]:
    """Mean and variance over the last dimensions; a cut network takes them over the entries that are kept."""
    dims = call.dims("input")
    for name in ("weight", "bias"):
        if is_tensor(call.get(name)):
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
        if is_tensor(call.get(name)):
            call.unify(dims[1], call.dims(name)[0])
    call.recorder.sizes.append((call.recorder.module, "num_groups", group))
    return [dims, *([dims[0], Dim(group)] for _ in call.outputs[1:])]


def reduction(call: Call) -> list[Dims]:
    """Dimensions disappear into one number each: sums, norms, means and variances are over the units that stay."""
    gone, kept = reduced(call)
    call.contract(*gone)
    if call.name not in ("sum", "norm", "linalg_vector_norm", "any", "mean", "var", "var_mean", "std", "std_mean"):
        call.freeze_if_used(gone, "reduces it")
    return [kept for _ in call.outputs]


def softmax(call: Call) -> list[Dims]:
    dims = call.dims("self")
    if dims:
        call.freeze([dims[call["dim"]]], "normalises over it")
    return [dims]


Rule = Callable[[Call], list[Dims]]

RULES: dict[Rule, str] = {
    pointwise: "copy masked_fill native_dropout where clamp lerp addcmul addcdiv _prelu_kernel rrelu_with_noise gelu "
    "silu mish softplus hardtanh hardswish hardsigmoid hardshrink softshrink log_sigmoid_forward threshold leaky_relu "
    "elu celu fill zero complex polar "
    "floor_divide",
    uniform: "zeros ones full empty rand randn new_zeros new_ones new_full new_empty",
    same: "clone detach alias lift_fresh _to_copy zeros_like ones_like empty_like rand_like randn_like randint_like "
    "full_like bernoulli uniform normal exponential poisson _conj",
    restrided: "as_strided",
    looked_up: "isin bucketize",
    shapes.view: "view _unsafe_view",
    shapes.permute: "permute",
    shapes.transpose: "transpose t",
    shapes.squeeze: "squeeze",
    shapes.unsqueeze: "unsqueeze",
    shapes.expand: "expand",
    shapes.repeat: "repeat",
    shapes.select: "select unbind",
    shapes.slice_: "slice",
    shapes.chunks: "split split_with_sizes unsafe_split unsafe_split_with_sizes",
    shapes.cat: "cat",
    shapes.stack: "stack",
    shapes.pad: "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d",
    shapes.glu: "glu",
    shapes.windows: "unfold",
    shapes.scatter_part: "slice_scatter select_scatter",
    shapes.diagonal: "diagonal",
    shapes.spread_diagonal: "diag_embed",
    shapes.rotate: "rot90",
    shapes.pair_up: "view_as_real view_as_complex",
    rows.reorder: "roll flip cumsum cumprod cummax cummin logcumsumexp sort triu tril",
    shapes.pixel_shuffle: "pixel_shuffle",
    shapes.pixel_unshuffle: "pixel_unshuffle",
    shapes.channel_shuffle: "channel_shuffle",
    matmul: "mm bmm addmm baddbmm",
    grouped_matmul: "_grouped_mm",
    matvec: "mv dot vdot addmv",
    layers.outer_product: "addr",
    layers.linear: "linear",
    layers.fused_cell: "_thnn_fused_lstm_cell _thnn_fused_gru_cell",
    layers.three_way: "_trilinear",
    layers.cross: "linalg_cross",
    layers.recurrent: "mkldnn_rnn_layer _cudnn_rnn _lstm_mps",
    layers.batch_sum: "addbmm",
    layers.convolution: "convolution _convolution",
    layers.deformable: "torchvision::deform_conv2d",
    layers.attention: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps",
    layers.embedding: "embedding",
    rows.embedding_bag: "_embedding_bag _embedding_bag_forward_only",
    weights.weight_norm: "_weight_norm_interface",
    weights.fake_quantize: "_fused_moving_avg_obs_fq_helper fake_quantize_per_channel_affine_cachemask "
    "fake_quantize_per_tensor_affine_cachemask _fake_quantize_per_tensor_affine_cachemask_tensor_qparams "
    "_fake_quantize_learnable_per_channel_affine _fake_quantize_learnable_per_tensor_affine",
    batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm _batch_norm_with_update",
    layer_norm: "native_layer_norm _fused_rms_norm",
    group_norm: "native_group_norm",
    reduction: "sum mean amax amin prod var var_mean std std_mean norm linalg_vector_norm any all logsumexp max min "
    "argmax argmin",
    softmax: "_softmax _log_softmax _safe_softmax",
    rows.statistic: "median nanmedian mode aminmax count_nonzero nansum kthvalue",
    rows.renorm: "renorm",
    rows.table_norm: "embedding_renorm",
    rows.distances: "_cdist_forward",
    space.spatial: "max_pool2d max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d "
    "upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    space.unpool: "max_unpool2d max_unpool3d",
    space.fractional_pool: "fractional_max_pool2d fractional_max_pool3d",
    space.patches: "im2col",
    space.unpatches: "col2im",
    space.sampled: "grid_sampler_2d grid_sampler_3d cudnn_grid_sampler",
    space.sampling_grid: "affine_grid_generator",
    space.regions: "torchvision::roi_align torchvision::roi_pool",
    space.fourier: "_fft_c2c _fft_r2c _fft_c2r",
    rows.indexing: "index",
    rows.index_put: "index_put",
    rows.index_fill: "index_fill",
    rows.picking: "index_select topk",
    rows.gathering: "gather",
    rows.scattering: "scatter scatter_add scatter_reduce index_add index_copy index_reduce",
    rows.segments: "segment_reduce",
    matrices: "linalg_inv_ex linalg_householder_product linalg_matrix_exp _linalg_solve_ex _linalg_svd _linalg_eigh "
    "_linalg_det linalg_qr linalg_cholesky_ex linalg_pinv",
    whole: "masked_scatter take trace",
}
"""The whole table, rule by operators; in-place forms (``relu_``) follow their plain ones."""

_BY_NAME: dict[str, Rule] = {name: rule for rule, names in RULES.items() for name in names.split()}


def apply_rule(call: Call) -> list[Dims]:
    """Return the dimensions of every output of a call."""
    name = call.name
    if name in ("norm", "linalg_vector_norm") and ".parametrizations." in f".{call.recorder.module}":
        return whole(call)  # weight norm along no single row, or a normalisation of the user's own
    rule = _BY_NAME.get(name) or _BY_NAME.get(name.rstrip("_"))
    if rule is None:
        rule = pointwise if _is_pointwise(call.func) else unknown if call.tensors else made
    return rule(call)


@cache
def _is_pointwise(func: Any) -> bool:
    return torch.Tag.pointwise in func.tags

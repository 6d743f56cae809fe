"""One small network for every operator that the tracer has a rule for: each is a case of ``test_operators``.

A case puts what it is about between two layers whose width is to be cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision import ops

WIDTH = 8
aten = torch.ops.aten
"""What exported programs call by itself."""


class Between(nn.Module):
    """A layer of ``WIDTH`` channels or features, what a case is about, and another layer.

    Args:
        what: a module, or a function of the rows and ``index``, six row numbers.
        dims: dimensions of the images, or 0 for rows.
        wide: channels after ``what``.
        shape: of the images, or of the rows.
    """

    def __init__(self, what: Callable[..., Tensor], dims: int, wide: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        if dims:
            conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
            self.first, self.last, self.shape = conv(3, WIDTH, 1), conv(wide, 2, 1), (2, 3, *shape)
        else:
            self.first, self.last, self.shape = nn.Linear(3, WIDTH), nn.Linear(wide, 2), (*shape, 3)
        self.what = what
        self.register_buffer("index", torch.tensor([0, 2, 1, 0, 5, 3]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.what(x) if isinstance(self.what, nn.Module) else self.what(x, self.index))

    def inputs(self) -> Tensor:
        """Return a batch."""
        return torch.randn(self.shape)


@dataclass(frozen=True)
class Operator:
    """One case.

    Attributes:
        words: operators that it is to dispatch, on some device.
        build: makes the network, which has ``inputs()``.
        groups: how many groups it has.
        dtype: that the cut is compared in.
        own: its own class can be cut, since no size is written into its code.
        rebuilt: it can be rebuilt from its operators.
        devices: where its operators exist.
    """

    words: str
    build: Callable[[], Any] = field(repr=False)
    groups: int = 1
    dtype: torch.dtype = torch.float64
    own: bool = True
    rebuilt: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda", "mps")


OPERATORS: list[Operator] = []


def layer(
    words: str, make: Callable[[], Callable], dims: int = 2, wide: int = WIDTH, size: int = 6, **options: Any
) -> None:
    """Add a case on images for a layer, which is made fresh every time."""
    OPERATORS.append(Operator(words, lambda: Between(make(), dims, wide, (size,) * dims), **options))


def rows(words: str, what: Callable, wide: int = WIDTH, shape: tuple[int, ...] = (6,), **options: Any) -> None:
    """Add a case for a function of rows, ``[*shape, WIDTH]``, and an index of six."""
    OPERATORS.append(Operator(words, lambda: Between(what, 0, wide, shape), **options))


def images(words: str, what: Callable, dims: int = 2, wide: int = WIDTH, **options: Any) -> None:
    """Add a case for a function of images, ``[2, WIDTH, 6, …]``, and an index of six."""
    layer(words, lambda: what, dims, wide, **options)


def whole(words: str, build: Callable[[], Any], **options: Any) -> None:
    """Add a case for a network of its own, with ``inputs()``."""
    OPERATORS.append(Operator(words, build, **options))


# ── entry by entry, and tensors from nothing ──────────────────────────────────────────────────────────────────────

rows("gelu silu mish softplus", lambda x, _: F.gelu(x) + F.silu(x) + F.mish(x) + F.softplus(x))
rows("hardtanh hardswish hardsigmoid", lambda x, _: F.hardtanh(x) + F.hardswish(x) + F.hardsigmoid(x))
rows("hardshrink softshrink log_sigmoid_forward", lambda x, _: F.hardshrink(x) + F.softshrink(x) + F.logsigmoid(x))
rows("threshold leaky_relu elu celu", lambda x, _: F.threshold(x, 0.1, 0) + F.leaky_relu(x) + F.elu(x) + F.celu(x))
rows("rrelu_with_noise native_dropout", lambda x, _: x + 0 * F.dropout(F.rrelu(x, training=True), 0.5, True))
layer("_prelu_kernel", lambda: nn.PReLU(WIDTH))
rows("where clamp masked_fill", lambda x, _: torch.where(x > 0, x, x.clamp(-1, 1)).masked_fill(x > 2, 0.0))
rows("lerp addcmul addcdiv", lambda x, _: torch.lerp(x, x * x, 0.3) + torch.addcmul(x, x, x) + x.addcdiv(x, x.exp()))
rows("copy fill zero", lambda x, _: torch.empty_like(x).fill_(2.0).mul_(x) + x.clone().zero_() + x.clone().copy_(x))
rows(
    "floor_divide isin bucketize",
    lambda x, i: x + x.floor_divide(2.0) + torch.isin(x, x.new_ones(1)) + torch.bucketize(x, i.float()),
)
rows("complex view_as_real _conj", lambda x, _: torch.view_as_real(torch.complex(x, x).conj().resolve_conj()).sum(-1))
rows(
    "polar view_as_complex",
    lambda x, _: torch.polar(x.exp(), x).real + torch.view_as_complex(torch.stack([x, x], -1)).real,
)
rows(
    "zeros ones full empty",
    lambda x, _: (
        x
        + torch.cat([torch.zeros_like(x[:2]), torch.ones(4, x.shape[1]).to(x) * torch.full((1,), 2.0).to(x)])
        + torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        + torch.empty(x.shape, device=x.device).zero_()
    ),
)
rows(
    "new_zeros new_ones new_full new_empty",
    lambda x, _: (
        x + x.new_zeros(x.shape) + x.new_ones(x.shape) + x.new_full(x.shape, 2.0) + x.new_empty(x.shape).zero_()
    ),
)
rows(
    "rand randn rand_like randn_like randint_like",
    lambda x, _: (
        x
        + 0
        * (
            torch.rand(x.shape, device=x.device)
            + torch.randn(x.shape, device=x.device)
            + torch.rand_like(x)
            + torch.randn_like(x)
            + torch.randint_like(x, 3)
        )
    ),
)
rows(
    "zeros_like ones_like empty_like full_like",
    lambda x, _: x + torch.zeros_like(x) + torch.ones_like(x) + torch.full_like(x, 2.0),
)
rows(
    "bernoulli uniform normal exponential poisson",
    lambda x, _: (
        x
        + 0
        * (
            torch.bernoulli(x.sigmoid())
            + x.clone().uniform_()
            + x.clone().normal_()
            + x.clone().exponential_()
            + torch.poisson(x.exp())
        )
    ),
)
rows(
    "clone detach alias _to_copy lift_fresh",
    lambda x, _: x.clone().detach().float().to(x.dtype) * torch.tensor(2.0) + aten.alias(x),
)

# ── shapes ────────────────────────────────────────────────────────────────────────────────────────────────────────

rows("view _unsafe_view", lambda x, _: x.view(2, 3, -1).view(6, -1))
rows("permute transpose t", lambda x, _: x.t().permute(1, 0).transpose(0, 1).t())
rows("squeeze unsqueeze expand", lambda x, _: x.unsqueeze(0).expand(3, -1, -1).sum(0, keepdim=True).squeeze(0))
rows("repeat", lambda x, _: x.repeat(1, 3), wide=24, groups=2, own=False)
rows("select", lambda x, _: x[:, None].expand(-1, 3, -1)[:, 1])
rows("unbind", lambda x, _: sum(x[:, None].expand(-1, 3, -1).unbind(1)))
rows("slice cat", lambda x, _: torch.cat([x[:, :3].tanh(), x[:, 3:]], 1), groups=2, own=False)
rows("slice_scatter", lambda x, _: x.slice_scatter(x[:, 3:].tanh(), 1, 3), groups=2, own=False)
rows("select_scatter", lambda x, _: x.select_scatter(x[0].tanh(), 0, 2))
images("diag_embed", lambda x, _: x[..., 0].diag_embed())
rows("split", lambda x, _: torch.cat([part.tanh() for part in x.chunk(2, 1)], 1), groups=2)
rows("split_with_sizes", lambda x, _: torch.cat([part.tanh() for part in x.split([2, 6], 1)], 1), groups=2, own=False)
rows("unsafe_split", lambda x, _: torch.cat(torch.unsafe_split(x, 4, 1), 1), groups=2, own=False)
rows(
    "unsafe_split_with_sizes",
    lambda x, _: torch.cat(torch.unsafe_split_with_sizes(x, [2, 6], 1), 1),
    groups=2,
    own=False,
)
rows("stack", lambda x, _: torch.stack([x, x.tanh()]).sum(0))
images("as_strided mean", lambda x, _: F.adaptive_avg_pool2d(x.to(memory_format=torch.channels_last), 1))
layer("constant_pad_nd", lambda: nn.ConstantPad2d((1, 2, 0, -1), 0.5))
images(
    "constant_pad_nd",
    lambda x, _: F.pad(F.pad(x, (0, 0, 0, 0, 1, 2)), (0, 0, 0, 0, -3, 2)),
    groups=2,
    wide=10,
    own=False,
)
for dims in (1, 2, 3):
    layer(f"reflection_pad{dims}d", lambda dims=dims: getattr(nn, f"ReflectionPad{dims}d")(2), dims)
    layer(f"replication_pad{dims}d", lambda dims=dims: getattr(nn, f"ReplicationPad{dims}d")(2), dims)
    layer("new_empty copy", lambda dims=dims: getattr(nn, f"CircularPad{dims}d")(2), dims)
    for mode in ("reflect", "replicate", "circular"):
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        layer("convolution", lambda c=conv, m=mode: c(WIDTH, WIDTH, 3, padding=1, padding_mode=m), dims, groups=2)
layer("glu", lambda: nn.GLU(1), wide=4)
rows("glu", lambda x, _: F.glu(x, -1), wide=4)
rows("glu", lambda x, _: F.glu(x, 0))
images("unfold", lambda x, _: x.unfold(2, 3, 1).sum(-1))
images("diagonal", lambda x, _: x.diagonal(0, 2, 3).unsqueeze(-1))
images("rot90", lambda x, _: x[..., :5].rot90(1, (2, 3)))
images("roll flip triu tril", lambda x, _: x.roll(2, 2).flip(3) + x.triu() + x.tril())
images("cumsum cumprod logcumsumexp sort", lambda x, _: x.cumsum(2) + x.cumprod(3) + x.logcumsumexp(2) + x.sort(2)[0])
images("cummax cummin", lambda x, _: x.cummax(2)[0] + x.cummin(3)[0])
layer("pixel_shuffle", lambda: nn.PixelShuffle(2), wide=2)
layer("pixel_unshuffle", lambda: nn.PixelUnshuffle(2), wide=32)
layer("channel_shuffle", lambda: nn.ChannelShuffle(4), groups=2)

# ── weights ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Weighted(nn.Module):
    """A layer between two linear ones, on rows ``[2, 4, 3]`` of tokens."""

    def __init__(self, make: Callable[[], nn.Module], wide: int = 6) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(3, WIDTH), make(), nn.Linear(wide, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.first(x)).tanh())

    def inputs(self) -> Tensor:
        """Return a batch."""
        return torch.randn(2, 4, 3)


class Recurrent(nn.Module):
    """A recurrent layer on tokens, of which the last one is used."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(3, WIDTH), kind(WIDTH, 5, batch_first=True, **options)
        self.last = nn.Linear(10 if self.layer.bidirectional else 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.first(x).tanh())[0][:, -1])

    def inputs(self) -> Tensor:
        """Return a batch."""
        return torch.randn(2, 4, 3)


class Loop(nn.Module):
    """A loop over a recurrent cell, which makes its own first state."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.first, self.cell, self.last = nn.Linear(3, WIDTH), kind(WIDTH, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(self.first(step), state)
        return self.last(state[0] if isinstance(state, tuple) else state)

    def inputs(self) -> Tensor:
        """Return a batch."""
        return torch.randn(2, 3, 3)


class Bilinear(nn.Module):
    """Products of the features of two layers, weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, WIDTH), nn.Linear(3, 6)
        self.both, self.last = nn.Bilinear(WIDTH, 6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.both(self.left(x).tanh(), self.right(x).tanh()))

    def inputs(self) -> Tensor:
        """Return a batch."""
        return torch.randn(4, 3)


class Tokens(nn.Module):
    """Rows of a table are looked up, alone or in bags."""

    def __init__(self, mode: str | None = None, max_norm: float | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(9, WIDTH, max_norm=max_norm) if mode is None else nn.EmbeddingBag(9, WIDTH, mode=mode)
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.table(x))

    def inputs(self) -> Tensor:
        """Return a batch."""
        return torch.randint(0, 9, (2, 3))


class Deformable(nn.Module):
    """A convolution whose offsets and masks come from the image."""

    def __init__(self, groups: int, parts: int) -> None:
        super().__init__()
        self.conv = ops.DeformConv2d(WIDTH, WIDTH, 3, padding=1, groups=groups)
        self.offset, self.mask = nn.Conv2d(WIDTH, 18 * parts, 1), nn.Conv2d(WIDTH, 9 * parts, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.offset(x), self.mask(x).sigmoid())


class Attend(nn.Module):
    """Self-attention over tokens."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, 16) for _ in range(3))
        self.out, self.masked, self.heads = nn.Linear(16, 6), masked, 2

    def forward(self, x: Tensor) -> Tensor:
        parts = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        bias = torch.zeros(x.shape[1], x.shape[1], device=x.device, dtype=x.dtype) if self.masked else None
        out = F.scaled_dot_product_attention(*parts, bias, scale=0.4)
        return self.out(out.transpose(1, 2).flatten(2))


class Quantized(nn.Module):
    """Fake quantisation of a weight, with a scale per row, and of its outputs, with one for all."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last, self.kind = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(WIDTH, 2, 1), kind
        make = nn.Parameter if kind == "learned" else nn.Buffer
        whole = torch.float32 if kind == "learned" else torch.int32
        for name, size in (("each", WIDTH), ("all", 1)):
            setattr(self, f"{name}_scale", make(torch.full((size,), 0.05)))
            setattr(self, f"{name}_zero", make(torch.zeros(size, dtype=whole)))
            self.register_buffer(f"{name}_least", torch.full((size,), -3.0))
            self.register_buffer(f"{name}_most", torch.full((size,), 3.0))
        self.register_buffer("on", torch.ones(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.first.weight, self.first.bias
        each, all_ = (self.each_scale, self.each_zero), (self.all_scale, self.all_zero)
        if self.kind == "learned":
            weight = torch._fake_quantize_learnable_per_channel_affine(weight, *each, 0, -128, 127, 1.0)
            x = torch._fake_quantize_learnable_per_tensor_affine(F.conv2d(x, weight, bias), *all_, -128, 127, 1.0)
        elif self.kind == "fixed":
            weight = torch.fake_quantize_per_channel_affine(weight, *each, 0, -128, 127)
            x = torch.fake_quantize_per_tensor_affine(F.conv2d(x, weight, bias), 0.1, 0, -128, 127)
            x = torch.fake_quantize_per_tensor_affine(x, *all_, -128, 127)
        else:
            quantize = torch.fused_moving_avg_obs_fake_quant
            weight = quantize(
                weight, self.on, self.on, self.each_least, self.each_most, *each, 0.01, -128, 127, 0, True, True
            )
            x = F.conv2d(x, weight, bias)
            x = quantize(x, self.on, self.on, self.all_least, self.all_most, *all_, 0.01, -128, 127, -1, False, False)
        return self.last(x)

    def inputs(self) -> Tensor:
        """Return a batch."""
        return torch.randn(2, 3, 6, 6)


class Experts(nn.Module):
    """Rows are computed with one of three matrices each."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(3, WIDTH, WIDTH))
        self.register_buffer("ends", torch.tensor([2, 3, 6], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.matrices, offs=self.ends)


if hasattr(torch, "_grouped_mm"):  # from PyTorch 2.8 on
    whole("_grouped_mm", lambda: Between(Experts(), 0, WIDTH, (6,)), groups=2, dtype=torch.float32)
whole("mm addmm", lambda: Weighted(lambda: nn.Linear(WIDTH, 6, bias=False)), groups=2)
rows("bmm baddbmm", lambda x, _: torch.baddbmm(x, x @ x.transpose(1, 2), x), shape=(2, 3))
whole("_safe_softmax", lambda: Weighted(lambda: Attend(True)), groups=5)
whole("_scaled_dot_product_flash_attention_for_cpu", lambda: Weighted(lambda: Attend(False)), groups=5)
for kernel, more in (("flash", ()), ("efficient", (None, False)), ("cudnn", (None, False)), ("fused", ())):
    name = f"_scaled_dot_product_{kernel}_attention" + ("_overrideable" if kernel == "fused" else "")
    images(name, lambda x, _, n=name, m=more: getattr(aten, n)(x, x, x, *m)[0], devices=("cuda",))
rows("mv addmv", lambda x, _: x * torch.addmv(torch.mv(x, x.sum(0)), x, x.sum(0))[:, None])
rows("dot vdot", lambda x, _: x * torch.dot(x[0].detach(), x[1]) + torch.vdot(x[2], x[3]), groups=1)
rows("addr", lambda x, _: torch.addr(x, x.sum(1), x.sum(0)))
images("linalg_cross", lambda x, _: torch.cross(x[..., :3], x[..., 3:], dim=3))
rows("addbmm", lambda x, _: x + torch.addbmm(x[0].new_zeros(1), x, x.transpose(1, 2)).sum(), shape=(2, 5))
for name in ("LSTM", "GRU", "RNN"):
    whole("_thnn_fused_lstm_cell _thnn_fused_gru_cell", lambda n=name: Loop(getattr(nn, f"{n}Cell")), groups=2)
for options in ({}, {"num_layers": 2, "bidirectional": True}):
    whole("mkldnn_rnn_layer", lambda o=options: Recurrent(nn.LSTM, **o), dtype=torch.float32)
    whole("addmm", lambda o=options: Recurrent(nn.GRU, **o), rebuilt=False)
whole("_trilinear", Bilinear, groups=3)
layer("convolution", lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2), groups=3)
layer("convolution", lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2, groups=2), groups=3)
layer("torchvision::deform_conv2d", lambda: Deformable(1, 1), groups=2)
layer("torchvision::deform_conv2d", lambda: Deformable(2, 2), groups=2)
images(
    "_convolution",
    lambda x, _: (
        x
        + torch._convolution(
            x[:1], x[1:], None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, False, False, True, True
        ).sum()
    ),
    groups=1,
)
whole("embedding", Tokens)
whole("embedding_renorm", lambda: Tokens(max_norm=1.0))
for mode in ("sum", "mean", "max"):
    whole("_embedding_bag", lambda mode=mode: Tokens(mode))
whole("_embedding_bag_forward_only", lambda: Tokens("sum").requires_grad_(False))
for dim in (0, 1):
    layer(
        "_weight_norm_interface",
        lambda dim=dim: parametrizations.weight_norm(nn.Conv2d(WIDTH, WIDTH, 1), dim=3 * dim),
        groups=2,
    )
layer("norm", lambda: parametrizations.weight_norm(nn.Conv2d(WIDTH, WIDTH, 1), dim=None), groups=0)
layer("mv vdot", lambda: parametrizations.spectral_norm(nn.Conv2d(WIDTH, WIDTH, 1)), groups=0)
for kind in ("learned", "fixed", "observed"):
    whole(
        "_fused_moving_avg_obs_fq_helper",
        lambda kind=kind: Quantized(kind),
        dtype=torch.float32,
        devices=("cpu", "cuda", "mps") if kind == "observed" else ("cpu",),
    )


class Exported(nn.Module):
    """A batch norm by the names that exported programs and AMD's GPUs call it by."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.norm, self.names = nn.BatchNorm2d(WIDTH), names

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        for name in self.names:
            mode = () if name == "_batch_norm_with_update" else (False,)
            x = getattr(aten, name)(x, n.weight, n.bias, n.running_mean, n.running_var, *mode, 0.1, 1e-5)[0]
        return x


# ── normalisation and reduction ───────────────────────────────────────────────────────────────────────────────────

layer("native_batch_norm cudnn_batch_norm", lambda: nn.BatchNorm2d(WIDTH))
rows(
    "_native_batch_norm_legit_no_training",
    lambda x, _: aten._native_batch_norm_legit_no_training(x, None, None, x[0] * 0, x[0] * 0 + 1, 0.1, 1e-5)[0],
)
layer(
    "_batch_norm_with_update _native_batch_norm_legit",
    lambda: Exported(("_batch_norm_with_update", "_native_batch_norm_legit")),
)
layer("miopen_batch_norm", lambda: Exported(("miopen_batch_norm",)), devices=("cuda",))
layer("_native_batch_norm_legit", lambda: nn.InstanceNorm2d(WIDTH, affine=True))
whole(
    "_fused_rms_norm",
    lambda: Weighted(lambda: nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 6))),
    groups=2,
)
layer("native_group_norm", lambda: nn.GroupNorm(2, WIDTH), groups=2)
whole("native_layer_norm", lambda: Weighted(lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6))), groups=2)
rows("sum norm linalg_vector_norm any", lambda x, _: x * (x.sum(0) + torch.linalg.vector_norm(x, dim=0)))
images(
    "mean amax amin prod var std",
    lambda x, _: x * (x.mean(2) + x.amax(3) + x.amin(2) + x.prod(3) + x.var(2) + x.std(3))[..., None],
)
images("var_mean std_mean", lambda x, _: x * (torch.var_mean(x, 2)[0] + torch.std_mean(x, 3)[1])[..., None])
images(
    "all any logsumexp max min argmax argmin",
    lambda x, _: (
        x
        * ((x > 0).all(2) + (x > 0).any(3) + x.logsumexp(2) + x.max(2)[0] + x.min(3)[0] + x.argmax(2) + x.argmin(3))[
            ..., None
        ]
    ),
)
images("_softmax _log_softmax", lambda x, _: x.softmax(2) + x.log_softmax(3))
images(
    "median nanmedian mode aminmax",
    lambda x, _: x * (x.median(2)[0] + x.nanmedian(3)[0] + x.mode(2)[0] + torch.aminmax(x, dim=2)[0])[..., None],
)
images(
    "count_nonzero nansum kthvalue",
    lambda x, _: x * (x.count_nonzero(2) + x.nansum(3) + x.kthvalue(2, 2)[0])[..., None],
)
rows("renorm", lambda x, _: x.t().renorm(2, 0, 1.0).t())
images("_cdist_forward", lambda x, _: torch.cdist(x, x, 1.0))

# ── space ─────────────────────────────────────────────────────────────────────────────────────────────────────────

for dims in (1, 2, 3):
    for name in ("MaxPool", "AvgPool"):
        layer(f"{'max' if name == 'MaxPool' else 'avg'}_pool", lambda name=f"{name}{dims}d": getattr(nn, name)(2), dims)
    for name in ("AdaptiveAvgPool", "AdaptiveMaxPool"):
        layer("adaptive_pool", lambda name=f"{name}{dims}d": getattr(nn, name)(2), dims)
    for mode in ("nearest", "nearest-exact", ("linear", "bilinear", "trilinear")[dims - 1]):
        layer("upsample", lambda mode=mode: nn.Upsample(scale_factor=2, mode=mode), dims)
layer("upsample_bicubic2d", lambda: nn.Upsample(scale_factor=2, mode="bicubic"))
images("_upsample_bilinear2d_aa", lambda x, _: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True))
images("_upsample_bicubic2d_aa", lambda x, _: F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True))


class Unpool(nn.Module):
    """Maxima go back to where they came from."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.pool = getattr(nn, f"MaxPool{dims}d")(2, return_indices=True)
        self.unpool = getattr(nn, f"MaxUnpool{dims}d")(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(x))


class Fractional(nn.Module):
    """Fractional pooling with the same random numbers in every call."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.register_buffer("samples", torch.rand(2, WIDTH, dims))
        self.pool = F.fractional_max_pool2d if dims == 2 else F.fractional_max_pool3d

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x, 2, output_size=3, _random_samples=self.samples)


class Warp(nn.Module):
    """A fixed affine map of an image."""

    def __init__(self, dims: int, aligned: bool = False) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(dims, dims + 1) * 0.7 + 0.1)
        self.aligned = aligned

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.matrix.expand(len(x), -1, -1), list(x.shape), align_corners=self.aligned)
        return F.grid_sample(x, grid, align_corners=self.aligned)


class Boxes(nn.Module):
    """Pooling over two boxes, into images of 2 × 2."""

    def __init__(self, pool: Callable) -> None:
        super().__init__()
        self.register_buffer("boxes", torch.tensor([[0.0, 0, 0, 4, 4], [1, 1, 1, 5, 4]]))
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x, self.boxes, 2)


for dims in (2, 3):
    layer(f"max_unpool{dims}d", lambda dims=dims: Unpool(dims), dims)
    layer(f"fractional_max_pool{dims}d", lambda dims=dims: Fractional(dims), dims)
    layer(f"grid_sampler_{dims}d affine_grid_generator", lambda dims=dims: Warp(dims), dims)
images("im2col col2im", lambda x, _: F.fold(F.unfold(x, 3, padding=1) * 0.5, x.shape[2:], 3, padding=1))
layer("cudnn_grid_sampler", lambda: Warp(2, aligned=True))
layer("im2col", lambda: nn.Sequential(nn.Unfold(2, stride=2), nn.Unflatten(2, (3, 3))), wide=32)
layer("torchvision::roi_align", lambda: Boxes(ops.roi_align))
layer("torchvision::roi_pool", lambda: Boxes(ops.roi_pool))
images(
    "_fft_c2c _fft_r2c _fft_c2r",
    lambda x, _: torch.fft.irfft2(torch.fft.rfft2(x)) + torch.fft.ifft(torch.fft.fft(x, dim=2), dim=3).real,
)

# ── rows by number ────────────────────────────────────────────────────────────────────────────────────────────────

rows("index", lambda x, i: x[i])
images("index", lambda x, i: x[:, :, i][..., i])
rows("index_put", lambda x, i: torch.zeros_like(x).index_put((i,), x, accumulate=True))
rows("index_fill masked", lambda x, i: x.index_fill(0, i[:2], 0.0))
rows("index_select topk", lambda x, i: x.index_select(0, i) + x.topk(6, 0)[0])
rows("gather", lambda x, i: x.gather(0, i[:, None].expand_as(x)))
rows("gather", lambda x, i: x.take_along_dim(i[:, None], 0))
rows(
    "scatter scatter_add",
    lambda x, i: x.scatter(0, i[:, None].expand_as(x), 2 * x) + x.scatter_add(0, i[:, None].expand_as(x), x),
)
rows("scatter_reduce", lambda x, i: torch.zeros_like(x).scatter_reduce(0, i[:, None].expand_as(x), x, "amax"))
rows("index_add index_copy", lambda x, i: torch.zeros_like(x).index_add(0, i, x) + x.index_copy(0, i, x.tanh()))
rows("index_reduce", lambda x, i: torch.zeros_like(x).index_reduce(0, i, x, "amax"))
rows("segment_reduce", lambda x, i: torch.segment_reduce(x, "sum", lengths=torch.tensor([2, 4], device=x.device)))
rows("masked_scatter", lambda x, _: x.masked_scatter(x > 0, x.tanh()), groups=0)
rows("take", lambda x, i: x + x.take(i)[:, None], groups=0)
rows("trace", lambda x, _: x + (x.t() @ x).trace(), groups=0)

# ── matrices ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _square(x: Tensor) -> Tensor:
    """Return matrices ``[2, WIDTH, 6, 6]`` that can be inverted."""
    return x @ x.transpose(-1, -2) + torch.eye(6, device=x.device, dtype=x.dtype)


images("linalg_inv_ex linalg_matrix_exp", lambda x, _: torch.linalg.inv(_square(x)) + torch.linalg.matrix_exp(x))
images(
    "_linalg_solve_ex linalg_pinv",
    lambda x, _: torch.linalg.solve(_square(x), x) + torch.linalg.pinv(x).transpose(-1, -2),
)
images("_linalg_svd linalg_qr", lambda x, _: (torch.linalg.svdvals(x) + torch.linalg.qr(x)[1].abs().sum(-1))[..., None])
images(
    "_linalg_eigh _linalg_det",
    lambda x, _: torch.linalg.eigvalsh(_square(x))[..., None] + torch.linalg.det(x)[..., None, None],
)
images("linalg_cholesky_ex", lambda x, _: torch.linalg.cholesky(_square(x)))
images("linalg_householder_product", lambda x, _: torch.linalg.householder_product(x, x[..., 0]))

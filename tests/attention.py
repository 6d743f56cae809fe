"""Attention as libraries write it, with the integers that they keep: small replicas, for sequences ``[B, N, 32]``."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn

WIDTH, HEADS = 32, 4


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Return ``[B, N, H, d]`` for ``[B, H, N, d]``, with a scale that does not follow the head width."""
    return (((query @ key.transpose(-2, -1)) * 0.3 + bias).softmax(-1) @ value).transpose(1, 2)


class Projections(nn.Module):
    """Four linear layers; subclasses say how they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.keep()

    def keep(self) -> None:
        """Set the integers that the class keeps."""

    def several(self, x: Tensor, heads: int, width: int) -> Tensor:
        shape = (*x.shape[:2], heads, width)
        query, key, value = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return attend(query, key, value)


class Bert(Projections):
    """Heads, width and their product, and integers of no concern to it."""

    def keep(self) -> None:
        self.num_attention_heads, self.attention_head_size, self.all_head_size = HEADS, 8, WIDTH
        self.warmup_epochs, self.window, self.pair, self.hidden_size = HEADS, 8, (HEADS, 8), WIDTH

    def forward(self, x: Tensor) -> Tensor:
        out = self.several(x, self.num_attention_heads, self.attention_head_size)
        return self.o(out.reshape(*x.shape[:2], self.all_head_size))


class Opt(Projections):
    """Heads and batch as one dimension, and the width of all heads by the name of the stream's."""

    def keep(self) -> None:
        self.embed_dim, self.num_heads, self.head_dim = WIDTH, HEADS, 8

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.size()
        query, key, value = (
            layer(x).view(batch, -1, self.num_heads, self.head_dim).transpose(1, 2).contiguous()
            for layer in (self.q, self.k, self.v)
        )
        query, key, value = (part.view(batch * self.num_heads, -1, self.head_dim) for part in (query, key, value))
        out = torch.bmm((torch.bmm(query, key.transpose(1, 2)) * 0.3).softmax(-1), value)
        out = out.view(batch, self.num_heads, length, self.head_dim).transpose(1, 2)
        return self.o(out.reshape(batch, length, self.embed_dim))


class Conv1D(nn.Module):
    """A linear layer with its weight the other way round, as GPT-2 has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.2), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.size()[:-1] + (self.nf,)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


class Gpt2(nn.Module):
    """One layer for queries, keys and values, split by one integer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.split_size, self.head_dim = WIDTH, WIDTH, 8
        self.c_attn, self.c_proj = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.c_attn(x).split(self.split_size, dim=2)
        query, key, value = (part.view(*part.shape[:-1], -1, self.head_dim).transpose(1, 2) for part in parts)
        return self.c_proj(attend(query, key, value).reshape(*x.shape[:-1], -1))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


class Llama(nn.Module):
    """Rotary positions by halves, fewer keys than queries, one ``head_dim``."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_key_value_heads=2, hidden_size=WIDTH, vocab_size=8)
        self.head_dim, self.num_key_value_groups = 8, 2
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.register_buffer("inv_freq", 1 / 10 ** torch.linspace(0, 1, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        query, key, value = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] @ self.inv_freq[None]
        angles = torch.cat([angles, angles], dim=-1)
        query, key = rotated(query, angles), rotated(key, angles)
        key, value = self.repeated(key), self.repeated(value)
        return self.o(attend(query, key, value).reshape(*x.shape[:-1], -1))

    def repeated(self, x: Tensor) -> Tensor:
        if self.num_key_value_groups == 1:
            return x
        batch, heads, length, width = x.shape
        x = x[:, :, None].expand(batch, heads, self.num_key_value_groups, length, width)
        return x.reshape(batch, heads * self.num_key_value_groups, length, width)


class NeoX(nn.Module):
    """Queries, keys and values of each head side by side; rotary positions on a quarter of the width."""

    def __init__(self) -> None:
        super().__init__()
        self.head_size, self.rotary_ndims = 8, 4
        self.query_key_value, self.dense = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, 3 * self.head_size)
        query, key, value = self.query_key_value(x).view(shape).transpose(1, 2).chunk(3, dim=-1)
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        query, key = (self.turned(part, angles) for part in (query, key))
        return self.dense(attend(query, key, value).reshape(*x.shape[:-1], -1))

    def turned(self, x: Tensor, angles: Tensor) -> Tensor:
        return torch.cat([rotated(x[..., : self.rotary_ndims], angles), x[..., self.rotary_ndims :]], dim=-1)


class T5(Projections):
    """A bias per head from a table with as many buckets as all heads are wide."""

    def keep(self) -> None:
        self.relative_attention_num_buckets = WIDTH
        self.n_heads, self.key_value_proj_dim, self.inner_dim = HEADS, 8, WIDTH
        self.bias = nn.Embedding(self.relative_attention_num_buckets, self.n_heads)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        bucket = (place[:, None] - place[None]).abs().clamp(max=self.relative_attention_num_buckets - 1)
        bias = self.bias(bucket).permute(2, 0, 1)[None]
        shape = (x.shape[0], -1, self.n_heads, self.key_value_proj_dim)
        query, key, value = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(attend(query, key, value, bias).reshape(x.shape[0], -1, self.inner_dim))


@dataclasses.dataclass(frozen=True)
class Sizes:
    hidden: int = WIDTH
    heads: int = HEADS
    epochs: int = HEADS


class Configured(Projections):
    """A frozen dataclass, and a width that is computed when it is asked for."""

    def keep(self) -> None:
        self.config = Sizes()

    @property
    def head_width(self) -> int:
        return self.config.hidden // self.config.heads

    def forward(self, x: Tensor) -> Tensor:
        out = self.several(x, self.config.heads, self.head_width)
        return self.o(out.reshape(*x.shape[:2], self.config.hidden))


class Divided(Projections):
    """A width that is divided as floats and made an integer again."""

    def keep(self) -> None:
        self.hidden, self.heads = WIDTH, HEADS

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.several(x, self.heads, int(self.hidden / self.heads)).flatten(2))


class Shaped(Projections):
    """Sizes in a tuple, a list and a dictionary."""

    def keep(self) -> None:
        self.shape, self.other = (HEADS, 8), (HEADS, 8)
        self.sizes, self.epochs = {"inner": [WIDTH, HEADS], "epochs": HEADS}, {"epochs": HEADS}

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.several(x, *self.shape).reshape(*x.shape[:2], self.sizes["inner"][0]))


class OfTheClass(Projections):
    """Sizes that the class holds for all its objects."""

    heads, width, epochs = HEADS, 8, HEADS

    def forward(self, x: Tensor) -> Tensor:
        return self.o(
            self.several(x, self.heads, self.width).reshape(*x.shape[:2], math.prod((self.heads, self.width)))
        )


class Sliced(nn.Module):
    """Queries, keys and values cut out of one layer's result with multiples of one integer."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.heads = WIDTH, HEADS
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out = self.qkv(x)
        parts = out[..., : self.dim], out[..., self.dim : 2 * self.dim], out[..., -self.dim :]
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.o(attend(query, key, value).flatten(2))


REPLICAS = (Bert, Opt, Gpt2, Llama, NeoX, T5, Configured, Divided, Shaped, OfTheClass, Sliced)

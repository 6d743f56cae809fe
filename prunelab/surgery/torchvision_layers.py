"""Stand-ins for attention layers of torchvision, see ``layers``; imported where a model has such a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2


class FreeWindowAttention(ShiftedWindowAttention):
    """torchvision's ``ShiftedWindowAttention`` (Swin), for any number of heads of any width."""

    scale: float

    def forward(self, x: Tensor) -> Tensor:
        position = self.get_relative_position_bias()
        height, wide = x.shape[1:3]
        (rows, columns), heads = self.window_size, self.num_heads
        x = F.pad(x, (0, 0, 0, -wide % columns, 0, -height % rows))
        shift = [s if w < n else 0 for s, w, n in zip(self.shift_size, self.window_size, x.shape[1:3], strict=True)]
        grid = (x.shape[1] // rows, x.shape[2] // columns)
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        windows = x.unflatten(2, (grid[1], columns)).unflatten(1, (grid[0], rows)).transpose(2, 3)
        windows = windows.flatten(3, 4).flatten(0, 2)
        query, key, value = self._qkv(windows).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self._scores(query, key) + position
        if any(shift):
            scores = scores.unflatten(0, (-1, grid[0] * grid[1])) + self._mask(x, grid, shift)[:, None]
            scores = scores.flatten(0, 1)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        out = F.dropout(self.proj((weights @ value).transpose(1, 2).flatten(2)), self.dropout, self.training)
        out = out.unflatten(1, (rows, columns)).unflatten(0, (-1, *grid)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if any(shift):
            out = out.roll((shift[0], shift[1]), (1, 2))
        return out[:, :height, :wide].contiguous()

    def _qkv(self, windows: Tensor) -> Tensor:
        return self.qkv(windows)

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        return query * self.scale @ key.transpose(-2, -1)

    def _mask(self, x: Tensor, grid: tuple[int, int], shift: list[int]) -> Tensor:
        """Return ``[windows, tokens, tokens]``: -100 between tokens that the roll brought together from two borders."""
        regions = x.new_zeros(1, 1)
        for dim, (window, moved) in enumerate(zip(self.window_size, shift, strict=True)):
            place = torch.arange(x.shape[1 + dim], device=x.device)
            last = (place >= len(place) - window).to(x.dtype) + (place >= len(place) - moved).to(x.dtype)
            regions = regions * 3 + (last if moved else torch.zeros_like(last)).view((-1, 1) if dim == 0 else (1, -1))
        regions = (
            regions.unflatten(1, (grid[1], -1)).unflatten(0, (grid[0], -1)).transpose(1, 2).flatten(2).flatten(0, 1)
        )
        return (regions[:, None, :] != regions[:, :, None]).to(x.dtype) * -100


class FreeWindowAttentionV2(FreeWindowAttention, ShiftedWindowAttentionV2):
    """The second version: cosine attention, no bias for keys, position bias from a small network."""

    def _qkv(self, windows: Tensor) -> Tensor:
        return F.linear(windows, self.qkv.weight, self._qkv_bias())

    def _qkv_bias(self) -> Tensor | None:
        if self.qkv.bias is None:
            return None
        query, key, value = self.qkv.bias.unflatten(0, (3, -1)).unbind(0)
        return torch.cat([query, torch.zeros_like(key), value])

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        cosine = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        return cosine * self.logit_scale.clamp(max=4.605170185988092).exp()  # ln 100


class FreeRelativeAttention(RelativePositionalMultiHeadAttention):
    """torchvision's attention in MaxViT, for any heads of any width."""

    def forward(self, x: Tensor) -> Tensor:
        parts = self.to_qkv(x).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.n_heads, -1)).permute(0, 1, 3, 2, 4) for part in parts)
        scores = query @ (key * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
        return self.merge((scores.softmax(-1) @ value).permute(0, 1, 3, 2, 4).flatten(3))


def _free_window(layer: ShiftedWindowAttention) -> bool:
    vars(layer)["scale"] = (layer.qkv.out_features // (3 * layer.num_heads)) ** -0.5
    return True


STAND_INS: dict[type[nn.Module], tuple[type[nn.Module], Callable[..., bool]]] = {
    ShiftedWindowAttention: (FreeWindowAttention, _free_window),
    ShiftedWindowAttentionV2: (FreeWindowAttentionV2, _free_window),
    RelativePositionalMultiHeadAttention: (FreeRelativeAttention, lambda layer: True),
}

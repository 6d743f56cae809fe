"""Stand-ins for layers whose code assumes that nothing was cut.

Some attention layers take their width from their input, or insist that heads × head width is the width of their input.
``free`` swaps the class of such a layer for one that computes the same from the shapes of its own parameters; names,
parameters and ``state_dict`` stay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FreeMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with any number of heads of any width; called in the same way.

    Its scale stays that of the head width it was made with.
    """

    scale: float

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        itself = query is key and key is value
        batched, first = query.dim() == 3, self.batch_first
        query, key, value = (self._batch_first(x, batched, first) for x in (query, key, value))
        parts = self._project(query, key, value, itself)
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in parts)
        mask = self._mask(attn_mask, key_padding_mask, query)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = query @ key.transpose(-2, -1) * self.scale
            weights = (scores if mask is None else scores + mask).softmax(-1)
            out = F.dropout(weights, dropout, self.training) @ value
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            causal = is_causal and mask is None
            out = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=self.scale)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if first else out.transpose(0, 1), weights

    @staticmethod
    def _batch_first(x: Tensor, batched: bool, first: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if first else x.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor, itself: bool) -> list[Tensor]:
        biases = [None] * 3 if self.in_proj_bias is None else list(self.in_proj_bias.unflatten(0, (3, -1)).unbind(0))
        if self.in_proj_weight is None:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        elif itself:
            return list(F.linear(query, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, -1)).unbind(-2))
        else:
            weights = list(self.in_proj_weight.unflatten(0, (3, -1)).unbind(0))
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
        if attn_mask is not None:
            attn_mask = _additive(attn_mask, query)
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        if padding is None:
            return attn_mask
        padding = _additive(padding if padding.dim() == 2 else padding[None], query)[:, None, None, :]
        return padding if attn_mask is None else attn_mask + padding


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as numbers to add; True in a bool mask forbids."""
    return like.new_zeros(mask.shape).masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else mask


class FreeEncoder(nn.TransformerEncoder):
    """``nn.TransformerEncoder`` whose layers need not take nested tensors.

    Without gradients, in eval mode, PyTorch's own packs the tokens that a padding mask leaves into a nested tensor, if
    the mask leaves out nothing but ends.  After the layers the places of the others are zero.  So they are here.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        out = super().forward(src, mask, src_key_padding_mask, is_causal)
        if src_key_padding_mask is None or not self._packs(src, mask, src_key_padding_mask):
            return out
        nothing = torch.zeros_like(out)
        nothing = nothing if self.norm is None else self.norm(nothing)
        return torch.where(_additive(src_key_padding_mask, src).ne(0)[..., None], nothing, out)

    def _packs(self, src: Tensor, mask: Tensor | None, padding: Tensor) -> bool:
        """Tell whether PyTorch's own encoder packs this batch."""
        asked = torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in self.parameters()))
        allowed = torch.backends.mha.get_fastpath_enabled() and not (asked or torch.is_autocast_enabled())
        if not allowed or mask is not None or src.dim() != 3 or self.layers[0].training or src.device.type == "mps":
            return False
        checked = getattr(self, "mask_check", True)
        return not checked or torch._nested_tensor_from_mask_left_aligned(src, padding.logical_not())


def pack_by_hand(encoder: nn.Module) -> None:
    """Swap, in place, the class of an encoder that packs batches, if it is one."""
    if type(encoder) is nn.TransformerEncoder and getattr(encoder, "use_nested_tensor", False):
        encoder.__class__ = FreeEncoder
        encoder.use_nested_tensor = False


def _free_multihead(layer: nn.MultiheadAttention) -> bool:
    if layer.bias_k is not None or layer.add_zero_attn:
        return False
    vars(layer)["scale"] = layer.head_dim**-0.5
    layer._qkv_same_embed_dim = False  # keeps encoder layers off their fused path, which would use the old sizes
    return True


STAND_INS: dict[type[nn.Module], tuple[type[nn.Module], Callable[..., bool]]] = {
    nn.MultiheadAttention: (FreeMultiheadAttention, _free_multihead),
}
"""For a class of PyTorch: its stand-in, and what prepares a layer for it, or refuses."""


def stand_in_for(kind: type[nn.Module]) -> tuple[type[nn.Module], Callable[..., bool]] | None:
    """Return what stands in for a class of layers, of PyTorch or torchvision; ``None`` for most."""
    if kind.__module__.startswith("torchvision.models."):
        from prunelab.surgery import torchvision_layers  # which needs torchvision: who has such a layer has it

        return torchvision_layers.STAND_INS.get(kind)
    return STAND_INS.get(kind)


def layer_type(module: nn.Module) -> type[nn.Module]:
    """Return the class of a layer; in a model rebuilt from its operators, the class of the layer that it stands for."""
    return vars(module).get("stands_for", type(module))


def free(model: nn.Module, parameters: set[str]) -> nn.Module:
    """Swap, in place, the class of every layer that has a stand-in and one of the named parameters."""
    encoders = []
    for name, module in model.named_modules():
        if type(module) is nn.TransformerEncoder:
            encoders.append(module)
        found = stand_in_for(type(module))
        if found is None:
            continue
        stand_in, prepare = found
        touched = any(parameter.startswith(f"{name}." if name else "") for parameter in parameters)
        if touched and prepare(module):
            module.__class__ = stand_in
    for encoder in encoders:
        if any(isinstance(part, FreeMultiheadAttention) for part in encoder.modules()):
            pack_by_hand(encoder)
    return model

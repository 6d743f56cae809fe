"""Calls of everything that uses a parameter in a simple way: layers, norms, embeddings, parameters added or multiplied.

Flows in: a model.  Flows out: ``calls`` as from ``LayerCalls``, with more kinds.  Per-sample gradients need all of
them, Kronecker factors only those of ``LayerCalls``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunelab.curvature.watching.layer_calls import LayerCall, LayerCalls
from prunelab.curvature.watching.weight_view import WeightView

# function -> kind, names of its arguments.  Norms act on dimension 1, or on the last ones.
NORMS: dict[Callable[..., Any], tuple[str, tuple[str, ...]]] = {
    F.batch_norm: ("channel_norm", ("input", "running_mean", "running_var", "weight", "bias", "training")),
    F.group_norm: ("channel_norm", ("input", "num_groups", "weight", "bias", "eps")),
    F.instance_norm: ("channel_norm", ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats")),
    F.layer_norm: ("last_norm", ("input", "normalized_shape", "weight", "bias", "eps")),
    F.rms_norm: ("last_norm", ("input", "normalized_shape", "weight", "eps")),
}
_MORE = ("momentum", "eps")  # the last arguments of batch and instance norm

# Arithmetic between a parameter and something larger, and the ways to copy a parameter for every sample.
ARITHMETIC = {
    getattr(owner, name) for owner in (torch, torch.Tensor) for name in ("add", "sub", "mul", "div", "true_divide")
}
ARITHMETIC |= {getattr(torch.Tensor, f"{name}_") for name in ("add", "sub", "mul", "div")}
EXPANSIONS = {torch.Tensor.expand, torch.Tensor.expand_as, torch.broadcast_to, torch.Tensor.broadcast_to}
_EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


class ParameterCalls(LayerCalls):
    """LayerCalls that also record norms, embeddings, and parameters that are broadcast against something larger.

    The kinds of calls besides those of ``LayerCalls``:

    - ``"channel_norm"``, ``"last_norm"``: ``output = x̂ · weight + bias``, with ``plain()`` giving x̂; the weight
    belongs
      to dimension 1 of the output, or to its last dimensions;
    - ``"embedding"``: ``output = weight[input]``; ``plain`` is the padding index;
    - ``"broadcast"``: ``output`` is the parameter itself, expanded to the shape in which it was used.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in NORMS:
            return self._norm(func, args, kwargs)
        if func is F.embedding:
            return self._embedding(args, kwargs)
        if func in ARITHMETIC and len(args) == 2 and all(isinstance(arg, Tensor) for arg in args):
            return func(*self._operands(func, *args), **kwargs)
        if func in EXPANSIONS and isinstance(args[0], Tensor) and id(args[0]) in self.names:
            return self._broadcast(args[0], partial(func, **kwargs), args[1:])
        return super().__torch_function__(func, types, args, kwargs)

    def _norm(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        kind, names = NORMS[func]
        names = names + _MORE if "running_mean" in names else names
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        weight, bias = given.get("weight"), given.get("bias")
        if weight is None or id(weight) not in self.names or (bias is not None and id(bias) not in self.names):
            return func(*args, **kwargs)
        blank = {**given, "weight": None} if "bias" not in names else {**given, "weight": None, "bias": None}
        call = self._recorded(weight, bias, kind, given["input"])
        call.plain = partial(func, **blank)
        return self._run(call, func, given)

    def _embedding(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        given = {**dict(zip(_EMBEDDING, args, strict=False)), **kwargs}
        special = any(given.get(option) for option in ("max_norm", "scale_grad_by_freq", "sparse"))
        if id(given["weight"]) not in self.names or special:
            return F.embedding(*args, **kwargs)
        call = self._recorded(given["weight"], None, "embedding", given["input"])
        call.view = WeightView(out_dim=1)
        call.plain = given.get("padding_idx")
        return self._run(call, F.embedding, given)

    def _operands(self, func: Callable[..., Any], left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        shape = torch.broadcast_shapes(left.shape, right.shape)
        changed = func.__name__.endswith("_")
        if id(left) in self.names and not changed:
            left = self._broadcast(left, torch.Tensor.expand, (shape,))
        if id(right) in self.names:
            right = self._broadcast(right, torch.Tensor.expand, (shape,))
        return left, right

    def _broadcast(self, parameter: Tensor, func: Callable[..., Any], args: Sequence[Any]) -> Tensor:
        call = self._recorded(parameter, None, "broadcast", parameter)
        return self._run(call, lambda weight: func(weight, *args), {"weight": parameter})

    def _recorded(self, weight: Tensor, bias: Tensor | None, kind: str, given: Tensor) -> LayerCall:
        rows = slice(0, len(weight) if weight.dim() else 1)
        call = LayerCall(self.names[id(weight)], rows, None, kind, given)
        if bias is not None:
            call.bias, call.bias_rows = self.names[id(bias)], slice(0, len(bias))
        if self.keep:
            self.calls.append(call)
        return call

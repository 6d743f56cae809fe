"""Layer calls: every call of a layer in a forward pass, with its input and its output, whatever module it happens in.

Flows in: a model; any forward pass inside ``with LayerCalls(model) as seen``.  Flows out: ``seen.calls``, in the order
in which they ran.  Module hooks see modules; curvature belongs to *weights*, which may be used by a bare ``F.linear``,
several times, or slice by slice (the fused projection of ``nn.MultiheadAttention``).  So functions are watched.
Notebook 07_kfac derives what is made of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from prunelab.curvature.watching.weight_view import WeightView
from prunelab.tracing.calls import is_quiet, unwatched

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

# What is watched: function -> kind, dimension of the weight that counts outputs, and names of the arguments in order.
LAYERS: dict[Callable[..., Any], tuple[str, int, tuple[str, ...]]] = {
    F.linear: ("linear", 0, ("input", "weight", "bias")),
    F.conv1d: ("conv", 0, _CONV),
    F.conv2d: ("conv", 0, _CONV),
    F.conv3d: ("conv", 0, _CONV),
    F.conv_transpose1d: ("conv_transpose", 1, _TRANSPOSED),
    F.conv_transpose2d: ("conv_transpose", 1, _TRANSPOSED),
    F.conv_transpose3d: ("conv_transpose", 1, _TRANSPOSED),
}

# Products with a matrix, which are linear layers written by hand: function -> the positions of input, weight and bias.
PRODUCTS: dict[Callable[..., Any], tuple[int, int, int | None]] = {
    torch.matmul: (0, 1, None),
    torch.mm: (0, 1, None),
    Tensor.matmul: (0, 1, None),
    Tensor.__matmul__: (0, 1, None),
    Tensor.mm: (0, 1, None),
    torch.addmm: (1, 2, 0),
    Tensor.addmm: (1, 2, 0),
}

KINDS = ("linear", "conv", "conv_transpose")
"""The kinds of layers; the channels of a linear one are the last dimension of its input and output."""


@dataclass(eq=False)
class LayerCall:
    """One use of a weight.

    Attributes:
        weight: qualified name of the parameter; the first one if it is tied.
        rows: which rows (dimension 0) of that parameter this call used; all, unless it took a slice.
        bias: name of the bias, if there is one and it is a parameter.
        kind: ``"linear"``, ``"conv"`` or ``"conv_transpose"``: what is computed.
        view: how its weight is laid out; of parameters outside layers (see ``ParameterCalls``) it says nothing.
        input: what the layer was given: ``[..., in]``, or ``[N, in, *space]``.
        output: what it gave; ``None`` as long as the call has not run.
        stride: one number per spatial dimension; empty for ``"linear"``.
        padding: the same, as are ``dilation`` and ``output_padding``.
        bias_rows: which entries of the bias were used.
        plain: of a norm (see ``ParameterCalls``), the norm without weight and bias; for an embedding, its options.
        edge: where the gradient of ``output`` is found, also if the model changed ``output`` in place afterwards:
            ``torch.autograd.grad(loss, [call.edge])``.  ``None`` when the output needs no gradient.
        other: whether this weight was used before in the other direction, as tied weights are.
    """

    weight: str
    rows: slice
    bias: str | None
    kind: str
    input: Tensor
    view: WeightView = field(default_factory=WeightView)
    output: Tensor | None = None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    bias_rows: slice = field(default_factory=lambda: slice(0, 0))
    edge: GradientEdge | None = None
    plain: Any = None
    other: bool = False

    def described(self) -> dict[str, Any]:
        """Return as plain values which weight this is and how it is laid out; ``restored`` reads them."""
        slices = {name: [getattr(self, name).start, getattr(self, name).stop] for name in ("rows", "bias_rows")}
        return {"weight": self.weight, "bias": self.bias, "view": asdict(self.view), **slices}


def restored(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``LayerCall.described`` took down as it was, with all else that is there."""
    slices = {name: slice(*about[name]) for name in ("rows", "bias_rows")}
    return {**about, "view": WeightView(**about["view"]), **slices}


class LayerCalls(TorchFunctionMode):
    """Record the layer calls of every forward pass that runs inside ``with LayerCalls(model) as seen``.

    Args:
        model: the network; calls whose weight is one of its parameters, or consecutive rows of one, are recorded.
        before: called with each call before it runs (``output`` is ``None``); a tensor it returns replaces the input.
        after: called with each call after it ran; a tensor it returns replaces the output.
        parameters: name -> tensor, in place of the model's own (``torch.func.functional_call``).
        keep: whether calls are kept in ``calls``; ``False`` where ``before`` and ``after`` are all that is wanted.
        cut: use copies of the weights in the recorded calls, so that gradients reach the outputs of the calls
            (``edge``) but not the parameters; what still reaches a parameter goes past these calls.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with LayerCalls(model) as seen:
        ...     output = model(torch.ones(5, 3))
        >>> [(call.weight, tuple(call.input.shape)) for call in seen.calls]
        [('0.weight', (5, 3)), ('2.weight', (5, 4))]
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[LayerCall], Tensor | None] | None = None,
        after: Callable[[LayerCall], Tensor | None] | None = None,
        *,
        parameters: Mapping[str, Tensor] | None = None,
        keep: bool = True,
        cut: bool = False,
    ) -> None:
        super().__init__()
        named = dict(model.named_parameters()) if parameters is None else parameters
        self.names: dict[int, str] = {}
        for name, parameter in named.items():
            self.names.setdefault(id(parameter), name)
        self.tensors = list(named.values())  # an id means its tensor only as long as that lives
        self.before, self.after, self.keep, self.cut = before, after, keep, cut
        self.calls: list[LayerCall] = []
        self.sides: dict[str, int] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_quiet():  # silencing makes a call again, without what was removed
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:  # a handler runs without its mode; this function's own layers are to be seen
                return _attention(*args, **kwargs)
        if func in PRODUCTS and not kwargs:
            return self._product(func, args)
        if func not in LAYERS:
            return func(*args, **kwargs)
        kind, out_dim, names = LAYERS[func]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        call = self._call(kind, out_dim, given)
        if call is None:
            return func(*args, **kwargs)
        return self._watched(call, func, given)

    def _product(self, func: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Run a product, and record it if it is one of an input with a parameter."""
        at_input, at_weight, at_bias = PRODUCTS[func]
        bias = None if at_bias is None else args[at_bias]
        x, weight = args[at_input], args[at_weight]
        if not isinstance(weight, Tensor) or not isinstance(x, Tensor) or x.dim() < 2 or id(x) in self.names:
            return func(*args)
        if bias is not None and (not isinstance(bias, Tensor) or bias.dim() != 1):
            return func(*args)
        name = self.names.get(id(weight))
        if name is None or weight.dim() != 2:
            return func(*args)
        call = LayerCall(name, slice(0, len(weight)), None, "linear", x, WeightView(out_dim=1))
        self._with_bias(call, bias)

        def run(input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            return func(input, weight) if bias is None else func(bias, input, weight)

        return self._watched(call, run, {"input": x, "weight": weight, "bias": bias})

    def _with_bias(self, call: LayerCall, bias: Tensor | None) -> None:
        place = None if bias is None else self._place(bias)
        call.bias, call.bias_rows = place if place else (None, slice(0, 0))

    def _watched(self, call: LayerCall, func: Callable[..., Any], given: dict[str, Any]) -> Any:
        """Run a recorded call, with what is to be done before and after it."""
        call.other = self.sides.setdefault(call.weight, call.view.out_dim) != call.view.out_dim
        if self.keep:
            self.calls.append(call)
        with unwatched():
            replaced = self.before(call) if self.before else None
        call.input = call.input if replaced is None else replaced
        if call.kind != "linear":
            given["padding"] = call.padding
        return self._run(call, func, {**given, "input": call.input})

    def _run(self, call: LayerCall, func: Callable[..., Any], given: dict[str, Any]) -> Tensor:
        if self.cut:
            given["weight"] = given["weight"].detach().requires_grad_()
            if call.bias:
                given["bias"] = given["bias"].detach()
        output = func(**given)
        call.output = output
        call.edge = get_gradient_edge(output) if output.requires_grad and torch.is_grad_enabled() else None
        with unwatched():
            replaced = self.after(call) if self.after else None
        return output if replaced is None else replaced

    def _call(self, kind: str, out_dim: int, given: dict[str, Any]) -> LayerCall | None:
        found = self._place(given["weight"])
        if found is None:
            return None
        name, rows = found
        view = WeightView(out_dim, given.get("groups", 1), tuple(given["weight"].shape[2:]))
        call = LayerCall(name, rows, None, kind, given["input"], view)
        self._with_bias(call, given.get("bias"))
        space = len(view.kernel)
        if not space:
            return call
        if call.input.dim() != space + 2:  # one image without a batch dimension
            return None
        call.stride, call.dilation = (_each(given.get(key, 1), space) for key in ("stride", "dilation"))
        call.output_padding = _each(given.get("output_padding", 0), space)
        call.padding, call.input = _padding(given.get("padding", 0), call)
        return call

    def _place(self, tensor: Tensor) -> tuple[str, slice] | None:
        """Return which rows of which parameter a tensor is, or ``None``."""
        if id(tensor) in self.names:
            return self.names[id(tensor)], slice(0, len(tensor))
        whole = tensor._base
        if whole is None or id(whole) not in self.names or whole.dim() != tensor.dim():
            return None
        if whole.shape[1:] != tensor.shape[1:] or whole.stride() != tensor.stride() or not whole.stride(0):
            return None
        first, rest = divmod(int(tensor.storage_offset() - whole.storage_offset()), whole.stride(0))
        return None if rest else (self.names[id(whole)], slice(first, first + len(tensor)))


def _each(value: int | Sequence[int], space: int) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * space if len(sizes) == 1 else sizes


def _padding(padding: Any, call: LayerCall) -> tuple[tuple[int, ...], Tensor]:
    """Return the padding in numbers; what is not the same on both sides (``"same"``) is put on the input itself."""
    kernel = call.view.kernel
    if padding == "valid":
        return (0,) * len(kernel), call.input
    if padding != "same":
        return _each(padding, len(kernel)), call.input
    total = [dilation * (size - 1) for dilation, size in zip(call.dilation, kernel, strict=True)]
    if any(size % 2 for size in total):
        sides = [side for size in reversed(total) for side in (size // 2, size - size // 2)]
        return (0,) * len(kernel), F.pad(call.input, sides)
    return tuple(size // 2 for size in total), call.input


# The body of F.multi_head_attention_forward without its first question, whether a mode wants to take it over: asked
# again, that would never end.
_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)

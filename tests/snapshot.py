"""A snapshot of a model and of the process: what must be the same after any measurement."""

from __future__ import annotations

import gc
import logging
import random
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Snapshot:
    """Everything that a measurement could change, as identities and as copies of values."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        modules = dict(model.named_modules(remove_duplicate=False))
        self.facts: dict[str, Any] = {"process": _process()}
        self.values: dict[str, Tensor] = {"generator": torch.get_rng_state()}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            grad = parameter.grad
            self.facts[f"parameter {name}"] = (id(parameter), type(parameter), parameter.data_ptr(), id(grad))
            self.facts[f"requires_grad of {name}"] = parameter.requires_grad
            self.values[f"parameter {name}"] = parameter.detach().clone()
            if grad is not None:
                self.values[f"grad of {name}"] = grad.clone()
        for name, buffer in model.named_buffers(remove_duplicate=False):
            self.facts[f"buffer {name}"] = id(buffer)
            self.values[f"buffer {name}"] = buffer.clone()
        for name, module in modules.items():
            self.facts[f"class of {name}"] = type(module)
            for key, value in vars(module).items():
                self.facts[f"{name}.{key}"] = (id(value), _content(value))
        self.keep = [list(vars(module).values()) for module in modules.values()]  # an id means what lives

    def changes(self) -> list[str]:
        """Return what is not as it was."""
        now = Snapshot(self.model)
        other = [key for key in self.facts.keys() | now.facts.keys() if self.facts.get(key) != now.facts.get(key)]
        for key in self.values.keys() | now.values.keys():
            before, after = self.values.get(key), now.values.get(key)
            if before is None or after is None or not torch.equal(before, after):
                other.append(f"value of {key}")
        return sorted(other)


def _content(value: Any) -> Any:
    """Return what a container holds, in order and by identity."""
    if isinstance(value, dict):
        return [(key, id(part)) for key, part in value.items()]
    return [id(part) for part in value] if isinstance(value, (list, tuple, set)) else None


def _process() -> Any:
    return {
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "attention": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "log": logging.getLogger("torch._subclasses.fake_tensor").disabled,
        "collector": gc.isenabled(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "types": (torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu")),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warnings": list(warnings.filters),
        "generators": (random.getstate(), np.random.get_state()[1].tolist()),
        "hooks": list(torch.nn.modules.module._global_forward_hooks.items()),
    }

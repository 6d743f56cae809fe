"""Keep a pruned model: weights and plans in one safetensors file, no pickle anywhere.

Flows in: a model that ``apply`` cut, ``factorize`` split or ``sparsify`` masked.  Flows out: a file, and from it and a
fresh unpruned model, the same model again.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from prunelab.errors import DataError, PlanError
from prunelab.factorization.factorized import Factorized
from prunelab.plan import Plan
from prunelab.sparsity.masks import Sparsified
from prunelab.surgery.apply import PLANS, apply

FORMAT = 1


def save(model: nn.Module, path: str | Path) -> None:
    """Write the weights of ``model`` and the plans that made it; the file appears whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    header = {
        "format": FORMAT,
        "class": type_before_parametrizations(model).__name__,
        "plans": [json.loads(plan.to_json()) for plan in getattr(model, PLANS, [])],
    }
    path = Path(path)
    fresh = path.with_name(path.name + ".tmp")
    try:
        save_model(model, str(fresh), metadata={"prunelab": json.dumps(header)})
        os.replace(fresh, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DataError(f"{path} cannot be written: {error}") from error
    finally:
        fresh.unlink(missing_ok=True)


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Return a copy of ``model`` cut by the plans in the file, with the file's weights.

    Args:
        model: a fresh, unpruned model of the class that was pruned; it stays as it is.
        path: a file written by ``save``.

    Raises:
        DataError: the file is missing, damaged, or not of this class of model; the message says which.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is missing.")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})["prunelab"])
        plans = [_step(data) for data in header["plans"]]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, PlanError) as error:
        raise DataError(f"{path} is not a model saved by prunelab, or is damaged: {error!r}") from error
    if header.get("format") != FORMAT:
        raise DataError(f"{path} has format {header.get('format')}, this version reads {FORMAT}: update prunelab.")
    out = copy.deepcopy(model)
    try:
        for plan in plans:
            out = apply(out, plan) if isinstance(plan, Plan) else plan.redo(out)
        load_model(out, str(path))
    except (PlanError, RuntimeError, SafetensorError) as error:
        made = f"it was saved from a {header.get('class')}, this is a {type(model).__name__}"
        raise DataError(f"{path} does not fit the model ({made}): {error}") from error
    return out


STEPS: dict[Any, Any] = {"factorize": Factorized, "sparsify": Sparsified}
"""What else than a plan may have made a model, by the word that stands in the file."""


def _step(data: Any) -> Plan | Factorized | Sparsified:
    """Return one of the steps that made a model; plans are the rule, others say what they are."""
    kind = STEPS.get(data.get("action"), Plan) if isinstance(data, dict) else Plan
    return kind.from_json(json.dumps(data))

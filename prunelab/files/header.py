"""What a file holds besides the weights: format, class, steps, ties, and a checksum over everything.

Flows in: what is to be kept, or a file.  Flows out: safetensors' metadata, or the header and tensors of the file.  The
file is data and is treated as such: sizes, types and nesting are bounded before anything is done with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from prunelab.errors import DataError

FORMAT = 2
LONGEST = 2**26
"""Characters of JSON that are read."""
MOST_STEPS = 1000
KEY, SUM = "prunelab", "sha256"
"""Where the header is in safetensors' metadata, and the checksum in the header."""


@dataclass(frozen=True)
class Header:
    """What is known of a kept model besides its weights.

    Attributes:
        name: of its class.
        steps: what made it, as plain data, in order.
        ties: names in the ``state_dict`` whose tensor is in the file under another name -> that name.
    """

    name: str
    steps: tuple[dict[str, Any], ...]
    ties: Mapping[str, str]

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"format": FORMAT, "class": self.name, "plans": list(self.steps), "tied": dict(self.ties)}

    @classmethod
    def from_data(cls, data: Any) -> Header:
        """Read it back.

        Raises:
            DataError: the data are something else, or of another format.
        """
        if not isinstance(data, dict) or type(data.get("format")) is not int:
            raise DataError("its header has no format")
        if data["format"] != FORMAT:
            older = "save the model again" if data["format"] < FORMAT else "update prunelab"
            raise DataError(f"it has format {data['format']}, this version reads {FORMAT}: {older}")
        name, steps, ties = (data.get(key) for key in ("class", "plans", "tied"))
        plain = isinstance(ties, dict) and all(isinstance(kept, str) for kept in ties.values())
        if not isinstance(name, str) or not isinstance(ties, dict) or not plain:
            raise DataError("its header lacks the class or the ties")
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise DataError("its header lacks the plans")
        if len(steps) > MOST_STEPS:
            raise DataError(f"its header has {len(steps)} plans, and at most {MOST_STEPS} are read")
        return cls(name, tuple(steps), ties)


def metadata(header: Header, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what goes into the file beside the tensors (contiguous, on the CPU).

    Raises:
        TypeError: a step holds something else than plain data.
    """
    data = header.to_data()
    return {KEY: json.dumps(data | {SUM: checksum(data, tensors)}, sort_keys=True)}


def checksum(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the header and of all tensors with their names, types and shapes, as hexadecimal digits.

    It finds what was damaged or edited.  It is not a signature: whoever edits a file on purpose can compute it again.
    """
    total = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """Return header and tensors of a file.

    Raises:
        DataError: the file is missing, damaged, edited, of another format, or no file of prunelab at all.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing.")
    try:
        with safe_open(str(path), framework="pt") as file:
            found = file.metadata() or {}
            if KEY not in found:
                raise DataError("it has no header of prunelab's")
            data = _parsed(found[KEY])
            header = Header.from_data(data)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
        if data.pop(SUM, None) != checksum(data, tensors):
            raise DataError("its contents do not have the checksum that was written with them")
    except DataError as error:
        raise DataError(f"{path} is not a model saved by prunelab, or is damaged or edited: {error}.") from error
    except Exception as error:  # whatever a foreign file makes safetensors raise
        raise DataError(f"{path} is not a model saved by prunelab, or is damaged or edited: {error!r}.") from error
    return header, tensors


def _parsed(text: str) -> Any:
    if len(text) > LONGEST:
        raise DataError(f"its header has {len(text)} characters")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"its header is not JSON: {type(error).__name__}") from error

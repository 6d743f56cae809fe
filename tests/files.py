"""Files of prunelab's format, taken apart and put together again by hand, with or without a true checksum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunelab.files.header import checksum


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["prunelab"])


def forge(
    out: Path, source: Path, header: Any = None, tensors: Mapping[str, Tensor] | None = None, *, honest: bool = True
) -> Path:
    """Write a file like ``source`` with another header (data, or the text itself) or other tensors.

    The checksum is computed again, as somebody would who knows the format, unless ``honest`` is False.
    """
    data = header_of(source) if header is None else header
    tensors = load_file(source) if tensors is None else dict(tensors)
    if honest and isinstance(data, dict):
        data = {key: value for key, value in data.items() if key != "sha256"}
        data["sha256"] = checksum(data, tensors)
    save_file(tensors, out, metadata={"prunelab": data if isinstance(data, str) else json.dumps(data)})
    return out

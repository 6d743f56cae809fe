"""One idea per module: ``get("taylor", multivariable=True)``.

A criterion is known by the name in its class, ``class Taylor(GroupwiseCriterion, name="taylor")``; so is one of your
own, once its class is there.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from prunelab.criteria.base import CRITERIA, Criterion, Scores
from prunelab.criteria.bn_scale import BNScale
from prunelab.criteria.eigendamage import EigenDamage, EigenScores
from prunelab.criteria.fpgm import FPGM
from prunelab.criteria.gate import Gate
from prunelab.criteria.kron import COBD, COBS, KronOBD, KronOBS
from prunelab.criteria.magnitude import Magnitude
from prunelab.criteria.oba import OBA, layer_pairs
from prunelab.criteria.obd import OBD
from prunelab.criteria.obs import OBS
from prunelab.criteria.oracle import Oracle
from prunelab.criteria.quadratic import Quadratic
from prunelab.criteria.random import Random
from prunelab.criteria.taylor import Taylor
from prunelab.errors import OptionError
from prunelab.options import shown

__all__ = [
    "COBD",
    "COBS",
    "CRITERIA",
    "FPGM",
    "OBA",
    "OBD",
    "OBS",
    "BNScale",
    "Criterion",
    "EigenDamage",
    "EigenScores",
    "Gate",
    "KronOBD",
    "KronOBS",
    "Magnitude",
    "Oracle",
    "Quadratic",
    "Random",
    "Scores",
    "Taylor",
    "get",
    "layer_pairs",
    "names",
]


def names() -> tuple[str, ...]:
    """Return the names that ``get`` knows."""
    return tuple(CRITERIA)


def get(name: str | Criterion, **options: Any) -> Criterion:
    """Return a criterion by name, with options; a criterion itself is returned as it is.

    Raises:
        OptionError: there is no such criterion or option, or an option is out of its range; the message lists what
            there is.

    >>> str(get("bn_scale", fallback="keep"))
    'bn_scale'
    """
    if isinstance(name, Criterion) and not options:
        return name
    if not isinstance(name, str) or name not in CRITERIA:
        raise OptionError(f"There is no criterion {shown(name)}; there are {', '.join(CRITERIA)}.")
    kind = CRITERIA[name]
    known: list[str] = [field.name for field in fields(kind)] if is_dataclass(kind) else []
    unknown = [option for option in options if option not in known]
    if unknown:
        raise OptionError(f"Criterion {name!r} has no option {unknown[0]!r}; its options are {', '.join(known)}.")
    return kind(**options)

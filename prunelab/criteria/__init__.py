"""One criterion per module, all in one table: ``get("taylor", multivariable=True)``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from prunelab.criteria.base import Criterion, Scores
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

CRITERIA: dict[str, type[Criterion]] = {
    "random": Random,
    "magnitude": Magnitude,
    "bn_scale": BNScale,
    "fpgm": FPGM,
    "taylor": Taylor,
    "obd": OBD,
    "c_obd": COBD,
    "c_obs": COBS,
    "kron_obd": KronOBD,
    "kron_obs": KronOBS,
    "eigendamage": EigenDamage,
    "gate": Gate,
    "obs": OBS,
    "oba": OBA,
    "quadratic": Quadratic,
    "oracle": Oracle,
}

for _name, _kind in CRITERIA.items():  # so that a criterion says itself what ``get`` knows it by
    _kind.name = _name

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
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise OptionError(f"Criterion {name!r} has no option {unknown[0]!r}; its options are {', '.join(known)}.")
    return kind(**options)

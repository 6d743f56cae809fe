"""One criterion per module, all in one table: ``get("taylor", multivariable=True)``."""

from __future__ import annotations

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
from prunelab.errors import PruneLabError

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


def get(name: str, **options: Any) -> Criterion:
    """Return a criterion by name, with options.

    Raises:
        PruneLabError: there is no such criterion or option; the message lists what there is.
    """
    if name not in CRITERIA:
        raise PruneLabError(f"There is no criterion {name!r}; there are {', '.join(CRITERIA)}.")
    try:
        return CRITERIA[name](**options)
    except TypeError as error:
        known = ", ".join(CRITERIA[name].__dataclass_fields__)  # type: ignore[attr-defined]
        raise PruneLabError(f"Criterion {name!r}: {error}; its options are {known}.") from error

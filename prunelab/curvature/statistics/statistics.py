"""Statistics: what ``collect`` returns, sums over samples that can be added, kept, resumed and reduced over processes.

Flows in: sums by name, and how many samples they are over.  Flows out: their means, as criteria use them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prunelab.batches import Batches, Loss
from prunelab.curvature.statistics.accumulators import ACCUMULATORS
from prunelab.curvature.statistics.kronecker import Factors
from prunelab.curvature.watching.layer_calls import restored
from prunelab.errors import BatchError
from prunelab.runtime.stack import user_level

Nested = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was measured on data: sums over samples, and what they mean under their own names.

    Attributes:
        samples: how many samples.
        fisher: which Fisher the moments and factors are of: ``"empirical"``, ``"mc"`` or ``"ggn"``.
        sums: what -> name -> sum over samples.
        meta: what -> name -> plain values that say what the sum is of.
        fixed: the eigenvectors that the EKFAC moments refer to.
        batches: what they were collected from, if that can be read again.
        total: what the samples count together, where some count less or more than one (ignored labels).
        loss: of which they are, as long as the batches are known.
    """

    samples: int
    fisher: str
    sums: Nested
    meta: Nested = field(default_factory=dict)
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    batches: Batches | None = None
    total: float | None = None
    loss: Loss | None = None

    @property
    def weight(self) -> float:
        """What all samples count together; their number where each counts as one."""
        return self.samples if self.total is None else self.total

    @property
    def what(self) -> frozenset[str]:
        """Which statistics these are."""
        return frozenset(self.sums)

    @cached_property
    def gradient(self) -> dict[str, Tensor]:
        """``E[g_n]`` by parameter name (``what="grad"``)."""
        return self._result("grad")

    @cached_property
    def moments(self) -> dict[str, Tensor]:
        """``E[g_n²]`` by parameter name, g_n the gradient of one sample's loss (``what="moments"``)."""
        return self._result("moments")

    @cached_property
    def kronecker(self) -> dict[str, Factors]:
        """``Factors`` by weight name, ``name[start:stop]`` for slices (``what="kronecker"``; EKFAC: ``"ekfac"``)."""
        factors: dict[str, Factors] = self._result("kronecker")
        self._warn_of_rank(factors)
        if "ekfac" not in self.what:
            return factors
        moments = self._result("ekfac")
        return {
            name: replace(found, moments=moments[name], basis=(self.fixed[f"Q_A:{name}"], self.fixed[f"Q_S:{name}"]))
            if name in moments
            else found
            for name, found in factors.items()
        }

    def _warn_of_rank(self, factors: Mapping[str, Factors]) -> None:
        short = []
        for name, found in factors.items():
            rows = float(self.sums["kronecker"][f"rows:{name}"])
            for letter, matrix, columns in (("A", found.A, found.positions), ("S", found.S, rows)):
                if columns < matrix.shape[-1]:
                    short.append(f"{letter} of `{name}`, {list(matrix.shape)}, has rank {columns:.0f} at most")
        if short:
            warnings.warn(
                f"{self.samples} samples are too few for {len(short)} of {2 * len(factors)} Kronecker factors: "
                f"{short[0]}. Collect from more, or damp the inverse.",
                stacklevel=user_level(),
            )

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """``InputMoment`` by weight name, ``name[start:stop]`` for slices (``what="inputs"``)."""
        return self._result("inputs")

    def _result(self, what: str) -> dict[str, Any]:
        if what not in self.what:
            raise BatchError(
                f"These statistics hold {', '.join(sorted(self.what))}, not {what!r}: collect(…, what={{{what!r}, …}})."
            )
        return ACCUMULATORS[what].result(dict(self.sums[what]), dict(self.meta.get(what, {})), self.weight)

    def __add__(self, other: Statistics) -> Statistics:
        """Return the statistics over the samples of both.

        Raises:
            BatchError: they are not of the same kind.
        """
        for name in ("what", "fisher"):
            if getattr(self, name) != getattr(other, name):
                raise BatchError(f"Statistics of {getattr(self, name)} and {getattr(other, name)} do not add up.")
        _same_basis(self.fixed, other.fixed)
        meta = {what: _joined(self.meta.get(what, {}), other.meta.get(what, {})) for what in self.sums}
        sums = {what: _added(self.sums[what], other.sums[what]) for what in self.sums}
        total = self.weight + other.weight
        return Statistics(self.samples + other.samples, self.fisher, sums, meta, self.fixed, total=total)

    def __or__(self, other: Statistics) -> Statistics:
        """Return both kinds of statistics of the same samples: the second pass of EKFAC beside the first.

        Raises:
            BatchError: they are not of the same samples or Fisher.
        """
        if (self.samples, self.fisher) != (other.samples, other.fisher):
            raise BatchError(
                f"Statistics of {self.samples} samples ({self.fisher}) and of {other.samples} ({other.fisher}) are not "
                "of the same pass."
            )
        return Statistics(
            self.samples,
            self.fisher,
            {**self.sums, **other.sums},
            {**self.meta, **other.meta},
            {**self.fixed, **other.fixed},
            self.batches,
            self.total,
            self.loss,
        )

    def to(self, device: torch.device | str) -> Statistics:
        """Return the statistics on another device."""
        sums = {what: {name: value.to(device) for name, value in named.items()} for what, named in self.sums.items()}
        return replace(self, sums=sums, fixed={name: value.to(device) for name, value in self.fixed.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return all as plain values and tensors, for ``torch.save``; without ``batches``."""
        return {
            "samples": self.samples,
            "fisher": self.fisher,
            "sums": {what: dict(named) for what, named in self.sums.items()},
            "meta": {what: dict(named) for what, named in self.meta.items()},
            "fixed": dict(self.fixed),
            "total": self.weight,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Statistics:
        """Return the statistics that ``state_dict`` took down.

        Raises:
            BatchError: it is something else.
        """
        try:
            named = {name: state[name] for name in ("samples", "fisher", "sums", "meta", "fixed")}
            for about in (about for found in named["meta"].values() for about in found.values()):
                if isinstance(about, Mapping) and "rows" in about:
                    restored(about)
            return cls(**named, total=state.get("total"))
        except (KeyError, TypeError, AttributeError) as error:
            raise BatchError(
                f"This is not a state of this version's statistics: {error} is missing. Collect them again."
            ) from error

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Statistics:
        """Return the statistics over the samples of all processes, the same numbers in each of them.

        Every process of ``group`` calls it.  Cost: one all-reduce per sum.

        Raises:
            BatchError: the processes hold different kinds of statistics.
        """
        mine: dict[str, Any] = {
            "what": sorted(self.what),
            "fisher": self.fisher,
            "shapes": {w: {name: (v.shape, v.dtype) for name, v in named.items()} for w, named in self.sums.items()},
            "meta": {what: dict(named) for what, named in self.meta.items()},
            "samples": self.samples,
            "total": self.weight,
            "fixed": {name: value.cpu() for name, value in self.fixed.items()},
        }
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group)
        for other in everyone:
            if (other["what"], other["fisher"]) != (mine["what"], mine["fisher"]):
                raise BatchError(f"Processes hold different statistics: {other['what']} and {mine['what']}.")
            _same_basis(mine["fixed"], other["fixed"])
        device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
        sums: dict[str, dict[str, Tensor]] = {}
        for what, named in self.sums.items():
            shapes = {name: about for other in everyone for name, about in other["shapes"][what].items()}
            sums[what] = {}
            for name, (shape, dtype) in sorted(shapes.items()):
                home = named[name].device if name in named else device
                value = torch.zeros(shape, dtype=dtype, device=device)
                if name in named:
                    value += named[name].to(device)
                dist.all_reduce(value, group=group)
                sums[what][name] = value.to(home)
        meta: dict[str, Mapping[str, Any]] = {}
        for other in everyone:
            meta = {what: _joined(meta.get(what, {}), named) for what, named in other["meta"].items()}
        samples, total = (sum(other[name] for other in everyone) for name in ("samples", "total"))
        return replace(self, samples=samples, sums=sums, meta=meta, batches=None, total=total)


def _added(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    total = dict(left)
    for name, value in right.items():
        total[name] = total[name] + value.to(total[name].device) if name in total else value
    return total


def _joined(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    for name in left.keys() & right.keys():
        if left[name] != right[name]:
            raise BatchError(f"Statistics of `{name}` do not add up: {left[name]} is not {right[name]}.")
    return {**left, **right}


def _same_basis(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    same = left.keys() == right.keys() and all(torch.equal(left[name].cpu(), right[name].cpu()) for name in left)
    if not same:
        raise BatchError("EKFAC moments in different eigenbases do not add up: collect both with the same `basis=`.")

"""Options of compensation: what ``apply(compensate=…)`` takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from prunelab.batches import Batches
from prunelab.curvature.statistics.collect import Statistics
from prunelab.curvature.statistics.input_moments import MEMORY
from prunelab.errors import OptionError
from prunelab.options import flag, one_of, real, whole

Side = Literal["consumers", "producers"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class Compensation:
    """How ``apply`` makes up for what it cuts.

    Args:
        source: statistics with ``"inputs"`` (``"kronecker"`` for producers), or batches to collect them from.
        side: ``"consumers"`` refits the layers that lose inputs, by least squares on their outputs; ``"producers"``
            updates the rows that stay beside the removed ones, by Kronecker-factored OBS.
        sequential: refit layer by layer in forward order, each on what the cut and refitted layers before it give,
            towards the outputs of the whole model: later layers correct what earlier ones could not.  Needs batches;
            the default where ``source`` are batches.  At once, statistics serve any number of plans.
        damping: share of each input's second moment that is added to it, which holds the weights where they are; by
            default 0.01, and more for a layer whose inputs are few for its columns.
        memory: bytes that the second moment of one layer's inputs may take; where patches of a convolution would need
            more, channels are refitted alike at all kernel positions.

    Source: Hassibi & Stork 1992, equation 5, for a layer's squared error; He et al. 2017, *Channel Pruning*, equation 3
    (least squares on the kept channels; ``sequential`` is its target, the whole model's output); producers: Wang et al.
    2019, *EigenDamage*, section 4 (Kron-OBS), for several rows at once.
    """

    source: Statistics | Batches | None = None
    side: Side = "consumers"
    sequential: bool | None = None
    damping: float | None = None
    memory: int = MEMORY

    def __post_init__(self) -> None:
        one_of("side", self.side, SIDES)
        set_option = partial(object.__setattr__, self)  # the dataclass is frozen
        if self.sequential is not None and flag("sequential", self.sequential) and self.side == "producers":
            raise OptionError("sequential=True refits consumers: leave side at 'consumers'.")
        if self.damping is not None:
            set_option("damping", real("damping", self.damping, least=0))
        set_option("memory", whole("memory", self.memory))

    @property
    def in_order(self) -> bool:
        """Whether layers are refitted one after the other."""
        return not isinstance(self.source, Statistics) if self.sequential is None else self.sequential

    @property
    def batches(self) -> Batches | None:
        """The batches, or those that the statistics were collected from."""
        return self.source.batches if isinstance(self.source, Statistics) else self.source


How = Compensation | Statistics | Batches | None
"""What ``apply`` takes to make up for what it cuts."""

"""Several processes: each holds a share of the data, all of them make the same plan.

Under ``torchrun`` every process builds the same model and reads its own share of the batches.  ``Sharded`` says that
batches are such a share; whatever takes batches takes it:

    torch.distributed.init_process_group()
    share = pl.distributed.Sharded(loader)                      # of this process
    small, report = pl.prune(model, images, criterion="kron_obs", data=share, flops=0.5)

Statistics are then measured on the shares and summed over the processes, so that each sees a part of the data only.
Criteria that need the batches themselves (Hessian products, gates, the oracle) get those of all processes, one after
the other.  Either way every process has the scores of one process on all the data, rank 0's first, to rounding; and to
be sure that not even rounding tells the processes apart, plans and weights are those of rank 0.

Files (``pl.save``, states, reports) are written by rank 0: ``if pl.distributed.rank() == 0: pl.save(…)``.

Flows in: batches of one process.  Flows out: batches that represent those of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelab.batches.reading import read
from prunelab.batches.samples import length
from prunelab.batches.task import Task, Wrapped
from prunelab.batches.trees import tree_map
from prunelab.errors import BatchError, PlanError, PruneLabError
from prunelab.options import module

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Sharded(Wrapped):
    """Batches of which every process of a group holds its own share; to be given wherever batches are taken.

    What takes them must be called by all processes of the group.  Iterating over it gives the batches of all of them,
    rank 0's first.

    Args:
        batches: of this process, as criteria take them, or a ``Task``; readable more than once, as from a loader with a
            ``DistributedSampler``, or every n-th batch.
        group: the processes; all of them by default.

    Raises:
        BatchError: ``torch.distributed`` was not started.
    """

    batches: Iterable[Any]
    group: Any = None

    def __post_init__(self) -> None:
        if not running():
            raise BatchError(
                "Sharded batches need torch.distributed.init_process_group() first, as under torchrun; with a single "
                "process give the batches as they are."
            )

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of all processes, on the CPU, each sent from the process that holds it."""
        me = dist.get_rank(self.group)
        for number in range(dist.get_world_size(self.group)):
            mine = iter(self.batches) if number == me else None
            while True:
                message: tuple[str, Any] = ("", None) if mine is None else _next(mine)
                kind, content = sent(message, number, self.group)
                if kind == "error":
                    raise BatchError(f"Rank {number} could not read its batches: {content}")
                if kind == "end":
                    break
                yield content

    def _length(self, item: Any) -> int:
        task = self.batches if isinstance(self.batches, Task) else Task(())
        inputs, targets = read(item, None, task, "A batch")
        return length(inputs, targets, task.samples)

    def first(self) -> int:
        """Return how many samples the processes before this one hold; reads the targets of all batches.

        Raises:
            BatchError: some process cannot read its batches.
        """
        mine = agreed(lambda: sum(self._length(item) for item in self.batches), self.group)
        return sum(gathered(mine, self.group)[: dist.get_rank(self.group)])


def _next(batches: Iterator[Any]) -> tuple[str, Any]:
    """Return the next batch as a message to the others; whatever goes wrong is one as well, or they would wait."""
    try:
        return "batch", tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, next(batches))
    except StopIteration:
        return "end", None
    except Exception as error:
        return "error", f"{type(error).__name__}: {error}"


def running() -> bool:
    """Return whether this is one of several processes, or of one that was started as if."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process; 0 where there is no other.  Rank 0 writes files."""
    return dist.get_rank() if running() else 0


def sent(value: T, source: int = 0, group: Any = None) -> T:
    """Return the value of one process (its rank in the group) in all of them."""
    box = [value]
    origin = source if group is None else dist.get_global_rank(group, source)
    dist.broadcast_object_list(box, src=origin, group=group)
    return box[0]


def agreed(work: Callable[[], T], group: Any = None) -> T:
    """Return what comes of some work of this process, once all processes have done theirs.

    Raises:
        BatchError: it failed in some process; raised in all of them, so that none waits for another.  What went wrong
            in this one is the cause.
    """
    done: T
    failure, cause = None, None
    try:
        done = work()
    except Exception as error:
        failure, cause = f"{type(error).__name__}: {error}", error
    for number, message in enumerate(gathered(failure, group)):
        if message is not None:
            raise BatchError(f"Rank {number} failed: {message}") from cause
    return done


def gathered(value: T, group: Any = None) -> list[T]:
    """Return the values of all processes, by rank, in each of them."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def same_everywhere(model: nn.Module, group: Any = None) -> nn.Module:
    """Give all processes rank 0's parameters and buffers, in place; without other processes nothing happens.

    Raises:
        PlanError: the processes hold models of different shapes.
    """
    if not running() or dist.get_world_size(group) == 1:
        return model
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    about = {name: (tuple(value.shape), str(value.dtype)) for name, value in tensors.items()}
    if any(other != about for other in gathered(about, group)):
        raise PlanError(f"The processes hold {type(model).__name__}s of different shapes: their plans differed.")
    source = 0 if group is None else dist.get_global_rank(group, 0)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else None
    with torch.no_grad():
        for value in tensors.values():
            there = value.detach().contiguous() if device is None else value.detach().to(device).contiguous()
            dist.broadcast(there, src=source, group=group)
            value.copy_(there)
    return model


def of_rank_0(value: T, data: Any) -> T:
    """Return rank 0's value in all processes that ``data`` are shared over; the value itself if they are not."""
    return sent(value, 0, data.group) if isinstance(data, Sharded) else value


def weights_of_rank_0(model: nn.Module, data: Any) -> nn.Module:
    """Give ``model`` rank 0's weights in all processes that ``data`` are shared over; change nothing if they are not.

    Fine-tuning leaves batch norm's running statistics different in every process.
    """
    return same_everywhere(model, data.group) if isinstance(data, Sharded) else model


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model inside a wrapper that changes the names of its parameters and does not survive a cut.

    Raises:
        PruneLabError: it is one; the message says how to get at the model.
        OptionError: it is not a module.
    """
    module("model", model)
    inner = next((name for name in ("module", "_orig_mod") if _is_wrapper(model, name)), None)
    if inner is not None:
        kind = type(model).__name__
        raise PruneLabError(
            f"This is a {kind} around a {type(getattr(model, inner)).__name__}: give the model inside, "
            f"`model.{inner}`, and wrap the result again."
        )


def _is_wrapper(model: nn.Module, inner: str) -> bool:
    kinds = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")
    return type(model).__name__ in kinds and isinstance(getattr(model, inner, None), nn.Module)

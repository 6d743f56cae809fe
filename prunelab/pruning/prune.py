"""All at once: trace, score, plan, cut and fine-tune, once or in steps, with a report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from prunelab import criteria
from prunelab.batches import Batches
from prunelab.cost import count
from prunelab.criteria import Criterion
from prunelab.curvature.statistics.statistics import Statistics
from prunelab.distributed import of_rank_0, rank, weights_of_rank_0
from prunelab.errors import OptionError
from prunelab.options import flag, function, parts, shown
from prunelab.options import whole as whole_number
from prunelab.planning import pools
from prunelab.planning.choose import choose
from prunelab.planning.fit import TOLERANCE
from prunelab.planning.options import Options, PlanOptions, only_budget
from prunelab.plans import Plan
from prunelab.pruning.given import compensation, train
from prunelab.pruning.report import Report, metrics_of
from prunelab.pruning.schedule import Schedule, ScheduleName, shares
from prunelab.pruning.seeds import seeded
from prunelab.pruning.state import State, described, identity
from prunelab.runtime.isolation import copied
from prunelab.runtime.switches import undisturbed
from prunelab.surgery.apply import apply
from prunelab.surgery.refit.options import Compensation
from prunelab.tracing import fakes
from prunelab.tracing.trace import DependencyGraph, trace

if TYPE_CHECKING:  # it is part of typing from Python 3.11 on
    from typing_extensions import Unpack

BEFORE, CUT, TUNED = "before", "cut", "fine-tuned"
"""The stages of a run, by their names in its report."""


@undisturbed()
def prune(
    model: nn.Module,
    example_inputs: fakes.Inputs,
    criterion: str | Criterion = "magnitude",
    data: Batches | None = None,
    *,
    flops: float | None = None,
    params: float | None = None,
    bytes: float | None = None,
    latency: float | None = None,
    ratio: float | None = None,
    steps: int = 1,
    schedule: ScheduleName | Schedule = "geometric",
    compensate: bool | Compensation | Statistics | Batches = False,
    finetune: Callable[[nn.Module], Any] | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float] | float] | None = None,
    state: str | Path | None = None,
    seed: int | None = None,
    progress: bool = True,
    **options: Unpack[PlanOptions],
) -> tuple[nn.Module, Report]:
    """Prune ``model`` to a budget and return the smaller model with a report; ``model`` is not changed.

    Args:
        model: any module that can be traced.
        example_inputs: a tensor, a tuple or a dict; shapes and types matter.
        criterion: a name, or a criterion with options.
        data: batches for the criterion, or a ``Task``; it is read once per step, twice with ``compensate``.
            With ``distributed.Sharded`` every process gives its share and calls this; plans, rows of the report and
            weights are then the same in all of them.
        flops: share of the FLOPs to keep, in (0, 1], of which 1 removes nothing; or
        params: share of the parameters to keep; or
        bytes: share of the memory of parameters and buffers to keep; or
        latency: share of the time of one forward pass to keep (see ``plan``); or
        ratio: share of the units to remove, in [0, 1), of which 0 removes nothing.
        steps: cut in so many steps, scoring again before each.
        schedule: what is left after each step: equal parts of what was there (``"geometric"``), equal amounts
            (``"linear"``), much at first and little at the end (``"cubic"``), or ``(progress, final) -> share left``.
        compensate: refit what is left after every cut: ``True`` on ``data``, or on other batches, as ``apply`` takes
            them; ``Compensation(…)`` for its options.
        finetune: called with the model after every cut; trains it in place, or returns a trained copy of it.
        evaluate: called with the model before, after every cut and after every fine-tuning; returns metrics by name, or
            one number, which is then called ``"score"``.
        state: folder in which the run is kept after every stage.  Called again after it was stopped, at any point, with
            the same arguments, it resumes there; a finished run is returned from it.
        seed: of Python's, NumPy's and PyTorch's random numbers, drawn again for every scoring and every fine-tuning, so
            that a run that was stopped ends like one that was not.  That is so as long as ``finetune`` and ``data``
            draw from nothing else: make a loader with its own generator in ``finetune``.  By default it
            is drawn from PyTorch's generator.
        progress: show a progress bar, if there are several steps.
        options: of ``plan`` (scope, max_ratio, round_to, ignore, overrides, per, timing).  ``max_ratio`` and
            ``overrides`` are shares to remove, of what a group had at first; ``overrides`` follow the schedule.

    Returns:
        The pruned model, in the mode of the original, and the report.

    Raises:
        OptionError: an option is out of its range or of another type, or ``evaluate`` returns something else.
        BudgetError: no or several budgets are given, or the budget cannot be met.
        TraceError: the model cannot be traced.
        PlanError: nothing in it can be removed.
        BatchError: the batches do not fit the model.
        DataError: ``state`` holds another run or something else, or cannot be written.

    Source: cubic schedule: Zhu & Gupta 2017, *To prune, or not to prune*, equation 1.

    >>> import prunelab as pl
    >>> model, x = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), torch.ones(1, 4)
    >>> small, report = pl.prune(model, x, ratio=0.5, steps=2, evaluate=lambda model: model(x).norm().item())
    >>> pl.count(model, x).params, pl.count(small, x).params
    (114, 58)
    >>> [row["stage"] for row in report.rows], "score" in report.rows[0]
    (['before', 'cut', 'cut'], True)
    """
    steps, progress = whole_number("steps", steps), flag("progress", progress)
    kind, asked = only_budget(flops=flops, params=params, bytes=bytes, latency=latency, ratio=ratio)
    chosen = criteria.get(criterion)
    _check_calls(finetune, evaluate, state)
    seed = None if seed is None else whole_number("seed", seed, least=0)
    refit = compensation(compensate)
    goal = Goal(trace(model, example_inputs), kind, asked, schedule, steps, options)
    kept = None
    if state is not None:
        run = {
            "model": identity(model),
            "inputs": fakes.describe_inputs(example_inputs),
            "criterion": described(chosen),
            "budget": {kind: asked},
            "steps": [steps, described(schedule)],
            "options": described(goal.plain),
            "compensate": described(refit),
            "finetune": finetune is not None,
            "seed": seed,
        }
        kept = State(state, run, writes=rank() == 0)
    if kept is not None and kept.run["seed"] is not None:
        seed = int(kept.run["seed"])
    base = of_rank_0(int(torch.randint(2**31, ())) if seed is None else seed, data)
    if kept is not None:
        kept.run["seed"] = base
    if refit is not None and refit.source is None:
        refit = replace(refit, source=data)
    report, weights = of_rank_0((kept.report, kept.weights) if kept is not None else (None, None), data)
    current = model
    if kept is not None and report is not None:
        kept.report, kept.weights = report, weights
        current = _settled(kept.model(model))
    report = report or Report()
    whole = count(model, example_inputs)
    done = {(row["step"], row["stage"]) for row in report.rows}

    def record(step: int, stage: str) -> None:
        cost = count(current, example_inputs)
        row: dict[str, Any] = {"step": step, "stage": stage, "flops": cost.flops, "params": cost.params}
        row |= {"flops_kept": _share(cost.flops, whole.flops), "params_kept": _share(cost.params, whole.params)}
        if kind == "bytes":
            row["bytes_kept"] = _share(cost.bytes, whole.bytes)
        if kind == "latency":
            row["latency_kept"] = _product(report.plans)
        with seeded(current, base, step, 2):
            row |= metrics_of(evaluate(current)) if evaluate else {}
        report.rows.append(of_rank_0(row, data))
        if kept is not None:
            kept.keep(current, report, model)

    if (0, BEFORE) not in done:
        record(0, BEFORE)
    with tqdm(
        total=steps, desc="pruning", unit="step", delay=1, disable=not progress or steps == 1 or rank() > 0
    ) as bar:
        for step in range(1, steps + 1):
            if (step, CUT) not in done:
                with seeded(current, base, step, 0):
                    scores = chosen(trace(current, example_inputs), data)
                    made = of_rank_0(choose(scores, kind, *goal.at(step, scores.graph, report.rows[-1])), data)
                    if made.cuts:
                        small = apply(current, made, compensate=refit)
                    else:  # the user's own model is not to be fine-tuned
                        small = copied(current) if current is model else current
                current = weights_of_rank_0(_settled(small) if kept else small, data)
                report.plans.append(made)
                record(step, CUT)
            if finetune is not None and (step, TUNED) not in done:
                with seeded(current, base, step, 1):
                    train(finetune, current)
                weights_of_rank_0(_settled(current) if kept else current, data)
                record(step, TUNED)
            bar.set_postfix({"flops": f"{report.rows[-1]['flops_kept']:.1%}"})
            bar.update()
    goal.warn(report)
    return current, report


class Goal:
    """What is to be left after each step, and how it is planned.

    Args:
        graph: of the whole model; shares of groups are of what they have there.
        kind: of the budget.
        asked: its share.
        schedule: how the steps go there.
        steps: their number.
        options: of ``plan``.

    Raises:
        OptionError: an option is unknown or out of range.
        PlanError: an option names what the model does not have.
    """

    def __init__(
        self,
        graph: DependencyGraph,
        kind: str,
        asked: float,
        schedule: str | Schedule,
        steps: int,
        options: PlanOptions,
    ) -> None:
        known = PlanOptions.__annotations__.keys()
        unknown = next((name for name in options if name not in known), None)
        if unknown is not None:
            raise OptionError(f"There is no option {unknown!r}; those of plan are {', '.join(sorted(known))}.")
        self.kind, self.asked, self.steps = kind, asked, steps
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        items = parts("ignore", given.get("ignore", ()))
        places = {id(module): name for name, module in graph.model.named_modules()}
        skipped = pools.ignored_groups(graph, items)
        overrides = pools.checked_shares(graph, given.get("overrides", {}))
        shares_of = pools.by_name(graph, overrides, "overrides")
        pools.overridden(graph, overrides, skipped)
        given["ignore"] = [places[id(item)] if isinstance(item, nn.Module) else item for item in items]
        given["overrides"] = {name: share for name, share in shares_of.items() if name not in skipped}
        if isinstance(given.get("max_ratio"), Mapping):
            given["max_ratio"] = pools.by_name(graph, given["max_ratio"], "max_ratio")
        self.sizes = {group.name: group.size for group in graph.groups}
        self.options = Options(**given, since=self.sizes)
        self.plain = {name: getattr(self.options, name) for name in given}
        pools.most(graph, graph.bundles, self.options.max_ratio)
        self.left = shares(schedule, steps, 1 - asked if kind == "ratio" else asked)
        self.paths = {name: shares(schedule, steps, 1 - share) for name, share in self.options.overrides.items()}

    def at(self, step: int, graph: DependencyGraph, row: Mapping[str, Any]) -> tuple[float, Options]:
        """Return share and options for one step, given the graph of the model as it is and the last row.

        Groups that are down to their last unit may not be groups any more; they are then named in vain.
        """
        here = {group.name for group in graph.groups}
        gone = self.sizes.keys() - here
        overrides = {name: 1 - path[step - 1] for name, path in self.paths.items() if name in here}
        modules = {name for name, _ in graph.model.named_modules()}
        ignore = [name for name in self.plain["ignore"] if name not in gone or name in modules]
        options = replace(self.options, overrides=overrides, ignore=ignore)
        if isinstance(options.max_ratio, Mapping):
            options = replace(options, max_ratio={name: r for name, r in options.max_ratio.items() if name in here})
        left = self.left[step - 1]
        return (1 - left if self.kind == "ratio" else left / row[f"{self.kind}_kept"]), options

    def warn(self, report: Report) -> None:
        """Warn if the run has ended too far from its budget, once for all steps."""
        if self.kind == "ratio":
            return
        kept = report.rows[-1][f"{self.kind}_kept"]
        why = next((plan.budget["why"] for plan in reversed(report.plans) if "why" in plan.budget), "")
        if kept < self.asked * (1 - TOLERANCE):
            of = f" In the last step that missed its part: {why}" if self.steps > 1 else f" {why}"
            warnings.warn(f"{self.kind}={self.asked:.4g}: {kept:.4f} are left.{of if why else ''}", stacklevel=4)


def _settled(model: nn.Module) -> nn.Module:
    """Lay all tensors out as in a model that was read from a file; another layout may round otherwise."""
    return model.to(memory_format=torch.contiguous_format)


def _product(plans: Iterable[Plan]) -> float:
    share = 1.0
    for plan in plans:
        share *= plan.budget["kept"].get("latency", 1.0)
    return share


def _share(part: int, total: int) -> float:
    return part / total if total else 1.0


def _check_calls(finetune: Any, evaluate: Any, state: Any) -> None:
    """Refuse what cannot be used, before hours of work are lost to it.

    Raises:
        OptionError: one of them is of another type.
    """
    if finetune is not None:
        function("finetune", finetune, "finetune(model)")
    if evaluate is not None:
        function("evaluate", evaluate, "evaluate(model) -> metrics by name")
    if not isinstance(state, (str, Path, type(None))):
        raise OptionError(f"`state` must be the path of a folder, got {shown(state)}.")

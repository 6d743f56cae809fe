"""The protocol: what every criterion gets, and how the result is measured.

Scores are taken on training images that are not augmented; what is reported is the accuracy after the last epoch, on
test images by which nothing was chosen.

Flows in: ``Settings``.  Flows out: stages, measured one after the other; in the end one row of numbers and a history.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from prunelab import data, zoo
from prunelab.cost import count, latency
from prunelab.criteria import Scores
from prunelab.experiments.shootout.meter import Meter
from prunelab.experiments.shootout.settings import Settings
from prunelab.factorization.factorize import factorize
from prunelab.options import one_of
from prunelab.planning.choose import choose
from prunelab.planning.options import COSTS, PERS, Options
from prunelab.pruning.seeds import seeded
from prunelab.sparsity.masks import bake
from prunelab.sparsity.sparsify import sparsify
from prunelab.surgery.apply import apply
from prunelab.tracing.trace import trace
from prunelab.training import evaluate, fit

KEPT_IN_MEMORY = 5000
"""Scoring images up to which batches are kept instead of being read again."""


class Run:
    """One run of the protocol.

    Args:
        settings: what to do.

    Attributes:
        settings: what was asked for.
        model: the network as it is now.
        whole: the network as it was.
        images: training and test set.
        batches: the images for scoring, as ``(inputs, targets)`` on the device.
        test: the test images that accuracies are measured on, in batches.
        shares: what is to be left after each step.
        meter: time and memory of each part.
        history: one row per stage.
        removed: what the last cut was: a plan, or nothing where there is none.

    Raises:
        DataError: there is no such network, checkpoint or data set; or it is not available here.
        PruneLabError: the network has more or fewer outputs than the data set has classes.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.device = settings, settings.torch_device()
        self.meter = Meter(self.device)
        with self.meter("load"):
            self.images = data.get(settings.dataset)
            model = zoo.load(settings.model, settings.checkpoint or None, num_classes=self.images.classes)
            self.whole = self.model = model.to(self.device).eval()
            self.inputs = self.images.inputs().to(self.device)
            self.train = _some(self.images.train, settings.images, settings.seed)
            scoring = _some(self.images.train, settings.scoring, settings.seed)
            self.batches = self._batches(scoring, min(settings.batch_size, 128))
            self.test = self._batches(_some(self.images.test, settings.test_images, settings.seed), 250)
        self.shares = settings.shares()
        self.sizes = {group.name: group.size for group in trace(self.model, self.inputs).groups}
        self.history: list[dict[str, Any]] = []
        self.removed: Any = None
        self.costs = self._costs()
        self._step = 0
        self._kept_time = 1.0

    def _batches(self, images: data.Images, size: int) -> Any:
        loader = data.loader(images, size)
        if len(images) > KEPT_IN_MEMORY:
            return loader
        return [(inputs.to(self.device), targets.to(self.device)) for inputs, targets in loader]

    # ── the steps ─────────────────────────────────────────────────────────────────────────────────────────────────

    def score(self) -> Scores | dict[str, Tensor]:
        """Return the scores of the network as it is, on the scoring images: per unit, or per weight."""
        scorer = self.settings.scorer()
        with self.meter("score"), seeded(self.model, self.settings.seed, self._step, 0):
            if self.settings.method == "weights":
                return scorer.elementwise(self.model, self.batches)  # type: ignore[attr-defined]
            return scorer(trace(self.model, self.inputs), self.batches)

    def cut(self, scores: Any, share: float) -> nn.Module:
        """Remove what scores lowest, so that ``share`` of the whole network's budget is left; return what is left."""
        settings = self.settings
        self._step += 1
        now = {"latency": self._kept_time, "density": 1.0}.get(settings.budget) or self._kept(settings.budget)
        self.removed = None
        if share / now >= 1:
            return self.model
        with self.meter("cut"), seeded(self.model, settings.seed, self._step, 1):
            if settings.method == "weights":
                self.model = sparsify(self.model, scores, share, scope=settings.scope)  # type: ignore[arg-type]
            elif settings.method == "factorize":
                budget: dict[str, Any] = {settings.budget: share / now, "per": settings.per or "auto"}
                self.model = factorize(self.model, scores, **budget)
            else:
                per = one_of("per", settings.per or "unit", PERS)
                options = Options(settings.scope, settings.max_ratio, per=per, since=self.sizes)
                self.removed = choose(scores, settings.budget, share / now, options)
                self._kept_time *= self.removed.budget["kept"].get("latency", 1.0)
                refit = _compensation(self.batches) if settings.compensate else None
                self.model = apply(self.model, self.removed, compensate=refit)
            if settings.recalibrate:
                update_bn(self.batches, self.model, self.device)
        return self.model.eval()

    def finetune(self) -> nn.Module:
        """Train what is left for this step's part of the epochs, and return it."""
        settings, before = self.settings, len(self.history)
        if not settings.epochs:
            return self.model
        every = settings.evaluate_every

        def after(epoch: int) -> dict[str, float]:
            if not every or epoch % every:
                return {}
            return evaluate(self.model, self.test, precision=settings.precision)

        if self.model is self.whole:
            self.model = copy.deepcopy(self.model)
        with self.meter("finetune"), seeded(self.model, settings.seed, self._step, 2):
            seed = settings.seed + 1000 * self._step
            log = fit(
                self.model,
                self.train,
                settings.recipe(),
                seed=seed,
                after_epoch=after,
                progress=False,
                precision=settings.precision,
            )
        for row in log:
            stage = {"step": self._step, "stage": "epoch", "epoch": row["epoch"], "training_loss": row["loss"]}
            measured = {name: row[name] for name in ("accuracy",) if name in row}
            self.history.append(stage | measured)
        assert len(self.history) == before + len(log)
        return self.model

    def measure(self, stage: str) -> dict[str, Any]:
        """Measure the network as it is, on test images and on the images for scoring, and note it in the history."""
        with self.meter("evaluate"):
            test = evaluate(self.model, self.test, precision=self.settings.precision)
            seen = evaluate(self.model, self.batches, precision=self.settings.precision)
        costs = self._costs()
        row = {"step": self._step, "stage": stage, **test, **{f"scoring_{name}": value for name, value in seen.items()}}
        row |= {f"{name}_kept": costs[name] / self.costs[name] for name in (*COSTS, "weights")}
        self.history.append(row)
        return row

    # ── what they cost ────────────────────────────────────────────────────────────────────────────────────────────

    def _plain(self) -> nn.Module:
        return bake(self.model) if self.settings.method == "weights" else self.model

    def _costs(self) -> dict[str, int]:
        model = self._plain()
        left = sum(int(value.count_nonzero()) for value in model.parameters())
        return count(model, self.inputs).to_dict() | {"weights": left}

    def _kept(self, name: str) -> float:
        return self._costs()[name] / self.costs[name]

    def latencies(self) -> dict[str, float]:
        """Return milliseconds of one forward pass, whole and now, taken in turns; nothing if none are asked for."""
        size = self.settings.latency_images
        if not size:
            return {}
        batch = self.inputs.expand(size, *self.inputs.shape[1:]).contiguous()
        small, taken = self._plain(), {"before": [], "after": []}  # type: ignore[var-annotated]
        with self.meter("latency"):
            for _ in range(3):
                taken["before"].append(latency(self.whole, batch, seconds=0.1).median)
                taken["after"].append(latency(small, batch, seconds=0.1).median)
        before, after = (1000 * sorted(values)[1] for values in taken.values())
        return {"latency_ms_before": before, "latency_ms": after, "latency_kept": after / before}

    def row(self) -> dict[str, Any]:
        """Return the result as one row: what was measured before, after the last cut, and at the end."""
        first = self._last("before")
        cut = self._last("cut")
        end = next(row for row in reversed(self.history) if "flops_kept" in row)
        names = ("accuracy", "loss", "scoring_accuracy", "scoring_loss")
        found: dict[str, Any] = {name: end[name] for name in names}
        found |= {f"{name}_cut": cut[name] for name in names} | {f"{name}_before": first[name] for name in names}
        costs = self._costs()
        found |= {name: costs[name] for name in COSTS}
        found |= {f"{name}_kept": costs[name] / self.costs[name] for name in (*COSTS, "weights")}
        found |= self.latencies()
        found |= {f"seconds_{name}": round(value, 3) for name, value in self.meter.seconds.items()}
        found |= {f"memory_{name}_gb": round(value, 3) for name, value in self.meter.peak_gb.items()}
        counts = {"test": self.images.test, "scoring": self.images.train, "training": self.images.train}
        asked = {"test": "test_images", "scoring": "scoring", "training": "images"}
        found |= {
            f"{name}_images_used": getattr(self.settings, asked[name]) or len(images) for name, images in counts.items()
        }
        return found | {"device_name": _device_name(self.device), "torch": torch.__version__}

    def _last(self, stage: str) -> Mapping[str, Any]:
        return next((row for row in reversed(self.history) if row["stage"] == stage), self.history[0])


def _some(images: data.Images, number: int, seed: int) -> data.Images:
    """Return so many images drawn by the seed; all of them for 0, or where there are no more."""
    return images.subset(number, seed) if 0 < number < len(images) else images


def _compensation(batches: Any) -> Any:
    from prunelab.surgery.refit.options import Compensation

    return Compensation(source=batches)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"

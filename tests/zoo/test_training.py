"""Training: it learns, it is seeded, and a run that was stopped ends like one that was not."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import prunelab as pl
from prunelab.training import (
    PAPERS,
    Distillation,
    Recipe,
    checkpoints,
    evaluate,
    fit,
    mixed_precision,
    train_checkpoint,
)
from tests.cases import imagined_gpu

RECIPE = Recipe(epochs=3, lr=0.05, weight_decay=5e-4, batch_size=50)


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)
    )


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


def test_training_lowers_the_loss_and_is_seeded(mini):
    images, models = mini.train.subset(300), [tiny(), tiny(), tiny()]
    logs = [
        fit(model, images, RECIPE, seed=seed, progress=False) for model, seed in zip(models, (0, 0, 1), strict=True)
    ]
    assert logs[0][-1]["loss"] < logs[0][0]["loss"]
    assert same(models[0], models[1]) and not same(models[0], models[2])
    assert not models[0].training


def test_a_run_that_was_stopped_ends_like_one_that_was_not(mini, tmp_path):
    images, whole, stopped = mini.train.subset(300), tiny(), tiny()
    fit(whole, images, RECIPE, progress=False)

    class Stop(Exception):
        pass

    def stop(epoch: int) -> dict[str, float]:
        if epoch == 2:
            raise Stop
        return {}

    with pytest.raises(Stop):
        fit(stopped, images, RECIPE, state=tmp_path / "state", after_epoch=stop, progress=False)
    resumed = tiny(seed=9)
    log = fit(resumed, images, RECIPE, state=tmp_path / "state", progress=False)
    assert [row["epoch"] for row in log] == [1, 2, 3] and same(resumed, whole)


def test_a_damaged_state_is_an_error(mini, tmp_path):
    (tmp_path / "state").write_text("nonsense")
    with pytest.raises(pl.DataError, match="delete it to start again"):
        fit(tiny(), mini.train.subset(50), RECIPE, state=tmp_path / "state", progress=False)


def test_the_learning_rate_falls_as_the_papers_say():
    """A tenth from half of the training on, a hundredth from three quarters on, and no warm-up."""
    recipe = Recipe(epochs=8, lr=0.1, weight_decay=0.0, optimizer="momentum", decay="steps")
    optimizer = recipe.make_optimizer(tiny())
    schedule, seen = recipe.make_schedule(optimizer, steps=8), []
    for _ in range(8):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)
    assert not optimizer.param_groups[0]["nesterov"]


def test_a_part_of_an_epoch_is_a_part_of_its_steps(mini):
    """Half an epoch of 6 steps sees 3 of them, and the learning rate has gone its whole way."""
    images, seen = mini.train.subset(300), []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()

        def forward(self, x):
            seen.append(len(x))
            return self.inner(x)

    for epochs, wanted in ((0.5, [50] * 3), (1.5, [50] * 9), (0.01, [50]), (2, [50] * 12)):
        seen.clear()
        log = fit(Counted(), images, replace(RECIPE, epochs=epochs), progress=False)
        assert seen == wanted and len(log) == -(-len(wanted) // 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "linear"}, "no decay 'linear'; there are cycle, steps"),
        ({"optimizer": "adam"}, "no optimizer 'adam'; there are sgd, momentum, adamw"),
        ({"milestones": (0.5, 0.5)}, "must be rising shares between 0 and 1"),
        ({"epochs": 0}, "`epochs` must be a number above 0, got 0"),
        ({"milestones": (0.5, 1.0)}, "must be rising shares between 0 and 1"),
    ],
)
def test_a_recipe_out_of_range_is_an_error(options, message):
    with pytest.raises(pl.BudgetError, match=message):
        Recipe(**({"epochs": 1, "lr": 0.1, "weight_decay": 0.0} | options))


def test_an_unknown_precision_is_an_error(mini):
    with pytest.raises(pl.BudgetError, match="no precision 'half'; there are float32, mixed"):
        fit(tiny(), mini.train.subset(50), RECIPE, progress=False, precision="half")


def test_evaluation_counts_samples_not_batches(mini):
    model, images = tiny().eval(), mini.test.subset(100)
    one = evaluate(model, pl.data.loader(images, 100))
    many = evaluate(model, pl.data.loader(images, 7))
    assert many["accuracy"] == one["accuracy"] and many["loss"] == pytest.approx(one["loss"], rel=1e-5)
    with pytest.raises(pl.DataError, match="nothing to evaluate"):
        evaluate(model, [])


def test_a_checkpoint_is_written_with_its_log(mini, tmp_path, monkeypatch):
    monkeypatch.setitem(pl.zoo.MODELS, "tiny", lambda num_classes: tiny())
    monkeypatch.setattr(pl.data, "get", lambda _: pl.data.TrainTest(mini.train.subset(200), mini.test.subset(100)))
    report = train_checkpoint("tiny", "mini", tmp_path, tmp_path / "state", RECIPE, seed=0)
    assert json.loads((tmp_path / "tiny.json").read_text()) == report and len(report["log"]) == 3
    monkeypatch.setattr(pl.zoo, "checkpoint", lambda name: tmp_path / f"{name}.safetensors")
    found = evaluate(pl.zoo.load("tiny"), pl.data.loader(mini.test.subset(100), 100))
    assert found["accuracy"] == report["accuracy"]["mini test set"]


def test_a_checkpoint_of_other_images_has_their_classes_and_their_name(mini, tmp_path, monkeypatch):
    images = mini.train.subset(100)
    images.spec = replace(images.spec, classes=("a",) * 12)
    monkeypatch.setitem(pl.zoo.MODELS, "tiny", lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(3072, 12)))
    monkeypatch.setattr(pl.data, "get", lambda _: pl.data.TrainTest(images, images))
    report = train_checkpoint("tiny", "twelve", tmp_path, tmp_path / "state", RECIPE, seed=0)
    assert list(report["accuracy"]) == ["100 test images"] and (tmp_path / "tiny-twelve.json").is_file()
    assert load_file(tmp_path / "tiny-twelve.safetensors")["1.bias"].shape == (12,)


def test_the_command_trains_by_the_recipe_of_a_paper_into_a_file(mini, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(pl.zoo.MODELS, "resnet20", lambda num_classes: tiny())
    monkeypatch.setattr(pl.data, "get", lambda _: pl.data.TrainTest(mini.train.subset(200), mini.test.subset(100)))
    out = tmp_path / "base" / "small.safetensors"
    words = f"resnet20 --data full --recipe oba --epochs 1 --seed 3 --out {out}".split()
    monkeypatch.setattr("sys.argv", ["training", *words])
    checkpoints.main()
    log = json.loads(out.with_suffix(".json").read_text())
    assert log["recipe"] | {"epochs": 200} == asdict(PAPERS["oba"]) | {"milestones": [0.3, 0.5, 0.75]}
    assert log["seed"] == 3 and log["command"].endswith("resnet20 --data cifar10") and out.is_file()
    assert capsys.readouterr().out.startswith("resnet20: {")


# ── distillation and mixed precision ──────────────────────────────────────────────────────────────────────────────


def test_distillation_is_hintons_loss():
    """Against its definition, probability by probability, in float64."""
    torch.manual_seed(0)
    student, labels, inputs = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 4, torch.randn(6, 3).double()
    teacher = nn.Linear(3, 4).double()
    temperature, weight = 3.0, 0.3
    soft = (teacher(inputs) / temperature).softmax(1)
    mine = (student / temperature).softmax(1)
    apart = (soft * (soft.log() - mine.log())).sum(1).mean()
    hard = -student.softmax(1).log()[torch.arange(6), labels].mean()
    wanted = 0.7 * hard + 0.3 * temperature**2 * apart
    found = Distillation(teacher, temperature, weight)(student, inputs, labels)
    # float32 inside, which is what mixed precision needs
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_at_high_temperature_distillation_matches_logits():
    """Hinton et al., equation 4: for zero-mean logits the gradient tends to (z − v) / classes."""
    torch.manual_seed(0)
    inputs, student = torch.eye(5), torch.randn(5, 4)
    student = (student - student.mean(1, keepdim=True)).requires_grad_()
    teacher = nn.Linear(5, 4, bias=False)
    with torch.no_grad():
        teacher.weight -= teacher.weight.mean(0)
    Distillation(teacher, temperature=300.0, weight=1.0)(student, inputs, torch.zeros(5).long()).backward()
    wanted = (student - teacher(inputs)).detach() / 4 / 5  # over the batch
    assert torch.allclose(student.grad, wanted, atol=2e-3 * wanted.abs().max())


def test_the_teacher_stays_as_it_is_and_the_student_comes_nearer(mini):
    images, teacher, student = mini.train.subset(200), tiny(1).train(), tiny(2)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    distill = Distillation(teacher, weight=1.0)
    log = fit(student, images, RECIPE, distill=distill, progress=False)
    assert log[-1]["loss"] < log[0]["loss"]
    assert teacher.training and all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_without_weight_distillation_changes_nothing(mini):
    plain, distilled = tiny(), tiny()
    fit(plain, mini.train.subset(100), RECIPE, progress=False)
    fit(distilled, mini.train.subset(100), RECIPE, distill=Distillation(tiny(5), weight=0.0), progress=False)
    for one, two in zip(plain.parameters(), distilled.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"weight": 1.5}, {"temperature": float("nan")}])
def test_a_distillation_out_of_range_is_an_error(options):
    with pytest.raises(pl.BudgetError, match=next(iter(options))):
        Distillation(tiny(), **options)


@imagined_gpu
@pytest.mark.parametrize("able", [False, True])
def test_precision_is_mixed_on_gpus_that_can_and_nowhere_else(monkeypatch, able):
    """On tensors without data that know that they would be on a GPU; there need be none."""
    assert not mixed_precision(torch.device("cpu"))._enabled
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model, teacher, images, targets = tiny(), tiny(), torch.empty(4, 3, 32, 32), torch.zeros(4).long()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: able)
        with torch.no_grad(), mixed_precision(torch.device("cuda")):
            logits = model(images)
            loss = Distillation(teacher)(logits, images, targets)
        assert logits.dtype == (torch.bfloat16 if able else torch.float32)
        assert loss.dtype == torch.float32 and loss.device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_in_mixed_precision_and_ends_near_the_cpu(mini):
    images, model = mini.train.subset(300), tiny().cuda()
    kinds = set()
    model[0].register_forward_hook(lambda module, inputs, out: kinds.add(out.dtype))
    log = fit(model, images, RECIPE, distill=Distillation(tiny(3).cuda(), weight=0.5), progress=False)
    wanted = fit(tiny(), images, RECIPE, distill=Distillation(tiny(3), weight=0.5), progress=False)
    assert torch.bfloat16 in kinds and all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert log[-1]["loss"] == pytest.approx(wanted[-1]["loss"], rel=0.05)  # bfloat16 has 8 bits of mantissa

"""Held out: disjoint draws, rank correlations with ties, spreads; what a notebook runs on; bets and holes."""

from __future__ import annotations

import pytest
import torch

import prunelab as pl
from prunelab.course.exercises import Verdict, bet, written
from prunelab.course.exercises.verdict import compare, solved_by
from prunelab.course.held_out import draws, paired, rank_correlation, spread, within_groups
from prunelab.course.notebook import machine


def test_no_image_is_in_two_draws(mini):
    parts = draws(mini.train, 300, number=3, seed=5)
    seen = [image.numpy().tobytes() for part in parts for image in part.images]
    assert len(seen) == 900 and len(set(seen)) == len(
        {i.numpy().tobytes() for i in mini.train.images}.intersection(seen)
    )
    again, other = (draws(mini.train, 300, number=3, seed=seed) for seed in (5, 6))
    assert all(torch.equal(one.targets, two.targets) for one, two in zip(parts, again, strict=True))
    assert not torch.equal(parts[0].targets, other[0].targets)


def test_more_images_than_there_are_is_an_error(mini):
    with pytest.raises(pl.DataError, match="3 draws of 2000 images each were asked of 5000"):
        draws(mini.train, 2000, number=3)
    with pytest.raises(pl.PruneLabError, match="positive"):
        draws(mini.train, 0, number=3)


def counted(values):
    """The rank of each value by counting: those below it, and half of those that are equal to it."""
    return ((values[None] < values[:, None]).sum(1) + ((values[None] == values[:, None]).sum(1) - 1) / 2).double()


def test_the_rank_correlation_is_that_of_counted_ranks_ties_included():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        first, second = torch.randint(6, (2, 30), generator=generator).float()
        x, y = (counted(values) - 14.5 for values in (first, second))
        assert rank_correlation(first, second) == pytest.approx(float(x @ y / (x.norm() * y.norm())), abs=1e-9)


def test_small_groups_are_left_out():
    scores = {"small": torch.arange(8.0), "large": torch.arange(16.0)}
    assert within_groups(scores, {name: -value for name, value in scores.items()}) == {"large": -1.0}


def test_pairing_takes_common_luck_away():
    luck = [0.1, -0.3, 0.2, 0.0]
    gain = paired([0.5 + x for x in luck], [0.4 + x for x in luck])
    assert gain.mean == pytest.approx(0.1) and gain.error < 1e-12 < spread(luck).error
    with pytest.raises(pl.PruneLabError, match="equally many"):
        paired([1.0], [1.0, 2.0])
    with pytest.raises(pl.PruneLabError, match="at least one value"):
        spread([])


def test_a_machine_says_what_it_is_and_scales_images(mini):
    here = machine("cpu", "full")
    assert here.images(200) == 2000 and here.images(200, most=900) == 900
    assert "CPU" in str(here) and "full" in str(here)
    (inputs, targets), *_ = here.batches(mini.test.subset(20, 0), 10)
    assert inputs.shape == (10, 3, 32, 32) and targets.shape == (10,)
    with pytest.raises(pl.PruneLabError, match="`device` is 'tpu9'"):
        machine("tpu9")
    with pytest.raises(pl.PruneLabError, match="scale"):
        machine("cpu", "huge")


@solved_by(lambda x: 2 * x)
def check(function):
    return compare(function, [(2.0,), (5.0,)], lambda x: 2 * x, {}, praise="twice.", hint="Two times.")


@pytest.mark.parametrize(
    ("attempt", "gives", "words"),
    [
        (lambda x: ..., 8, "Not written yet: the solution runs instead"),
        (lambda x: x + x, 8, "Right: twice"),
        (lambda x: 3 * x, 8, "continues with the solution"),
        (lambda x: x / 0, 8, "ZeroDivisionError"),
    ],
)
def test_a_hole_is_filled_by_the_reader_or_by_the_solution(attempt, gives, words, capsys):
    function = written(attempt, check)
    assert function(4) == gives
    assert words in capsys.readouterr().out
    assert (function is attempt) == words.startswith("Right")


def test_every_bet_gets_an_answer(capsys):
    for guess in (0.6, 0.1, 5, "a lot", ..., None):
        bet(guess, 0.62, unit="%")
    assert capsys.readouterr().out.splitlines() == [
        "You said 60 %, measured is 62 %: close.",
        "You said 10 %, measured is 62 %: too low.",
        "You said 500 %, measured is 62 %: too high.",
        "You said a lot, measured is 62 %.",
        "No bet. Measured: 62 %.",
        "No bet. Measured: 62 %.",
    ]
    assert isinstance(check(lambda x: x), Verdict)

"""Checkers accept the solutions that we hand out, and explain the mistakes that people make."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import nbformat
import pytest
import torch

from prunelab.course.exercises import tour as exercises

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDED = re.compile(r"<details><summary>Solution</summary>(.*?)</details>", re.DOTALL)


def solutions(name: str) -> dict:
    """What the folded solutions of a notebook define."""
    book = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    found: dict = {}
    for block in BLOCK.findall("\n".join(FOLDED.findall(text))):
        exec(block, found)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_solutions_are_right(name):
    checkers, found = importlib.import_module(f"prunelab.course.exercises.{name[3:]}"), solutions(name)
    for asked in checkers.__all__:
        checker = getattr(checkers, asked)
        for function in (found[asked], getattr(checker, "solution", found[asked])):
            verdict = checker(function)
            assert verdict, verdict.message
            assert verdict.message, "a right answer deserves a sentence too"


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_answer_is_told_to_replace_the_dots(name):
    checkers = importlib.import_module(f"prunelab.course.exercises.{name[3:]}")
    for asked in checkers.__all__:
        verdict = getattr(checkers, asked)(lambda *given: ...)
        assert not verdict
        assert "replace the dots" in verdict.message


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda i, o: o, "output channels alone"),
        (lambda i, o: (i + o) / 2, "averages"),
        (lambda i, o: 1 - i * o, "the share that is left was asked for"),
        (lambda i, o: 9 * i * o, "How many pairs"),
        (lambda i, o: ..., "replace the dots"),
        (lambda i, o: i / 0, "ZeroDivisionError"),
        (lambda i, o: torch.tensor([i, o]), "of shape [] is asked for"),
        (lambda i, o: "half", "not str"),
    ],
)
def test_mistakes_about_flops_are_explained(attempt, words):
    verdict = exercises.kept_flops(attempt)
    assert not verdict
    assert words in verdict.message


def highest(scores, number):
    return exercises._lowest(scores, number, sign=-1)


def per_group(scores, number):
    return {name: score.argsort()[: -(-number // len(scores))].tolist() for name, score in scores.items()}


def emptied(scores, number):
    return exercises._lowest(scores, number, spare=False)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (highest, "highest scores"),
        (per_group, "units and not"),
        (lambda scores, number: per_group(scores, 2) if number == 2 else exercises._lowest(scores, number), "compete"),
        (emptied, "leave one"),
        (lambda scores, number: [0, 1], "not list"),
        (lambda scores, number: dict.fromkeys(scores, 1), "lists of units"),
        (lambda scores, number: None, "returns nothing"),
    ],
)
def test_mistakes_about_plans_are_explained(attempt, words):
    verdict = exercises.lowest_units(attempt)
    assert not verdict
    assert words in verdict.message


def test_a_verdict_reads_as_a_sentence_in_text_and_on_a_page():
    verdict = exercises.Verdict(False, "1 < 2")
    assert repr(verdict) == "Not yet: 1 < 2"
    assert "1 &lt; 2" in verdict._repr_html_()

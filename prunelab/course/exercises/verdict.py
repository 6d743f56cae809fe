"""What a checker answers, and how most of them find it: try cases, compare with the truth, then with known mistakes.

``written`` takes the reader's function where a notebook needs it, ``bet`` the reader's guess.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

LARGE = 12
"""Entries of a tensor from which on it is named by its shape instead of its numbers."""


@dataclass(frozen=True)
class Verdict:
    """What a checker found.

    Attributes:
        passed: whether the function does what was asked.
        message: why, in words.
        empty: the function is not written yet.
    """

    passed: bool
    message: str
    empty: bool = False

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return f"{'Right' if self.passed else 'Not yet'}: {self.message}"

    def _repr_html_(self) -> str:
        head = "✓ Right" if self.passed else "✎ Not yet"
        return f"<p><b>{head}:</b> {html.escape(self.message)}</p>"


def answer_of(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Verdict | None]:
    """Return what the reader's function gives, or the verdict that it gives nothing."""
    call = f"{function.__name__}({', '.join(shown(argument) for argument in arguments)})"
    try:
        answer = function(*arguments)
    except Exception as error:
        return None, Verdict(False, f"{call} raised {type(error).__name__}: {error}")
    if answer is None or answer is ...:
        words = f"{call} returns nothing so far: replace the dots by your own lines."
        return None, Verdict(False, words, empty=True)
    return answer, None


Function = TypeVar("Function", bound=Callable[..., Any])


class Exercise(Generic[Function]):
    """A checker with the solution beside it; ``exercise(function)`` returns the verdict."""

    def __init__(self, check: Callable[[Function], Verdict], solution: Function) -> None:
        self._check, self.solution = check, solution
        self.__name__, self.__doc__ = check.__name__, check.__doc__

    def __call__(self, function: Function) -> Verdict:
        return self._check(function)


def solved_by(solution: Function) -> Callable[[Callable[[Function], Verdict]], Exercise[Function]]:
    """Put a solution beside a checker, for ``written``."""
    return lambda check: Exercise(check, solution)


def written(function: Function, exercise: Exercise[Function]) -> Function:
    """Return the function with which a notebook continues: the reader's if it is right, else the solution.

    What the checker found is shown, and so is whether the solution takes over.

    Args:
        function: of the reader; it returns ``...`` as long as it is not written.
        exercise: checker and solution.

    >>> @solved_by(lambda x: 2 * x)
    ... def twice(function):
    ...     return Verdict(False, "twice(3) returns nothing so far.", empty=True)
    >>> double = written(lambda x: ..., twice)
    Not written yet: the solution runs instead.
    >>> double(4)
    8
    """
    verdict = exercise(function)
    if verdict.empty:
        print("Not written yet: the solution runs instead.")
        return exercise.solution
    print(verdict if verdict else f"{verdict}\nThe notebook continues with the solution.")
    return function if verdict else exercise.solution


def bet(guess: object, truth: object, *, unit: str = "", close: float = 0.15) -> None:
    """Print what a reader bet, what is true, and how far they are apart.

    Args:
        guess: of the reader; ``...`` as long as there is none.
        truth: a number, or one of several words.
        unit: what follows a number; ``"%"`` shows shares in percent.
        close: distance from the truth, relative to it, up to which a number is called close.

    >>> bet(0.4, 0.62, unit="%")
    You said 40 %, measured is 62 %: too low.
    >>> bet(..., "magnitude")
    No bet. Measured: magnitude.
    >>> bet("random", "magnitude")
    You said random, measured is magnitude.
    """
    right = _told(truth, unit)
    if guess is ... or guess is None:
        print(f"No bet. Measured: {right}.")
        return
    numbers = [isinstance(value, (int, float)) and not isinstance(value, bool) for value in (guess, truth)]
    said = _told(guess, unit) if numbers[0] else str(guess)
    if not all(numbers):
        same = str(guess).strip().lower() == str(truth).strip().lower()
        print(f"You said {said}, " + ("and that is right." if same else f"measured is {right}."))
        return
    gap = float(guess) - float(truth)  # type: ignore[arg-type]
    near = abs(gap) <= close * abs(float(truth))  # type: ignore[arg-type]
    print(f"You said {said}, measured is {right}: {'close' if near else 'too low' if gap < 0 else 'too high'}.")


def _told(value: object, unit: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if unit == "%":
        return f"{100 * value:.3g} %"
    return f"{value:.3g} {unit}".rstrip()


def compare(
    function: Callable[..., Any],
    cases: Sequence[tuple[Any, ...]],
    truth: Callable[..., Any],
    mistakes: Mapping[str, Callable[..., Any]],
    *,
    praise: str,
    hint: str,
    rtol: float = 1e-4,
) -> Verdict:
    """Try a reader's function on cases and say what is wrong with its answers, if anything is.

    Args:
        function: of the reader; it returns a number or a tensor.
        cases: arguments, one tuple per call; tensors among them are cloned for every call.
        truth: the right function.
        mistakes: what to tell the reader -> a function that makes this mistake; the first that gives the reader's
            answers in all cases is named.  Each must differ from the truth in one case at least.
        praise: what a right answer shows, in words.
        hint: what to say of an answer that is not one of the known mistakes.
        rtol: how far an answer may be off, relative to the largest entry of the right one.
    """

    def copied(case: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(part.clone() if isinstance(part, Tensor) else part for part in case)

    def close(answer: Any, right: Any) -> bool:
        answer, right = (torch.as_tensor(value, dtype=torch.float64) for value in (answer, right))
        scale = right.abs().max().clamp_min(1e-12) if right.numel() else 1.0
        return answer.shape == right.shape and bool(((answer - right).abs() <= rtol * scale).all())

    answers = []
    for case in cases:
        answer, verdict = answer_of(function, *copied(case))
        if verdict is not None:
            return verdict
        if isinstance(answer, bool) or not isinstance(answer, (int, float, Tensor)):
            return Verdict(False, f"it should return a number or a tensor, not {type(answer).__name__}.")
        answers.append(answer)
    rights = [truth(*copied(case)) for case in cases]
    for case, answer, right in zip(cases, answers, rights, strict=True):
        if close(answer, right):
            continue
        given = ", ".join(shown(part) for part in case)
        wrong = f"{function.__name__}({given}) gives {shown(answer)}, and {shown(right)} is right"
        for words, mistake in mistakes.items():
            if all(close(said, mistake(*copied(other))) for said, other in zip(answers, cases, strict=True)):
                return Verdict(False, f"{wrong}: {words}.")
        if torch.as_tensor(answer).shape != torch.as_tensor(right).shape:
            return Verdict(
                False, f"{wrong}: a tensor of shape {list(torch.as_tensor(right).shape)} is asked for. {hint}"
            )
        return Verdict(False, f"{wrong}. {hint}")
    return Verdict(True, praise)


def shown(value: Any) -> str:
    """Return a value as a reader would write it down: tensors as lists, with three decimals; large ones by shape."""
    if isinstance(value, Tensor) and value.numel() > LARGE:
        return f"<a tensor of shape {list(value.shape)}>"
    if isinstance(value, Tensor):
        return str(torch.round(value.detach().double(), decimals=3).tolist())
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {shown(item)}" for key, item in value.items()) + "}"
    return repr(value)


__all__ = ["Exercise", "Verdict", "answer_of", "bet", "compare", "shown", "solved_by", "written"]

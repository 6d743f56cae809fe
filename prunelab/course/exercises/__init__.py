"""Checkers for the notebooks' exercises: the reader's function goes in, a verdict that explains comes out.

A checker tries the function on cases whose answer is known, and compares a wrong answer with the mistakes that people
make.  There is one module for each notebook, with the notebook's name; solutions stand apart, in
``notebooks/solutions``.
"""

from prunelab.course.exercises.verdict import Verdict, bet, written

__all__ = ["Verdict", "bet", "written"]

"""Checkers for the notebooks' exercises: the reader's function goes in, a verdict that explains comes out.

A checker tries the function on cases whose answer is known, and compares a wrong answer with the mistakes that people
make.  There is one module for each notebook, with the notebook's name.  ``written`` lets a notebook continue with the
reader's function, or with the solution where that is empty or wrong.
"""

from prunelab.course.exercises.verdict import Verdict, bet, written

__all__ = ["Verdict", "bet", "written"]

"""What notebooks need, and what runs them: checked parameters, published results, a command line.

``parameters`` and ``results`` are for use in a notebook; ``run`` leaves an executed copy, a web page and the results in
a folder; ``save`` executes a notebook in place and cleans it, so that it can be committed with its outputs.  Flows in:
a notebook and parameters.  Flows out: files.
"""

from prunelab.course.notebook.machine import Machine, machine
from prunelab.course.notebook.parameters import Between, validate
from prunelab.course.notebook.progress import progress
from prunelab.course.notebook.results import RESULT, publish_result, readable, result_of
from prunelab.course.notebook.run import run
from prunelab.course.notebook.save import clean, save

__all__ = [
    "RESULT",
    "Between",
    "Machine",
    "clean",
    "machine",
    "progress",
    "publish_result",
    "readable",
    "result_of",
    "run",
    "save",
    "validate",
]

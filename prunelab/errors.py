"""Every error that prunelab raises on purpose, so that one ``except`` catches them all."""


class PruneLabError(Exception):
    """Base of all errors of prunelab; the message names the culprit and what to do."""


class TraceError(PruneLabError):
    """The model could not be traced, or a parameter that was asked for is not in the trace."""


class BudgetError(PruneLabError, ValueError):
    """A budget cannot be met, or none or several are given; and, as ``OptionError``, an option is out of its range."""


class OptionError(BudgetError):
    """An option is of the wrong type or out of its range; the message says what it must be.

    Whoever catches ``BudgetError`` catches this too: a budget out of its range is a wrong option.
    """


class BatchError(PruneLabError):
    """A batch does not fit the model: its structure, shape, device or values."""


class PlanError(PruneLabError):
    """A plan does not fit the model it is applied to."""


class MissingExtra(PruneLabError, ImportError):
    """A package is not installed that only part of prunelab needs; the message names the extra that brings it."""


class DataError(PruneLabError):
    """A data set, checkpoint or saved model is missing, damaged or of another kind."""

"""What can go wrong, said once: where, what was found, what was expected and what to do.

This module stands below everything else, so that every stage can raise its errors and the command line can catch one type.
"""

from __future__ import annotations


class InitauditError(Exception):
    """A problem with what the user gave, never with the program: it ends as one line and exit status 2.

    `where` is a path, a tensor or an option; `found`, `expected` and `advice` are short clauses without a final stop.
    """

    def __init__(self, where: str, found: str, expected: str = "", advice: str = "") -> None:
        self.where, self.found, self.expected, self.advice = where, found, expected, advice
        super().__init__(where, found, expected, advice)

    def __str__(self) -> str:
        text = f"{self.where}: {self.found}"
        if self.expected:
            text += f"; expected {self.expected}"
        if self.advice:
            text += f"; {self.advice}"
        return " ".join(text.split())


class UnreadableModel(InitauditError):
    """The model named on the command line cannot be read: missing, empty, truncated, of no known format, or hostile."""


class NoWeights(UnreadableModel):
    """A file that was read whole and holds no tensor: somebody's settings or a step count, and no model."""


class UsageError(InitauditError):
    """An option, a rule code or a configuration value that means nothing."""


class LimitExceeded(InitauditError):
    """A bound of our own was reached: elements, bytes, loop trips, expansions or wall-clock time."""


class UnsupportedOperator(InitauditError):
    """An operator, or a form of one, that is not executed here; what lies downstream of it is unknown, never guessed."""

"""What is wrong with a network, a schedule or a measurement: three short parts, as users read them.

The packages above turn it into their own user error; nothing here knows of files or exit codes.
"""


class CommsError(ValueError):
    """A user's mistake in what was asked of the network."""

    def __init__(self, problem: str, where: str = "", hint: str = "") -> None:
        super().__init__(": ".join(part for part in (where, problem) if part))
        self.problem = problem
        self.where = where
        self.hint = hint


class TooManyMessages(CommsError):
    """A collective that is too large to be followed message by message."""

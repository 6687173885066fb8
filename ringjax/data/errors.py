"""Faults in data, told with their place."""


class DataError(ValueError):
    """A line, record or picture that cannot be used: the message names the file, the line or record, and the fault."""


class MissingShard(FileNotFoundError, DataError):
    """A file of a data set is not there."""


class SkippedLines:
    """Counts what was left out on request, each line once however often an epoch comes back to it."""

    def __init__(self) -> None:
        self._seen: dict[str, set] = {}
        self._first: dict[str, str] = {}

    def add(self, reason: str, place: object, message: str) -> None:
        """`place` is one line of one source (anything hashable); `message` is kept for the first of each reason."""
        self._seen.setdefault(reason, set()).add(place)
        self._first.setdefault(reason, message)

    @property
    def counts(self) -> dict[str, int]:
        """How many different lines were skipped, by reason."""
        return {reason: len(places) for reason, places in self._seen.items()}

    @property
    def first(self) -> dict[str, str]:
        """The message of the first line skipped, by reason."""
        return dict(self._first)

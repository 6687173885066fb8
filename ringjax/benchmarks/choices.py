"""Which attention kernel a program got, and why: what the library says while the program is traced."""

import contextlib
import logging
from collections.abc import Iterator

from ringjax.attention import kernels


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() not in self.lines:
            self.lines.append(record.getMessage())


@contextlib.contextmanager
def backend_choices() -> Iterator[list[str]]:
    """The lines that `backend="auto"` writes at level DEBUG for what is traced inside."""
    handler, logger = _Lines(), kernels.logger
    level, propagate = logger.level, logger.propagate
    kernels._say.cache_clear()  # it says a thing once in a process; here each program is asked
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate

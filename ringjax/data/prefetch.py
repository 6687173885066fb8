"""Batches made ahead in a background thread, without the state running ahead."""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple


class _Made(NamedTuple):
    batch: Any
    state: Any
    error: BaseException | None


class Prefetched:
    """An iterator with `get_state` and `set_state`, drawn from by a thread up to `ahead` batches in advance.

    The state given is always that after the last batch handed out. An error (or the end) comes where it would have
    come without the thread, and again at every later `next`.

    Grain's own prefetching (`grain.experimental.ThreadPrefetchIterDataset`, 0.2.18) is not used because it raises
    AttributeError from `__del__` when the interpreter exits.
    """

    def __init__(self, iterator: Iterator, ahead: int):
        self._iterator, self._ahead = iterator, ahead
        self._state = iterator.get_state()
        self._error: BaseException | None = None
        self._worker: _Worker | None = None

    def __iter__(self) -> "Prefetched":
        return self

    def __next__(self) -> Any:
        if self._error is not None:
            raise self._error
        if self._worker is None:
            self._worker = _Worker(self._iterator, self._ahead)
            # Otherwise the thread would go on, in foreign code, while the interpreter is taken down.
            weakref.finalize(self, self._worker.stop)
        made = self._worker.made.get()
        if made.error is not None:
            self._error = made.error
            self._stop()
            raise made.error
        self._state = made.state
        return made.batch

    def get_state(self) -> Any:
        return self._state

    def set_state(self, state: Any) -> None:
        self._stop()
        self._iterator.set_state(state)
        self._state, self._error = self._iterator.get_state(), None

    def close(self) -> None:
        """Stop the thread and go back to the last batch handed out: a later `next` starts anew from there."""
        if self._worker is not None:
            self.set_state(self._state)

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None


class _Worker:
    """The thread. It knows nothing of `Prefetched`, which can be collected, and so stopped, while it runs."""

    def __init__(self, iterator: Iterator, ahead: int):
        self.made: queue.Queue[_Made] = queue.Queue(maxsize=ahead)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(iterator,), name="ringjax-prefetch", daemon=True)
        self._thread.start()

    def _run(self, iterator: Iterator) -> None:
        while not self._stopping.is_set():
            try:
                made = _Made(next(iterator), iterator.get_state(), None)
            except BaseException as error:  # handed to the reader, whatever it is
                made = _Made(None, None, error)
            self._put(made)
            if made.error is not None:
                return

    def _put(self, made: _Made) -> None:
        while not self._stopping.is_set():
            try:
                return self.made.put(made, timeout=0.1)
            except queue.Full:
                continue

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

"""Ids that come one at a time, as text that can be shown at once: whole characters, and no part of a stop string."""

from collections.abc import Callable, Iterable, Iterator, Sequence

# Text is decoded from here on back, so that each new token costs the same however long the answer is.
_BACK = 16


def stream_text(
    ids: Iterable[int], whole_text: Callable[[Sequence[int]], str], stops: Sequence[str] = ()
) -> Iterator[str]:
    """The text of `ids` in pieces; it ends before the first of the `stops`.

    `whole_text` gives the text of some ids without an unfinished character at the end.
    """
    seen: list[int] = []
    shown, text, start, before = 0, "", 0, ""
    for token in ids:
        seen.append(int(token))
        now = whole_text(seen[start:])
        text += now[len(before) :]
        before = now
        if len(seen) - start >= 2 * _BACK:  # a token's text may depend on the one before it
            start = len(seen) - _BACK
            before = whole_text(seen[start:])
        end = min((place for place in (text.find(stop) for stop in stops) if place >= 0), default=None)
        ready = len(text) - _held_back(text, stops) if end is None else end
        if ready > shown:
            yield text[shown:ready]
            shown = ready
        if end is not None:
            return
    if len(text) > shown:
        yield text[shown:]


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end that may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest

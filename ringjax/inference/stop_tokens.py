"""Special tokens by name, as ids that end an answer."""

import difflib
from collections.abc import Mapping, Sequence

_SHOWN = 6


def stop_token_ids(names: Sequence[str], specials: Mapping[str, int]) -> tuple[int, ...]:
    """The ids of special tokens such as `<|im_end|>`.

    Raises ValueError for a name that is none of the tokenizer's `specials`, naming some of them, the nearest first.
    """
    for name in names:
        if name not in specials:
            near = difflib.get_close_matches(name, specials, n=_SHOWN, cutoff=0.0)
            known = f"it has {', '.join(near)}" if near else "it has none"
            more = f" and {len(specials) - len(near)} more" if len(specials) > len(near) else ""
            raise ValueError(
                f"stop token {name!r} is no special token of this tokenizer; {known}{more}. Ordinary text that ends an"
                " answer is given with --stop"
            )
    return tuple(specials[name] for name in names)
